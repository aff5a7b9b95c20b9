# SPDX-License-Identifier: Apache-2.0
"""Addresses, rotation and tiles of the attention kernels.

A row of D channels is held as a tile of LO channels and, unless HI is 0, one of HI more. Rotated
rows are held in pair order: the two channels that rotate together are neighbours. That is the
memory order for the "interleaved" layout; for "half", pairs (i, i + D/2) are moved together. Scores
do not depend on the order, and gradients are put back when they are stored.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

# Values of ``Channels.rope``: not rotated, channel pairs (2i, 2i + 1), channel pairs (i, i + D/2).
NONE, INTERLEAVED, HALF = (tl.constexpr(i) for i in range(3))
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


# Groups of arguments of the kernels. Triton passes the members of a NamedTuple one by one, so the
# binaries are those of single arguments.


class Rows(NamedTuple):
    """A tensor (B, heads, N, D) with a contiguous last dimension."""

    ptr: Any
    stride_b: Any
    stride_h: Any
    stride_n: Any


class Rotary(NamedTuple):
    """Tables of a rotary embedding; any tensors where nothing is rotated."""

    cos_ptr: Any  # (rows, D)
    sin_ptr: Any  # (rows, D)
    prefix: Any  # first tokens, which are not rotated
    skipped: Any  # first tokens, for which the tables have no row


class Shape(NamedTuple):
    """How the programs of a launch share heads and tokens."""

    kept: Any  # K
    tokens: Any  # N
    blocks: Any  # blocks of rows of the longest window
    windows: Any
    grid_h: Any  # (grid_h, grid_w) tokens in windows of size x size; one window without a grid
    grid_w: Any
    size: Any


class Channels(NamedTuple):
    """What the compiler knows of the rows of a call."""

    D: int
    LO: int  # widths of the two tiles of a row; the second may be 0
    HI: int
    rope: int  # NONE, INTERLEAVED or HALF
    unit: int  # divides all strides of rows, in elements
    precision: str  # of products


@triton.jit
def program(shape):
    """Row block, window, kept head and image of this program; row blocks of a head are adjacent."""
    pid = tl.program_id(0)
    block, pid = pid % shape.blocks, pid // shape.blocks
    window, pid = pid % shape.windows, pid // shape.windows
    return block, window, pid % shape.kept, pid // shape.kept


@triton.jit
def window_span(index, shape, WINDOWED: tl.constexpr):
    """First token, run length, and number of real tokens of a window."""
    first, length, count = shape.tokens * 0, shape.tokens, shape.tokens
    if WINDOWED:
        across = tl.cdiv(shape.grid_w, shape.size)
        y, x = index // across * shape.size, index % across * shape.size
        first = y * shape.grid_w + x
        length = tl.minimum(shape.size, shape.grid_w - x)
        count = tl.minimum(shape.size, shape.grid_h - y) * length
    return first, length, count


@triton.jit
def window_tokens(i, first, length, shape, WINDOWED: tl.constexpr):
    """Tokens of the window's i-th real tokens."""
    if WINDOWED:
        i = first + i // length * shape.grid_w + i % length
    return i


@triton.jit
def table_offsets(token, shape, rotary, D: tl.constexpr, WINDOWED: tl.constexpr):
    """Where the rows of tokens start in a rope table (rows, D); negative: not rotated."""
    if WINDOWED:
        # A table has one row for each place inside a window.
        size, across = shape.size, shape.grid_w
        row = token // across % size * size + token % across % size
    else:
        row = tl.where(token < rotary.prefix, -1, token - rotary.skipped)
    return row * D


@triton.jit
def row_offsets(token, stride, UNIT: tl.constexpr):
    """Where the rows of tokens start, in elements."""
    # The compiler does not see that UNIT divides the stride; 16-byte loads depend on it.
    return token.to(tl.int64) * (stride // UNIT) * UNIT


@triton.jit
def head_base(ptr, x, b, h, UNIT: tl.constexpr):
    """Where the tokens of head h of image b start in a tensor with the strides of ``x``."""
    return ptr + row_offsets(b, x.stride_b, UNIT) + row_offsets(h, x.stride_h, UNIT)


@triton.jit
def load_tile(
    ptr,
    rows,
    ok,
    D: tl.constexpr,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr = True,
):
    """(R, WIDTH) channels from START on of the rows at offsets ``rows``; 0 where not ``ok``.

    Without MASKED every row is known to be there.
    """
    cols = START + tl.arange(0, WIDTH)
    place = ptr + rows[:, None] + cols[None, :]
    if MASKED:
        x = tl.load(place, mask=ok[:, None] & (cols < D)[None, :], other=0.0)
    elif START + WIDTH > D:
        x = tl.load(place, mask=(cols < D)[None, :], other=0.0)
    else:
        x = tl.load(place)
    return x


@triton.jit
def store_tile(
    ptr, rows, ok, x, D: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, ROPE: tl.constexpr
):
    """Stores channels from START on; with ROPE = HALF, x is in pair order and put back."""
    if ROPE == HALF:
        x0, x1 = tl.split(tl.reshape(x, (x.shape[0], WIDTH // 2, 2)))
        cols = START // 2 + tl.arange(0, WIDTH // 2)
        mask = ok[:, None] & (cols < D // 2)[None, :]
        place = ptr + rows[:, None] + cols[None, :]
        tl.store(place, x0.to(ptr.dtype.element_ty), mask=mask)
        tl.store(place + D // 2, x1.to(ptr.dtype.element_ty), mask=mask)
    else:
        cols = START + tl.arange(0, WIDTH)
        mask = ok[:, None] & (cols < D)[None, :]
        tl.store(ptr + rows[:, None] + cols[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_pairs(
    ptr, rows, ok, D: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, ROPE: tl.constexpr
):
    """First and second channels of the pairs in [START, START + WIDTH), each (R, WIDTH / 2)."""
    if ROPE == HALF:
        cols = START // 2 + tl.arange(0, WIDTH // 2)
        mask = ok[:, None] & (cols < D // 2)[None, :]
        place = ptr + rows[:, None] + cols[None, :]
        x0 = tl.load(place, mask=mask, other=0.0)
        x1 = tl.load(place + D // 2, mask=mask, other=0.0)
    else:
        x = load_tile(ptr, rows, ok, D, START, WIDTH)
        x0, x1 = tl.split(tl.reshape(x, (x.shape[0], WIDTH // 2, 2)))
    return x0, x1


@triton.jit
def rotate(
    x0,
    x1,
    ok,
    rotary,
    turn,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """Pairs (R, WIDTH / 2) rotated by the tables' rows at ``turn``: fp32, pair order, (R, WIDTH).

    INVERSE is the transposed map, which takes gradients back. Negative ``turn``: not rotated.
    """
    ok = ok & (turn >= 0)
    D: tl.constexpr = CHANNELS.D
    ROPE: tl.constexpr = CHANNELS.rope
    c0, c1 = load_pairs(rotary.cos_ptr, turn, ok, D, START, WIDTH, ROPE)
    s0, s1 = load_pairs(rotary.sin_ptr, turn, ok, D, START, WIDTH, ROPE)
    x0, x1 = x0.to(tl.float32), x1.to(tl.float32)
    s0, s1 = s0.to(tl.float32), s1.to(tl.float32)
    c0 = tl.where(ok[:, None], c0.to(tl.float32), 1.0)
    c1 = tl.where(ok[:, None], c1.to(tl.float32), 1.0)
    if INVERSE:
        y0, y1 = x0 * c0 + x1 * s1, x1 * c1 - x0 * s0
    else:
        y0, y1 = x0 * c0 - x1 * s0, x1 * c1 + x0 * s1
    return tl.reshape(tl.join(y0, y1), (y0.shape[0], WIDTH))


@triton.jit
def load_rotated(
    ptr,
    rows,
    ok,
    rotary,
    turn,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """``load_tile`` with rotation, rounded to the dtype of ``ptr`` and in pair order."""
    x0, x1 = load_pairs(ptr, rows, ok, CHANNELS.D, START, WIDTH, CHANNELS.rope)
    y = rotate(x0, x1, ok, rotary, turn, START, WIDTH, CHANNELS, False)
    return y.to(ptr.dtype.element_ty)


@triton.jit
def load_rows(ptr, rows, ok, CHANNELS: tl.constexpr, MASKED: tl.constexpr = True):
    """Both tiles of rows, the first one twice where there is one only; see ``load_tile``."""
    lo = load_tile(ptr, rows, ok, CHANNELS.D, 0, CHANNELS.LO, MASKED)
    hi = lo
    if CHANNELS.HI:
        hi = load_tile(ptr, rows, ok, CHANNELS.D, CHANNELS.LO, CHANNELS.HI, MASKED)
    return lo, hi


@triton.jit
def load_queries(ptr, rows, ok, rotary, turn, CHANNELS: tl.constexpr):
    """``load_rows``, rotated where the call rotates."""
    if CHANNELS.rope == NONE:
        lo, hi = load_rows(ptr, rows, ok, CHANNELS)
    else:
        lo = load_rotated(ptr, rows, ok, rotary, turn, 0, CHANNELS.LO, CHANNELS)
        hi = lo
        if CHANNELS.HI:
            hi = load_rotated(ptr, rows, ok, rotary, turn, CHANNELS.LO, CHANNELS.HI, CHANNELS)
    return lo, hi


@triton.jit
def store_rows(ptr, rows, ok, lo, hi, CHANNELS: tl.constexpr):
    """Stores both tiles of rows in their own order."""
    store_tile(ptr, rows, ok, lo, CHANNELS.D, 0, CHANNELS.LO, NONE)
    if CHANNELS.HI:
        store_tile(ptr, rows, ok, hi, CHANNELS.D, CHANNELS.LO, CHANNELS.HI, NONE)


@triton.jit
def store_grad(
    ptr,
    rows,
    ok,
    x,
    rotary,
    turn,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Stores the gradient x (R, WIDTH) of rotated rows as the gradient of the rows themselves."""
    if CHANNELS.rope != NONE:
        x0, x1 = tl.split(tl.reshape(x, (x.shape[0], WIDTH // 2, 2)))
        x = rotate(x0, x1, ok, rotary, turn, START, WIDTH, CHANNELS, True)
    store_tile(ptr, rows, ok, x, CHANNELS.D, START, WIDTH, CHANNELS.rope)


@triton.jit
def scores(a_lo, a_hi, b_lo, b_hi, CHANNELS: tl.constexpr):
    """Products (R, C) of the rows of a (R, LO | HI) and b (C, LO | HI)."""
    s = tl.dot(a_lo, tl.trans(b_lo), input_precision=CHANNELS.precision)
    if CHANNELS.HI:
        s = tl.dot(a_hi, tl.trans(b_hi), s, input_precision=CHANNELS.precision)
    return s
