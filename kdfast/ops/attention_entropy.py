# SPDX-License-Identifier: Apache-2.0
"""Exact entropy of attention rows. B batch, H heads, N tokens, D head dim."""

import math
from typing import Any

import torch
from torch import Tensor

from kdfast.ops import pruned_attention as attention
from kdfast.ops._attention_args import (
    check_geometry,
    check_qkv,
    geometry_tensors,
    score_args,
    window_args,
)
from kdfast.ops._autocast import without_autocast
from kdfast.ops._checks import check_tensors
from kdfast.ops._library import (
    LIB,
    forbid_gradient,
    fused_devices,
    not_compiled,
    register_fake,
    use_fused,
)
from kdfast.ops.geometry import Rope, Window

# Elements of one tile of scores of the reference: 16 MiB in fp32, whatever N is.
TILE = 1 << 22


@torch.no_grad()
def attention_entropy(
    q: Tensor,
    k: Tensor,
    *,
    rope: Rope | None = None,
    window: Window | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Entropy of every row of softmax(scale * R(q) R(k)^T), of which only a tile exists at a time.

    Args:
        q: (B, H, N, D) before the rotation, fp16, bf16, fp32 or fp64.
        k: (B, H, N, D) before the rotation, dtype and device of q.
        rope: As in ``pruned_attention``.
        window: As in ``pruned_attention``; with ``pad_value`` its pads are keys with logit 0.
        scale: Factor of the scores; D ** -0.5 if None.
        backend: "auto", "fused" or "reference"; ``KDFAST_BACKEND`` if None.

    Returns:
        Entropy in nats, (B, H, N) in fp32, fp64 for fp64 inputs; and the logarithm of the number
        of keys that each token sees, pads included, (N,), which is the largest possible entropy.

    Raises:
        TypeError: Dtypes do not match or are not supported, or q or k is no tensor.
        ValueError: Shapes or devices do not match.
        NotImplementedError: ``backend="fused"`` and there is no kernel (the reason is given).

    Gradients: none. Autocast has no effect on the scores. Deterministic: yes.
    """
    check_tensors("attention_entropy", ("q", "k"), q, k)
    check_qkv("attention_entropy", q=q, k=k)
    check_geometry("attention_entropy", q, rope, window)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    device = q.device.type
    given = (q, k, *geometry_tensors(rope, window))
    compiled = device in FUSED_ON
    fused = use_fused("attention_entropy", backend, why_not(q), compiled=compiled, given=given)
    limit = q.new_empty(q.shape[2], dtype=attention.math_dtype(q.dtype))
    for index, pads in _groups(q, window):
        limit[index] = math.log(len(index) + pads) if len(index) + pads else 0
    context, _ = without_autocast(device)
    with context:
        if not fused:
            return reference(q, k, rope, window, scale), limit
        grid, size, pad_value = window_args(window)
        if rope is not None:
            q, k, rope = rope.whole(q, k)
        op = torch.ops.kdfast.attention_entropy.default
        entropy: Tensor = op(q, k, *score_args(rope, scale), grid, size, pad_value is not None)
        return entropy, limit


def why_not(q: Tensor) -> str | None:
    """The reason why the compiled kernel cannot run this input, or None."""
    return not_compiled("attention_entropy", q.device, FUSED_ON)


def _groups(q: Tensor, window: Window | None) -> list[tuple[Tensor, int]]:
    """The tokens of every window, and its live pads."""
    if window is None:
        return [(torch.arange(q.shape[2], device=q.device), 0)]
    live = window.pad_value is not None
    return [(window.token_index(s, q.device), live * window.pads(s)) for s in window.spans()]


def reference(
    q: Tensor, k: Tensor, rope: Rope | None, window: Window | None, scale: float
) -> Tensor:
    """The specification, (B, H, N): a tile of scores at a time."""
    dtype = attention.math_dtype(q.dtype)
    q, k = (attention.rotated(x, rope, window).to(dtype) for x in (q, k))
    entropy = q.new_empty(q.shape[:3])
    for index, pads in _groups(q, window):
        keys = k[:, :, index].transpose(-1, -2)
        rows = max(1, TILE // max(1, q.shape[0] * q.shape[1] * len(index)))
        for some in index.split(rows) if len(index) else ():
            entropy[:, :, some] = _row_entropy(scale * q[:, :, some] @ keys, pads)
    return entropy


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


LIB.define(
    "attention_entropy(Tensor q, Tensor k, Tensor? cos, Tensor? sin, int prefix, bool interleaved, "
    "float scale, int[]? grid, int window, bool pads) -> Tensor"
)


@register_fake("attention_entropy")
def _fake(*, q: Tensor, **_: Any) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=attention.math_dtype(q.dtype))


forbid_gradient("attention_entropy")
FUSED_ON = fused_devices("attention_entropy")
