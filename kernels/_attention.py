# SPDX-License-Identifier: Apache-2.0
"""Addresses, rotation and tiles of the attention kernels.

A row of D channels is held as a tile of LO channels and, unless HI is 0, one of HI more. Rotated
rows are held in pair order: the two channels that rotate together are neighbours. That is the
memory order for the "interleaved" layout; for "half", pairs (i, i + D/2) are moved together. Scores
do not depend on the order, and gradients are put back when they are stored.
"""

import triton
import triton.language as tl

# Values of the constexpr ROPE: not rotated, channel pairs (2i, 2i + 1), channel pairs (i, i + D/2).
NONE, INTERLEAVED, HALF = (tl.constexpr(i) for i in range(3))
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def program(block_count, window_count, kept):
    """Row block, window, kept head and image of this program; row blocks of a head are adjacent."""
    pid = tl.program_id(0)
    block, pid = pid % block_count, pid // block_count
    window, pid = pid % window_count, pid // window_count
    return block, window, pid % kept, pid // kept


@triton.jit
def window_span(index, tokens, grid_h, grid_w, size, WINDOWED: tl.constexpr):
    """First token, run length, and number of real tokens of a window."""
    first, length, count = tokens * 0, tokens, tokens
    if WINDOWED:
        across = tl.cdiv(grid_w, size)
        y, x = index // across * size, index % across * size
        first = y * grid_w + x
        length = tl.minimum(size, grid_w - x)
        count = tl.minimum(size, grid_h - y) * length
    return first, length, count


@triton.jit
def window_tokens(i, first, length, grid_w, WINDOWED: tl.constexpr):
    """Tokens of the window's i-th real tokens."""
    if WINDOWED:
        i = first + i // length * grid_w + i % length
    return i


@triton.jit
def table_offsets(token, grid_w, size, prefix, skipped, D: tl.constexpr, WINDOWED: tl.constexpr):
    """Where the rows of tokens start in a rope table (rows, D); negative: not rotated."""
    if WINDOWED:
        row = token // grid_w % size * size + token % grid_w % size
    else:
        row = tl.where(token < prefix, -1, token - skipped)
    return row * D


@triton.jit
def row_offsets(token, stride, UNIT: tl.constexpr):
    """Where the rows of tokens start, in elements."""
    # The compiler does not see that UNIT divides the stride; 16-byte loads depend on it.
    return token.to(tl.int64) * (stride // UNIT) * UNIT


@triton.jit
def head_base(ptr, b, h, stride_b, stride_h, UNIT: tl.constexpr):
    """Where the tokens of head h of image b start."""
    return ptr + row_offsets(b, stride_b, UNIT) + row_offsets(h, stride_h, UNIT)


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
    cos_ptr,
    sin_ptr,
    turn,
    D: tl.constexpr,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    ROPE: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """Pairs (R, WIDTH / 2) rotated by the tables' rows at ``turn``: fp32, pair order, (R, WIDTH).

    INVERSE is the transposed map, which takes gradients back. Negative ``turn``: not rotated.
    """
    ok = ok & (turn >= 0)
    c0, c1 = load_pairs(cos_ptr, turn, ok, D, START, WIDTH, ROPE)
    s0, s1 = load_pairs(sin_ptr, turn, ok, D, START, WIDTH, ROPE)
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
    cos_ptr,
    sin_ptr,
    turn,
    D: tl.constexpr,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    ROPE: tl.constexpr,
):
    """``load_tile`` with rotation, rounded to the dtype of ``ptr`` and in pair order."""
    x0, x1 = load_pairs(ptr, rows, ok, D, START, WIDTH, ROPE)
    y = rotate(x0, x1, ok, cos_ptr, sin_ptr, turn, D, START, WIDTH, ROPE, False)
    return y.to(ptr.dtype.element_ty)


@triton.jit
def load_query(
    ptr,
    rows,
    ok,
    cos_ptr,
    sin_ptr,
    turn,
    D: tl.constexpr,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    ROPE: tl.constexpr,
):
    """``load_rotated``, or ``load_tile`` where nothing is rotated."""
    if ROPE == NONE:
        x = load_tile(ptr, rows, ok, D, START, WIDTH)
    else:
        x = load_rotated(ptr, rows, ok, cos_ptr, sin_ptr, turn, D, START, WIDTH, ROPE)
    return x


@triton.jit
def store_grad(
    ptr,
    rows,
    ok,
    x,
    cos_ptr,
    sin_ptr,
    turn,
    D: tl.constexpr,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    ROPE: tl.constexpr,
):
    """Stores the gradient x (R, WIDTH) of rotated rows as the gradient of the rows themselves."""
    if ROPE != NONE:
        x0, x1 = tl.split(tl.reshape(x, (x.shape[0], WIDTH // 2, 2)))
        x = rotate(x0, x1, ok, cos_ptr, sin_ptr, turn, D, START, WIDTH, ROPE, True)
    store_tile(ptr, rows, ok, x, D, START, WIDTH, ROPE)


@triton.jit
def scores(a_lo, a_hi, b_lo, b_hi, HI: tl.constexpr, PRECISION: tl.constexpr):
    """Products (R, C) of the rows of a (R, LO | HI) and b (C, LO | HI)."""
    s = tl.dot(a_lo, tl.trans(b_lo), input_precision=PRECISION)
    if HI:
        s = tl.dot(a_hi, tl.trans(b_hi), s, input_precision=PRECISION)
    return s
