# SPDX-License-Identifier: Apache-2.0
"""Saves any model that kdfast can prune, and loads it without the original.

See docs/use/pruning.md.

A folder with ``model.safetensors`` and ``config.json``. The latter is what timm or Hugging Face
writes itself, plus a section "kdfast" with the kept heads and MLP widths.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kdfast._version import __version__
from kdfast.machine.files import replacing_files
from kdfast.models.eva import EVAViT
from kdfast.pruning.architecture import build, described, differences, transformers_class

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save_pretrained(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    model_args: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a model, pruned or not, into a folder that ``load_pretrained`` reads.

    The files appear under their names when all are complete, the configuration last: a folder that
    has one holds one whole model.

    Args:
        model: EVAViT, or a model of timm, torchvision or Hugging Face that kdfast can prune.
        path: Folder; it is made if missing, files of the same names are replaced.
        model_args: JSON values for the architecture's constructor, where timm did not record them.

    Returns:
        The folder.

    Raises:
        TypeError: The model's family is not known, or cannot be pruned.
        ValueError: The model is not what its configuration builds; the message says what differs.
    """
    config = described(model, model_args or {})
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors, aliases = _tensors(model)
    metadata = {"format": "pt", "kdfast": __version__, "aliases": json.dumps(aliases)}
    text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    with replacing_files(folder, last=CONFIG) as staged:
        save_file(tensors, staged / WEIGHTS, metadata)
        (staged / CONFIG).write_text(text, encoding="utf-8")
    return folder


def load_pretrained(path: str | os.PathLike[str]) -> Any:
    """Builds the model of a folder, on the CPU and in eval mode. No code of the folder is run.

    Args:
        path: Folder of ``save_pretrained``, or one in the layout of timm or Hugging Face with
            ``model.safetensors``.

    Returns:
        The model with the kept heads and hidden units; types of tensors are those of the file.

    Raises:
        FileNotFoundError: The folder or one of its two files is missing.
        ValueError: A file is damaged or of another kind, the architecture is not known here, or the
            tensors do not fit it; one message lists all that is wrong.
    """
    folder = Path(path)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"load_pretrained: {folder} must hold {name}, got none")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"load_pretrained: {folder / CONFIG} must be JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"load_pretrained: {folder / CONFIG} must be a JSON object")
    if "kdfast" not in config and config.get("architectures"):
        # The library knows the names that its older versions gave to tensors.
        return _of_transformers(folder, transformers_class(config["architectures"][0]))
    model = build(config)
    state = _read(folder / WEIGHTS)
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in state.items()}
    if problems := differences(found, wanted):
        raise ValueError(
            f"load_pretrained: {folder / WEIGHTS} must fit the architecture, got\n  "
            + "\n  ".join(problems)
        )
    model.load_state_dict(_as_parameters(state, model), strict=True, assign=True)
    if isinstance(model, EVAViT):
        model.fill_rope()
    for name, dtype in config.get("kdfast", {}).get("tables", {}).items():
        owner, _, leaf = name.rpartition(".")
        buffers = model.get_submodule(owner)._buffers
        buffers[leaf] = buffers[leaf].to(getattr(torch, dtype))  # type: ignore[union-attr]
    return model.eval()


def _of_transformers(folder: Path, kind: Any) -> Any:
    """A model of a folder that transformers wrote, none of whose tensors are random."""
    try:
        model, info = kind.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are listed then
            output_loading_info=True,
        )
    except (RuntimeError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise ValueError(
            f"load_pretrained: {folder / WEIGHTS} must fit the architecture, got {error}"
        ) from error
    if problems := unfilled(info):
        raise ValueError(
            f"load_pretrained: {folder / WEIGHTS} must fit the architecture, got\n  "
            + "\n  ".join(problems)
        )
    return model.eval()


def unfilled(info: Mapping[str, Any]) -> list[str]:
    """The tensors that transformers left random, by what its ``from_pretrained`` reports."""
    problems = [f"missing: {name}" for name in sorted(info.get("missing_keys", ()))]
    return problems + [f"of another shape: {x}" for x in sorted(info.get("mismatched_keys", ()))]


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor once, and the other names of shared ones."""
    first: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
            continue
        first[id(tensor)] = name
        copy = tensor.detach().cpu().contiguous()
        # Two views of one memory are two tensors in the file.
        whole = copy.untyped_storage().nbytes() == copy.numel() * copy.element_size()
        tensors[name] = copy if whole else copy.clone()
    return tensors, aliases


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            # Cloned: the file may change or go while the model lives.
            state = {name: file.get_tensor(name).clone() for name in file.keys()}
            aliases = json.loads((file.metadata() or {}).get("aliases", "{}"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(
            f"load_pretrained: {path} must be a whole safetensors file: {error}"
        ) from error
    if missing := sorted(set(aliases.values()) - set(state)):
        raise ValueError(f"load_pretrained: {path} must hold the shared tensors {missing}")
    return {**state, **{name: state[source] for name, source in aliases.items()}}


def _as_parameters(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Parameters where the model has parameters, the same one for a tensor of several names."""
    made: dict[int, Tensor] = {}
    for name, own in model.state_dict(keep_vars=True).items():
        tensor = state[name]
        is_parameter = isinstance(own, nn.Parameter)
        if id(tensor) not in made:
            made[id(tensor)] = nn.Parameter(tensor, own.requires_grad) if is_parameter else tensor
    return {name: made[id(tensor)] for name, tensor in state.items()}
