# SPDX-License-Identifier: Apache-2.0
"""What a picture's title says: the model, and what it takes the image for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from kdfast.models.eva import EVAViT

IMAGENET = 1000


def model_name(model: nn.Module) -> str:
    """Name of a model's architecture: timm's or Hugging Face's, else its class and its size."""
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    if name := config.get("architecture"):
        return str(name)
    config = getattr(model, "config", None)
    if name := getattr(config, "model_type", None):
        return str(name)
    if isinstance(model, EVAViT):
        heads = sum(len(block) for block in model.heads)
        width = model.config["embed_dim"]
        return f"EVA-ViT, {len(model.blocks)} blocks, {width} wide, {heads} heads"
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    return f"{type(model).__name__}, {millions:.2f}M parameters"


def class_names(model: nn.Module) -> list[str] | None:
    """Names of a model's classes: those of its config, or ImageNet's; None: they are not known."""
    known = getattr(getattr(model, "config", None), "id2label", None)
    if known and not all(str(name).startswith("LABEL_") for name in known.values()):
        return [str(known[i]) for i in sorted(known)]
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    if config.get("num_classes") == IMAGENET == getattr(model, "num_classes", None):
        from timm.data.imagenet_info import ImageNetInfo

        info = ImageNetInfo()
        return [info.index_to_description(i).split(",")[0] for i in range(IMAGENET)]
    return None


def prediction(logits: Tensor, names: Sequence[str] | None) -> str:
    """The class of the highest logit with its probability, such as "tabby (93%)".

    Args:
        logits: (C,) of one image.
        names: Names of the classes; None: their numbers.
    """
    shares = logits.float().softmax(0)
    best = int(shares.argmax())
    fits = names is not None and len(names) == len(logits)
    return f"{names[best] if fits and names else f'class {best}'} ({float(shares[best]):.0%})"
