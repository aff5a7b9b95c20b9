# SPDX-License-Identifier: Apache-2.0
"""What the launchers of the attention ops share: one description of a call, and the rotation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kdfast.kernels._attention import (
    HALF,
    INTERLEAVED,
    NONE,
    Channels,
    Rotary,
    Rows,
    Shape,
    head_base,
    load_rotated,
    program,
    row_offsets,
    store_tile,
    table_offsets,
)
from kdfast.kernels._blocks import architecture
from kdfast.kernels._common import (
    PLAIN_ROWS,
    Tiles,
    alignment,
    choose_tiles,
    chunks,
    dot_precision,
    head_table,
    power_of_two,
    window_lengths,
)


@triton.jit
def rotate_kernel(
    x,  # Rows (B, H, N, D)
    y_ptr,  # (B, K, N, D), contiguous: rotated, in pair order
    heads_ptr,
    rotary,
    shape,
    CHANNELS: tl.constexpr,  # with one tile
    WINDOWED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Rotates the keys once, where every block of queries would rotate them again."""
    D: tl.constexpr = CHANNELS.D
    WIDTH: tl.constexpr = CHANNELS.LO
    block, _, j, b = program(shape)
    token = block * ROWS + tl.arange(0, ROWS)
    ok = token < shape.tokens
    x_ptr = head_base(x.ptr, x, b, tl.load(heads_ptr + j), CHANNELS.unit)
    turn = table_offsets(token, shape, rotary, D, WINDOWED)
    rows = row_offsets(token, x.stride_n, CHANNELS.unit)
    y = load_rotated(x_ptr, rows, ok, rotary, turn, 0, WIDTH, CHANNELS)
    y_ptr += (b.to(tl.int64) * shape.kept + j) * shape.tokens * D
    store_tile(y_ptr, token * D, ok, y, D, 0, WIDTH, NONE)


class Scores(NamedTuple):
    """How a call makes scores of queries and keys; the names are those of the schemas."""

    cos: Tensor | None  # (rows, D)
    sin: Tensor | None
    prefix: int
    interleaved: bool
    scale: float


class Windows(NamedTuple):
    """How a call splits the tokens into windows; the names are those of the schemas."""

    grid: list[int] | None
    window: int
    pad_value: Tensor | None  # (H, D)


@dataclass(frozen=True)
class Call:
    """What the launches of one call share."""

    heads: Tensor  # (K,) int32
    cos: Tensor  # (rows, D), contiguous; any tensor without rope
    sin: Tensor
    pad: Tensor  # (H, D), contiguous; any tensor without a pad value
    rope: int  # NONE, INTERLEAVED or HALF
    has_pad: bool
    windowed: bool
    batch: int
    kept: int
    tokens: int
    head_dim: int
    width: int  # head dim and bytes of an element that blocks have to suit
    itemsize: int
    lengths: tuple[int, ...]
    grid: tuple[int, int, int]  # (h, w, size)
    prefix: int
    skipped: int
    scale: float
    arch: str  # of the GPU

    @property
    def rows(self) -> int:
        """Blocks of an element-wise kernel."""
        return -(-self.tokens // PLAIN_ROWS)

    def tiles(self, kernel: str) -> Tiles:
        """Blocks of a kernel of ``BLOCKS``."""
        return choose_tiles(kernel, self.lengths, self.width, self.itemsize, self.arch)

    def programs(self, tiles: Tiles) -> int:
        """Programs of an attention kernel: one for each block of rows, window, head and image."""
        blocks = -(-max(self.lengths) // tiles.rows)
        return blocks * len(self.lengths) * self.kept * self.batch

    def rotary(self) -> Rotary:
        """The tables as the kernels take them."""
        return Rotary(self.cos, self.sin, self.prefix, self.skipped)

    def channels(self, *rows: Tensor) -> Channels:
        """What the compiler knows of tensors of one dtype with the head dim of the call."""
        low, high = chunks(self.head_dim, rows[0].dtype.itemsize)
        precision = dot_precision(rows[0].dtype)
        return Channels(self.head_dim, low, high, self.rope, alignment(*rows), precision)

    def launch(
        self, kernel: Any, tiles: Tiles, rows: Sequence[Tensor], *others: Any, **options: Any
    ) -> None:
        """Runs an attention kernel.

        Args:
            kernel: Its parameters are those that follow, then the head table, the rotary tables and
                the shape; and by name what every attention kernel takes, with ``options``.
            tiles: Its blocks, from ``tiles``.
            rows: Tensors with rows of the call's channels.
            *others: What follows them.
            **options: By name.
        """
        blocks = -(-max(self.lengths) // tiles.rows)
        kernel[(self.programs(tiles),)](
            *(rows_of(x) for x in rows),
            *others,
            self.heads,
            self.rotary(),
            Shape(self.kept, self.tokens, blocks, len(self.lengths), *self.grid),
            CHANNELS=self.channels(*rows),
            TILES=tiles,
            WINDOWED=self.windowed,
            HAS_PAD=self.has_pad,
            num_warps=tiles.warps,
            **options,
        )


def make_call(q: Tensor, heads: list[int] | None, scores: Scores, windows: Windows) -> Call:
    """The call of an op on the named heads of q (B, H, N, D)."""
    batch, count, tokens, head_dim = q.shape
    kept = tuple(range(count) if heads is None else heads)
    cos, sin, pad, grid = scores.cos, scores.sin, windows.pad_value, windows.grid
    layout = INTERLEAVED if scores.interleaved else HALF
    return Call(
        # A kernel needs some tensor for a pointer that it does not read.
        heads=head_table(kept, q.device),
        cos=q if cos is None else cos.contiguous(),
        sin=q if sin is None else sin.contiguous(),
        pad=q if pad is None else pad.contiguous(),
        rope=NONE.value if cos is None else layout.value,
        has_pad=pad is not None,
        windowed=grid is not None,
        batch=batch,
        kept=len(kept),
        tokens=tokens,
        head_dim=head_dim,
        width=head_dim,
        itemsize=q.dtype.itemsize,
        lengths=window_lengths(tokens, None if grid is None else tuple(grid), windows.window),
        grid=(1, tokens, tokens) if grid is None else (grid[0], grid[1], windows.window),
        prefix=scores.prefix,
        # The rows of a table that leaves out the prefix start later.
        skipped=0 if cos is None or grid is not None else tokens - cos.shape[0],
        scale=scores.scale,
        arch=architecture(q.device),
    )


def rows_of(x: Tensor) -> Rows:
    """x (B, heads, N, D) as the kernels take it."""
    return Rows(x, *x.stride()[:3])


def rows_first(x: Tensor, heads: int, *, zero: bool = False) -> Tensor:
    """(B, heads, N, D) like x, in the memory order (B, N, heads, D)."""
    batch, _, tokens, head_dim = x.shape
    make = x.new_zeros if zero else x.new_empty
    return make((batch, tokens, heads, head_dim)).transpose(1, 2)


def turning(x: Tensor, call: Call) -> Tensor:
    """Where the rotated copy (B, K, N, D) of x goes; x itself without rope."""
    if call.rope == NONE.value or x.numel() == 0:
        return x
    return x.new_empty((call.batch, call.kept, call.tokens, call.head_dim))


def rotated(x: Tensor, call: Call) -> Tensor:
    """The kept heads of x, (B, K, N, D), rotated and in pair order; x itself without rope."""
    y = turning(x, call)
    if y is x:
        return x
    # Of the windows only the tables' order matters here.
    shape = Shape(call.kept, call.tokens, call.rows, 1, *call.grid)
    channels = call.channels(x)._replace(LO=power_of_two(call.head_dim), HI=0)
    rotate_kernel[(call.rows * call.kept * call.batch,)](
        rows_of(x),
        y,
        call.heads,
        call.rotary(),
        shape,
        CHANNELS=channels,
        WINDOWED=call.windowed,
        ROWS=PLAIN_ROWS,
    )
    return y
