# SPDX-License-Identifier: Apache-2.0
"""Attention rollout of one row, without an N x N matrix.

See docs/use/attention_pictures.md. B batch, H heads, N tokens, n rows, m keys of a row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kdfast.ops.pruned_attention import math_dtype
from kdfast.pictures.layer import BLOCK, LayerAttention

FUSIONS = ("mean", "max", "min")
# The bits of an fp32 number are found in this many passes of as many bits.
PASSES, DIGIT = 4, 8


@torch.no_grad()
def rollout(
    layers: Sequence[LayerAttention],
    start: int | None = None,
    *,
    fusion: str = "mean",
    discard: float = 0.0,
    block: int = BLOCK,
) -> Tensor:
    """How much of each input token reaches a token of the last layer, by attention rollout.

    ``r A_L A_(L-1) ... A_1`` with ``A = (F + I) / (rowsum(F) + 1)`` and F the heads' fused matrix.
    With fusion "mean" rows of F sum to 1, so that ``A = 0.5 W + 0.5 I`` as in the paper. The row r
    is multiplied from the last layer backwards, each matrix in blocks of rows.

    Args:
        layers: Attentions in the order of execution, all with the same number of tokens.
        start: The token of the last layer, 0 for a CLS token; None: the mean of all tokens.
        fusion: "mean", "max" or "min" over a layer's heads. The last two are not in the paper.
        discard: Share in [0, 1) of F's entries, the smallest of each image and layer, that is
            set to 0 first. Not in the paper; takes five times as long.
        block: Elements of a block.

    Returns:
        (B, N), fp32 (fp64 for fp64 models); rows sum to 1.

    Raises:
        ValueError: There is no layer, token counts differ, or an argument is out of range.

    Memory: O(N) for every option. Gradients: none.
    Source: arXiv 2005.00928 sec. 3.
    """
    tokens = _check(layers, start, fusion, discard)
    first = layers[0].q
    dtype = math_dtype(first.dtype)
    if start is None:
        row = first.new_full((first.shape[0], tokens), 1 / tokens, dtype=dtype)
    else:
        row = first.new_zeros((first.shape[0], tokens), dtype=dtype)
        row[:, start] = 1
    for layer in reversed(layers):
        # A block whose heads were all removed passes the residual stream on.
        if layer.q.shape[1]:
            row = _step(layer, row, fusion, discard, block)
    return row


def _check(layers: Sequence[LayerAttention], start: int | None, fusion: str, discard: float) -> int:
    if not layers:
        raise ValueError("rollout: layers must hold at least one attention, got none")
    counts = sorted({layer.tokens for layer in layers})
    if len(counts) > 1:
        raise ValueError(f"rollout: layers must have the same tokens, got {counts}")
    if start is not None and not 0 <= start < counts[0]:
        raise ValueError(f"rollout: start must be in [0, {counts[0]}), got {start}")
    if fusion not in FUSIONS:
        raise ValueError(f"rollout: fusion must be one of {FUSIONS}, got {fusion!r}")
    if not 0 <= discard < 1:
        raise ValueError(f"rollout: discard must be in [0, 1), got {discard}")
    return counts[0]


def _step(layer: LayerAttention, row: Tensor, fusion: str, discard: float, block: int) -> Tensor:
    """row (B, N) times A of the layer."""
    out = torch.zeros_like(row)
    floor = _smallest_kept(layer, fusion, discard, block) if discard else None
    for tokens, keys, weights in layer.blocks(block=block):
        fused = _fuse(weights, fusion)
        if floor is not None:
            fused = fused.where(fused.float() >= floor[:, None, None], 0.0)
        share = row[:, tokens] / (fused.sum(-1) + 1)
        out[:, keys] += torch.einsum("bn,bnm->bm", share, fused)
        out[:, tokens] += share
    return out


def _fuse(weights: Tensor, fusion: str) -> Tensor:
    """(B, H, n, m) to (B, n, m)."""
    if fusion == "mean":
        return weights.mean(1)
    return weights.amax(1) if fusion == "max" else weights.amin(1)


def _smallest_kept(layer: LayerAttention, fusion: str, discard: float, block: int) -> Tensor:
    """(B,) the smallest entry of each image's fused matrix that is not discarded, exactly.

    A radix select: the bits of non-negative fp32 numbers order as the numbers do, so each pass
    counts the entries by their next byte among those that share the bytes found so far. Entries
    outside a window, which no row has, are not counted.
    """
    batch, device = layer.q.shape[0], layer.q.device
    # How many entries lie below the one looked for, among those that match the prefix.
    rank = torch.full((batch,), int(discard * layer.pairs), dtype=torch.int64, device=device)
    prefix = torch.zeros(batch, dtype=torch.int64, device=device)
    for number in reversed(range(PASSES)):
        counts = torch.zeros(batch, 1 << DIGIT, dtype=torch.int64, device=device)
        for _, _, weights in layer.blocks(block=block):
            fused = _fuse(weights, fusion).float().flatten(1)
            bits = fused.contiguous().view(torch.int32).long()
            matches = bits >> DIGIT * (number + 1) == prefix[:, None]
            digit = bits >> DIGIT * number & (1 << DIGIT) - 1
            counts.scatter_add_(1, digit, matches.long())
        below = counts.cumsum(1)
        digit = (below <= rank[:, None]).sum(1)
        rank = rank - (below - counts).gather(1, digit[:, None])[:, 0]
        prefix = prefix << DIGIT | digit
    return prefix.int().view(torch.float32)
