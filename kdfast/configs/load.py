# SPDX-License-Identifier: Apache-2.0
"""Finds a config by name or file, applies the user's changes, checks it; and writes one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from kdfast.configs.chain import ChainConfig
from kdfast.configs.check import check
from kdfast.configs.cnn_chain import cnn_chain, cnn_chain_digits
from kdfast.configs.fields import ConfigError, build, keys, plain
from kdfast.configs.fitting import fit_chain, with_precision
from kdfast.configs.flags import absent_data, as_key, data_kind, is_flag
from kdfast.configs.orion50 import (
    orion50,
    orion50_frames,
    orion50_mini,
    orion50_mlp,
    orion50_scenes,
)
from kdfast.configs.recovery import Config
from kdfast.configs.smoke import smoke
from kdfast.configs.stand_ins import stand_in
from kdfast.configs.synonyms import Kind, unknown
from kdfast.configs.vit_chain import cifar10, vit_chain, vit_chain_digits
from kdfast.configs.yaml_file import YamlError, read_tree, read_yaml
from kdfast.machine.files import write_text
from kdfast.machine.spelling import did_you_mean

CONFIGS: dict[str, Callable[[], Config | ChainConfig]] = {
    f.__name__: f
    for f in (
        *(orion50, orion50_mlp, orion50_frames, orion50_scenes, orion50_mini, smoke),
        *(vit_chain, vit_chain_digits, cnn_chain, cnn_chain_digits, cifar10),
    )
}


def load(source: str, changes: Sequence[str] = (), *, files: bool = True) -> Config | ChainConfig:
    """The resolved config of a name or a YAML file.

    Args:
        source: Name of a config, or path of a YAML file: ``name:`` says what it starts from,
            every other key replaces a value. A saved config is such a file.
        changes: ``a.b=value`` with a YAML value, or ``--flag=value`` with a flag of
            ``configs/flags.py``; later ones win.
        files: False: the files that it names need not exist, nothing stands in for them, and the
            precision may stay open, as it depends on the machine.

    Raises:
        ConfigError: Lists everything that is wrong: unknown keys, bad values, missing files.
    """
    problems: list[str] = []
    tree = read_tree(source) if _is_file(source) else {"name": source}
    name = tree.get("name")
    if not isinstance(name, str) or name not in CONFIGS:
        complaint = f"name: must be one of {', '.join(CONFIGS)}, got {name!r}"
        meant = did_you_mean(str(name), CONFIGS) or " (a file ends in .yaml)"
        raise ConfigError([*problems, f"{complaint}{meant}"])
    kind = type(CONFIGS[name]())
    known = keys(kind)
    reader = _Reader(kind, known, problems)
    user = reader.flat(tree) | reader.parsed(changes)
    user.pop("name", None)
    name, note = stand_in(CONFIGS[name](), user) if files else (name, "")
    values = plain(CONFIGS[name]()) | ({"note": note} if note else {})
    if kind is ChainConfig:
        fit_chain(values, user)
    for key, value in user.items():
        _put(values, key, value)
    config = build(kind, values, problems)
    if files and "data.kind" not in user:
        problems += absent_data(changes, kind)
    if config is not None and files:
        config = with_precision(config)
        problems += check(config)
    if problems or config is None:
        raise ConfigError(problems)
    return config


def as_yaml(config: Config | ChainConfig) -> str:
    """A config as YAML that ``load`` reads."""
    page = "docs/use/vit_chain.md" if isinstance(config, ChainConfig) else "docs/use/training.md"
    head = f"# Resolved config of a run; use it with --config. {page} explains the keys.\n"
    note = f"# {config.note}\n" if config.note else ""
    return head + note + yaml.safe_dump(plain(config), sort_keys=False)


def save(config: Config | ChainConfig, path: Path) -> None:
    """Write a config as YAML that ``load`` reads."""
    write_text(path, as_yaml(config))


def _is_file(source: str) -> bool:
    return Path(source).suffix in (".yaml", ".yml")


class _Reader:
    """Reads what the user sets, for one kind of config; what is wrong goes to ``problems``."""

    def __init__(self, kind: Kind, known: list[str], problems: list[str]) -> None:
        self.kind, self.known, self.problems = kind, known, problems

    def parsed(self, changes: Sequence[str]) -> dict[str, Any]:
        """Dotted keys and values of ``key=value`` and ``--flag=value``."""
        found: dict[str, Any] = {}
        for change in (*data_kind(changes, self.kind), *changes):
            if is_flag(change):
                try:
                    change = as_key(change, self.kind)
                except ValueError as error:
                    self.problems.append(str(error))
                    continue
            found |= self._one(change)
        return found

    def _one(self, change: str) -> dict[str, Any]:
        key, equals, text = change.partition("=")
        if not equals:
            self.problems.append(f"--set {change}: must be key=value")
            return {}
        if key not in self.known or key == "name":
            self.problems.append(unknown(key, self.kind, self.known))
            return {}
        try:
            value = read_yaml(text)
        except YamlError as error:
            self.problems.append(f"{key}: not a YAML value: {text[:80]}: {error}")
            return {}
        if _unspaced(value):
            spaced = re.sub(r":(?=\S)", ": ", text)
            self.problems.append(
                f"{key}: YAML wants a space after each colon: --set '{key}={spaced}', got {text}"
            )
            return {}
        return self.flat({key: value})

    def flat(self, tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
        """Dotted keys and values; unknown keys are reported and left out."""
        found: dict[str, Any] = {}
        for name, value in tree.items():
            key = f"{prefix}{name}"
            if key not in self.known:
                self.problems.append(unknown(key, self.kind, self.known))
            elif isinstance(value, Mapping) and any(k.startswith(f"{key}.") for k in self.known):
                found |= self.flat(value, f"{key}.")
            else:
                found[key] = value
        return found


def _unspaced(value: Any) -> bool:
    """Whether a value has a key such as "depth:2", which YAML reads where a space is missing."""
    if isinstance(value, Mapping):
        own = any(x is None and ":" in str(key) for key, x in value.items())
        return own or any(map(_unspaced, value.values()))
    return isinstance(value, list) and any(map(_unspaced, value))


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    for name in sections:
        if values[name] is None:
            values[name] = {}
        if not isinstance(values[name], dict):
            return  # the section itself was set to a scalar, which ``build`` reports
        values = values[name]
    values[leaf] = value
