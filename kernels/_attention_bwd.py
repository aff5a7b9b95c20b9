# SPDX-License-Identifier: Apache-2.0
"""The kernel of attention's backward pass. See docs/ops/pruned_attention.md.

B batch, H heads, K kept heads, N tokens, D head dim. Each launch recomputes the scores of its block
and owns its results, so nothing is added atomically and every sum has a fixed order.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kdfast.kernels._attention import (
    LN_2,
    LOG2_E,
    NONE,
    Channels,
    Rotary,
    Rows,
    head_base,
    load_rotated,
    load_rows,
    load_tile,
    program,
    row_offsets,
    scores,
    store_grad,
    store_rows,
    store_tile,
    table_offsets,
    window_span,
    window_tokens,
)
from kdfast.kernels._attention_bias import bias_bases, bias_tile
from kdfast.kernels._attention_maps import load_stats, map_gradient


@triton.jit
def across(x, KEYS: tl.constexpr):
    """Values of the queries, broadcast to a tile: a row of it with KEYS, else a column."""
    return x[None, :] if KEYS else x[:, None]


@triton.jit
def take_queries(ptr, rows, ok, rotary, turn, copy_ptr, token, CHANNELS: tl.constexpr):
    """Both tiles of a program's rows, rotated, in pair order; copied to (N, D) at ``copy_ptr``."""
    D: tl.constexpr = CHANNELS.D
    LO: tl.constexpr = CHANNELS.LO
    lo = load_rotated(ptr, rows, ok, rotary, turn, 0, LO, CHANNELS)
    hi = lo
    store_tile(copy_ptr, token * D, ok, lo, D, 0, LO, NONE)
    if CHANNELS.HI:
        hi = load_rotated(ptr, rows, ok, rotary, turn, LO, CHANNELS.HI, CHANNELS)
        store_tile(copy_ptr, token * D, ok, hi, D, LO, CHANNELS.HI, NONE)
    return lo, hi


@triton.jit
def row_products(x, y):
    """Inner products (R,) of the rows of x and y (R, C)."""
    return tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)


@triton.jit
def store_pad_part(
    part_ptr, lse, grad, pads, D: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr
):
    """What the rows of ``grad`` (R, WIDTH) give to the gradient of the pad value."""
    # Without a padded key, exp(-lse) may be infinite.
    weight = tl.where(pads > 0, pads * tl.exp(-lse), 0.0)
    cols = START + tl.arange(0, WIDTH)
    tl.store(part_ptr + cols, tl.sum(grad.to(tl.float32) * weight[:, None], 0), mask=cols < D)


class Teacher(NamedTuple):
    """What a launch with the distance to a teacher's maps reads of it; see _attention_maps.py."""

    own: Rows  # its q (B, Ht, N, TD); with KEYS its k, as ``other`` else
    other: Rows  # its k; with KEYS its q; with rotation (B, K, N, TD), rotated
    turned_ptr: Any  # (B, K, N, TD), as ``turned_ptr`` of the kernel
    rotary: Rotary
    heads_ptr: Any  # (K,)
    stats_ptr: Any  # (planes, B, K, N)
    grad_loss_ptr: Any  # ()
    plane: Any  # B * K * N
    scale: Any  # over the temperature
    temperature: Any
    weight: Any  # of a row in the loss, over the temperature


class Maps(NamedTuple):
    """What the compiler knows of the distance of two maps."""

    kind: int  # one of KINDS
    plain: bool  # the temperature is 1: the maps of the loss are those of the output
    channels: Channels  # of the teacher


# The options of a launch without a teacher.
NO_MAPS: dict[str, None] = {"teacher": None, "MAPS": None}


@triton.jit
def bwd_kernel(
    # A launch owns rows of queries and their gradients, and the keys and values stream past; or
    # with KEYS the other way round. The rows of `own` and `other` make the scores; those of
    # `own_v` and `other_v` the gradient of the weights.
    own,  # Rows of q (B, H, N, D); with KEYS k, as `other` else
    own_v,  # Rows of grad (B, K, N, D); with KEYS v
    other,  # Rows of k (B, H, N, D); with KEYS q; with rotation (B, K, N, D), in pair order
    other_v,  # Rows of v (B, H, N, D); with KEYS grad
    d_own,  # Rows (B, H, N, D)
    out,  # Rows (B, K, N, D)
    d_own_v_ptr,  # with the strides of d_own: dv; without KEYS not used
    lse_ptr,  # (B, K, N)
    # Without KEYS these three are results, and the launch with KEYS follows:
    delta_ptr,  # (B, K, N), rowsum(grad * out)
    turned_ptr,  # (B, K, N, D), contiguous: q, rotated and in pair order; only with rotation
    part_ptr,  # (B * windows * blocks, K, D), zeros: parts of dpad; only with HAS_PAD
    heads_ptr,  # (K,)
    rotary,
    shape,
    scale,
    bias,  # BiasRows or None
    teacher,  # Teacher or None
    CHANNELS: tl.constexpr,
    TILES: tl.constexpr,
    WINDOWED: tl.constexpr,
    HAS_PAD: tl.constexpr,
    KEYS: tl.constexpr,
    MAPS: tl.constexpr,  # with a teacher
):
    """Gradient of one block of queries, while keys stream past.

    With KEYS, gradients of one block of keys and values, while queries stream past.
    """
    D: tl.constexpr = CHANNELS.D
    LO: tl.constexpr = CHANNELS.LO
    HI: tl.constexpr = CHANNELS.HI
    UNIT: tl.constexpr = CHANNELS.unit
    ROPE: tl.constexpr = CHANNELS.rope
    # Which rows of which tensors are this program's.
    block, window, j, b = program(shape)
    first, length, count = window_span(window, shape, WINDOWED)
    head = tl.load(heads_ptr + j)
    own_ptr = head_base(own.ptr, own, b, j if KEYS and ROPE else head, UNIT)
    own_v_ptr = head_base(own_v.ptr, own_v, b, head if KEYS else j, UNIT)
    other_ptr = head_base(other.ptr, other, b, j if ROPE else head, UNIT)
    other_v_ptr = head_base(other_v.ptr, other_v, b, j if KEYS else head, UNIT)
    d_own_ptr = head_base(d_own.ptr, d_own, b, head, UNIT)
    d_own_v_ptr = head_base(d_own_v_ptr, d_own, b, head, UNIT)
    out_ptr = head_base(out.ptr, out, b, j, UNIT)
    stats = (b.to(tl.int64) * shape.kept + j) * shape.tokens
    if teacher is not None:
        # Named here: Triton 3.6 does not pass on that a part of a constexpr is one.
        THEIRS: tl.constexpr = MAPS.channels
        TD: tl.constexpr = THEIRS.D
        TUNIT: tl.constexpr = THEIRS.unit
        TROPE: tl.constexpr = THEIRS.rope
        their_head = tl.load(teacher.heads_ptr + j)
        own_head = j if KEYS and TROPE else their_head
        t_own_ptr = head_base(teacher.own.ptr, teacher.own, b, own_head, TUNIT)
        other_head = j if TROPE else their_head
        t_other_ptr = head_base(teacher.other.ptr, teacher.other, b, other_head, TUNIT)
        weight = teacher.weight * tl.load(teacher.grad_loss_ptr).to(tl.float32)
    if bias is not None:
        bias_ptr, top_ptr = bias_bases(bias, b, head)
    left = count - block * TILES.rows
    # A block is full, or it is the window's last one and takes the smaller tile.
    for PART in tl.static_range(2 if TILES.row_tail else 1):
        if (left > 0 and left < TILES.rows) if PART else left >= TILES.rows:
            i = block * TILES.rows + tl.arange(0, TILES.row_tail if PART else TILES.rows)
            ok = i < count
            token = window_tokens(tl.minimum(i, count - 1), first, length, shape, WINDOWED)
            turn = table_offsets(token, shape, rotary, D, WINDOWED)
            rows = row_offsets(token, own.stride_n, UNIT)
            # Keys have been rotated before.
            if KEYS or ROPE == NONE:
                own_lo, own_hi = load_rows(own_ptr, rows, ok, CHANNELS)
            else:
                copy = turned_ptr + stats * D
                own_lo, own_hi = take_queries(
                    own_ptr, rows, ok, rotary, turn, copy, token, CHANNELS
                )
            rows = row_offsets(token, own_v.stride_n, UNIT)
            own_v_lo, own_v_hi = load_rows(own_v_ptr, rows, ok, CHANNELS)
            # Row sums of grad * out, which both launches need.
            if not KEYS:
                lse = tl.load(lse_ptr + stats + token, mask=ok, other=float("inf"))
                rows = row_offsets(token, out.stride_n, UNIT)
                delta = row_products(own_v_lo, load_tile(out_ptr, rows, ok, D, 0, LO))
                if HI:
                    delta += row_products(own_v_hi, load_tile(out_ptr, rows, ok, D, LO, HI))
                tl.store(delta_ptr + stats + token, delta, mask=ok)
                if bias is not None:
                    top = tl.load(top_ptr + token * bias.top_stride_n)
                if HAS_PAD:
                    pads = shape.size * shape.size - count
                    part = (b.to(tl.int64) * shape.windows + window) * shape.blocks + block
                    here = part_ptr + (part * shape.kept + j) * D
                    store_pad_part(here, lse, own_v_lo, pads, D, 0, LO)
                    if HI:
                        store_pad_part(here, lse, own_v_hi, pads, D, LO, HI)
            if teacher is not None:
                rows = row_offsets(token, teacher.own.stride_n, TUNIT)
                if KEYS or TROPE == NONE:
                    t_own_lo, t_own_hi = load_rows(t_own_ptr, rows, ok, THEIRS)
                else:
                    turned = table_offsets(token, shape, teacher.rotary, TD, WINDOWED)
                    copy = teacher.turned_ptr + stats * TD
                    t_own_lo, t_own_hi = take_queries(
                        *(t_own_ptr, rows, ok, teacher.rotary, turned, copy, token),
                        THEIRS,
                    )
                if not KEYS:
                    here = teacher.stats_ptr + stats
                    a_lse, b_lse, x, y = load_stats(here, teacher.plane, token, ok, MAPS.kind)
            d_lo = tl.zeros((token.shape[0], LO), tl.float32)
            d_hi = tl.zeros((token.shape[0], HI if HI else 16), tl.float32)
            d_v_lo, d_v_hi = tl.zeros_like(d_lo), tl.zeros_like(d_hi)
            # The other side streams past: whole tiles, then a smaller one with a mask.
            full = count // TILES.cols * TILES.cols
            for REST in tl.static_range(2 if TILES.col_tail else 1):
                for n in tl.range(
                    full if REST else 0,
                    count if REST else full,
                    TILES.col_tail if REST else TILES.cols,
                    num_stages=1 if REST else TILES.stages,
                ):
                    col = n + tl.arange(0, TILES.col_tail if REST else TILES.cols)
                    there = col < count
                    if REST:
                        col = tl.minimum(col, count - 1)
                    col = window_tokens(col, first, length, shape, WINDOWED)
                    at = row_offsets(col, other.stride_n, UNIT)
                    c_lo, c_hi = load_rows(other_ptr, at, there, CHANNELS, REST)
                    at = row_offsets(col, other_v.stride_n, UNIT)
                    c_v_lo, c_v_hi = load_rows(other_v_ptr, at, there, CHANNELS, REST)
                    if KEYS:
                        # An absent query has the weight exp(-inf) for every key.
                        lse = tl.load(lse_ptr + stats + col, mask=there, other=float("inf"))
                        delta = tl.load(delta_ptr + stats + col, mask=there, other=0.0)
                    # The weights p again, and the gradient ds of the scores.
                    s = scores(own_lo, own_hi, c_lo, c_hi, CHANNELS) * (scale * LOG2_E)
                    if bias is not None:
                        if KEYS:
                            top = tl.load(top_ptr + col * bias.top_stride_n)
                        added = bias_tile(bias_ptr, token, col, bias.stride_r, bias.stride_c)
                        s += (added - across(top, KEYS)) * LOG2_E
                    p = tl.exp2(s - across(lse * LOG2_E, KEYS))
                    if REST and not KEYS:
                        p = tl.where(there[None, :], p, 0.0)
                    ds = scores(own_v_lo, own_v_hi, c_v_lo, c_v_hi, CHANNELS)
                    ds = p * (ds - across(delta, KEYS))
                    # What the distance to the teacher's maps adds to it.
                    if teacher is not None:
                        at = row_offsets(col, teacher.other.stride_n, TUNIT)
                        tc_lo, tc_hi = load_rows(t_other_ptr, at, there, THEIRS, REST)
                        t = scores(t_own_lo, t_own_hi, tc_lo, tc_hi, THEIRS) * teacher.scale
                        if KEYS:
                            here = teacher.stats_ptr + stats
                            a_lse, b_lse, x, y = load_stats(
                                here, teacher.plane, col, there, MAPS.kind
                            )
                        dm = map_gradient(
                            s * (LN_2 / teacher.temperature),
                            t,
                            p,
                            across(a_lse, KEYS),
                            across(b_lse, KEYS),
                            across(x, KEYS),
                            across(y, KEYS),
                            count,
                            MAPS.kind,
                            MAPS.plain,
                        )
                        if REST:
                            dm = tl.where(there[None, :], dm, 0.0)
                        ds += weight * dm
                    ds = ds.to(c_lo.dtype)
                    d_lo = tl.dot(ds, c_lo, d_lo, input_precision=CHANNELS.precision)
                    if HI:
                        d_hi = tl.dot(ds, c_hi, d_hi, input_precision=CHANNELS.precision)
                    if KEYS:
                        p = p.to(c_v_lo.dtype)
                        d_v_lo = tl.dot(p, c_v_lo, d_v_lo, input_precision=CHANNELS.precision)
                        if HI:
                            d_v_hi = tl.dot(p, c_v_hi, d_v_hi, input_precision=CHANNELS.precision)
            # Gradients of rotated rows are rotated back.
            rows = row_offsets(token, d_own.stride_n, UNIT)
            store_grad(d_own_ptr, rows, ok, d_lo * scale, rotary, turn, 0, LO, CHANNELS)
            if HI:
                store_grad(d_own_ptr, rows, ok, d_hi * scale, rotary, turn, LO, HI, CHANNELS)
            if KEYS:
                store_rows(d_own_v_ptr, rows, ok, d_v_lo, d_v_hi, CHANNELS)
