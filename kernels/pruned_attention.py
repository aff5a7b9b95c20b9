# SPDX-License-Identifier: Apache-2.0
"""Softmax attention over kept heads, with RoPE and windows inside.

See docs/ops/pruned_attention.md.

B batch, H heads, K kept heads, N tokens, D head dim. A program owns a block of rows of one window,
kept head and image; the window's other tokens stream past it. Every sum has a fixed order.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.kernels._attention import (
    LN_2,
    LOG2_E,
    NONE,
    head_base,
    load_query,
    load_tile,
    program,
    row_offsets,
    scores,
    store_tile,
    table_offsets,
    window_span,
    window_tokens,
)
from kdfast.kernels._attention_bias import (
    Bias,
    add_bias_gradient,
    bias_head,
    bias_tile,
    make_bias,
)
from kdfast.kernels._attention_bwd import bwd_kernel
from kdfast.kernels._attention_call import (
    Call,
    Scores,
    Windows,
    make_call,
    rotated,
    rows_first,
    turning,
)
from kdfast.kernels._common import PLAIN_ROWS, power_of_two, unit_stride


@triton.jit
def fwd_kernel(
    q_ptr,  # (B, H, N, D)
    k_ptr,  # (B, H, N, D); with ROPE (B, K, N, D), rotated and in pair order
    v_ptr,  # (B, H, N, D)
    out_ptr,  # (B, K, N, D)
    lse_ptr,  # (B, K, N)
    heads_ptr,  # (K,)
    cos_ptr,  # (rows, D)
    sin_ptr,
    pad_ptr,  # (H, D)
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
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
    scale,  # times log2(e)
    D: tl.constexpr,
    LO: tl.constexpr,
    HI: tl.constexpr,
    ROPE: tl.constexpr,
    WINDOWED: tl.constexpr,
    HAS_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_TAIL: tl.constexpr,
    COLS: tl.constexpr,
    COL_TAIL: tl.constexpr,
    STAGES: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    VALUES: tl.constexpr = True,
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
    """Output and log-sum-exp of one block of queries; without VALUES only the latter.

    With HAS_BIAS the log-sum-exp is relative to the largest bias of the row.
    """
    block, window, j, b = program(blocks, windows, kept)
    first, length, count = window_span(window, tokens, grid_h, grid_w, size, WINDOWED)
    head = tl.load(heads_ptr + j)
    q_ptr = head_base(q_ptr, b, head, stride_qb, stride_qh, UNIT)
    k_ptr = head_base(k_ptr, b, head if ROPE == NONE else j, stride_kb, stride_kh, UNIT)
    v_ptr = head_base(v_ptr, b, head, stride_vb, stride_vh, UNIT)
    out_ptr = head_base(out_ptr, b, j, stride_ob, stride_oh, UNIT)
    lse_ptr += (b.to(tl.int64) * kept + j) * tokens
    if HAS_BIAS:
        bias_ptr = bias_head(bias_ptr, b, head, biases, stride_ig, stride_ih)
        top_ptr = bias_head(top_ptr, b, head, biases, stride_tg, stride_th)
    left = count - block * ROWS
    for PART in tl.static_range(2 if ROW_TAIL else 1):
        if (left > 0 and left < ROWS) if PART else left >= ROWS:
            i = block * ROWS + tl.arange(0, ROW_TAIL if PART else ROWS)
            ok = i < count
            token = window_tokens(tl.minimum(i, count - 1), first, length, grid_w, WINDOWED)
            rows = row_offsets(token, stride_qn, UNIT)
            turn = table_offsets(token, grid_w, size, prefix, skipped, D, WINDOWED)
            q_lo = load_query(q_ptr, rows, ok, cos_ptr, sin_ptr, turn, D, 0, LO, ROPE)
            q_hi = q_lo
            if HI:
                q_hi = load_query(q_ptr, rows, ok, cos_ptr, sin_ptr, turn, D, LO, HI, ROPE)
            if HAS_BIAS:
                top = tl.load(top_ptr + token * stride_tn)
            m = tl.full(token.shape, float("-inf"), tl.float32)
            total = tl.zeros(token.shape, tl.float32)
            acc_lo = tl.zeros((token.shape[0], LO), tl.float32)
            acc_hi = tl.zeros((token.shape[0], HI if HI else 16), tl.float32)
            if HAS_PAD:
                # The padded keys are the first term of the sums: `pads` times exp(0) and pad.
                pads = size * size - count
                m = tl.where(pads > 0, tl.zeros_like(m), m)
                total += pads
            if HAS_PAD and VALUES:
                lo, hi = tl.arange(0, LO), LO + tl.arange(0, HI if HI else 16)
                pad_ptr += head * D
                acc_lo += pads * tl.load(pad_ptr + lo, lo < D, other=0.0).to(tl.float32)[None, :]
                acc_hi += pads * tl.load(pad_ptr + hi, hi < D, other=0.0).to(tl.float32)[None, :]
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
                    s = scores(q_lo, q_hi, k_lo, k_hi, HI, PRECISION) * scale
                    if HAS_BIAS:
                        bias = bias_tile(bias_ptr, token, keys, stride_ir, stride_ic)
                        s += (bias - top[:, None]) * LOG2_E
                    if REST:
                        s = tl.where(there[None, :], s, float("-inf"))
                    m_new = tl.maximum(m, tl.max(s, 1))
                    shift = m_new
                    if HAS_BIAS:
                        # So far every key may be masked.
                        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
                    decay = tl.exp2(m - shift)
                    p = tl.exp2(s - shift[:, None])
                    m = m_new
                    total = total * decay + tl.sum(p, 1)
                    if VALUES:
                        at = row_offsets(keys, stride_vn, UNIT)
                        v_lo = load_tile(v_ptr, at, there, D, 0, LO, REST)
                        p = p.to(v_lo.dtype)
                        acc_lo = tl.dot(p, v_lo, acc_lo * decay[:, None], input_precision=PRECISION)
                        if HI:
                            v_hi = load_tile(v_ptr, at, there, D, LO, HI, REST)
                            acc_hi = tl.dot(
                                p, v_hi, acc_hi * decay[:, None], input_precision=PRECISION
                            )
            if HAS_BIAS:
                # A row without a finite score gives zeros, and the weight exp(-inf) to every key.
                m = tl.where(total == 0.0, float("inf"), m)
                total = tl.where(total == 0.0, 1.0, total)
            if VALUES:
                rows = row_offsets(token, stride_on, UNIT)
                store_tile(out_ptr, rows, ok, acc_lo / total[:, None], D, 0, LO, NONE)
                if HI:
                    store_tile(out_ptr, rows, ok, acc_hi / total[:, None], D, LO, HI, NONE)
            tl.store(lse_ptr + token, (m + tl.log2(total)) * LN_2, mask=ok)


@triton.jit
def _bwd_pad_kernel(
    part_ptr,  # (P, K, D)
    dpad_ptr,  # (H, D)
    heads_ptr,
    parts,
    kept,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sums the parts of one head in their order."""
    j = tl.program_id(0)
    cols = tl.arange(0, WIDTH)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, parts, ROWS):
        i = start + tl.arange(0, ROWS)
        place = part_ptr + (i.to(tl.int64)[:, None] * kept + j) * D + cols[None, :]
        total += tl.load(place, mask=(i < parts)[:, None] & (cols < D)[None, :], other=0.0)
    dpad = tl.sum(total, 0).to(dpad_ptr.dtype.element_ty)
    tl.store(dpad_ptr + tl.load(heads_ptr + j) * D + cols, dpad, mask=cols < D)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: list[int] | None,
    cos: Tensor | None,
    sin: Tensor | None,
    prefix: int,
    interleaved: bool,
    scale: float,
    grid: list[int] | None,
    window: int,
    pad_value: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Launches ``kdfast::pruned_attention``: out (B, K, N, D) and lse (B, K, N)."""
    q, k, v = (unit_stride(x) for x in (q, k, v))
    call = make_call(
        *(q, heads),
        Scores(cos, sin, prefix, interleaved, scale),
        Windows(grid, window, pad_value),
    )
    with torch.cuda.device_of(q):
        added = make_bias(bias, q, call)
        return attend(q, rotated(k, call), v, call, added)


def attend(
    q: Tensor, k: Tensor, v: Tensor, call: Call, bias: Bias | None = None
) -> tuple[Tensor, Tensor]:
    """out (B, K, N, D) and lse (B, K, N); k as ``rotated`` gives it."""
    # In the memory order (B, N, K, D), which the next projection reads as rows.
    out = rows_first(q, call.kept)
    lse = q.new_empty((call.batch, call.kept, call.tokens), dtype=torch.float32)
    if out.numel():
        pointers = (q, k, v, out, lse, call.heads, call.cos, call.sin, call.pad)
        # The kernel takes powers of two.
        scaled = replace(call, scale=call.scale * math.log2(math.e))
        tiles = call.tiles("fwd" if bias is None else "fwd_bias")
        extra = {} if bias is None else bias.options()
        flags = {"HAS_PAD": call.has_pad, "HAS_BIAS": bias is not None}
        scaled.launch(fwd_kernel, tiles, pointers, (q, k, v, out), **flags, **extra)
    return out, lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    heads: list[int] | None,
    cos: Tensor | None,
    sin: Tensor | None,
    prefix: int,
    interleaved: bool,
    scale: float,
    grid: list[int] | None,
    window: int,
    pad_value: Tensor | None,
    bias: Tensor | None,
    bias_grad: bool,
) -> tuple[Tensor, ...]:
    """Launches ``kdfast::pruned_attention_bwd``.

    Returns:
        dq, dk, dv (B, H, N, D), dpad (H, D) and dbias (G, H, N, N); empty where not wanted.
    """
    if bias_grad and bias is None:
        raise ValueError("pruned_attention: bias_grad needs a bias")
    grad_out, q, k, v, out = (unit_stride(x) for x in (grad_out, q, k, v, out))
    call = make_call(
        *(q, heads),
        Scores(cos, sin, prefix, interleaved, scale),
        Windows(grid, window, pad_value),
    )
    with torch.cuda.device_of(q):
        added = make_bias(bias, q, call)
        return gradients(grad_out, q, k, v, out, lse, call, bias=added, bias_grad=bias_grad)


def gradients(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    call: Call,
    rider: Callable[[bool], dict[str, Any]] | None = None,
    bias: Bias | None = None,
    bias_grad: bool = False,
) -> tuple[Tensor, ...]:
    """dq, dk, dv (B, H, N, D), dpad (H, D) and dbias (G, H, N, N); empty where not wanted.

    Args:
        grad_out: (B, K, N, D), the gradient of out.
        q: (B, H, N, D).
        k: (B, H, N, D), not yet rotated.
        v: (B, H, N, D).
        out: (B, K, N, D), as ``attend`` gives it.
        lse: (B, K, N), as ``attend`` gives it.
        call: The call of the forward pass.
        rider: The kernel's options for the distance to a teacher's maps; called with whether the
            launch is that of the gradient of keys, else of queries.
        bias: The bias of the forward pass.
        bias_grad: Whether dbias is wanted.
    """
    # Heads that are not kept get zeros.
    subset = call.kept < q.shape[1]
    dq, dk, dv = (rows_first(x, x.shape[1], zero=subset) for x in (q, k, v))
    dpad = torch.zeros_like(call.pad) if call.has_pad else q.new_empty(0)
    dbias = q.new_empty(0)
    if bias is not None and bias_grad:
        dbias = torch.zeros_like(bias.values, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return dq, dk, dv, dpad, dbias
    # The first launch leaves the row sums of grad_out * out and the rotated q for the next ones.
    delta, k, turned = torch.empty_like(lse), rotated(k, call), turning(q, call)
    suffix = "_rider" if rider else "_bias" if bias else ""
    tiles = call.tiles(f"dq{suffix}")
    # Sums over the queries of a program; those without a query leave zeros.
    programs = call.programs(tiles) // call.kept if call.has_pad else 0
    part = lse.new_zeros((programs, call.kept, call.head_dim))
    for name, pairs, results in (
        ("dq", (q, grad_out, k, v), (dq, dq)),
        ("dkdv", (k, v, turned, grad_out), (dk, dv)),
    ):
        keys = name == "dkdv"
        # What the launch adds to the gradient of attention: a teacher's maps or a bias.
        extra = {} if rider is None else rider(keys)
        if bias is not None:
            extra = {"HAS_BIAS": True, **bias.options(keys)}
        tiles = call.tiles(f"{name}{suffix}")
        rows = (lse, delta, turned, part, out)
        pointers = (*pairs, *rows, *results, call.heads, call.cos, call.sin)
        strided = (*pairs, results[0], out)
        call.launch(bwd_kernel, tiles, pointers, strided, HAS_PAD=call.has_pad, KEYS=keys, **extra)
    # The gradient of the pad value, from what each program of dq has left.
    if call.has_pad:
        _bwd_pad_kernel[(call.kept,)](
            part,
            dpad,
            call.heads,
            programs,
            call.kept,
            D=call.head_dim,
            WIDTH=power_of_two(call.head_dim),
            ROWS=PLAIN_ROWS,
        )
    if bias is not None and bias_grad:
        add_bias_gradient(dbias, bias, (turned, k, v, grad_out), lse, delta, call)
    return dq, dk, dv, dpad, dbias
