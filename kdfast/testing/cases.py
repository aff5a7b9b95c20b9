# SPDX-License-Identifier: Apache-2.0
"""Shapes and inputs of attention calls."""

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from kdfast.ops.geometry import Rope, Window
from kdfast.ops.pruned_attention import pruned_attention

# (B, H, N, D): smallest, nothing a multiple of anything, one token, and a real ViT-S row count.
SHAPES = {
    "tiny": (1, 2, 4, 16),
    "odd": (2, 3, 37, 24),
    "one": (1, 1, 1, 16),
    "vit": (1, 3, 197, 64),
}


def rotary(rows: int, dim: int, layout: str = "interleaved", prefix: int = 0) -> Rope:
    """Tables (rows, dim) whose columns all differ, so that a swapped pair or a wrong row shows."""
    angle = torch.arange(rows)[:, None] * (0.3 + torch.arange(dim) / 7)
    return Rope(angle.cos(), angle.sin(), prefix, layout)


@dataclass(frozen=True)
class AttentionCase:
    """One call of ``pruned_attention``, with inputs that are the same in every dtype but rounding.

    Attributes:
        shape: (B, H, N, D).
        heads: Kept heads; all if None.
        layout: Layout of the rotary tables; None: no rotation.
        prefix: Tokens in front that are not rotated; their rows are left out of the tables.
        grid: (h, w) of windows; None: every token sees every token.
        size: Side of a window.
        padded: Whether the windows have pad values, (H, D), as the last input.
        biases: G of a bias (G, H, N, N), the last input; 0: none.
        masked: Whether some entries of the bias are -inf, one row of head 0 is all of them, and the
            last key of the last head -100.
        scale: As in ``pruned_attention``.
    """

    shape: tuple[int, int, int, int]
    heads: tuple[int, ...] | None = None
    _: KW_ONLY
    layout: str | None = None
    prefix: int = 0
    grid: tuple[int, int] | None = None
    size: int = 0
    padded: bool = False
    biases: int = 0
    masked: bool = False
    scale: float | None = None

    def inputs(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """q, k, v, and the pad values or the bias if the call has them."""
        _, heads, tokens, dim = self.shape
        shapes: list[tuple[int, ...]] = [self.shape] * 3
        shapes += [(heads, dim)] * self.padded
        shapes += [(self.biases, heads, tokens, tokens)] * (self.biases > 0)
        draw = torch.Generator().manual_seed(7)
        # In fp64 and then rounded, so that runs in several dtypes see the same numbers.
        inputs = [torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes]
        if self.masked:
            bias = inputs[3]
            bias.masked_fill_(torch.rand(bias.shape, generator=draw) < 0.3, -math.inf)
            bias[:, 0, tokens // 2] = -math.inf
            bias[:, -1, :, -1] = -100.0
        return [x.to(dtype) for x in inputs]

    def call(self, backend: str) -> Callable[..., Tensor]:
        """The function of the inputs."""

        def attention(q: Tensor, k: Tensor, v: Tensor, extra: Tensor | None = None) -> Tensor:
            window = rope = None
            if self.grid is not None:
                window = Window(self.grid, self.size, extra if self.padded else None)
            if self.layout is not None:
                rows = self.size**2 if self.grid else q.shape[2] - self.prefix
                rope = rotary(rows, q.shape[3], self.layout, self.prefix)
            return pruned_attention(
                *(q, k, v),
                heads=self.heads,
                rope=rope,
                scale=self.scale,
                window=window,
                bias=extra if self.biases else None,
                backend=backend,
            )

        return attention
