# SPDX-License-Identifier: Apache-2.0
"""``head_gather`` of all tensors of an attention block at once. See docs/ops/head_gather.md."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kdfast.ops import head_gather as one
from kdfast.ops._checks import check_tensors, head_list
from kdfast.ops._library import (
    LIB,
    forbid_gradient,
    fused_devices,
    not_compiled,
    register_fake,
    use_fused,
)

OP = "head_gather_block"


def head_gather_block(
    tensors: Sequence[Tensor],
    heads: Sequence[int] | Tensor,
    *,
    head_dim: int,
    dims: Sequence[int],
    backend: str | None = None,
) -> list[Tensor]:
    """``[head_gather(x, heads, head_dim=head_dim, dim=dim) for x, dim in zip(tensors, dims)]``.

    On CUDA one launch moves up to 32 tensors. Of a packed projection (3 * H * head_dim, C), pass
    ``weight.unflatten(0, (3, -1))`` with dim 1.

    Args:
        tensors: (..., H * head_dim, ...) each, with one H; any dtypes, any strides, one device.
        heads: K distinct head indices in [0, H); their order is the order of the results.
        head_dim: Size of one head along the dimension that holds the heads.
        dims: That dimension of each tensor.
        backend: "auto", "fused" or "reference"; ``KDFAST_BACKEND`` if None.

    Returns:
        (..., K * head_dim, ...) for each tensor, as ``head_gather`` returns them.

    Raises:
        TypeError: Something in ``tensors`` is no tensor, or ``heads`` are not integers.
        ValueError: Not one dim for each tensor, or another number of heads or device than in the
            first tensor; or as ``head_gather``.
        NotImplementedError: ``backend="fused"`` and the kernel cannot run (the reason is given).

    Gradients: the tensors; where one is needed, every tensor takes a launch of its own.
    Deterministic: yes.
    """
    tensors = list(tensors)
    check_tensors(OP, ("each of tensors",) * len(tensors), *tensors)
    if len(tensors) != len(dims):
        raise ValueError(
            f"{OP}: dims must hold one dimension for each tensor, got {len(dims)} and "
            f"{len(tensors)} tensors"
        )
    if not tensors:
        return []
    places = [_place(x, head_dim, dim) for x, dim in zip(tensors, dims, strict=True)]
    count, device = tensors[0].shape[places[0]] // head_dim, tensors[0].device
    for x, dim in zip(tensors, places, strict=True):
        if x.shape[dim] // head_dim != count or x.device != device:
            raise ValueError(
                f"{OP}: tensors must all hold {count} heads on {device}, got "
                f"{x.shape[dim] // head_dim} on {x.device}"
            )
    kept = head_list(OP, "heads", heads, count)
    reason, compiled = why_not(device, count), device.type in FUSED_ON
    if not use_fused(OP, backend, reason, compiled=compiled, given=tensors):
        return reference(tensors, kept, head_dim, places)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return [_gather(x, kept, head_dim, dim) for x, dim in zip(tensors, places, strict=True)]
    out: list[Tensor] = torch.ops.kdfast.head_gather_block.default(tensors, kept, head_dim, places)
    return out


def _place(x: Tensor, head_dim: int, dim: int) -> int:
    """``dim``, counted from the front, if x holds heads there."""
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"{OP}: dims must be in [{-x.dim()}, {x.dim()}) for all, got {dim}")
    if head_dim < 1 or x.shape[dim] % head_dim:
        raise ValueError(
            f"{OP}: sizes of dims must be multiples of head_dim, got {x.shape[dim]} and {head_dim}"
        )
    return dim % x.dim()


def why_not(device: torch.device, count: int) -> str | None:
    """The reason why the compiled kernel cannot run this input, or None."""
    if count > one.MAX_HEADS:
        return f"more than {one.MAX_HEADS} heads"
    return not_compiled(OP, device, FUSED_ON)


def reference(
    tensors: Sequence[Tensor], heads: Sequence[int], head_dim: int, dims: Sequence[int]
) -> list[Tensor]:
    """The specification: that of ``head_gather`` for one tensor after the other."""
    return [one.reference(x, heads, head_dim, dim) for x, dim in zip(tensors, dims, strict=True)]


def _gather(x: Tensor, heads: Sequence[int], head_dim: int, dim: int) -> Tensor:
    out: Tensor = torch.ops.kdfast.head_gather.default(x, heads, head_dim, dim)
    return out


LIB.define(f"{OP}(Tensor[] tensors, int[] heads, int head_dim, int[] dims) -> Tensor[]")


@register_fake(OP)
def _fake(tensors: list[Tensor], heads: list[int], head_dim: int, dims: list[int]) -> list[Tensor]:
    shapes = (
        [*x.shape[:dim], len(heads) * head_dim, *x.shape[dim + 1 :]]
        for x, dim in zip(tensors, dims, strict=True)
    )
    return [x.new_empty(shape) for x, shape in zip(tensors, shapes, strict=True)]


if "cpu" in one.FUSED_ON:

    @torch.library.impl(LIB, OP, "CPU")
    def _cpu(
        tensors: list[Tensor], heads: list[int], head_dim: int, dims: list[int]
    ) -> list[Tensor]:
        # There is no launch to save: what each copies is large against the call.
        return [_gather(x, heads, head_dim, dim) for x, dim in zip(tensors, dims, strict=True)]


forbid_gradient(OP)
FUSED_ON = fused_devices(OP)
