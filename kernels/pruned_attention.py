# SPDX-License-Identifier: Apache-2.0
"""Softmax attention over kept heads, with RoPE and windows inside.

See docs/ops/pruned_attention.md.

B batch, H heads, K kept heads, N tokens, D head dim. A program owns a block of rows of one window,
kept head and image; the window's other tokens stream past it. Every sum has a fixed order.
"""

import math
from collections.abc import Callable, Sequence
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
    load_queries,
    load_rows,
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
    bias_bases,
    bias_tile,
    make_bias,
)
from kdfast.kernels._attention_bwd import NO_MAPS, bwd_kernel
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
    q,  # Rows (B, H, N, D)
    k,  # Rows (B, H, N, D); with rotation (B, K, N, D), rotated and in pair order
    v,  # Rows (B, H, N, D)
    out,  # Rows (B, K, N, D)
    lse_ptr,  # (B, K, N)
    pad_ptr,  # (H, D)
    heads_ptr,  # (K,)
    rotary,
    shape,
    scale,  # times log2(e)
    bias,  # BiasRows or None
    CHANNELS: tl.constexpr,
    TILES: tl.constexpr,
    WINDOWED: tl.constexpr,
    HAS_PAD: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Output and log-sum-exp of one block of queries; without VALUES only the latter.

    With a bias the log-sum-exp is relative to the largest bias of the row.
    """
    D: tl.constexpr = CHANNELS.D
    LO: tl.constexpr = CHANNELS.LO
    HI: tl.constexpr = CHANNELS.HI
    UNIT: tl.constexpr = CHANNELS.unit
    # Which rows of which tensors are this program's.
    block, window, j, b = program(shape)
    first, length, count = window_span(window, shape, WINDOWED)
    head = tl.load(heads_ptr + j)
    q_ptr = head_base(q.ptr, q, b, head, UNIT)
    k_ptr = head_base(k.ptr, k, b, head if CHANNELS.rope == NONE else j, UNIT)
    v_ptr = head_base(v.ptr, v, b, head, UNIT)
    out_ptr = head_base(out.ptr, out, b, j, UNIT)
    lse_ptr += (b.to(tl.int64) * shape.kept + j) * shape.tokens
    if bias is not None:
        bias_ptr, top_ptr = bias_bases(bias, b, head)
    left = count - block * TILES.rows
    # A block is full, or it is the window's last one and takes the smaller tile.
    for PART in tl.static_range(2 if TILES.row_tail else 1):
        if (left > 0 and left < TILES.rows) if PART else left >= TILES.rows:
            i = block * TILES.rows + tl.arange(0, TILES.row_tail if PART else TILES.rows)
            ok = i < count
            token = window_tokens(tl.minimum(i, count - 1), first, length, shape, WINDOWED)
            rows = row_offsets(token, q.stride_n, UNIT)
            turn = table_offsets(token, shape, rotary, D, WINDOWED)
            q_lo, q_hi = load_queries(q_ptr, rows, ok, rotary, turn, CHANNELS)
            if bias is not None:
                top = tl.load(top_ptr + token * bias.top_stride_n)
            # Running maximum, sum and weighted values of the online softmax.
            m = tl.full(token.shape, float("-inf"), tl.float32)
            total = tl.zeros(token.shape, tl.float32)
            acc_lo = tl.zeros((token.shape[0], LO), tl.float32)
            acc_hi = tl.zeros((token.shape[0], HI if HI else 16), tl.float32)
            if HAS_PAD:
                # The padded keys are the first term of the sums: `pads` times exp(0) and pad.
                pads = shape.size * shape.size - count
                m = tl.where(pads > 0, tl.zeros_like(m), m)
                total += pads
            if HAS_PAD and VALUES:
                lo, hi = tl.arange(0, LO), LO + tl.arange(0, HI if HI else 16)
                pad_ptr += head * D
                acc_lo += pads * tl.load(pad_ptr + lo, lo < D, other=0.0).to(tl.float32)[None, :]
                acc_hi += pads * tl.load(pad_ptr + hi, hi < D, other=0.0).to(tl.float32)[None, :]
            # Keys and values stream past: whole tiles, then a smaller one with a mask.
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
                    s = scores(q_lo, q_hi, k_lo, k_hi, CHANNELS) * scale
                    if bias is not None:
                        added = bias_tile(bias_ptr, token, keys, bias.stride_r, bias.stride_c)
                        s += (added - top[:, None]) * LOG2_E
                    if REST:
                        s = tl.where(there[None, :], s, float("-inf"))
                    m_new = tl.maximum(m, tl.max(s, 1))
                    shift = m_new
                    if bias is not None:
                        # So far every key may be masked.
                        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
                    decay = tl.exp2(m - shift)
                    p = tl.exp2(s - shift[:, None])
                    m = m_new
                    total = total * decay + tl.sum(p, 1)
                    if VALUES:
                        at = row_offsets(keys, v.stride_n, UNIT)
                        v_lo = load_tile(v_ptr, at, there, D, 0, LO, REST)
                        p = p.to(v_lo.dtype)
                        acc_lo = tl.dot(
                            p, v_lo, acc_lo * decay[:, None], input_precision=CHANNELS.precision
                        )
                        if HI:
                            v_hi = load_tile(v_ptr, at, there, D, LO, HI, REST)
                            acc_hi = tl.dot(
                                p, v_hi, acc_hi * decay[:, None], input_precision=CHANNELS.precision
                            )
            if bias is not None:
                # A row without a finite score gives zeros, and the weight exp(-inf) to every key.
                m = tl.where(total == 0.0, float("inf"), m)
                total = tl.where(total == 0.0, 1.0, total)
            if VALUES:
                rows = row_offsets(token, out.stride_n, UNIT)
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
        launch_forward(call, (q, k, v, out), lse, bias=bias)
    return out, lse


def launch_forward(
    call: Call,
    rows: Sequence[Tensor],
    lse: Tensor,
    *,
    bias: Bias | None = None,
    temperature: float = 1.0,
    values: bool = True,
) -> None:
    """Launches ``fwd_kernel``.

    Args:
        call: With at least one image, head and token.
        rows: q, k as ``rotated`` gives it, v and the output; the last two are not touched without
            ``values``.
        lse: (B, K, N), gets the log-sum-exp of the scores over the temperature.
        bias: The bias of the call.
        temperature: Divides the scores.
        values: Whether there is an output.
    """
    call.launch(
        fwd_kernel,
        call.tiles("fwd" if bias is None else "fwd_bias"),
        rows,
        lse,
        call.pad,
        # The kernel takes powers of two.
        scale=call.scale / temperature * math.log2(math.e),
        bias=None if bias is None else bias.rows(),
        VALUES=values,
    )


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
    maps: Callable[[bool], dict[str, Any]] | None = None,
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
        maps: Gives the kernel's options for the distance to a teacher's maps; called with whether
            the launch is that of the gradient of keys, else of queries.
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
    suffix = "_maps" if maps else "_bias" if bias else ""
    # Sums over the queries of a program; those without a query leave zeros.
    programs = call.programs(call.tiles(f"dq{suffix}")) // call.kept if call.has_pad else 0
    part = lse.new_zeros((programs, call.kept, call.head_dim))
    for keys, rows, dv_rows in (
        # One launch owns rows of queries, the other rows of keys; see the kernel.
        (False, (q, grad_out, k, v, dq, out), dq),
        (True, (k, v, turned, grad_out, dk, out), dv),
    ):
        call.launch(
            bwd_kernel,
            call.tiles(("dkdv" if keys else "dq") + suffix),
            rows,
            dv_rows,
            lse,
            delta,
            turned,
            part,
            scale=call.scale,
            bias=None if bias is None else bias.rows(keys),
            **(NO_MAPS if maps is None else maps(keys)),
            KEYS=keys,
        )
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
