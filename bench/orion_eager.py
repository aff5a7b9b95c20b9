# SPDX-License-Identifier: Apache-2.0
"""EVAViT as public ORION code runs it: zero-padded windows, eager rotation, maps in memory.

Shares the parameters of a kdfast EVAViT, so a comparison differs in the way of computing only.
B batch, H heads, N tokens, D head dim, C channels, S window side.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.models.eva import EVAViT


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


def attention(attn: Any, x: Tensor, rope: Any) -> tuple[Tensor, Tensor]:
    """(B, h, w, C) to the same, and the log of the map, (B, H, N, N)."""
    batch, h, w, _ = x.shape
    rows = x.view(batch, h * w, -1)

    def split(proj: Any, bias: Tensor | None) -> Tensor:
        y = F.linear(rows, proj.weight, bias)
        return y.view(batch, h * w, -1, attn.head_dim).transpose(1, 2)

    q = rotate(split(attn.q_proj, attn.q_bias), rope.cos, rope.sin) * attn.head_dim**-0.5
    k = rotate(split(attn.k_proj, None), rope.cos, rope.sin)
    log_map = (q @ k.transpose(-1, -2)).log_softmax(-1)
    out = log_map.exp() @ split(attn.v_proj, attn.v_bias)
    return attn.proj(out.transpose(1, 2).reshape(batch, h, w, -1)), log_map


def forward(model: EVAViT, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(B, 3, H, W) to (B, C, h, w), and the log maps of all blocks, pads and all."""
    tokens, grid = model._embed(x)
    image, maps = tokens.view(tokens.shape[0], *grid, -1), []
    for block, rope in zip(model._blocks(), model._ropes(grid, tokens), strict=True):
        y = block.norm1(image)
        if block.attn.window_size:
            parts, windows = partition(y, block.attn.window_size)
            parts, log_map = attention(block.attn, parts, rope)
            y = unpartition(parts, windows, grid)
        else:
            y, log_map = attention(block.attn, y, rope)
        maps.append(log_map)
        image = image + y
        image = image + block.mlp(block.norm2(image))
    return image.permute(0, 3, 1, 2), maps
