# SPDX-License-Identifier: Apache-2.0
"""Token geometry of an attention call: rotary tables and windows of a token grid."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.ops._checks import check_tensors

LAYOUTS = ("interleaved", "half")


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding tables, applied to queries and keys inside the op.

    Attributes:
        cos: (N, R) floating, R <= D and even: the first R channels are rotated, the others stay.
            Row = token (row inside the window when the call has a window). (N - prefix, R) is
            accepted too: the rows of the prefix tokens left out.
        sin: Like ``cos``.
        prefix: Number of leading tokens (CLS, registers) that are not rotated.
        layout: "interleaved" rotates channel pairs (2i, 2i+1), as EVA and timm do; "half"
            rotates pairs (i, i + R/2), as NeoX and Hugging Face's DINOv3 do. With R < D the
            kernels get "half" as "interleaved", by copies of q and k with channels in that order.
    """

    cos: Tensor
    sin: Tensor
    prefix: int = 0
    layout: str = "interleaved"

    def whole(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, "Rope"]:
        """q and k (B, H, N, D) and tables of D columns that give the scores of q, k and these."""
        width, dim = self.cos.shape[1], q.shape[3]
        if width == dim:
            return q, k, self
        cos, sin = (
            F.pad(x, (0, dim - width), value=rest) for x, rest in ((self.cos, 1.0), (self.sin, 0.0))
        )
        if self.layout == "half":
            # Scores do not depend on the order of channels, so the pairs may become neighbours.
            q, k, cos, sin = (_neighbours(x, width) for x in (q, k, cos, sin))
        return q, k, Rope(cos, sin, self.prefix)

    def check(self, op: str, tokens: int, head_dim: int) -> None:
        """Raises TypeError or ValueError unless the tables fit ``tokens`` and ``head_dim``."""
        if self.layout not in LAYOUTS:
            raise ValueError(f"{op}: rope.layout must be one of {LAYOUTS}, got {self.layout!r}")
        if not 0 <= self.prefix <= tokens:
            raise ValueError(f"{op}: rope.prefix must be in [0, {tokens}], got {self.prefix}")
        if head_dim % 2:
            raise ValueError(f"{op}: rope needs an even head dim, got {head_dim}")
        check_tensors(op, ("rope.cos", "rope.sin"), self.cos, self.sin)
        rows = (tokens,) if self.prefix == 0 else (tokens - self.prefix, tokens)
        for name, table in (("cos", self.cos), ("sin", self.sin)):
            if not table.is_floating_point():
                raise TypeError(f"{op}: rope.{name} must be floating, got {table.dtype}")
            # Compared one by one: while torch.jit traces sizes are tensors, and torch.compile of
            # torch 2.11 does not find a size that it left open in a tuple.
            fits = table.dim() == 2 and (table.shape[0] == rows[0] or table.shape[0] == rows[-1])
            if not fits or table.shape[1] % 2 or not 0 < table.shape[1] <= head_dim:
                want = " or ".join(f"({r}, {head_dim})" for r in rows)
                raise ValueError(
                    f"{op}: rope.{name} must be {want}, or of fewer channels, an even number, got "
                    f"{tuple(table.shape)}"
                )
        if self.cos.shape != self.sin.shape:
            raise ValueError(
                f"{op}: rope.cos and rope.sin must have one shape, got "
                f"{tuple(self.cos.shape)} and {tuple(self.sin.shape)}"
            )


def _neighbours(x: Tensor, width: int) -> Tensor:
    """x (..., D) with its channels i and i + width / 2 side by side, for i < width / 2."""
    pairs = x[..., :width].unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    return torch.cat((pairs, x[..., width:]), -1)


@dataclass(frozen=True)
class Window:
    """Non-overlapping square windows of a row-major token grid.

    Attributes:
        grid: (h, w) of the token grid; the call's N is h * w.
        size: Side of a window in tokens. The grid is padded at the bottom and the right to a
            multiple of it.
        pad_value: (H, D) value of a padded token per head. Padded tokens are then live keys whose
            key vector is zero (logit 0), as in ORION's EVA-ViT, in closed form: none is computed.
            None: border windows are simply smaller.
    """

    grid: tuple[int, int]
    size: int
    pad_value: Tensor | None = None

    def check(self, op: str, tokens: int, heads: int, head_dim: int) -> None:
        """Raises TypeError or ValueError unless the windows fit the call."""
        h, w = self.grid
        if h < 1 or w < 1 or h * w != tokens:
            raise ValueError(f"{op}: window.grid must hold N = {tokens} tokens, got {h} x {w}")
        if self.size < 1:
            raise ValueError(f"{op}: window.size must be at least 1, got {self.size}")
        pad = self.pad_value
        if pad is None:
            return
        check_tensors(op, ("window.pad_value",), pad)
        if not pad.is_floating_point():
            raise TypeError(f"{op}: window.pad_value must be floating, got {pad.dtype}")
        if tuple(pad.shape) != (heads, head_dim):
            raise ValueError(
                f"{op}: window.pad_value must be (H, D) = ({heads}, {head_dim}), "
                f"got {tuple(pad.shape)}"
            )

    def spans(self) -> list[tuple[slice, slice]]:
        """Row and column slices of every window, row-major; border windows are cut off."""
        h, w = self.grid
        return [
            (slice(y, min(y + self.size, h)), slice(x, min(x + self.size, w)))
            for y in range(0, h, self.size)
            for x in range(0, w, self.size)
        ]

    def pads(self, span: tuple[slice, slice]) -> int:
        """Number of padded tokens in the window at ``span``."""
        rows, cols = span
        return self.size**2 - (rows.stop - rows.start) * (cols.stop - cols.start)

    def token_index(self, span: tuple[slice, slice], device: torch.device) -> Tensor:
        """(n,) indices into N of the window's real tokens, row-major inside the window."""
        h, w = self.grid
        return torch.arange(h * w, device=device).view(h, w)[span].reshape(-1)

    def table_index(self, span: tuple[slice, slice], device: torch.device) -> Tensor:
        """(n,) positions of the same tokens inside the full window: their rows of a rope table."""
        rows, cols = span
        inside = torch.arange(self.size**2, device=device).view(self.size, self.size)
        return inside[: rows.stop - rows.start, : cols.stop - cols.start].reshape(-1)


def score_count(tokens: int, grid: Sequence[int] | None, window: int) -> int:
    """Pairs of a query and a real key of its window, for one head of one image."""
    if grid is None:
        return tokens**2
    spans = Window((grid[0], grid[1]), window).spans()
    return sum(((y.stop - y.start) * (x.stop - x.start)) ** 2 for y, x in spans)
