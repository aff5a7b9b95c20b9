# SPDX-License-Identifier: Apache-2.0
"""Pictures of what a vision transformer's heads look at. See docs/use/attention_pictures.md."""

from kdfast.pictures.capture import Attentions, capture
from kdfast.pictures.draw import (
    draw_head,
    draw_heads,
    draw_pruned_heads,
    draw_rollout,
    draw_rollout_change,
)
from kdfast.pictures.layer import LayerAttention
from kdfast.pictures.names import class_names, model_name, prediction
from kdfast.pictures.rollout import rollout

__all__ = [
    "Attentions",
    "LayerAttention",
    "capture",
    "class_names",
    "draw_head",
    "draw_heads",
    "draw_pruned_heads",
    "draw_rollout",
    "draw_rollout_change",
    "model_name",
    "prediction",
    "rollout",
]
