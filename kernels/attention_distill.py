# SPDX-License-Identifier: Apache-2.0
"""Attention, and the distance of its maps to a teacher's. See docs/ops/attention_distill.md.

B batch, H heads, K kept heads, N tokens, D head dim; Ht, TD the teacher's. The forward pass is that
of pruned_attention, a log-sum-exp of the teacher's scores, and row sums over both maps; the
gradient rides on the kernels of pruned_attention's backward pass.
"""

import math
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.kernels import pruned_attention
from kdfast.kernels._attention import (
    NONE,
    head_base,
    load_query,
    load_tile,
    program,
    row_offsets,
    scores,
    table_offsets,
    window_span,
    window_tokens,
)
from kdfast.kernels._attention_call import Call, Scores, Windows, make_call, rotated, turning
from kdfast.kernels._attention_maps import (
    COSINE,
    JSD,
    KINDS,
    KL,
    LOGIT_MSE,
    MSE,
    load_stats,
    map_terms,
    row_results,
)
from kdfast.kernels._common import (
    SUM_BLOCK,
    alignment,
    chunks,
    dot_precision,
    total_kernel,
    unit_stride,
)
from kdfast.ops.attention_distill import STATS


@triton.jit
def _distance_kernel(
    q_ptr,  # (B, H, N, D)
    k_ptr,  # (B, H, N, D); with ROPE (B, K, N, D), rotated and in pair order
    distance_ptr,  # (B, K, N)
    heads_ptr,  # (K,)
    cos_ptr,  # (rows, D)
    sin_ptr,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
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
    # The teacher, as in the kernel of the backward pass.
    ta_ptr,
    tc_ptr,
    teacher_turned_ptr,
    teacher_cos_ptr,
    teacher_sin_ptr,
    teacher_heads_ptr,
    stats_ptr,
    grad_loss_ptr,
    stride_tab,
    stride_tah,
    stride_tan,
    stride_tcb,
    stride_tch,
    stride_tcn,
    teacher_prefix,
    teacher_skipped,
    plane,
    teacher_scale,
    temperature,
    weight,
    KIND: tl.constexpr,
    TROPE: tl.constexpr,
    TD: tl.constexpr,
    TLO: tl.constexpr,
    THI: tl.constexpr,
    TUNIT: tl.constexpr,
    TPRECISION: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """Distances of one block of queries; fills the planes of stats that the gradient needs."""
    block, window, j, b = program(blocks, windows, kept)
    first, length, count = window_span(window, tokens, grid_h, grid_w, size, WINDOWED)
    head, teacher = tl.load(heads_ptr + j), tl.load(teacher_heads_ptr + j)
    q_ptr = head_base(q_ptr, b, head, stride_qb, stride_qh, UNIT)
    k_ptr = head_base(k_ptr, b, head if ROPE == NONE else j, stride_kb, stride_kh, UNIT)
    ta_ptr = head_base(ta_ptr, b, teacher, stride_tab, stride_tah, TUNIT)
    tc_ptr = head_base(tc_ptr, b, j if TROPE else teacher, stride_tcb, stride_tch, TUNIT)
    stats = (b.to(tl.int64) * kept + j) * tokens
    left = count - block * ROWS
    for PART in tl.static_range(2 if ROW_TAIL else 1):
        if (left > 0 and left < ROWS) if PART else left >= ROWS:
            i = block * ROWS + tl.arange(0, ROW_TAIL if PART else ROWS)
            ok = i < count
            token = window_tokens(tl.minimum(i, count - 1), first, length, grid_w, WINDOWED)
            turn = table_offsets(token, grid_w, size, prefix, skipped, D, WINDOWED)
            rows = row_offsets(token, stride_qn, UNIT)
            q_lo = load_query(q_ptr, rows, ok, cos_ptr, sin_ptr, turn, D, 0, LO, ROPE)
            q_hi = q_lo
            if HI:
                q_hi = load_query(q_ptr, rows, ok, cos_ptr, sin_ptr, turn, D, LO, HI, ROPE)
            cos, sin = teacher_cos_ptr, teacher_sin_ptr
            turn = table_offsets(token, grid_w, size, teacher_prefix, teacher_skipped, TD, WINDOWED)
            rows = row_offsets(token, stride_tan, TUNIT)
            tq_lo = load_query(ta_ptr, rows, ok, cos, sin, turn, TD, 0, TLO, TROPE)
            tq_hi = tq_lo
            if THI:
                tq_hi = load_query(ta_ptr, rows, ok, cos, sin, turn, TD, TLO, THI, TROPE)
            a_lse, b_lse, x, y = load_stats(
                stats_ptr + stats, plane, token, ok, LOGIT_MSE if KIND == LOGIT_MSE else KL
            )
            one = tl.zeros(token.shape, tl.float32)
            two, three = one, one
            top = tl.full(token.shape, float("-inf"), tl.float32)
            if HAS_PAD and KIND == KL:
                pads = size * size - count
                top = tl.where(pads > 0, tl.zeros_like(top), top)
                one, two = pads * a_lse, one + pads
            elif HAS_PAD and KIND != LOGIT_MSE:
                # A padded key is an entry of logit 0 of both maps.
                pads = size * size - count
                u, v, w = map_terms(one, one, a_lse, b_lse, KIND)
                one, two, three = pads * u, pads * v, pads * w
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
                    at = row_offsets(keys, stride_tcn, TUNIT)
                    tk_lo = load_tile(tc_ptr, at, there, TD, 0, TLO, REST)
                    tk_hi = tk_lo
                    if THI:
                        tk_hi = load_tile(tc_ptr, at, there, TD, TLO, THI, REST)
                    s = scores(q_lo, q_hi, k_lo, k_hi, HI, PRECISION) * (scale / temperature)
                    t = scores(tq_lo, tq_hi, tk_lo, tk_hi, THI, TPRECISION) * teacher_scale
                    if KIND == KL:
                        # Sums of r' and r' (log r' - log p), r' = exp(t - top) not yet normalised.
                        t = tl.where(there[None, :], t, float("-inf")) if REST else t
                        raised = tl.maximum(top, tl.max(t, 1))
                        fall = tl.where(top == float("-inf"), 0.0, top - raised)
                        decay = tl.exp(top - raised)
                        t -= raised[:, None]
                        r = tl.exp(t)
                        d = r * (t - (s - a_lse[:, None]))
                        d = tl.where(there[None, :], d, 0.0) if REST else d
                        one = decay * (one + two * fall) + tl.sum(d, 1)
                        two, top = decay * two + tl.sum(r, 1), raised
                    else:
                        u, v, w = map_terms(s, t, a_lse[:, None], b_lse[:, None], KIND)
                        one += tl.sum(tl.where(there[None, :], u, 0.0) if REST else u, 1)
                    if KIND == JSD or KIND == MSE or KIND == COSINE:
                        two += tl.sum(tl.where(there[None, :], v, 0.0) if REST else v, 1)
                    if KIND == COSINE:
                        three += tl.sum(tl.where(there[None, :], w, 0.0) if REST else w, 1)
            place = stats_ptr + stats + token
            if KIND == KL:
                distance = one / two - tl.log(two)
                tl.store(place + 2 * tl.cast(plane, tl.int64), top + tl.log(two), mask=ok)
            else:
                distance, x, y = row_results(one, two, three, count, KIND)
            tl.store(distance_ptr + stats + token, distance, mask=ok)
            if KIND != LOGIT_MSE and KIND != KL:
                tl.store(place + 3 * tl.cast(plane, tl.int64), x, mask=ok)
            if KIND == COSINE:
                tl.store(place + 4 * tl.cast(plane, tl.int64), y, mask=ok)


def pair_of_calls(
    q: Tensor,
    teacher_q: Tensor,
    heads: list[int] | None,
    teacher_heads: list[int],
    student_scores: Scores,
    windows: Windows,
    teacher_scores: Scores,
) -> tuple[Call, Call]:
    """The student's call, with blocks for kernels that see both sides, and the teacher's."""
    call = make_call(q, heads, student_scores, windows)
    teacher = make_call(teacher_q, teacher_heads, teacher_scores, windows)
    # Blocks have to suit both sides: those of two tiles are the smallest.
    itemsize = max(q.dtype.itemsize, teacher_q.dtype.itemsize)
    dims = (call.head_dim, teacher.head_dim)
    width = max(dims, key=lambda d: (itemsize == 4 and chunks(d, itemsize)[1] > 0, d))
    return replace(call, width=width, itemsize=itemsize), teacher


def log_sums(q: Tensor, k: Tensor, call: Call, temperature: float) -> Tensor:
    """Log-sum-exp (B, K, N) of the scores over the temperature; k as ``rotated`` gives it."""
    # The forward kernel of attention without values: q stands for what it does not touch.
    lse = torch.empty((call.batch, call.kept, call.tokens), dtype=torch.float32, device=q.device)
    pointers = (q, k, q, q, lse, call.heads, call.cos, call.sin, call.pad)
    scaled = replace(call, scale=call.scale / temperature * math.log2(math.e))
    scaled.launch(
        pruned_attention.fwd_kernel,
        call.tiles("fwd"),
        pointers,
        (q, k, q, q),
        HAS_PAD=call.has_pad,
        VALUES=False,
    )
    return lse


def rider(
    a: Tensor,
    c: Tensor,
    turned: Tensor,
    teacher: Call,
    stats: Tensor,
    grad_loss: Tensor,
    temperature: float,
    kind: str,
) -> dict[str, Any]:
    """The parameters, by name, that kernels have for the distance to a teacher's maps.

    Args:
        a: The teacher's tensor on the side of the resident rows: its q; for the gradient of keys
            its k as ``rotated`` gives it.
        c: The teacher's tensor on the side that streams past: its k as ``rotated`` gives it; for
            the gradient of keys its rotated q.
        turned: Where the gradient of queries leaves the teacher's rotated q.
        teacher: The teacher's call.
        stats: (planes, B, K, N), as the forward pass fills it.
        grad_loss: The gradient of the loss, ().
        temperature: The temperature of both maps.
        kind: A kind of ``KINDS``.
    """
    low, high = chunks(teacher.head_dim, a.dtype.itemsize)
    names = [f"stride_t{side}{axis}" for side in "ac" for axis in "bhn"]
    strides = [*a.stride()[:3], *c.stride()[:3]]
    rows = stats[0].numel()
    return dict(zip(names, strides, strict=True)) | {
        "ta_ptr": a,
        "tc_ptr": c,
        "teacher_turned_ptr": turned,
        "teacher_cos_ptr": teacher.cos,
        "teacher_sin_ptr": teacher.sin,
        "teacher_heads_ptr": teacher.heads,
        "stats_ptr": stats,
        "grad_loss_ptr": grad_loss,
        "teacher_prefix": teacher.prefix,
        "teacher_skipped": teacher.skipped,
        "plane": rows,
        "teacher_scale": teacher.scale / temperature,
        "temperature": float(temperature),
        "weight": 1 / (rows * temperature),
        "KIND": KINDS.index(kind),
        "TROPE": teacher.rope,
        "TD": teacher.head_dim,
        "TLO": low,
        "THI": high,
        "TUNIT": alignment(a, c),
        "TPRECISION": dot_precision(a.dtype),
        "PLAIN": temperature == 1,
    }


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    heads: list[int] | None,
    teacher_heads: list[int],
    cos: Tensor | None,
    sin: Tensor | None,
    prefix: int,
    interleaved: bool,
    scale: float,
    grid: list[int] | None,
    window: int,
    pad_value: Tensor | None,
    teacher_cos: Tensor | None,
    teacher_sin: Tensor | None,
    teacher_prefix: int,
    teacher_interleaved: bool,
    teacher_scale: float,
    temperature: float,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches ``kdfast::attention_distill``: out (B, K, N, D), loss () and stats."""
    q, k, v = (unit_stride(x) for x in (q, k, v))
    teacher_q, teacher_k = unit_stride(teacher_q), unit_stride(teacher_k)
    call, teacher = pair_of_calls(
        *(q, teacher_q, heads, teacher_heads),
        Scores(cos, sin, prefix, interleaved, scale),
        Windows(grid, window, pad_value),
        Scores(teacher_cos, teacher_sin, teacher_prefix, teacher_interleaved, teacher_scale),
    )
    with torch.cuda.device_of(q):
        # The attention of the student, by its own kernel.
        k = rotated(k, call)
        own = replace(call, width=call.head_dim, itemsize=q.dtype.itemsize)
        out, lse = pruned_attention.attend(q, k, v, own)
        # Here the planes are lse, a_lse, b_lse, x, y: fewer than the CPU kernel uses.
        stats = torch.empty((STATS[kind], *lse.shape), dtype=torch.float32, device=q.device)
        loss = torch.zeros((), dtype=torch.float32, device=q.device)
        if out.numel() == 0:
            return out, loss, stats
        # What the rows of both maps are normalised by; for "kl" the next kernel adds the teacher's.
        teacher_k = rotated(teacher_k, teacher)
        stats[0] = lse
        if kind != "logit_mse":
            stats[1] = lse if temperature == 1 else log_sums(q, k, own, temperature)
        if kind not in ("kl", "logit_mse"):
            stats[2] = log_sums(teacher_q, teacher_k, teacher, temperature)
        # The distance of every row, and their mean.
        distance = torch.empty_like(lse)
        call.launch(
            _distance_kernel,
            call.tiles("distance"),
            (q, k, distance, call.heads, call.cos, call.sin),
            (q, k),
            HAS_PAD=call.has_pad,
            **rider(teacher_q, teacher_k, teacher_q, teacher, stats, loss, temperature, kind),
        )
        rows = distance.numel()
        total_kernel[(1,)](distance, loss, rows, float(rows), BLOCK=SUM_BLOCK)
    return out, loss, stats


def backward(
    grad_out: Tensor,
    grad_loss: Tensor,
    out: Tensor,
    stats: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    heads: list[int] | None,
    teacher_heads: list[int],
    cos: Tensor | None,
    sin: Tensor | None,
    prefix: int,
    interleaved: bool,
    scale: float,
    grid: list[int] | None,
    window: int,
    pad_value: Tensor | None,
    teacher_cos: Tensor | None,
    teacher_sin: Tensor | None,
    teacher_prefix: int,
    teacher_interleaved: bool,
    teacher_scale: float,
    temperature: float,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches ``kdfast::attention_distill_bwd``: dq, dk, dv (B, H, N, D) and dpad (H, D)."""
    grad_out, out, q, k, v = (unit_stride(x) for x in (grad_out, out, q, k, v))
    teacher_q, teacher_k = unit_stride(teacher_q), unit_stride(teacher_k)
    call, teacher = pair_of_calls(
        *(q, teacher_q, heads, teacher_heads),
        Scores(cos, sin, prefix, interleaved, scale),
        Windows(grid, window, pad_value),
        Scores(teacher_cos, teacher_sin, teacher_prefix, teacher_interleaved, teacher_scale),
    )
    with torch.cuda.device_of(q):
        # The gradient of queries leaves the teacher's rotated q for that of keys.
        turned = teacher_q
        if out.numel():
            teacher_k, turned = rotated(teacher_k, teacher), turning(teacher_q, teacher)

        def options(keys: bool) -> dict[str, Any]:
            sides = (teacher_k, turned) if keys else (teacher_q, teacher_k)
            return rider(*sides, turned, teacher, stats, grad_loss, temperature, kind)

        dq, dk, dv, dpad, _ = pruned_attention.gradients(
            grad_out, q, k, v, out, stats[0], call, options
        )
        return dq, dk, dv, dpad
