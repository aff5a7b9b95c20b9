# SPDX-License-Identifier: Apache-2.0
"""Entropy of the attention rows of a call. B batch, H heads, N tokens."""

import math

import torch
from torch import Tensor

from kdfast.nn.heads import AttentionCall
from kdfast.ops.attention_entropy import attention_entropy


@torch.no_grad()
def call_entropy(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """``kdfast.attention_entropy`` of a call, its position bias included.

    Returns:
        Entropy in nats (B, H, N), and the logarithm of the number of keys (N,). With a bias whole
        score matrices are held, an image or a window at a time.
    """
    if call.bias is None:
        return attention_entropy(
            call.q, call.k, rope=call.rope, window=call.window, scale=call.scale
        )
    rows = []
    with torch.autocast(call.q.device.type, enabled=False):
        for i, (q, k) in enumerate(zip(call.q.split(1), call.k.split(1), strict=True)):
            bias = call.bias[i % len(call.bias)].unsqueeze(0)
            log_p = call._replace(q=q, k=k, bias=bias).scores().log_softmax(-1)
            # A weight of 0 has no part in it, whatever its logarithm.
            rows.append(-(log_p.exp() * log_p.clamp_min(-1e30)).sum(-1))
    entropy = torch.cat(rows)
    return entropy, entropy.new_full(entropy.shape[2:], math.log(max(1, entropy.shape[2])))
