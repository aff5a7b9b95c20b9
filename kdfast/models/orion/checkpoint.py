# SPDX-License-Identifier: Apache-2.0
"""Reads the heads of an ORION checkpoint. See docs/use/orion.md."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kdfast.models.checkpoint import is_safetensors, read_torch
from kdfast.models.orion.config import HeadsConfig
from kdfast.models.orion.task import OrionHeads
from kdfast.models.orion_keys import shape_problems

HEADS = ("pts_bbox_head.", "map_head.")
# ORION saves these once for itself and once more for each head that uses them.
SHARED = ("query_pos.", "time_embedding.", "ego_pose_pe.", "position_encoder.")
CONSTANTS = ("position_range", "coords_d")
# ORION has them and computes nothing with them.
UNUSED = ("map_head.code_weights", "map_head.match_costs")
# One branch serves all layers and is saved under the number of each.
BRANCH = re.compile(r"(?<=_branches\.)\d+(?=\.)")


def load_orion_heads(
    path: str | os.PathLike[str],
    config: HeadsConfig | None = None,
    *,
    frozen: bool = True,
) -> OrionHeads:
    """The detection head and the map head of an ORION checkpoint, or of their own state dict.

    Modules that are shared, and so appear several times, are loaded once; their copies must be
    equal. The tensors are copied, so the file may change afterwards.

    Args:
        path: safetensors file or PyTorch checkpoint (a state dict, or a dict with the entry
            ``state_dict``), as ``load_orion_backbone`` takes it; other modules are ignored.
        config: Sizes; those of ORION's stage 3 if None.
        frozen: Whether the parameters have no gradient.

    Returns:
        The heads in fp32 on the CPU, in eval mode.

    Raises:
        ValueError: The file cannot be read without running code from it, or does not fit; one
            message lists every missing, extra and mis-shaped key and every copy that differs.
    """
    with torch.device("meta"):
        heads = OrionHeads(config)
    tensors, problems = _read(Path(path))
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in heads.state_dict().items()}
    problems = shape_problems(found, wanted) + problems
    if problems:
        raise ValueError(f"checkpoint: {path} must fit the heads, got\n  " + "\n  ".join(problems))
    own = {
        name: tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    heads.load_state_dict(own, assign=True)
    if frozen:
        heads.requires_grad_(False)
    return heads.eval()


def head_names(keys: Iterable[str]) -> dict[str, list[str]]:
    """Names of ``OrionHeads``, mapped to the keys of a checkpoint that hold their value.

    A leading ``module.`` is dropped; keys of other modules are left out.
    """
    names: dict[str, list[str]] = {}
    for key in keys:
        name = BRANCH.sub("0", key.removeprefix("module."))
        for head in HEADS:
            inner = name.removeprefix(head)
            if inner.startswith(SHARED) or inner in CONSTANTS:
                name = inner
        if name.startswith((*HEADS, *SHARED)) or name in CONSTANTS:
            if name not in UNUSED:
                names.setdefault(name, []).append(key)
    return names


def _read(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors by name, and what is wrong with copies of one value."""
    if not is_safetensors(path):
        state = read_torch(path)
        names = head_names(state)
        odd = [key for keys in names.values() for key in keys if not isinstance(state[key], Tensor)]
        if odd:
            raise ValueError(f"checkpoint: {path} must hold tensors, got other values for {odd}")
        return _once({name: {key: state[key] for key in keys} for name, keys in names.items()})
    try:
        with safe_open(path, framework="pt") as file:
            names = head_names(file.keys())
            found = {n: {key: file.get_tensor(key) for key in keys} for n, keys in names.items()}
    except SafetensorError as error:
        raise ValueError(f"checkpoint: {path} must be a whole safetensors file: {error}") from error
    return _once(found)


def _once(found: dict[str, dict[str, Tensor]]) -> tuple[dict[str, Tensor], list[str]]:
    """One of the copies of each name, and a line for each copy that differs from it."""
    tensors, problems = {}, []
    for name, copies in found.items():
        (first, tensor), *others = copies.items()
        tensors[name] = tensor
        problems += [
            f"{key} differs from {first}" for key, t in others if not torch.equal(t, tensor)
        ]
    return tensors, problems
