# SPDX-License-Identifier: Apache-2.0
"""Attention, and the distance of its maps to a teacher's. See docs/ops/attention_distill.md.

B batch, H heads, K kept heads, N tokens, D head dim; Ht, TD the teacher's. The forward pass is that
of pruned_attention, a log-sum-exp of the teacher's scores, and row sums over both maps; the
gradient rides on the kernels of pruned_attention's backward pass.
"""

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
    load_queries,
    load_rows,
    program,
    row_offsets,
    scores,
    table_offsets,
    window_span,
    window_tokens,
)
from kdfast.kernels._attention_bwd import Maps, Teacher
from kdfast.kernels._attention_call import (
    Call,
    Scores,
    Windows,
    make_call,
    rotated,
    rows_of,
    turning,
)
from kdfast.kernels._attention_maps import (
    COSINE,
    JSD,
    KINDS,
    KL,
    LOGIT_MSE,
    MSE,
    PLANES,
    load_stats,
    map_terms,
    row_results,
)
from kdfast.kernels._common import (
    SUM_BLOCK,
    chunks,
    total_kernel,
    unit_stride,
)


@triton.jit
def _distance_kernel(
    q,  # Rows (B, H, N, D)
    k,  # Rows (B, H, N, D); with rotation (B, K, N, D), rotated and in pair order
    distance_ptr,  # (B, K, N)
    heads_ptr,  # (K,)
    rotary,
    shape,
    scale,
    teacher,  # Teacher
    CHANNELS: tl.constexpr,
    TILES: tl.constexpr,
    WINDOWED: tl.constexpr,
    HAS_PAD: tl.constexpr,
    MAPS: tl.constexpr,
):
    """Distances of one block of queries; fills the planes of stats that the gradient needs."""
    UNIT: tl.constexpr = CHANNELS.unit
    # Named here: Triton 3.6 does not pass on that a part of a constexpr is one.
    THEIRS: tl.constexpr = MAPS.channels
    TUNIT: tl.constexpr = THEIRS.unit
    KIND: tl.constexpr = MAPS.kind
    # Which rows of which tensors are this program's.
    block, window, j, b = program(shape)
    first, length, count = window_span(window, shape, WINDOWED)
    head, their_head = tl.load(heads_ptr + j), tl.load(teacher.heads_ptr + j)
    q_ptr = head_base(q.ptr, q, b, head, UNIT)
    k_ptr = head_base(k.ptr, k, b, head if CHANNELS.rope == NONE else j, UNIT)
    tq_ptr = head_base(teacher.own.ptr, teacher.own, b, their_head, TUNIT)
    other_head = j if THEIRS.rope else their_head
    tk_ptr = head_base(teacher.other.ptr, teacher.other, b, other_head, TUNIT)
    stats = (b.to(tl.int64) * shape.kept + j) * shape.tokens
    left = count - block * TILES.rows
    # A block is full, or it is the window's last one and takes the smaller tile.
    for PART in tl.static_range(2 if TILES.row_tail else 1):
        if (left > 0 and left < TILES.rows) if PART else left >= TILES.rows:
            i = block * TILES.rows + tl.arange(0, TILES.row_tail if PART else TILES.rows)
            ok = i < count
            token = window_tokens(tl.minimum(i, count - 1), first, length, shape, WINDOWED)
            turn = table_offsets(token, shape, rotary, CHANNELS.D, WINDOWED)
            rows = row_offsets(token, q.stride_n, UNIT)
            q_lo, q_hi = load_queries(q_ptr, rows, ok, rotary, turn, CHANNELS)
            turn = table_offsets(token, shape, teacher.rotary, THEIRS.D, WINDOWED)
            rows = row_offsets(token, teacher.own.stride_n, TUNIT)
            tq_lo, tq_hi = load_queries(tq_ptr, rows, ok, teacher.rotary, turn, THEIRS)
            # The sums over a row that its distance is made of, see map_terms.
            a_lse, b_lse, x, y = load_stats(
                *(teacher.stats_ptr + stats, teacher.plane, token, ok),
                LOGIT_MSE if KIND == LOGIT_MSE else KL,
            )
            one = tl.zeros(token.shape, tl.float32)
            two, three = one, one
            top = tl.full(token.shape, float("-inf"), tl.float32)
            if HAS_PAD and KIND == KL:
                pads = shape.size * shape.size - count
                top = tl.where(pads > 0, tl.zeros_like(top), top)
                one, two = pads * a_lse, one + pads
            elif HAS_PAD and KIND != LOGIT_MSE:
                # A padded key is an entry of logit 0 of both maps.
                pads = shape.size * shape.size - count
                # Other names than in the loop, whose tiles have another shape.
                pad_one, pad_two, pad_three = map_terms(one, one, a_lse, b_lse, KIND)
                one, two, three = pads * pad_one, pads * pad_two, pads * pad_three
            # Keys of both sides stream past: whole tiles, then a smaller one with a mask.
            full = count // TILES.cols * TILES.cols
            for REST in tl.static_range(2 if TILES.col_tail else 1):
                for c in tl.range(
                    full if REST else 0,
                    count if REST else full,
                    TILES.col_tail if REST else TILES.cols,
                    num_stages=1 if REST else TILES.stages,
                ):
                    n = c + tl.arange(0, TILES.col_tail if REST else TILES.cols)
                    there = n < count
                    keys = n
                    if REST:
                        keys = tl.minimum(n, count - 1)
                    keys = window_tokens(keys, first, length, shape, WINDOWED)
                    at = row_offsets(keys, k.stride_n, UNIT)
                    k_lo, k_hi = load_rows(k_ptr, at, there, CHANNELS, REST)
                    at = row_offsets(keys, teacher.other.stride_n, TUNIT)
                    tk_lo, tk_hi = load_rows(tk_ptr, at, there, THEIRS, REST)
                    s = scores(q_lo, q_hi, k_lo, k_hi, CHANNELS) * (scale / teacher.temperature)
                    t = scores(tq_lo, tq_hi, tk_lo, tk_hi, THEIRS) * teacher.scale
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
            # The distances, and what the gradient needs of each row.
            place = teacher.stats_ptr + stats + token
            plane = tl.cast(teacher.plane, tl.int64)
            if KIND == KL:
                distance = one / two - tl.log(two)
                tl.store(place + 2 * plane, top + tl.log(two), mask=ok)
            else:
                distance, x, y = row_results(one, two, three, count, KIND)
            tl.store(distance_ptr + stats + token, distance, mask=ok)
            if KIND != LOGIT_MSE and KIND != KL:
                tl.store(place + 3 * plane, x, mask=ok)
            if KIND == COSINE:
                tl.store(place + 4 * plane, y, mask=ok)


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
    rows = (q, k, q, q)
    pruned_attention.launch_forward(call, rows, lse, temperature=temperature, values=False)
    return lse


def teacher_maps(
    own: Tensor,
    other: Tensor,
    turned: Tensor,
    teacher: Call,
    stats: Tensor,
    grad_loss: Tensor,
    temperature: float,
    kind: str,
) -> dict[str, Any]:
    """The options of a launch with the distance to a teacher's maps.

    Args:
        own: The teacher's tensor on the side of the resident rows: its q; for the gradient of keys
            its k as ``rotated`` gives it.
        other: The teacher's tensor on the side that streams past: its k as ``rotated`` gives it;
            for the gradient of keys its rotated q.
        turned: Where the gradient of queries leaves the teacher's rotated q.
        teacher: The teacher's call.
        stats: (planes, B, K, N), as the forward pass fills it.
        grad_loss: The gradient of the loss, ().
        temperature: The temperature of both maps.
        kind: A kind of ``KINDS``.
    """
    rows = stats[0].numel()
    group = Teacher(
        own=rows_of(own),
        other=rows_of(other),
        turned_ptr=turned,
        rotary=teacher.rotary(),
        heads_ptr=teacher.heads,
        stats_ptr=stats,
        grad_loss_ptr=grad_loss,
        plane=rows,
        scale=teacher.scale / temperature,
        temperature=float(temperature),
        weight=1 / (rows * temperature),
    )
    maps = Maps(KINDS.index(kind), temperature == 1, teacher.channels(own, other))
    return {"teacher": group, "MAPS": maps}


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
        stats = torch.empty((PLANES[kind], *lse.shape), dtype=torch.float32, device=q.device)
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
        sides = (teacher_q, teacher_k, teacher_q)
        call.launch(
            _distance_kernel,
            call.tiles("distance"),
            (q, k),
            distance,
            scale=call.scale,
            **teacher_maps(*sides, teacher, stats, loss, temperature, kind),
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

        def maps(keys: bool) -> dict[str, Any]:
            sides = (teacher_k, turned) if keys else (teacher_q, teacher_k)
            return teacher_maps(*sides, turned, teacher, stats, grad_loss, temperature, kind)

        dq, dk, dv, dpad, _ = pruned_attention.gradients(
            grad_out, q, k, v, out, stats[0], call, maps
        )
        return dq, dk, dv, dpad
