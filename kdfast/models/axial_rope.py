# SPDX-License-Identifier: Apache-2.0
"""Two-dimensional rotary tables of EVA-02, for any grid. See docs/use/eva.md."""

from collections.abc import Collection

import torch
from torch import Tensor

from kdfast.ops.geometry import Rope


def axial_tables(
    grid: tuple[int, int],
    head_dim: int,
    pt_hw_seq_len: int,
    intp_freq: bool,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Cosines and sines of a row-major token grid.

    The first half of the channels turns with the row, the second half with the column; channels
    2i and 2i + 1 share the frequency ``10000 ** (-2i / (head_dim / 2))``.

    Args:
        grid: (h, w).
        head_dim: D, a multiple of 4.
        pt_hw_seq_len: Number of positions that an axis spans, whatever its length.
        intp_freq: False: the positions are 0, 1, 2, ... instead.
        device: Where the tables are made.
        dtype: Type of the tables; they are computed in float64.

    Returns:
        (2, h * w, D): the cosines, then the sines.
    """
    half = head_dim // 2
    exponent = torch.arange(0, half, 2, dtype=torch.float64, device=device) / half
    freqs = (10000.0**-exponent).repeat_interleave(2)

    def angles(length: int) -> Tensor:
        step = pt_hw_seq_len / length if intp_freq and length else 1.0
        positions = torch.arange(length, dtype=torch.float64, device=device) * step
        return positions[:, None] * freqs

    h, w = grid
    rows = angles(h)[:, None].expand(h, w, half)
    cols = angles(w)[None].expand(h, w, half)
    angle = torch.cat((rows, cols), -1).view(h * w, head_dim)
    return torch.stack((angle.cos(), angle.sin())).to(dtype)


class AxialRope:
    """Rotary tables by grid, device and dtype, each made once; no part of any state dict."""

    def __init__(self, head_dim: int, pt_hw_seq_len: int, intp_freq: bool) -> None:
        self.head_dim = head_dim
        self.pt_hw_seq_len = pt_hw_seq_len
        self.intp_freq = intp_freq
        self._tables: dict[tuple[int, int, torch.device, torch.dtype], Tensor] = {}

    def tables(self, grid: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
        """Makes the tables (2, h * w, D) of ``grid``, see ``axial_tables``."""
        spec = (self.head_dim, self.pt_hw_seq_len, self.intp_freq)
        return axial_tables(grid, *spec, device, dtype)

    def refill(self, grids: Collection[tuple[int, int]], like: Tensor) -> None:
        """Forgets every table but those of ``grids``, which are made for the device of ``like``."""
        self._tables.clear()
        for grid in grids:
            self(grid, like)

    def __call__(self, grid: tuple[int, int], like: Tensor) -> Rope:
        """The tables of ``grid`` on the device of ``like``: fp64 for fp64, else fp32."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        key = (*grid, like.device, dtype)
        table = self._tables.get(key)
        if table is None and torch.compiler.is_compiling():
            # Kept out of the cache: a CUDA graph would reuse the memory.
            table = self.tables(grid, like.device, dtype)
        elif table is None:
            # A table made in inference mode could not be saved for a later backward.
            with torch.inference_mode(False):
                table = self.tables(grid, like.device, dtype)
            # A fake tensor must not outlive the mode that made it.
            if type(table) is Tensor:
                self._tables[key] = table
        cos, sin = table.unbind()
        return Rope(cos, sin)
