# SPDX-License-Identifier: Apache-2.0
"""The additive bias of pruned_attention: as the kernels read it, and its gradient.

B batch, H heads, K kept heads, N tokens, D head dim, G biases that the images of a batch take in
turn: image b has bias b % G.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.kernels._attention import LOG2_E, head_base, load_tile, row_offsets, scores
from kdfast.kernels._attention_call import Call
from kdfast.kernels._common import alignment, chunks, dot_precision

# Of the gradient's launch: enough programs for any GPU, and bytes that its sums may take for them.
PROGRAMS, SUM_BYTES = 1024, 64 << 20


@dataclass(frozen=True)
class Bias:
    """The bias of a call and the largest entry of each of its rows."""

    values: Tensor  # (G, H, N, N), any strides
    top: Tensor  # (G, H, N) fp32; 0 where a row has nothing but -inf

    def options(self, keys: bool = False) -> dict[str, Any]:
        """What a kernel has to know of it; with ``keys``, the rows of its tiles are keys."""
        group, head, *sides = self.values.stride()
        row, col = sides[::-1] if keys else sides
        return {
            "bias_ptr": self.values,
            "top_ptr": self.top,
            "biases": self.values.shape[0],
            "stride_ig": group,
            "stride_ih": head,
            "stride_ir": row,
            "stride_ic": col,
            "stride_tg": self.top.stride(0),
            "stride_th": self.top.stride(1),
            "stride_tn": self.top.stride(2),
        }


def make_bias(bias: Tensor | None, q: Tensor, call: Call) -> Bias | None:
    """The bias of a call on q (B, H, N, D).

    Raises:
        ValueError: It is not (G, H, N, N) with a G that divides B, or the call has windows.
    """
    if bias is None:
        return None
    batch, heads, tokens, _ = q.shape
    fits = bias.dim() == 4 and tuple(bias.shape[1:]) == (heads, tokens, tokens)
    if not fits or bias.shape[0] == 0 or batch % bias.shape[0]:
        raise ValueError(
            "pruned_attention: bias must be (G, H, N, N) with a G that divides B, "
            f"got {list(bias.shape)} for q {list(q.shape)}"
        )
    if call.windowed:
        raise ValueError("pruned_attention: bias must be None in a call with a window")
    if bias.numel() == 0:
        return Bias(bias, bias.new_zeros(bias.shape[:3], dtype=torch.float32))
    # The largest entry of each row, computed once where a dimension is expanded.
    small = bias
    for axis in range(3):
        if bias.stride(axis) == 0:
            small = small.narrow(axis, 0, 1)
    top = small.amax(-1).float()
    return Bias(bias, top.masked_fill(top == float("-inf"), 0.0).expand(bias.shape[:3]))


@triton.jit
def bias_head(ptr, b, head, biases, stride_g, stride_h):
    """Where the rows of image b and a head start, in the bias or in its tops."""
    return ptr + (b % biases).to(tl.int64) * stride_g + head.to(tl.int64) * stride_h


@triton.jit
def bias_tile(ptr, rows, cols, stride_r, stride_c):
    """(R, C) entries in fp32; all of ``rows`` and ``cols`` have to be there."""
    place = rows.to(tl.int64)[:, None] * stride_r + cols.to(tl.int64)[None, :] * stride_c
    return tl.load(ptr + place).to(tl.float32)


@triton.jit
def _bias_grad_kernel(
    q_ptr,  # (B, H, N, D); with ROPE (B, K, N, D), rotated and in pair order
    k_ptr,  # as q
    v_ptr,  # (B, H, N, D)
    grad_ptr,  # (B, K, N, D)
    lse_ptr,  # (B, K, N)
    delta_ptr,  # (B, K, N)
    sums_ptr,  # (slices, G, K, N, N) fp32
    heads_ptr,  # (K,)
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
    kept,
    tokens,
    row_blocks,
    col_blocks,
    turns,  # images of each bias
    slices,
    scale,
    bias_ptr,  # (G, H, N, N)
    top_ptr,  # (G, H, N)
    biases,
    stride_ig,
    stride_ih,
    stride_ir,
    stride_ic,
    stride_tg,
    stride_th,
    stride_tn,
    D: tl.constexpr,
    LO: tl.constexpr,
    HI: tl.constexpr,
    ROPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STAGES: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums dS of one block of a bias and a head over the images of one slice, in their order."""
    pid = tl.program_id(0)
    n, pid = pid % col_blocks * COLS + tl.arange(0, COLS), pid // col_blocks
    i, pid = pid % row_blocks * ROWS + tl.arange(0, ROWS), pid // row_blocks
    j, pid = pid % kept, pid // kept
    group, part = pid % biases, pid // biases
    head = tl.load(heads_ptr + j)
    own = j if ROPE else head
    ok, there = i < tokens, n < tokens
    query, key = tl.minimum(i, tokens - 1), tl.minimum(n, tokens - 1)
    bias_ptr = bias_head(bias_ptr, group, head, biases, stride_ig, stride_ih)
    top_ptr = bias_head(top_ptr, group, head, biases, stride_tg, stride_th)
    bias = bias_tile(bias_ptr, query, key, stride_ir, stride_ic)
    bias = (bias - tl.load(top_ptr + query * stride_tn)[:, None]) * LOG2_E
    total = tl.zeros((ROWS, COLS), tl.float32)
    for turn in tl.range(turns * part // slices, turns * (part + 1) // slices, num_stages=STAGES):
        b = turn * biases + group
        here = head_base(q_ptr, b, own, stride_qb, stride_qh, UNIT)
        at = row_offsets(query, stride_qn, UNIT)
        q_lo = load_tile(here, at, ok, D, 0, LO)
        q_hi = load_tile(here, at, ok, D, LO, HI) if HI else q_lo
        here = head_base(k_ptr, b, own, stride_kb, stride_kh, UNIT)
        at = row_offsets(key, stride_kn, UNIT)
        k_lo = load_tile(here, at, there, D, 0, LO)
        k_hi = load_tile(here, at, there, D, LO, HI) if HI else k_lo
        row = (b.to(tl.int64) * kept + j) * tokens + query
        lse, delta = tl.load(lse_ptr + row), tl.load(delta_ptr + row)
        s = scores(q_lo, q_hi, k_lo, k_hi, HI, PRECISION) * (scale * LOG2_E) + bias
        p = tl.exp2(s - lse[:, None] * LOG2_E)
        here = head_base(grad_ptr, b, j, stride_gb, stride_gh, UNIT)
        at = row_offsets(query, stride_gn, UNIT)
        g_lo = load_tile(here, at, ok, D, 0, LO)
        g_hi = load_tile(here, at, ok, D, LO, HI) if HI else g_lo
        here = head_base(v_ptr, b, head, stride_vb, stride_vh, UNIT)
        at = row_offsets(key, stride_vn, UNIT)
        v_lo = load_tile(here, at, there, D, 0, LO)
        v_hi = load_tile(here, at, there, D, LO, HI) if HI else v_lo
        total += p * (scores(g_lo, g_hi, v_lo, v_hi, HI, PRECISION) - delta[:, None])
    sums_ptr += ((part.to(tl.int64) * biases + group) * kept + j) * tokens * tokens
    place = sums_ptr + query.to(tl.int64)[:, None] * tokens + n[None, :]
    tl.store(place, total, mask=ok[:, None] & there[None, :])


def add_bias_gradient(
    result: Tensor,
    bias: Bias,
    pairs: Sequence[Tensor],
    lse: Tensor,
    delta: Tensor,
    call: Call,
) -> None:
    """Fills the kept heads of the bias's gradient.

    Args:
        result: (G, H, N, N).
        bias: The bias of the call.
        pairs: q and k as ``rotated`` gives them, v and the gradient of the result.
        lse: (B, K, N), the log-sum-exp of the scores, relative to the largest bias of their row.
        delta: (B, K, N), rowsum(grad * out).
        call: With at least one image, head and token.
    """
    groups, _, tokens, _ = bias.values.shape
    tiles = call.tiles("dbias")
    row_blocks, col_blocks = -(-tokens // tiles.rows), -(-tokens // tiles.cols)
    turns, matrices = call.batch // groups, groups * call.kept
    # Slices of the batch are summed apart, so that the GPU has enough programs. The shapes alone
    # say how many: the sums have one order.
    wanted = -(-PROGRAMS // (matrices * row_blocks * col_blocks))
    slices = max(1, min(turns, wanted, SUM_BYTES // (4 * matrices * tokens**2)))
    sums = lse.new_empty((slices, groups, call.kept, tokens, tokens))
    low, high = chunks(call.head_dim, pairs[0].dtype.itemsize)
    _bias_grad_kernel[(slices * matrices * row_blocks * col_blocks,)](
        *pairs,
        lse,
        delta,
        sums,
        call.heads,
        *(stride for x in pairs for stride in x.stride()[:3]),
        call.kept,
        tokens,
        row_blocks,
        col_blocks,
        turns,
        slices,
        call.scale,
        **bias.options(),
        D=call.head_dim,
        LO=low,
        HI=high,
        ROPE=call.rope,
        ROWS=tiles.rows,
        COLS=tiles.cols,
        STAGES=tiles.stages,
        UNIT=alignment(*pairs),
        PRECISION=dot_precision(pairs[0].dtype),
        num_warps=tiles.warps,
    )
    # The slices in their order, then the heads to their places.
    total = sums[0]
    for piece in sums[1:]:
        total += piece
    result.index_copy_(1, call.heads.long(), total.to(result.dtype))
