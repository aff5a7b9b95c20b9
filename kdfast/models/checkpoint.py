# SPDX-License-Identifier: Apache-2.0
"""Reads and writes EVA-ViT backbones, ORION's own checkpoints included. See docs/use/eva.md."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kdfast.machine.archive import is_archive
from kdfast.machine.bounded import Size, bounded, check_counts
from kdfast.machine.files import NeedsCode, load_torch, replacing
from kdfast.machine.weights import DIGEST, digest_problem, tensors_digest, weight_problems
from kdfast.models.eva import EVAViT
from kdfast.models.orion_keys import (
    PREFIX,
    backbone_names,
    infer_config,
    is_table,
    orion_tables,
    shape_problems,
    table_problems,
)

CONFIG, HEADS = "kdfast.config", "kdfast.heads"
WINDOWS = ("img_size", "window_size", "window_block_indexes")


def load_orion_backbone(
    path: str | os.PathLike[str],
    *,
    head_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> EVAViT:
    """Builds the backbone of an ORION checkpoint, or of a backbone's bare state dict.

    The architecture comes from ``overrides``, else from the metadata of ``save_backbone``, else
    from the shapes: depth, widths, heads, and windows from the rotary buffers, which are compared
    with ours and dropped. Tensors are copied, so the file may change afterwards.

    Args:
        path: safetensors file or PyTorch checkpoint (a state dict, or a dict with the entry
            ``state_dict``). If keys start with ``img_backbone.``, other modules are ignored.
        head_dim: D, where it is not 64 and the file has no rotary buffers.
        dtype: Type of the model's parameters.
        **overrides: Arguments of ``EVAViT``: what shapes cannot show (``drop_path_rate``,
            ``with_cp``, ``heads`` of a pruned state dict) or shall not decide.

    Returns:
        The model on the CPU, in training mode unless ``frozen``.

    Raises:
        ValueError: The file cannot be read without running code from it, or does not fit the
            model; one message lists every missing, extra and mis-shaped key and every rotary
            buffer that differs.
    """
    if head_dim is not None and "num_heads" in overrides:
        raise ValueError("load_orion_backbone: give num_heads or head_dim, got both")
    tensors, metadata = _read(Path(path))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    stored = _stored_config(path, metadata)
    config = {**infer_config(shapes, head_dim), **stored, **overrides}
    problems = []
    unknown = [name for name in WINDOWS if name not in config]
    if unknown:
        problems.append(
            f"no rotary buffers that show the windows: pass {', '.join(unknown)} (in a run "
            f"teacher.{unknown[0]} and so on; docs/use/eva.md has those of ORION)"
        )
    if config.get("heads") is None and _pruned(shapes, config["embed_dim"]):
        problems.append(
            "fewer heads than embed_dim / head_dim: pass heads, the kept ones per block"
        )
    return _build(path, config, tensors, dtype, problems)


def load_backbone(path: str | os.PathLike[str]) -> EVAViT:
    """Restores the model that ``save_backbone`` wrote: architecture, kept heads, values, dtypes.

    Args:
        path: File of ``save_backbone``, with either kind of keys.

    Raises:
        ValueError: The file is of another origin, or does not fit the architecture it names.
    """
    tensors, metadata = _read(Path(path))
    config = _stored_config(path, metadata)
    if not config:
        raise ValueError(
            f"load_backbone: {path} must be a file of save_backbone, got one without its "
            "metadata; load_orion_backbone reads other checkpoints"
        )
    return _build(path, config, tensors, None, [])


def save_backbone(model: EVAViT, path: str | os.PathLike[str], *, orion_keys: bool = False) -> None:
    """Writes a backbone as safetensors, with architecture and kept heads in the metadata.

    The file appears under its name only when it is complete.

    Args:
        model: Full or pruned backbone.
        path: File to write or replace.
        orion_keys: Use the keys that the backbone has in ORION's whole model, rotary buffers
            included.

    Raises:
        TypeError: ``model`` is not an EVAViT.
    """
    if not isinstance(model, EVAViT):
        raise TypeError(f"save_backbone: model must be an EVAViT, got {type(model).__name__}")
    state = dict(model.state_dict())
    if orion_keys:
        state = {
            PREFIX + name: tensor for name, tensor in (state | orion_tables(model.config)).items()
        }
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    config = {name: value for name, value in model.config.items() if name != "heads"}
    metadata = {"format": "pt", CONFIG: json.dumps(config), HEADS: json.dumps(model.heads)}
    metadata[DIGEST] = tensors_digest(state, metadata)
    with replacing(Path(path)) as partial:
        save_file(state, partial, metadata)


def _stored_config(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> dict[str, Any]:
    if CONFIG not in metadata or HEADS not in metadata:
        return {}
    try:
        config, heads = json.loads(metadata[CONFIG]), json.loads(metadata[HEADS])
        if not isinstance(config, dict):
            raise ValueError(f"it must be a JSON object, got {config!r:.80}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"checkpoint: {path} has a damaged {CONFIG}: {error}") from error
    return {**config, "heads": heads}


def _pruned(shapes: Mapping[str, tuple[int, ...]], embed_dim: int) -> bool:
    widths = [s[0] for n, s in shapes.items() if n.endswith(".attn.q_proj.weight") and s]
    return any(width < embed_dim for width in widths)


def _build(
    path: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    problems: list[str],
) -> EVAViT:
    """The model of ``config`` with the tensors of a file, or one error with all that is wrong."""
    model = _described(path, config, len(tensors))
    tables = {name: tensor for name, tensor in tensors.items() if is_table(name)}
    params = {name: tensor for name, tensor in tensors.items() if name not in tables}
    found = {name: tuple(tensor.shape) for name, tensor in params.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = problems + shape_problems(found, wanted) + table_problems(tables, model.config)
    problems += weight_problems(params, model.state_dict())
    if problems:
        raise ValueError(f"checkpoint: {path} must fit the model, got\n  " + "\n  ".join(problems))
    own = {
        name: tensor.to(
            dtype=dtype or tensor.dtype, copy=True, memory_format=torch.contiguous_format
        )
        for name, tensor in params.items()
    }
    model.load_state_dict(own, assign=True)
    model.fill_rope()
    return model


def _described(path: str | os.PathLike[str], config: Mapping[str, Any], tensors: int) -> EVAViT:
    """The model of a configuration, without memory and within what the file allows."""
    size = Size(Path(path), Path(path).stat().st_size, tensors)
    try:
        check_counts({name: _listed(value) for name, value in config.items()}, size)
        with bounded(size), torch.device("meta"):
            return EVAViT(**config)
    except Exception as error:  # the constructor stumbles over whatever a file says
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(
            f"checkpoint: {path} must describe a backbone, got {kind}{error}"
        ) from error


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Backbone tensors by backbone name, and the metadata of a safetensors file."""
    if is_safetensors(path):
        return _read_safetensors(path)
    state = read_torch(path)
    names = backbone_names(state)
    odd = [key for key in names.values() if not isinstance(state[key], Tensor)]
    if odd:
        raise ValueError(f"checkpoint: {path} must hold tensors, got other values for {odd}")
    return {name: state[key] for name, key in names.items()}, {}


def is_safetensors(path: Path) -> bool:
    """Whether a file starts like one of safetensors."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            names, metadata = backbone_names(file.keys()), dict(file.metadata() or {})
            # The checksum is of all tensors; other files may hold much that is not needed.
            wanted = file.keys() if DIGEST in metadata else names.values()
            found = {key: file.get_tensor(key) for key in wanted}
    except SafetensorError as error:
        raise ValueError(f"checkpoint: {path} must be a whole safetensors file: {error}") from error
    if problem := digest_problem(found, metadata):
        raise ValueError(f"checkpoint: {path}: {problem}; copy or save it again")
    return {name: found[key] for name, key in names.items()}, metadata


def read_torch(path: Path) -> Mapping[str, Any]:
    """State dict of a PyTorch checkpoint, mapped from the file where its format allows.

    Raises:
        ValueError: The file cannot be read without running code from it, or holds no state dict.
    """
    try:
        loaded = load_torch(path, mmap=is_archive(path))
    except NeedsCode as error:
        raise ValueError(
            f"checkpoint: {error}, which cannot be read without running code from it. If you trust "
            "its source, rewrite it once without that object: state = torch.load(path, "
            "map_location='cpu', weights_only=False)['state_dict']; "
            "torch.save({'state_dict': state}, new_path)"
        ) from error
    except ValueError as error:
        raise ValueError(f"checkpoint: {error}") from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else loaded
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise ValueError(f"checkpoint: {path} must hold a state dict, got {type(state).__name__}")
    return state
