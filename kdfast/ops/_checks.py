# SPDX-License-Identifier: Apache-2.0
"""Argument checks that several ops share."""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_tensors(op: str, names: Sequence[str], *tensors: object, optional: bool = False) -> None:
    """Raises TypeError for an argument that is no tensor, before anything is asked of it.

    Args:
        op: Name of the op, for messages.
        names: Names of the arguments, for messages.
        *tensors: The arguments, one per name.
        optional: Whether None is as good as a tensor.
    """
    for name, x in zip(names, tensors, strict=True):
        if type(x) is Tensor or (optional and x is None):
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
        if type(x).__module__ == "torch.nn.attention.bias":
            # Its memory was never written: only torch's attention knows what it stands for.
            raise TypeError(
                f"{op}: {name} must be a tensor with values of its own, got {type(x).__name__}"
            )


def head_list(
    op: str, name: str, heads: Sequence[int] | Tensor, count: int, *, distinct: bool = True
) -> list[int]:
    """Head indices as a list of ints in [0, count).

    Args:
        op: Name of the op, for messages.
        name: Name of the argument, for messages.
        heads: Indices; a tensor must be a 1-D integer tensor on the CPU, since reading indices
            back from a GPU would stall it.
        count: Number of heads that exist.
        distinct: Whether a repeated index is an error, as it is for kept heads.

    Raises:
        TypeError: Not integers.
        ValueError: Empty, out of range, repeated, or a tensor on another device.
    """
    if isinstance(heads, Tensor):
        if heads.device.type != "cpu":
            raise ValueError(f"{op}: {name} must be a list or a CPU tensor, got {heads.device}")
        if heads.is_floating_point() or heads.dtype == torch.bool or heads.dim() != 1:
            raise TypeError(
                f"{op}: {name} must be a 1-D integer tensor, got {heads.dtype} {heads.dim()}-D"
            )
        heads = heads.tolist()
    kept = list(heads)
    plain = set(map(type, kept)) <= {int}  # the common case, in a tenth of the time
    if not plain and any(isinstance(h, bool) or not isinstance(h, int) for h in kept):
        raise TypeError(f"{op}: {name} must hold ints, got {kept}")
    if not kept:
        raise ValueError(f"{op}: {name} must name at least one head, got none")
    if min(kept) < 0 or max(kept) >= count:
        raise ValueError(f"{op}: {name} must be in [0, {count}), got {kept}")
    if distinct and len(set(kept)) != len(kept):
        raise ValueError(f"{op}: {name} must not repeat a head, got {kept}")
    return kept
