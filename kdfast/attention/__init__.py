# SPDX-License-Identifier: Apache-2.0
"""Pictures of what a vision transformer's heads look at. See docs/attention_pictures.md."""

from kdfast.attention.capture import Attentions, capture
from kdfast.attention.layer import LayerAttention
from kdfast.attention.pictures import (
    draw_comparison,
    draw_head,
    draw_heads,
    draw_pruned_heads,
    draw_rollout,
)
from kdfast.attention.rollout import rollout

__all__ = [
    "Attentions",
    "LayerAttention",
    "capture",
    "draw_comparison",
    "draw_head",
    "draw_heads",
    "draw_pruned_heads",
    "draw_rollout",
    "rollout",
]
