# SPDX-License-Identifier: Apache-2.0
"""Exact entropy of attention rows, in tiles. B batch, H heads, N tokens, D head dim."""

import math

import torch
from torch import Tensor

from kdfast.ops._attention import check_geometry, check_qkv
from kdfast.ops.geometry import Rope, Window
from kdfast.ops.pruned_attention import math_dtype, rotated

# Elements of one tile of scores: 16 MiB in fp32, whatever N is.
TILE = 1 << 22


@torch.no_grad()
def attention_entropy(
    q: Tensor,
    k: Tensor,
    *,
    rope: Rope | None = None,
    window: Window | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Entropy of every row of softmax(scale * R(q) R(k)^T), of which only a tile exists at a time.

    Args:
        q: (B, H, N, D) before the rotation.
        k: (B, H, N, D) before the rotation.
        rope: As in ``pruned_attention``.
        window: As in ``pruned_attention``; with ``pad_value`` its pads are keys with logit 0.
        scale: Factor of the scores; D ** -0.5 if None.

    Returns:
        Entropy in nats, (B, H, N) in fp32, fp64 for fp64 inputs; and the logarithm of the number
        of keys that each token sees, pads included, (N,), which is the largest possible entropy.

    Raises:
        TypeError: Dtypes do not match.
        ValueError: Shapes or devices do not match.

    Gradients: none.
    """
    check_qkv("attention_entropy", q=q, k=k)
    check_geometry("attention_entropy", q, rope, window)
    batch, heads, tokens, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    dtype = math_dtype(q.dtype)
    q, k = (rotated(x, rope, window).to(dtype) for x in (q, k))
    groups = [(torch.arange(tokens, device=q.device), 0)]
    if window is not None:
        live = window.pad_value is not None
        groups = [
            (window.token_index(span, q.device), live * window.pads(span))
            for span in window.spans()
        ]
    entropy = q.new_empty(batch, heads, tokens)
    limit = q.new_empty(tokens)
    for index, pads in groups:
        keys = k[:, :, index].transpose(-1, -2)
        limit[index] = torch.log(q.new_tensor(len(index) + pads))
        rows = max(1, TILE // max(1, batch * heads * len(index)))
        # Autocast would round the scores, which the attention op keeps in fp32.
        with torch.autocast(q.device.type, enabled=False):
            for some in index.split(rows):
                entropy[:, :, some] = _row_entropy(scale * q[:, :, some] @ keys, pads)
    return entropy, limit


def _row_entropy(scores: Tensor, pads: int) -> Tensor:
    """Entropy (B, H, n) of softmax over scores (B, H, n, m) and ``pads`` more keys of logit 0."""
    # Relative to the largest logit: lse and the mean then cancel nothing, however large logits are.
    top = scores.amax(-1, keepdim=True)
    top = top.clamp_min(0) if pads else top
    scores = scores - top
    lse = scores.logsumexp(-1, keepdim=True)
    if pads:
        lse = torch.logaddexp(lse, math.log(pads) - top)
    mean = (torch.exp(scores - lse) * scores).sum(-1)
    if pads:
        mean = mean - (pads * torch.exp(-top - lse) * top).squeeze(-1)
    # H = -sum p (s - lse) = lse - sum p s.
    return lse.squeeze(-1) - mean
