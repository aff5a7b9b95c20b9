# SPDX-License-Identifier: Apache-2.0
"""What pictures a model takes, and a model behind its own resize and normalisation.

B batch, (H, W) pixels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.data.config import resolve_model_data_config
from timm.data.constants import DEFAULT_CROP_PCT, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from kdfast.models.eva import EVAViT
from kdfast.models.image_processor import pictures_config


def input_config(model: nn.Module) -> dict[str, Any]:
    """``input_size`` (3, H, W), ``mean``, ``std``, ``crop_pct``, ``interpolation`` and more.

    They are arguments of timm's ``create_transform``. The size is the one that the model was built
    for, perhaps not that of its pretrained weights.

    Args:
        model: Of timm, torchvision or Hugging Face, or ``EVAViT``.
    """
    if hasattr(model, "default_cfg") or hasattr(model, "pretrained_cfg"):
        config: dict[str, Any] = resolve_model_data_config(model)
        embed: Any = getattr(model, "patch_embed", None)
        if getattr(embed, "img_size", None) is not None:
            config = {**config, "input_size": (3, *embed.img_size), "crop_pct": 1.0}
        return config
    if hasattr(own := getattr(model, "config", None), "model_type"):
        return pictures_config(own)
    if isinstance(model, EVAViT):
        side: Any = int(model.config["img_size"]) // model.patch_size * model.patch_size
    else:
        side = getattr(getattr(model, "config", model), "image_size", 224)
    sides = (side, side) if isinstance(side, int) else tuple(side)
    return {
        "input_size": (3, *sides),
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "crop_pct": DEFAULT_CROP_PCT,
        "interpolation": "bilinear",
    }


class PreparedModel(nn.Module):
    """A model behind its own resize and normalisation.

    Attributes:
        net: A model of timm, torchvision or Hugging Face.
        size: (H, W) that the images are resized to; None: they stay as they are.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        config = input_config(net)
        # Facts of the model, not weights: they are no part of its state.
        for name in ("mean", "std"):
            value = torch.tensor(config[name]).view(-1, 1, 1)
            self.register_buffer(name, value, persistent=False)
        self.size = fixed_size(net)

    def forward(self, images: Tensor) -> Any:
        """The model's output for images (B, 3, H, W) in [0, 1], not normalised."""
        return self.net(self.prepared(images))

    def prepared(self, images: Tensor) -> Tensor:
        """Images as ``net`` takes them: of its size, normalised."""
        if self.size is not None and tuple(images.shape[-2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bilinear", antialias=True)
        return (images - self.mean) / self.std


def fixed_size(net: nn.Module) -> tuple[int, int] | None:
    """The one size that a model takes; None where it takes others as well."""
    embed: Any = getattr(net, "patch_embed", None)
    size: Any = getattr(embed, "img_size", None)
    if size is not None and not getattr(embed, "strict_img_size", True):
        return None
    if size is None:
        # torchvision's attribute, or that of transformers' configuration.
        size = getattr(getattr(net, "config", net), "image_size", None)
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
