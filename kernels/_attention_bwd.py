# SPDX-License-Identifier: Apache-2.0
"""The kernel of attention's backward pass. See docs/ops/pruned_attention.md.

B batch, H heads, K kept heads, N tokens, D head dim. Each launch recomputes the scores of its block
and owns its results, so nothing is added atomically and every sum has a fixed order.
"""

import triton
import triton.language as tl

from kdfast.kernels._attention import (
    LN_2,
    LOG2_E,
    NONE,
    head_base,
    load_rotated,
    load_tile,
    program,
    row_offsets,
    scores,
    store_grad,
    store_tile,
    table_offsets,
    window_span,
    window_tokens,
)
from kdfast.kernels._attention_bias import bias_head, bias_tile
from kdfast.kernels._attention_maps import load_stats, map_gradient


@triton.jit
def across(x, KEYS: tl.constexpr):
    """Values of the queries, broadcast to a tile: a row of it with KEYS, else a column."""
    return x[None, :] if KEYS else x[:, None]


@triton.jit
def take_queries(
    ptr,
    rows,
    ok,
    cos_ptr,
    sin_ptr,
    turn,
    copy_ptr,
    token,
    D: tl.constexpr,
    LO: tl.constexpr,
    HI: tl.constexpr,
    ROPE: tl.constexpr,
):
    """Both tiles of a program's rows, rotated, in pair order; copied to (N, D) at ``copy_ptr``."""
    lo = load_rotated(ptr, rows, ok, cos_ptr, sin_ptr, turn, D, 0, LO, ROPE)
    hi = lo
    store_tile(copy_ptr, token * D, ok, lo, D, 0, LO, NONE)
    if HI:
        hi = load_rotated(ptr, rows, ok, cos_ptr, sin_ptr, turn, D, LO, HI, ROPE)
        store_tile(copy_ptr, token * D, ok, hi, D, LO, HI, NONE)
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


@triton.jit
def bwd_kernel(
    a_ptr,  # q (B, H, N, D), with KEYS k, which is as c
    b_ptr,  # grad (B, K, N, D), with KEYS v (B, H, N, D)
    c_ptr,  # k, with KEYS q: (B, H, N, D); with ROPE (B, K, N, D), rotated and in pair order
    d_ptr,  # v, with KEYS grad
    lse_ptr,  # (B, K, N)
    # Without KEYS these three are results, and the launch with KEYS follows:
    delta_ptr,  # (B, K, N), rowsum(grad * out)
    turned_ptr,  # (B, K, N, D), contiguous: q, rotated and in pair order; only with ROPE
    part_ptr,  # (B * windows * blocks, K, D), zeros: parts of dpad; only with HAS_PAD
    out_ptr,  # (B, K, N, D)
    da_ptr,  # (B, H, N, D)
    db_ptr,  # (B, H, N, D), dv; without KEYS not used
    heads_ptr,
    cos_ptr,
    sin_ptr,
    stride_ab,
    stride_ah,
    stride_an,
    stride_bb,
    stride_bh,
    stride_bn,
    stride_cb,
    stride_ch,
    stride_cn,
    stride_db,
    stride_dh,
    stride_dn,
    stride_gb,  # of both gradients
    stride_gh,
    stride_gn,
    stride_ob,
    stride_oh,
    stride_on,
    kept,
    tokens,
    blocks,
    windows,
    grid_h,
    grid_w,
    size,
    prefix,
    skipped,
    scale,
    D: tl.constexpr,
    LO: tl.constexpr,
    HI: tl.constexpr,
    ROPE: tl.constexpr,
    WINDOWED: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_TAIL: tl.constexpr,
    COLS: tl.constexpr,
    COL_TAIL: tl.constexpr,
    STAGES: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_PAD: tl.constexpr,
    KEYS: tl.constexpr,
    # The rider: the gradient of the distance to a teacher's maps, see _attention_maps.py.
    ta_ptr=None,  # the teacher's q (B, Ht, N, TD), with KEYS k, which is as tc
    tc_ptr=None,  # its k, with KEYS q: (B, Ht, N, TD); with TROPE (B, K, N, TD), rotated
    teacher_turned_ptr=None,  # (B, K, N, TD), as turned
    teacher_cos_ptr=None,  # (rows, TD)
    teacher_sin_ptr=None,
    teacher_heads_ptr=None,  # (K,)
    stats_ptr=None,  # (planes, B, K, N)
    grad_loss_ptr=None,  # ()
    stride_tab=0,
    stride_tah=0,
    stride_tan=0,
    stride_tcb=0,
    stride_tch=0,
    stride_tcn=0,
    teacher_prefix=0,
    teacher_skipped=0,
    plane=0,
    teacher_scale=0.0,  # over the temperature
    temperature=1.0,
    weight=0.0,  # of a row in the loss, over the temperature
    KIND: tl.constexpr = -1,
    TROPE: tl.constexpr = 0,
    TD: tl.constexpr = 0,
    TLO: tl.constexpr = 0,
    THI: tl.constexpr = 0,
    TUNIT: tl.constexpr = 1,
    TPRECISION: tl.constexpr = "ieee",
    PLAIN: tl.constexpr = False,  # the temperature is 1: the maps of the loss are those of out
    # An additive bias, see _attention_bias.py.
    bias_ptr=None,  # (G, H, N, N)
    top_ptr=None,  # (G, H, N), the largest entry of each row
    biases=1,
    stride_ig=0,
    stride_ih=0,
    stride_ir=0,  # of the rows of a tile of scores, and of its columns
    stride_ic=0,
    stride_tg=0,
    stride_th=0,
    stride_tn=0,
    HAS_BIAS: tl.constexpr = False,
):
    """Gradient of one block of queries, while keys stream past.

    With KEYS, gradients of one block of keys and values, while queries stream past.
    """
    block, window, j, b = program(blocks, windows, kept)
    first, length, count = window_span(window, tokens, grid_h, grid_w, size, WINDOWED)
    head = tl.load(heads_ptr + j)
    a_ptr = head_base(a_ptr, b, j if KEYS and ROPE else head, stride_ab, stride_ah, UNIT)
    b_ptr = head_base(b_ptr, b, head if KEYS else j, stride_bb, stride_bh, UNIT)
    c_ptr = head_base(c_ptr, b, j if ROPE else head, stride_cb, stride_ch, UNIT)
    d_ptr = head_base(d_ptr, b, j if KEYS else head, stride_db, stride_dh, UNIT)
    da_ptr = head_base(da_ptr, b, head, stride_gb, stride_gh, UNIT)
    db_ptr = head_base(db_ptr, b, head, stride_gb, stride_gh, UNIT)
    out_ptr = head_base(out_ptr, b, j, stride_ob, stride_oh, UNIT)
    stats = (b.to(tl.int64) * kept + j) * tokens
    if KIND >= 0:
        teacher = tl.load(teacher_heads_ptr + j)
        own = j if KEYS and TROPE else teacher
        ta_ptr = head_base(ta_ptr, b, own, stride_tab, stride_tah, TUNIT)
        tc_ptr = head_base(tc_ptr, b, j if TROPE else teacher, stride_tcb, stride_tch, TUNIT)
        weight *= tl.load(grad_loss_ptr).to(tl.float32)
    if HAS_BIAS:
        bias_ptr = bias_head(bias_ptr, b, head, biases, stride_ig, stride_ih)
        top_ptr = bias_head(top_ptr, b, head, biases, stride_tg, stride_th)
    left = count - block * ROWS
    for PART in tl.static_range(2 if ROW_TAIL else 1):
        if (left > 0 and left < ROWS) if PART else left >= ROWS:
            i = block * ROWS + tl.arange(0, ROW_TAIL if PART else ROWS)
            ok = i < count
            token = window_tokens(tl.minimum(i, count - 1), first, length, grid_w, WINDOWED)
            turn = table_offsets(token, grid_w, size, prefix, skipped, D, WINDOWED)
            rows = row_offsets(token, stride_an, UNIT)
            # Keys have been rotated before.
            if KEYS or ROPE == NONE:
                a_lo = load_tile(a_ptr, rows, ok, D, 0, LO)
                a_hi = load_tile(a_ptr, rows, ok, D, LO, HI) if HI else a_lo
            else:
                copy = turned_ptr + stats * D
                a_lo, a_hi = take_queries(
                    a_ptr, rows, ok, cos_ptr, sin_ptr, turn, copy, token, D, LO, HI, ROPE
                )
            rows = row_offsets(token, stride_bn, UNIT)
            b_lo = load_tile(b_ptr, rows, ok, D, 0, LO)
            b_hi = load_tile(b_ptr, rows, ok, D, LO, HI) if HI else b_lo
            if not KEYS:
                lse = tl.load(lse_ptr + stats + token, mask=ok, other=float("inf"))
                rows = row_offsets(token, stride_on, UNIT)
                delta = row_products(b_lo, load_tile(out_ptr, rows, ok, D, 0, LO))
                if HI:
                    delta += row_products(b_hi, load_tile(out_ptr, rows, ok, D, LO, HI))
                tl.store(delta_ptr + stats + token, delta, mask=ok)
                if HAS_BIAS:
                    top = tl.load(top_ptr + token * stride_tn)
                if HAS_PAD:
                    pads = size * size - count
                    part = (b.to(tl.int64) * windows + window) * blocks + block
                    here = part_ptr + (part * kept + j) * D
                    store_pad_part(here, lse, b_lo, pads, D, 0, LO)
                    if HI:
                        store_pad_part(here, lse, b_hi, pads, D, LO, HI)
            if KIND >= 0:
                rows = row_offsets(token, stride_tan, TUNIT)
                if KEYS or TROPE == NONE:
                    ta_lo = load_tile(ta_ptr, rows, ok, TD, 0, TLO)
                    ta_hi = load_tile(ta_ptr, rows, ok, TD, TLO, THI) if THI else ta_lo
                else:
                    cos, sin, skip = teacher_cos_ptr, teacher_sin_ptr, teacher_skipped
                    turned = table_offsets(token, grid_w, size, teacher_prefix, skip, TD, WINDOWED)
                    copy = teacher_turned_ptr + stats * TD
                    ta_lo, ta_hi = take_queries(
                        ta_ptr, rows, ok, cos, sin, turned, copy, token, TD, TLO, THI, TROPE
                    )
                if not KEYS:
                    a_lse, b_lse, x, y = load_stats(stats_ptr + stats, plane, token, ok, KIND)
            da_lo = tl.zeros((token.shape[0], LO), tl.float32)
            da_hi = tl.zeros((token.shape[0], HI if HI else 16), tl.float32)
            db_lo, db_hi = tl.zeros_like(da_lo), tl.zeros_like(da_hi)
            full = count // COLS * COLS
            for REST in tl.static_range(2 if COL_TAIL else 1):
                for n in tl.range(
                    full if REST else 0,
                    count if REST else full,
                    COL_TAIL if REST else COLS,
                    num_stages=1 if REST else STAGES,
                ):
                    col = n + tl.arange(0, COL_TAIL if REST else COLS)
                    there = col < count
                    if REST:
                        col = tl.minimum(col, count - 1)
                    col = window_tokens(col, first, length, grid_w, WINDOWED)
                    at = row_offsets(col, stride_cn, UNIT)
                    c_lo = load_tile(c_ptr, at, there, D, 0, LO, REST)
                    c_hi = load_tile(c_ptr, at, there, D, LO, HI, REST) if HI else c_lo
                    at = row_offsets(col, stride_dn, UNIT)
                    d_lo = load_tile(d_ptr, at, there, D, 0, LO, REST)
                    d_hi = load_tile(d_ptr, at, there, D, LO, HI, REST) if HI else d_lo
                    if KEYS:
                        # An absent query has the weight exp(-inf) for every key.
                        lse = tl.load(lse_ptr + stats + col, mask=there, other=float("inf"))
                        delta = tl.load(delta_ptr + stats + col, mask=there, other=0.0)
                    s = scores(a_lo, a_hi, c_lo, c_hi, HI, PRECISION) * (scale * LOG2_E)
                    if HAS_BIAS:
                        if KEYS:
                            top = tl.load(top_ptr + col * stride_tn)
                        bias = bias_tile(bias_ptr, token, col, stride_ir, stride_ic)
                        s += (bias - across(top, KEYS)) * LOG2_E
                    p = tl.exp2(s - across(lse * LOG2_E, KEYS))
                    if REST and not KEYS:
                        p = tl.where(there[None, :], p, 0.0)
                    ds = scores(b_lo, b_hi, d_lo, d_hi, HI, PRECISION)
                    ds = p * (ds - across(delta, KEYS))
                    if KIND >= 0:
                        at = row_offsets(col, stride_tcn, TUNIT)
                        tc_lo = load_tile(tc_ptr, at, there, TD, 0, TLO, REST)
                        tc_hi = tc_lo
                        if THI:
                            tc_hi = load_tile(tc_ptr, at, there, TD, TLO, THI, REST)
                        t = scores(ta_lo, ta_hi, tc_lo, tc_hi, THI, TPRECISION) * teacher_scale
                        if KEYS:
                            here = stats_ptr + stats
                            a_lse, b_lse, x, y = load_stats(here, plane, col, there, KIND)
                        dm = map_gradient(
                            s * (LN_2 / temperature),
                            t,
                            p,
                            across(a_lse, KEYS),
                            across(b_lse, KEYS),
                            across(x, KEYS),
                            across(y, KEYS),
                            count,
                            KIND,
                            PLAIN,
                        )
                        if REST:
                            dm = tl.where(there[None, :], dm, 0.0)
                        ds += weight * dm
                    ds = ds.to(c_lo.dtype)
                    da_lo = tl.dot(ds, c_lo, da_lo, input_precision=PRECISION)
                    if HI:
                        da_hi = tl.dot(ds, c_hi, da_hi, input_precision=PRECISION)
                    if KEYS:
                        p = p.to(d_lo.dtype)
                        db_lo = tl.dot(p, d_lo, db_lo, input_precision=PRECISION)
                        if HI:
                            db_hi = tl.dot(p, d_hi, db_hi, input_precision=PRECISION)
            rows = row_offsets(token, stride_gn, UNIT)
            store_grad(da_ptr, rows, ok, da_lo * scale, cos_ptr, sin_ptr, turn, D, 0, LO, ROPE)
            if HI:
                store_grad(da_ptr, rows, ok, da_hi * scale, cos_ptr, sin_ptr, turn, D, LO, HI, ROPE)
            if KEYS:
                store_tile(db_ptr, rows, ok, db_lo, D, 0, LO, NONE)
                if HI:
                    store_tile(db_ptr, rows, ok, db_hi, D, LO, HI, NONE)
