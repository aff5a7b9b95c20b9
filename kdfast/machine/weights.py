# SPDX-License-Identifier: Apache-2.0
"""Weights that come from files: their checksum, and whether a model can compute with them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Entry of a safetensors file's metadata with the checksum of everything else in it.
DIGEST = "kdfast.sha256"
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def tensors_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of names, types, shapes and bytes of tensors on the CPU, and of text beside them.

    Costs about 0.6 s a GB on a CPU with instructions for it.
    """
    digest = hashlib.sha256()
    kept = {name: text for name, text in metadata.items() if name != DIGEST}
    digest.update(json.dumps(kept, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_problem(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str | None:
    """What is wrong with tensors that were written with their checksum; None without one."""
    if DIGEST not in metadata or metadata[DIGEST] == tensors_digest(tensors, metadata):
        return None
    return "it is damaged: its tensors do not match their checksum"


def weight_problems(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """One line for every tensor that a model cannot compute with.

    Args:
        found: Tensors of a file.
        wanted: Those of the model; names that are in one of the two only are not looked at.

    Returns:
        What is no plain number of the model's kind, or not finite where the model's may not be.
    """
    problems = []
    for name, tensor in found.items():
        if name not in wanted:
            continue
        floating = wanted[name].is_floating_point()
        if tensor.layout != torch.strided or tensor.is_quantized:
            problems.append(f"{name} must be a dense tensor, got {tensor.layout}")
        elif floating and tensor.dtype not in FLOATS:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
            problems.append(f"{name} must be of {names}, got {_short(tensor.dtype)}")
        elif not floating and tensor.dtype != wanted[name].dtype:
            want = _short(wanted[name].dtype)
            problems.append(f"{name} must be {want}, got {_short(tensor.dtype)}")
        elif floating and (bad := not_finite(tensor)):
            problems.append(f"{name} must be finite, got {bad:,} numbers that are not")
    return problems


def not_finite(tensor: Tensor) -> int:
    """How many numbers of a tensor are infinite or NaN."""
    # One pass without memory: a sum is not finite if a number is not, or if it overflows.
    if tensor.numel() == 0 or bool(tensor.sum(dtype=torch.float64).isfinite()):
        return 0
    return int((~tensor.isfinite()).sum())


def tensor_bytes(value: Any) -> int:
    """Bytes of the tensors in nested dicts, lists and tuples; shared memory counts once."""
    left, sizes = [value], {}
    while left:
        part = left.pop()
        if isinstance(part, Tensor):
            storage = part.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        elif isinstance(part, dict):
            left += part.values()
        elif isinstance(part, list | tuple):
            left += part
    return sum(sizes.values())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
