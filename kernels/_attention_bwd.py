# SPDX-License-Identifier: Apache-2.0
"""The two kernels of attention's backward pass. See docs/pruned_attention.md.

B batch, H heads, K kept heads, N tokens, D head dim. Each recomputes the scores of its block and
owns its results, so nothing is added atomically and every sum has a fixed order.
"""

import triton
import triton.language as tl

from kdfast.kernels._attention import (
    LN_2,
    LOG2_E,
    NONE,
    head_base,
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
from kdfast.kernels._attention_maps import load_stats, map_gradient


@triton.jit
def bwd_dq_kernel(
    q_ptr,  # (B, H, N, D); with ROPE (B, K, N, D), rotated and in pair order, as is k
    k_ptr,
    v_ptr,  # (B, H, N, D)
    grad_ptr,  # (B, K, N, D)
    lse_ptr,  # (B, K, N)
    delta_ptr,  # (B, K, N)
    dq_ptr,  # (B, H, N, D)
    heads_ptr,
    cos_ptr,
    sin_ptr,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_db,
    stride_dh,
    stride_dn,
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
    # The rider: the gradient of the distance to a teacher's maps, see _attention_maps.py.
    teacher_q_ptr=None,  # (B, Ht, N, TD); with TROPE (B, K, N, TD), rotated, as is its k
    teacher_k_ptr=None,
    teacher_heads_ptr=None,  # (K,)
    stats_ptr=None,  # (planes, B, K, N)
    grad_loss_ptr=None,  # ()
    stride_tqb=0,
    stride_tqh=0,
    stride_tqn=0,
    stride_tkb=0,
    stride_tkh=0,
    stride_tkn=0,
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
):
    """Gradient of one block of queries; keys stream past."""
    block, window, j, b = program(blocks, windows, kept)
    first, length, count = window_span(window, tokens, grid_h, grid_w, size, WINDOWED)
    head = tl.load(heads_ptr + j)
    q_ptr = head_base(q_ptr, b, head if ROPE == NONE else j, stride_qb, stride_qh, UNIT)
    k_ptr = head_base(k_ptr, b, head if ROPE == NONE else j, stride_kb, stride_kh, UNIT)
    v_ptr = head_base(v_ptr, b, head, stride_vb, stride_vh, UNIT)
    grad_ptr = head_base(grad_ptr, b, j, stride_gb, stride_gh, UNIT)
    dq_ptr = head_base(dq_ptr, b, head, stride_db, stride_dh, UNIT)
    stats = (b.to(tl.int64) * kept + j) * tokens
    if KIND >= 0:
        teacher = j if TROPE else tl.load(teacher_heads_ptr + j)
        teacher_q_ptr = head_base(teacher_q_ptr, b, teacher, stride_tqb, stride_tqh, TUNIT)
        teacher_k_ptr = head_base(teacher_k_ptr, b, teacher, stride_tkb, stride_tkh, TUNIT)
        weight *= tl.load(grad_loss_ptr).to(tl.float32)
    left = count - block * ROWS
    for PART in tl.static_range(2 if ROW_TAIL else 1):
        if (left > 0 and left < ROWS) if PART else left >= ROWS:
            i = block * ROWS + tl.arange(0, ROW_TAIL if PART else ROWS)
            ok = i < count
            token = window_tokens(tl.minimum(i, count - 1), first, length, grid_w, WINDOWED)
            rows = row_offsets(token, stride_qn, UNIT)
            q_lo = load_tile(q_ptr, rows, ok, D, 0, LO)
            q_hi = load_tile(q_ptr, rows, ok, D, LO, HI) if HI else q_lo
            rows = row_offsets(token, stride_gn, UNIT)
            g_lo = load_tile(grad_ptr, rows, ok, D, 0, LO)
            g_hi = load_tile(grad_ptr, rows, ok, D, LO, HI) if HI else g_lo
            lse = tl.load(lse_ptr + stats + token, mask=ok, other=float("inf")) * LOG2_E
            delta = tl.load(delta_ptr + stats + token, mask=ok, other=0.0)
            if KIND >= 0:
                rows = row_offsets(token, stride_tqn, TUNIT)
                tq_lo = load_tile(teacher_q_ptr, rows, ok, TD, 0, TLO)
                tq_hi = load_tile(teacher_q_ptr, rows, ok, TD, TLO, THI) if THI else tq_lo
                a_lse, b_lse, x, y = load_stats(stats_ptr + stats, plane, token, ok, KIND)
            dq_lo = tl.zeros((token.shape[0], LO), tl.float32)
            dq_hi = tl.zeros((token.shape[0], HI if HI else 16), tl.float32)
            full = count // COLS * COLS
            for REST in tl.static_range(2 if COL_TAIL else 1):
                for c in tl.range(
                    full if REST else 0,
                    count if REST else full,
                    COL_TAIL if REST else COLS,
                    num_stages=1 if REST else STAGES,
                ):
                    n = c + tl.arange(0, COL_TAIL if REST else COLS)
                    there = n < count
                    keys = n
                    if REST:
                        keys = tl.minimum(n, count - 1)
                    keys = window_tokens(keys, first, length, grid_w, WINDOWED)
                    at = row_offsets(keys, stride_kn, UNIT)
                    k_lo = load_tile(k_ptr, at, there, D, 0, LO, REST)
                    k_hi = load_tile(k_ptr, at, there, D, LO, HI, REST) if HI else k_lo
                    at = row_offsets(keys, stride_vn, UNIT)
                    v_lo = load_tile(v_ptr, at, there, D, 0, LO, REST)
                    v_hi = load_tile(v_ptr, at, there, D, LO, HI, REST) if HI else v_lo
                    s = scores(q_lo, q_hi, k_lo, k_hi, HI, PRECISION) * (scale * LOG2_E)
                    p = tl.exp2(s - lse[:, None])
                    if REST:
                        p = tl.where(there[None, :], p, 0.0)
                    dp = scores(g_lo, g_hi, v_lo, v_hi, HI, PRECISION)
                    ds = p * (dp - delta[:, None])
                    if KIND >= 0:
                        at = row_offsets(keys, stride_tkn, TUNIT)
                        tk_lo = load_tile(teacher_k_ptr, at, there, TD, 0, TLO, REST)
                        tk_hi = tk_lo
                        if THI:
                            tk_hi = load_tile(teacher_k_ptr, at, there, TD, TLO, THI, REST)
                        t = scores(tq_lo, tq_hi, tk_lo, tk_hi, THI, TPRECISION) * teacher_scale
                        s *= LN_2 / temperature
                        da = map_gradient(
                            s,
                            t,
                            a_lse[:, None],
                            b_lse[:, None],
                            x[:, None],
                            y[:, None],
                            count,
                            KIND,
                        )
                        if REST:
                            da = tl.where(there[None, :], da, 0.0)
                        ds += weight * da
                    ds = ds.to(k_lo.dtype)
                    dq_lo = tl.dot(ds, k_lo, dq_lo, input_precision=PRECISION)
                    if HI:
                        dq_hi = tl.dot(ds, k_hi, dq_hi, input_precision=PRECISION)
            turn = table_offsets(token, grid_w, size, prefix, skipped, D, WINDOWED)
            rows = row_offsets(token, stride_dn, UNIT)
            store_grad(dq_ptr, rows, ok, dq_lo * scale, cos_ptr, sin_ptr, turn, D, 0, LO, ROPE)
            if HI:
                store_grad(dq_ptr, rows, ok, dq_hi * scale, cos_ptr, sin_ptr, turn, D, LO, HI, ROPE)


@triton.jit
def bwd_dkdv_kernel(
    q_ptr,  # (B, H, N, D); with ROPE (B, K, N, D), rotated and in pair order, as is k
    k_ptr,
    v_ptr,  # (B, H, N, D)
    grad_ptr,  # (B, K, N, D)
    lse_ptr,  # (B, K, N)
    delta_ptr,  # (B, K, N)
    dk_ptr,  # (B, H, N, D), as is dv
    dv_ptr,
    heads_ptr,
    cos_ptr,
    sin_ptr,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_db,
    stride_dh,
    stride_dn,
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
    # The rider: the gradient of the distance to a teacher's maps, see _attention_maps.py.
    teacher_q_ptr=None,  # (B, Ht, N, TD); with TROPE (B, K, N, TD), rotated, as is its k
    teacher_k_ptr=None,
    teacher_heads_ptr=None,  # (K,)
    stats_ptr=None,  # (planes, B, K, N)
    grad_loss_ptr=None,  # ()
    stride_tqb=0,
    stride_tqh=0,
    stride_tqn=0,
    stride_tkb=0,
    stride_tkh=0,
    stride_tkn=0,
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
):
    """Gradients of one block of keys and values; queries stream past."""
    block, window, j, b = program(blocks, windows, kept)
    first, length, count = window_span(window, tokens, grid_h, grid_w, size, WINDOWED)
    head = tl.load(heads_ptr + j)
    q_ptr = head_base(q_ptr, b, head if ROPE == NONE else j, stride_qb, stride_qh, UNIT)
    k_ptr = head_base(k_ptr, b, head if ROPE == NONE else j, stride_kb, stride_kh, UNIT)
    v_ptr = head_base(v_ptr, b, head, stride_vb, stride_vh, UNIT)
    grad_ptr = head_base(grad_ptr, b, j, stride_gb, stride_gh, UNIT)
    dk_ptr = head_base(dk_ptr, b, head, stride_db, stride_dh, UNIT)
    dv_ptr = head_base(dv_ptr, b, head, stride_db, stride_dh, UNIT)
    stats = (b.to(tl.int64) * kept + j) * tokens
    if KIND >= 0:
        teacher = j if TROPE else tl.load(teacher_heads_ptr + j)
        teacher_q_ptr = head_base(teacher_q_ptr, b, teacher, stride_tqb, stride_tqh, TUNIT)
        teacher_k_ptr = head_base(teacher_k_ptr, b, teacher, stride_tkb, stride_tkh, TUNIT)
        weight *= tl.load(grad_loss_ptr).to(tl.float32)
    left = count - block * ROWS
    for PART in tl.static_range(2 if ROW_TAIL else 1):
        if (left > 0 and left < ROWS) if PART else left >= ROWS:
            i = block * ROWS + tl.arange(0, ROW_TAIL if PART else ROWS)
            ok = i < count
            token = window_tokens(tl.minimum(i, count - 1), first, length, grid_w, WINDOWED)
            rows = row_offsets(token, stride_kn, UNIT)
            k_lo = load_tile(k_ptr, rows, ok, D, 0, LO)
            k_hi = load_tile(k_ptr, rows, ok, D, LO, HI) if HI else k_lo
            rows = row_offsets(token, stride_vn, UNIT)
            v_lo = load_tile(v_ptr, rows, ok, D, 0, LO)
            v_hi = load_tile(v_ptr, rows, ok, D, LO, HI) if HI else v_lo
            if KIND >= 0:
                rows = row_offsets(token, stride_tkn, TUNIT)
                tk_lo = load_tile(teacher_k_ptr, rows, ok, TD, 0, TLO)
                tk_hi = load_tile(teacher_k_ptr, rows, ok, TD, TLO, THI) if THI else tk_lo
            dk_lo = tl.zeros((token.shape[0], LO), tl.float32)
            dk_hi = tl.zeros((token.shape[0], HI if HI else 16), tl.float32)
            dv_lo, dv_hi = tl.zeros_like(dk_lo), tl.zeros_like(dk_hi)
            full = count // COLS * COLS
            for REST in tl.static_range(2 if COL_TAIL else 1):
                for c in tl.range(
                    full if REST else 0,
                    count if REST else full,
                    COL_TAIL if REST else COLS,
                    num_stages=1 if REST else STAGES,
                ):
                    n = c + tl.arange(0, COL_TAIL if REST else COLS)
                    there = n < count
                    queries = n
                    if REST:
                        queries = tl.minimum(n, count - 1)
                    queries = window_tokens(queries, first, length, grid_w, WINDOWED)
                    at = row_offsets(queries, stride_qn, UNIT)
                    q_lo = load_tile(q_ptr, at, there, D, 0, LO, REST)
                    q_hi = load_tile(q_ptr, at, there, D, LO, HI, REST) if HI else q_lo
                    at = row_offsets(queries, stride_gn, UNIT)
                    g_lo = load_tile(grad_ptr, at, there, D, 0, LO, REST)
                    g_hi = load_tile(grad_ptr, at, there, D, LO, HI, REST) if HI else g_lo
                    # An absent query has the weight exp(-inf) for every key.
                    lse = tl.load(lse_ptr + stats + queries, mask=there, other=float("inf"))
                    delta = tl.load(delta_ptr + stats + queries, mask=there, other=0.0)
                    s = scores(k_lo, k_hi, q_lo, q_hi, HI, PRECISION) * (scale * LOG2_E)
                    p = tl.exp2(s - lse[None, :] * LOG2_E)
                    dp = scores(v_lo, v_hi, g_lo, g_hi, HI, PRECISION)
                    ds = p * (dp - delta[None, :])
                    if KIND >= 0:
                        at = row_offsets(queries, stride_tqn, TUNIT)
                        tq_lo = load_tile(teacher_q_ptr, at, there, TD, 0, TLO, REST)
                        tq_hi = tq_lo
                        if THI:
                            tq_hi = load_tile(teacher_q_ptr, at, there, TD, TLO, THI, REST)
                        t = scores(tk_lo, tk_hi, tq_lo, tq_hi, THI, TPRECISION) * teacher_scale
                        s *= LN_2 / temperature
                        here = stats_ptr + stats
                        a_lse, b_lse, x, y = load_stats(here, plane, queries, there, KIND)
                        da = map_gradient(
                            s,
                            t,
                            a_lse[None, :],
                            b_lse[None, :],
                            x[None, :],
                            y[None, :],
                            count,
                            KIND,
                        )
                        if REST:
                            da = tl.where(there[None, :], da, 0.0)
                        ds += weight * da
                    ds = ds.to(q_lo.dtype)
                    p = p.to(g_lo.dtype)
                    dv_lo = tl.dot(p, g_lo, dv_lo, input_precision=PRECISION)
                    dk_lo = tl.dot(ds, q_lo, dk_lo, input_precision=PRECISION)
                    if HI:
                        dv_hi = tl.dot(p, g_hi, dv_hi, input_precision=PRECISION)
                        dk_hi = tl.dot(ds, q_hi, dk_hi, input_precision=PRECISION)
            turn = table_offsets(token, grid_w, size, prefix, skipped, D, WINDOWED)
            rows = row_offsets(token, stride_dn, UNIT)
            store_tile(dv_ptr, rows, ok, dv_lo, D, 0, LO, NONE)
            store_grad(dk_ptr, rows, ok, dk_lo * scale, cos_ptr, sin_ptr, turn, D, 0, LO, ROPE)
            if HI:
                store_tile(dv_ptr, rows, ok, dv_hi, D, LO, HI, NONE)
                store_grad(dk_ptr, rows, ok, dk_hi * scale, cos_ptr, sin_ptr, turn, D, LO, HI, ROPE)
