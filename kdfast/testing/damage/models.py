# SPDX-License-Identifier: Apache-2.0
"""Small models of every family that is saved, and their folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import kdfast
from kdfast.models import EVAViT
from kdfast.pruning import prune_heads

KEEP = [[0, 2], [1]]


def timm_vit() -> nn.Module:
    """Three heads of 16 channels in each of two blocks; so have the others."""
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", depth=2, num_classes=7, img_size=32, embed_dim=48, num_heads=3
    )
    return model


def eva() -> EVAViT:
    """An EVA backbone."""
    sizes: dict[str, Any] = {"embed_dim": 48, "num_heads": 3, "depth": 2, "mlp_ratio": 2.0}
    return EVAViT(img_size=32, pretrain_img_size=32, **sizes)


def torchvision_vit() -> nn.Module:
    """A model of torchvision."""
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, 2, 3, 48, 64, num_classes=5)


def hugging_face() -> nn.Module:
    """A model of transformers."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes: dict[str, Any] = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 2, "image_size": 32, "patch_size": 8, "num_labels": 4}
    config = ViTConfig(**sizes)
    model: nn.Module = ViTForImageClassification(config)
    return model


MAKERS = {
    "timm": timm_vit,
    "EVA": eva,
    "torchvision": torchvision_vit,
    "transformers": hugging_face,
}


def saved(name: str, folder: Path, *, foreign: bool = False) -> None:
    """Writes a folder of a model.

    Args:
        name: One of ``MAKERS``.
        folder: Folder.
        foreign: As the library itself does it, whole; else pruned, by ``save_pretrained``.
    """
    torch.manual_seed(0)
    model: Any = MAKERS[name]().eval()
    if not foreign:
        kdfast.save_pretrained(prune_heads(model, KEEP), folder)
    elif name == "transformers":
        model.save_pretrained(folder)
    else:
        timm.models.save_for_hf(model, str(folder), safe_serialization=True)
