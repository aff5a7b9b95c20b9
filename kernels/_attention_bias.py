# SPDX-License-Identifier: Apache-2.0
"""The additive bias of pruned_attention: as the kernels read it, and its gradient.

B batch, H heads, K kept heads, N tokens, D head dim, G biases that the images of a batch take in
turn: image b has bias b % G.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.kernels._attention import LOG2_E, head_base, load_rows, row_offsets, scores
from kdfast.kernels._attention_call import Call, rows_of

# Of the gradient's launch: enough programs for any GPU, and bytes that its sums may take for them.
PROGRAMS, SUM_BYTES = 1024, 64 << 20


class BiasRows(NamedTuple):
    """A bias in the arguments of a kernel."""

    ptr: Any  # (G, H, N, N)
    top_ptr: Any  # (G, H, N), the largest entry of each row
    count: Any  # G
    stride_g: Any
    stride_h: Any
    stride_r: Any  # of the rows of a tile of scores, and of its columns
    stride_c: Any
    top_stride_g: Any
    top_stride_h: Any
    top_stride_n: Any


@dataclass(frozen=True)
class Bias:
    """The bias of a call and the largest entry of each of its rows."""

    values: Tensor  # (G, H, N, N), any strides
    top: Tensor  # (G, H, N) fp32; 0 where a row has nothing but -inf

    def rows(self, keys: bool = False) -> BiasRows:
        """The bias as kernels take it; with ``keys``, the rows of its tiles are keys."""
        group, head, *sides = self.values.stride()
        row, col = sides[::-1] if keys else sides
        return BiasRows(
            *(self.values, self.top, self.values.shape[0]),
            *(group, head, row, col),
            *self.top.stride(),
        )


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
def bias_bases(bias, b, head):
    """Where the rows of image b and a head start, in the bias and in its tops."""
    group, head = (b % bias.count).to(tl.int64), head.to(tl.int64)
    here = bias.ptr + group * bias.stride_g + head * bias.stride_h
    return here, bias.top_ptr + group * bias.top_stride_g + head * bias.top_stride_h


@triton.jit
def bias_tile(ptr, rows, cols, stride_r, stride_c):
    """(R, C) entries in fp32; all of ``rows`` and ``cols`` have to be there."""
    place = rows.to(tl.int64)[:, None] * stride_r + cols.to(tl.int64)[None, :] * stride_c
    return tl.load(ptr + place).to(tl.float32)


@triton.jit
def _bias_grad_kernel(
    q,  # Rows (B, H, N, D); with rotation (B, K, N, D), rotated and in pair order
    k,  # Rows, as q
    v,  # Rows (B, H, N, D)
    grad,  # Rows (B, K, N, D)
    lse_ptr,  # (B, K, N)
    delta_ptr,  # (B, K, N)
    sums_ptr,  # (slices, G, K, N, N) fp32
    heads_ptr,  # (K,)
    kept,
    tokens,
    row_blocks,
    col_blocks,
    turns,  # images of each bias
    slices,
    scale,
    bias,  # BiasRows
    CHANNELS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Sums dS of one block of a bias and a head over the images of one slice, in their order."""
    UNIT: tl.constexpr = CHANNELS.unit
    # Named here: Triton 3.6 does not pass on that a part of a constexpr is one.
    ROWS: tl.constexpr = TILES.rows
    COLS: tl.constexpr = TILES.cols
    # Which entries of which bias, which head and which images are this program's.
    pid = tl.program_id(0)
    n, pid = pid % col_blocks * COLS + tl.arange(0, COLS), pid // col_blocks
    i, pid = pid % row_blocks * ROWS + tl.arange(0, ROWS), pid // row_blocks
    j, pid = pid % kept, pid // kept
    group, part = pid % bias.count, pid // bias.count
    head = tl.load(heads_ptr + j)
    own = j if CHANNELS.rope else head
    ok, there = i < tokens, n < tokens
    query, key = tl.minimum(i, tokens - 1), tl.minimum(n, tokens - 1)
    bias_ptr, top_ptr = bias_bases(bias, group, head)
    added = bias_tile(bias_ptr, query, key, bias.stride_r, bias.stride_c)
    added = (added - tl.load(top_ptr + query * bias.top_stride_n)[:, None]) * LOG2_E
    # The weights and their gradient again, image by image.
    total = tl.zeros((ROWS, COLS), tl.float32)
    for turn in tl.range(
        turns * part // slices, turns * (part + 1) // slices, num_stages=TILES.stages
    ):
        b = turn * bias.count + group
        here = head_base(q.ptr, q, b, own, UNIT)
        at = row_offsets(query, q.stride_n, UNIT)
        q_lo, q_hi = load_rows(here, at, ok, CHANNELS)
        here = head_base(k.ptr, k, b, own, UNIT)
        at = row_offsets(key, k.stride_n, UNIT)
        k_lo, k_hi = load_rows(here, at, there, CHANNELS)
        row = (b.to(tl.int64) * kept + j) * tokens + query
        lse, delta = tl.load(lse_ptr + row), tl.load(delta_ptr + row)
        s = scores(q_lo, q_hi, k_lo, k_hi, CHANNELS) * (scale * LOG2_E) + added
        p = tl.exp2(s - lse[:, None] * LOG2_E)
        here = head_base(grad.ptr, grad, b, j, UNIT)
        at = row_offsets(query, grad.stride_n, UNIT)
        g_lo, g_hi = load_rows(here, at, ok, CHANNELS)
        here = head_base(v.ptr, v, b, head, UNIT)
        at = row_offsets(key, v.stride_n, UNIT)
        v_lo, v_hi = load_rows(here, at, there, CHANNELS)
        total += p * (scores(g_lo, g_hi, v_lo, v_hi, CHANNELS) - delta[:, None])
    sums_ptr += ((part.to(tl.int64) * bias.count + group) * kept + j) * tokens * tokens
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
    _bias_grad_kernel[(slices * matrices * row_blocks * col_blocks,)](
        *(rows_of(x) for x in pairs),
        lse,
        delta,
        sums,
        call.heads,
        call.kept,
        tokens,
        row_blocks,
        col_blocks,
        turns,
        slices,
        call.scale,
        bias.rows(),
        CHANNELS=call.channels(*pairs),
        TILES=tiles,
        num_warps=tiles.warps,
    )
    # The slices in their order, then the heads to their places.
    total = sums[0]
    for piece in sums[1:]:
        total += piece
    result.index_copy_(1, call.heads.long(), total.to(result.dtype))
