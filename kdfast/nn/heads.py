# SPDX-License-Identifier: Apache-2.0
"""Where an attention keeps its heads, and what one call of it computed.

B batch, H heads, N tokens, D head dim.
"""

from typing import NamedTuple

from torch import Tensor

from kdfast.ops.geometry import Rope, Window


class HeadAxis(NamedTuple):
    """Where a tensor of the attention holds its heads.

    Attributes:
        dim: The dimension with H equal blocks, one a head (D long in a projection).
        parts: How many times the H blocks repeat along ``dim``: 3 for a fused qkv.
        grouped: The blocks are key/value heads, each shared by ``kv_group`` consecutive query
            heads, so there are H // kv_group of them.
    """

    dim: int
    parts: int = 1
    grouped: bool = False


class AttentionCall(NamedTuple):
    """What one attention computes its probabilities and its context from.

    Attributes:
        q: (B, H, N, D) before the rotation, after a query norm.
        k: (B, H, N, D) before the rotation, after a key norm.
        rope: Rotary tables of the call; None where ``q`` and ``k`` are not rotated, or hold a
            rotation already that no ``Rope`` can say (tables per head or per image).
        window: Windows of the call.
        scale: Factor of the logits; D ** -0.5 if None.
        v: (B, H, N, D) values; None where the reader did not ask for them.
        bias: (G, H, N, N) added to the scaled scores; G divides B, image b takes ``bias[b % G]``.
    """

    q: Tensor
    k: Tensor
    rope: Rope | None
    window: Window | None
    scale: float | None
    v: Tensor | None = None
    bias: Tensor | None = None
