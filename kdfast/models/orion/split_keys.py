# SPDX-License-Identifier: Apache-2.0
"""Attention of few queries to many keys on the kernel that takes as many of both.

The keys are split into S equal parts, which the kernel sees as S images with the same queries. With
lse_s the log-sum of a part's weights, and lse that of all, the whole result is the sum of
exp(lse_s - lse) out_s. The kernel's backward needs only the result, lse and its part of the keys,
so that it gives each part's gradient right away.

B streams, H heads, N queries, M keys, D head dim, S parts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdfast.ops._library import DEFAULT_BACKEND
from kdfast.ops._matmul import products_of
from kdfast.ops.pruned_attention import FUSED_ON
from kdfast.ops.sdpa import scaled_dot_product_attention

# Products of queries and keys below which torch's function is as fast, and the largest share of
# queries that may be padding.
LEAST_WORK, MOST_PADDING = 2**20, 0.3


def cross_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention (B, H, N, D) of q (B, H, N, D) to k and v (B, H, M, D).

    On a CPU with compiled kernels, where there is enough work and M has a fitting divisor, by parts
    of the keys; elsewhere torch's function.

    Gradients: q, k, v, of first order where keys are split.
    """
    parts = split(q.shape[2], k.shape[2])
    usable = q.device.type == "cpu" and "cpu" in FUSED_ON and DEFAULT_BACKEND != "reference"
    if parts < 2 or not usable or torch.compiler.is_compiling():
        return scaled_dot_product_attention(q, k, v)
    out: Tensor = _SplitKeys.apply(q, k, v, parts)
    return out


def split(queries: int, keys: int) -> int:
    """S, into how many parts to split the keys; 1 where torch's function is better."""
    if queries == 0 or queries * keys < LEAST_WORK:
        return 1
    most = keys // queries
    parts = next((s for s in range(most, 1, -1) if keys % s == 0), 1)
    return parts if keys // parts <= (1 + MOST_PADDING) * queries else 1


class _SplitKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, parts: int) -> Tensor:
        batch, _, queries, _ = q.shape
        side = k.shape[2] // parts
        given = _repeated(q, parts, side), _parted(k, parts), _parted(v, parts)
        outs, lses = torch.ops.kdfast.pruned_attention.default(*given, *_plain(q), products_of(q))
        outs = outs.unflatten(0, (batch, parts))[..., :queries, :]
        lses = lses.unflatten(0, (batch, parts))[..., :queries]
        lse = lses.logsumexp(1)
        out = ((lses - lse[:, None]).exp()[..., None] * outs).sum(1)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.parts = parts
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        batch, parts, queries, side = q.shape[0], ctx.parts, q.shape[2], k.shape[2] // ctx.parts
        # Queries that fill up have no gradient and no result, so that they add nothing.
        grads, qs, outs = (_repeated(x, parts, side) for x in (grad, q, out))
        lses = _repeated(lse[..., None], parts, side)[..., 0]
        given = grads, qs, _parted(k, parts), _parted(v, parts), outs, lses
        op = torch.ops.kdfast.pruned_attention_bwd.default
        dq, dk, dv = op(*given, *_plain(q), False, products_of(q))[:3]
        dq = dq.unflatten(0, (batch, parts)).sum(1)[:, :, :queries]
        dk, dv = (x.unflatten(0, (batch, parts)).transpose(1, 2).flatten(2, 3) for x in (dk, dv))
        return dq, dk, dv, None


def _plain(q: Tensor) -> tuple[Any, ...]:
    """The kernel's further arguments: all heads, no rotation, windows or bias."""
    return None, None, None, 0, True, q.shape[3] ** -0.5, None, 0, None, None


def _repeated(x: Tensor, parts: int, side: int) -> Tensor:
    """(B S, H, side, D) of x (B, H, N, D): filled up with zeros, once for each part."""
    filled = F.pad(x, (0, 0, 0, side - x.shape[2]))
    return filled.repeat_interleave(parts, 0)


def _parted(x: Tensor, parts: int) -> Tensor:
    """(B S, H, M / S, D) of x (B, H, M, D)."""
    return x.unflatten(2, (parts, -1)).transpose(1, 2).flatten(0, 1)
