# SPDX-License-Identifier: Apache-2.0
"""ORION's backbone and heads as public code runs them: padded windows, maps in memory.

They have the parameters of kdfast's models, so a comparison differs in the way of computing only.
B batch, H heads, N tokens, D head dim, C channels, S window side.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.models.eva import EVAViT
from kdfast.models.orion import OrionHeads
from kdfast.models.orion.decoder import PackedAttention


def partition(x: Tensor, size: int) -> tuple[Tensor, tuple[int, int]]:
    """(B, h, w, C) to windows (B * windows, S, S, C), padded with zeros; and the padded grid."""
    batch, h, w, dim = x.shape
    x = F.pad(x, (0, 0, 0, -w % size, 0, -h % size))
    high, wide = x.shape[1] // size, x.shape[2] // size
    x = x.view(batch, high, size, wide, size, dim).transpose(2, 3)
    return x.reshape(-1, size, size, dim), (high, wide)


def unpartition(x: Tensor, windows: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Inverse of ``partition``, without the padding."""
    size, dim = x.shape[1], x.shape[-1]
    x = x.view(-1, *windows, size, size, dim).transpose(2, 3)
    x = x.reshape(-1, windows[0] * size, windows[1] * size, dim)
    return x[:, : grid[0], : grid[1]]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved rotation by tensor ops; x is (B, H, N, D), the tables are (N, D)."""
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)


def attention(attn: Any, x: Tensor, rope: Any, sdpa: bool) -> tuple[Tensor, Tensor | None]:
    """(B, h, w, C) to the same, and the scores, (B, H, N, N), unless ``sdpa`` keeps them inside."""
    batch, h, w, _ = x.shape
    rows = x.view(batch, h * w, -1)

    def split(proj: Any, bias: Tensor | None) -> Tensor:
        y = F.linear(rows, proj.weight, bias)
        return y.view(batch, h * w, -1, attn.head_dim).transpose(1, 2)

    q = rotate(split(attn.q_proj, attn.q_bias), rope.cos, rope.sin)
    k = rotate(split(attn.k_proj, None), rope.cos, rope.sin)
    v, scores = split(attn.v_proj, attn.v_bias), None
    if sdpa:
        out = F.scaled_dot_product_attention(q, k, v)
    else:
        scores = (q * attn.head_dim**-0.5) @ k.transpose(-1, -2)
        out = scores.softmax(-1) @ v
    return attn.proj(out.transpose(1, 2).reshape(batch, h, w, -1)), scores


def forward(model: EVAViT, x: Tensor, sdpa: bool = False) -> Tensor:
    """(B, 3, H, W) to (B, C, h, w)."""
    out: Tensor = traced(model, x, sdpa, keep=False)[0]
    return out


def traced(
    model: EVAViT, x: Tensor, sdpa: bool = False, keep: bool = True
) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """Like ``forward``; and the results and the scores of all blocks, pads and all, if ``keep``."""
    tokens, grid = model._embed(x)
    image = tokens.view(tokens.shape[0], *grid, -1)
    streams, scores = [], []
    for block, rope in zip(model._blocks(), model._ropes(grid, tokens), strict=True):
        y = block.norm1(image)
        if block.attn.window_size:
            parts, windows = partition(y, block.attn.window_size)
            parts, found = attention(block.attn, parts, rope, sdpa)
            y = unpartition(parts, windows, grid)
        else:
            y, found = attention(block.attn, y, rope, sdpa)
        image = image + y
        image = image + block.mlp(block.norm2(image))
        if keep:
            scores.append(found)
            streams.append(image.permute(0, 3, 1, 2))
        del found
    return image.permute(0, 3, 1, 2), streams, scores


def attention_kl(
    student: Sequence[Tensor | None],
    teacher: Sequence[Tensor | None],
    heads: Sequence[Sequence[int]],
    model: EVAViT,
    grid: tuple[int, int],
    temperature: float,
) -> Tensor:
    """T^2 times the mean KL of the maps of all blocks, over the queries that are no padding.

    Args:
        student: Scores (B, H, N, N) of its blocks.
        teacher: Those of the teacher, which has more heads.
        heads: By block, the place of each head of the student among the teacher's.
        model: Knows the windows.
        grid: Patches (h, w).
        temperature: T.
    """
    losses = []
    for mine, other, pairs, block in zip(student, teacher, heads, model._blocks(), strict=True):
        assert mine is not None and other is not None
        log_map = (mine.float() / temperature).log_softmax(-1)
        goal = (other[:, list(pairs)].float() / temperature).log_softmax(-1)
        rows = F.kl_div(log_map, goal, log_target=True, reduction="none").sum(-1)
        real = torch.ones(len(rows), 1, rows.shape[-1], dtype=torch.bool, device=rows.device)
        if size := block.attn.window_size:
            windows = partition(rows.new_ones(1, *grid, 1), size)[0].flatten(1) > 0
            real = windows.repeat(len(rows) // len(windows), 1)[:, None]
        losses.append(rows.where(real, 0).sum() / (real.sum() * rows.shape[1]))
    return temperature**2 * torch.stack(losses).mean()


class _Explicit(PackedAttention):
    """Attention that holds its maps."""

    sdpa = False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
        weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, w, b).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x, w, b in zip((q, k, v), weights, biases, strict=True)
        )
        if self.sdpa:
            out = F.scaled_dot_product_attention(q, k, v, seen)
        else:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
            if seen is not None:
                scores = scores.masked_fill(~seen, -torch.inf)
            out = scores.softmax(-1) @ v
        return F.linear(out.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)


class _Sdpa(_Explicit):
    """Attention by torch's function."""

    sdpa = True


def eager_heads(heads: OrionHeads, sdpa: bool = False) -> OrionHeads:
    """A copy of the heads whose attention is that of torch.

    Args:
        heads: Kdfast's.
        sdpa: Whether it is torch's function, or the maps are held.
    """
    made = copy.deepcopy(heads)
    for module in made.modules():
        if type(module) is PackedAttention:
            module.__class__ = _Sdpa if sdpa else _Explicit
    return made
