# SPDX-License-Identifier: Apache-2.0
"""Configs are functions that return a typed tree; here one is found, changed, checked, saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from kdfast.configs.chain import ChainConfig
from kdfast.configs.chain_check import check_chain, check_device
from kdfast.configs.cnn_chain import cnn_chain, cnn_chain_digits
from kdfast.configs.fields import ConfigError, build, keys, plain, unknown
from kdfast.configs.orion50 import orion50, orion50_scenes
from kdfast.configs.recovery import Config
from kdfast.configs.smoke import smoke
from kdfast.configs.vit_chain import cifar10, vit_chain, vit_chain_digits

__all__ = ["CONFIGS", "ChainConfig", "Config", "ConfigError", "load", "plain", "save"]

CONFIGS: dict[str, Callable[[], Config | ChainConfig]] = {
    f.__name__: f
    for f in (
        *(orion50, orion50_scenes, smoke),
        *(vit_chain, vit_chain_digits, cnn_chain, cnn_chain_digits, cifar10),
    )
}
# A config that needs files, and the one that stands in for it where none of them is there.
STAND_INS = {
    "orion50": "orion50_scenes",
    "vit_chain": "vit_chain_digits",
    "cnn_chain": "cnn_chain_digits",
}


def load(source: str, changes: Sequence[str] = (), *, files: bool = True) -> Config | ChainConfig:
    """The resolved config of a name or a YAML file.

    Args:
        source: Name of a config, or path of a YAML file: ``name:`` says what it starts from,
            every other key replaces a value. A saved config is such a file.
        changes: ``a.b=value`` with a YAML value; later ones win.
        files: False: the files that it names need not exist, and nothing stands in for them.

    Raises:
        ConfigError: Lists everything that is wrong: unknown keys, bad values, missing files.
    """
    problems: list[str] = []
    tree = _read(source, problems) if _is_file(source) else {"name": source}
    name = tree.get("name")
    if not isinstance(name, str) or name not in CONFIGS:
        complaint = f"name: must be one of {', '.join(CONFIGS)}, got {name!r}"
        raise ConfigError([*problems, f"{complaint} (a file ends in .yaml)"])
    kind = type(CONFIGS[name]())
    known = keys(kind)
    user = _flatten(tree, problems, known) | _parse(changes, problems, known)
    user.pop("name", None)
    name, note = _stand_in(name, user) if files else (name, "")
    values = plain(CONFIGS[name]()) | ({"note": note} if note else {})
    for key, value in user.items():
        _put(values, key, value)
    config = build(kind, values, problems)
    if config is not None and files:
        problems += check(config)
    if problems or config is None:
        raise ConfigError(problems)
    return config


def save(config: Config | ChainConfig, path: Path) -> None:
    """Write a config as YAML that ``load`` reads."""
    page = "docs/use/vit_chain.md" if isinstance(config, ChainConfig) else "docs/use/training.md"
    head = f"# Resolved config of a run; use it with --config. {page} explains the keys.\n"
    note = f"# {config.note}\n" if config.note else ""
    path.write_text(head + note + yaml.safe_dump(plain(config), sort_keys=False), encoding="utf-8")


def check(config: Config | ChainConfig) -> list[str]:
    """Problems that involve more than one key, or the file system."""
    if isinstance(config, ChainConfig):
        return check_chain(config)
    found: list[str] = []
    teacher, data, run = config.teacher, config.data, config.run
    if teacher.checkpoint is None and teacher.fit is None:
        found.append("teacher.checkpoint: must name a file, or teacher.fit say how to train one")
    if teacher.checkpoint is None and data.kind != "scenes":
        found.append(f"teacher.checkpoint: {data.kind} has no labels to train one, must be a file")
    if teacher.checkpoint is not None and not Path(teacher.checkpoint).expanduser().is_file():
        found.append(f"teacher.checkpoint: no such file: {teacher.checkpoint}")
    if data.kind != "scenes" and data.root is None:
        found.append(f"data.root: {data.kind} needs a folder")
    elif data.kind != "scenes" and not Path(str(data.root)).expanduser().is_dir():
        found.append(f"data.root: no such folder: {data.root}")
    if data.cache and data.augment:
        found.append("data.cache: needs data.augment false, got true")
    if config.distill.feature + config.distill.attention + config.distill.output == 0:
        found.append("distill: feature, attention and output must not all be 0")
    return found + check_device(run.device, run.precision, "run.")


def _is_file(source: str) -> bool:
    return Path(source).suffix in (".yaml", ".yml")


def _read(source: str, problems: list[str]) -> dict[str, Any]:
    path = Path(source).expanduser()
    if not path.is_file():
        raise ConfigError([f"--config: no such file: {source}"])
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError([f"--config: {source} is not YAML: {error}"]) from error
    if not isinstance(tree, dict):
        raise ConfigError([f"--config: {source} must hold keys and values"])
    return tree


def _parse(changes: Sequence[str], problems: list[str], known: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            problems.append(f"--set {change}: must be key=value")
            continue
        if key not in known or key == "name":
            problems.append(unknown(key, known))
            continue
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            problems.append(f"{key}: not a YAML value: {text}")
            continue
        if isinstance(value, Mapping):
            found |= _flatten(value, problems, known, f"{key}.")
        else:
            found[key] = value
    return found


def _flatten(
    tree: Mapping[Any, Any], problems: list[str], known: list[str], prefix: str = ""
) -> dict[str, Any]:
    """Dotted keys and values; unknown keys are reported and left out."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key not in known:
            problems.append(unknown(key, known))
        elif isinstance(value, Mapping):
            found |= _flatten(value, problems, known, f"{key}.")
        else:
            found[key] = value
    return found


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    for name in sections:
        if values[name] is None:
            values[name] = {}
        if not isinstance(values[name], dict):
            return  # the section itself was set to a scalar, which ``build`` reports
        values = values[name]
    values[leaf] = value


def _stand_in(name: str, user: Mapping[str, Any]) -> tuple[str, str]:
    """The config to start from and the note about it.

    The stand-in is used only where the user named neither the checkpoint nor the data and both
    default inputs are absent; with one of them the user is told what the other one is.
    """
    if name not in STAND_INS:
        return name, ""
    default = CONFIGS[name]()
    if isinstance(default, ChainConfig):
        return _chain_stand_in(name, str(default.data.root), user)
    checkpoint, root = str(default.teacher.checkpoint), str(default.data.root)
    if "teacher.checkpoint" in user:
        return name, ""
    rendered = user.get("data.kind") == "scenes"
    if not rendered and ("data.kind" in user or "data.root" in user):
        return name, ""
    has_checkpoint, has_data = Path(checkpoint).is_file(), Path(root).is_dir()
    if has_checkpoint == has_data and not has_data or (rendered and not has_checkpoint):
        absent = checkpoint if rendered and has_data else f"{checkpoint} and {root}"
        note = f"EMBEDDED DEFAULT: no {absent}, so this is {STAND_INS[name]}: rendered scenes"
        return STAND_INS[name], f"{note} and a small EVA-ViT teacher trained here"
    return name, ""


def _chain_stand_in(name: str, root: str, user: Mapping[str, Any]) -> tuple[str, str]:
    """The embedded default of a chain if the user named no data and the default is absent."""
    digits = user.get("data.kind") == "digits"
    if not digits and ("data.kind" in user or "data.root" in user or Path(root).exists()):
        return name, ""
    why = "data.kind is digits" if digits else f"no {root}"
    note = f"EMBEDDED DEFAULT: {why}, so this is {STAND_INS[name]}: scikit-learn's digits"
    return STAND_INS[name], f"{note} and small models trained here"
