# SPDX-License-Identifier: Apache-2.0
"""The size of the pictures that a model takes."""

from timm.data.config import resolve_model_data_config
from torch import nn

from kdfast.pruning.families import anatomy_of


def picture_size(model: nn.Module) -> tuple[int, int]:
    """(height, width) of the pictures that a model was built for."""
    try:
        return anatomy_of("picture_size", model).adapter.image_size(model)
    except TypeError:  # no model that can be pruned
        if hasattr(model, "pretrained_cfg"):
            height, width = resolve_model_data_config(model)["input_size"][1:]
            return height, width
        side = getattr(getattr(model, "config", model), "image_size", 224)
        return (side, side) if isinstance(side, int) else tuple(side)
