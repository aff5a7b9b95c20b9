# SPDX-License-Identifier: Apache-2.0
"""Copies the kept heads' slices of a weight, bias or activation. See docs/ops/head_gather.md."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdfast.ops._checks import check_tensors, head_list
from kdfast.ops._library import (
    LIB,
    call_below_autograd,
    fused_devices,
    not_compiled,
    register_fake,
    register_gradient,
    use_fused,
)

# Fits the kernel-argument table of csrc/head_gather.h, which spares a device copy of the indices.
MAX_HEADS = 512


def head_gather(
    x: Tensor,
    heads: Sequence[int] | Tensor,
    *,
    head_dim: int,
    dim: int,
    backend: str | None = None,
) -> Tensor:
    """Copies the slices of the kept heads along one dimension.

    ``dim`` holds H heads side by side, head h at ``[h * head_dim, (h + 1) * head_dim)``: rows of a
    q, k or v weight (dim 0), a bias (dim 0), columns of an output projection (dim 1), or the
    channels of an activation (dim -1).

    Args:
        x: (..., H * head_dim, ...), any dtype, any strides.
        heads: K distinct head indices in [0, H); their order is the order of the result.
        head_dim: Size of one head along ``dim``.
        dim: The dimension that holds the heads.
        backend: "auto", "fused" or "reference"; ``KDFAST_BACKEND`` if None.

    Returns:
        (..., K * head_dim, ...), contiguous, dtype and device of ``x``.

    Raises:
        TypeError: ``x`` is no tensor, or ``heads`` are not integers.
        ValueError: ``dim`` is out of range, its size is not a multiple of ``head_dim``, or a head
            is out of range or repeated.
        NotImplementedError: ``backend="fused"`` and the kernel cannot run (the reason is given).

    Gradients: x (scattered to the kept slices, zero elsewhere). Deterministic: yes.
    """
    check_tensors("head_gather", ("x",), x)
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"head_gather: dim must be in [{-x.dim()}, {x.dim()}), got {dim}")
    dim %= x.dim()
    size = x.shape[dim]
    if head_dim < 1 or size % head_dim:
        raise ValueError(
            f"head_gather: size of dim {dim} must be a multiple of head_dim, "
            f"got {size} and {head_dim}"
        )
    kept = head_list("head_gather", "heads", heads, size // head_dim)
    reason = why_not(x, head_dim, dim)
    compiled = x.device.type in FUSED_ON
    if use_fused("head_gather", backend, reason, compiled=compiled, given=(x,)):
        op = torch.ops.kdfast.head_gather.default
        out: Tensor = call_below_autograd(op, x, kept, head_dim, dim)
        return out
    return reference(x, kept, head_dim, dim)


def why_not(x: Tensor, head_dim: int, dim: int) -> str | None:
    """The reason why the compiled kernel cannot run this input, or None."""
    if x.shape[dim] // head_dim > MAX_HEADS:
        return f"more than {MAX_HEADS} heads"
    return not_compiled("head_gather", x.device, FUSED_ON)


def reference(x: Tensor, heads: Sequence[int], head_dim: int, dim: int) -> Tensor:
    """The specification: ``x`` split into heads along ``dim``, indexed, joined again."""
    index = torch.tensor(heads, device=x.device)
    return x.unflatten(dim, (-1, head_dim)).index_select(dim, index).flatten(dim, dim + 1)


LIB.define("head_gather(Tensor x, int[] heads, int head_dim, int dim) -> Tensor")
LIB.define(
    "head_gather_bwd(Tensor grad_out, int[] heads, int head_dim, int dim, SymInt num_heads) "
    "-> Tensor"
)


@register_fake("head_gather")
def _fake(x: Tensor, heads: list[int], head_dim: int, dim: int) -> Tensor:
    return x.new_empty([*x.shape[:dim], len(heads) * head_dim, *x.shape[dim + 1 :]])


@register_fake("head_gather_bwd")
def _fake_bwd(
    grad_out: Tensor, heads: list[int], head_dim: int, dim: int, num_heads: int
) -> Tensor:
    shape = [*grad_out.shape[:dim], num_heads * head_dim, *grad_out.shape[dim + 1 :]]
    return grad_out.new_empty(shape)


def _setup_context(ctx: Any, given: Any, output: Tensor) -> None:
    ctx.heads, ctx.head_dim, ctx.dim = given.heads, given.head_dim, given.dim
    ctx.num_heads = given.x.shape[given.dim] // given.head_dim


def _backward(ctx: Any, grad_out: Tensor) -> dict[str, Tensor | None]:
    op = torch.ops.kdfast.head_gather_bwd.default
    return {"x": op(grad_out, ctx.heads, ctx.head_dim, ctx.dim, ctx.num_heads)}


def _bwd_setup_context(ctx: Any, given: Any, output: Tensor) -> None:
    ctx.heads, ctx.head_dim, ctx.dim = given.heads, given.head_dim, given.dim


def _bwd_backward(ctx: Any, grad: Tensor) -> dict[str, Tensor | None]:
    # The scatter is linear, so its own backward is the gather.
    op = torch.ops.kdfast.head_gather.default
    return {"grad_out": op(grad, ctx.heads, ctx.head_dim, ctx.dim)}


register_gradient("head_gather", _backward, _setup_context)
register_gradient("head_gather_bwd", _bwd_backward, _bwd_setup_context)
FUSED_ON = fused_devices("head_gather")
