# SPDX-License-Identifier: Apache-2.0
"""flash-attn in the place of the CUDA kernel of ``pruned_attention``, where it is the faster one.

That has to be measured: ``python -m bench.gpu --tune`` writes the calls and the version of
flash-attn into the table of the GPU's architecture. Without such a file this is never done.
"""

import functools
import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdfast.ops._library import second_derivative

PACKAGE = "flash-attn"


def takes(q: Tensor) -> bool:
    """Whether flash-attn was measured to be faster for q (B, H, N, D), with k and v alike.

    Never while torch.compile traces, which could not see the gradient's inner graph.
    """
    if q.device.type != "cuda" or torch.compiler.is_compiling():
        return False
    return any(covers(win, q) for win in wins(q.device))


def covers(win: Any, q: Tensor) -> bool:
    """Whether q lies among the calls of one win of a table."""
    batch, heads, tokens, dim = q.shape
    kind = (str(q.dtype).removeprefix("torch."), dim)
    measured = win.least <= tokens <= win.most and batch * heads >= win.matrices
    return kind == (win.dtype, win.head_dim) and measured


@functools.cache
def wins(device: torch.device) -> tuple[Any, ...]:
    """The wins in a GPU's table; none where another version of flash-attn is installed."""
    blocks: Any = importlib.import_module("kdfast.kernels._blocks")
    table = blocks.table(blocks.architecture(device))
    found: tuple[Any, ...] = table.flash
    return found if found and installed() == table.flash_version else ()


def installed() -> str | None:
    """The version of flash-attn, or None."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, reference: Callable[..., Tensor]
) -> Tensor:
    """softmax(scale q k^T) v by flash-attn, in the memory order (B, N, H, D).

    Args:
        q: (B, H, N, D), fp16 or bf16.
        k: Like q.
        v: Like q.
        scale: Multiplies the scores.
        reference: The same of q, k and v by torch's operators, for second derivatives.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        out: Tensor = _Gradient.apply(q, k, v, scale, reference)
        return out
    return _call(q, k, v, scale)


def _call(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    flash_attn: Any = importlib.import_module("flash_attn")
    rows = (x.transpose(1, 2) for x in (q, k, v))
    # Its gradient of queries has an order of its own only if asked for.
    out: Tensor = flash_attn.flash_attn_func(*rows, softmax_scale=scale, deterministic=True)
    return out.transpose(1, 2)


class _Gradient(torch.autograd.Function):
    """flash-attn's gradient, and that of the reference where it is to be differentiated again."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, reference: Callable[..., Tensor]
    ) -> Tensor:
        leaves = (own_q, own_k, own_v) = tuple(x.detach().requires_grad_() for x in (q, k, v))
        # A graph of its own: flash-attn's functions save what they need in it.
        with torch.enable_grad():
            out = _call(own_q, own_k, own_v, scale)
        ctx.inner, ctx.reference = (leaves, out), reference
        ctx.save_for_backward(q, k, v)
        return out.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            inputs = dict(zip("qkv", ctx.saved_tensors, strict=True))
            found = second_derivative(lambda **x: [ctx.reference(**x)], inputs, grads)
            return (*(found.get(name) for name in "qkv"), None, None)
        leaves, out = ctx.inner
        # Kept, since the outer graph may be walked again.
        return (*torch.autograd.grad(out, leaves, grads, retain_graph=True), None, None)
