# SPDX-License-Identifier: Apache-2.0
"""timm's Vision Transformer behind a convolutional stem, for pictures of 32 x 32 pixels.

B batch, C channels, N tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from examples.cifar10.config import ModelConfig

SIDE, PATCH = 32, 4
# Of CIFAR-10's training pictures.
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Convolution(nn.Sequential):
    """3 x 3 convolution, batch norm and ReLU; the size stays."""

    def __init__(self, given: int, made: int) -> None:
        super().__init__(
            nn.Conv2d(given, made, 3, padding=1, bias=False),
            nn.BatchNorm2d(made),
            nn.ReLU(inplace=True),
        )


class Residual(Convolution):
    """The same with its input added."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) of the same."""
        return x + super().forward(x)


class Stem(nn.Module):
    """Makes 8 x 8 tokens of a picture; in the place of timm's ``PatchEmbed``."""

    def __init__(
        self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **_: Any
    ) -> None:
        super().__init__()
        side = img_size // patch_size
        self.img_size, self.patch_size = (img_size, img_size), (patch_size, patch_size)
        self.grid_size, self.num_patches = (side, side), side * side
        self.layers = nn.Sequential(
            Convolution(in_chans, 32),
            nn.MaxPool2d(2),
            Convolution(32, 48),
            Residual(48),
            Residual(48),
            nn.MaxPool2d(2),
            Convolution(48, embed_dim),
            Residual(embed_dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) tokens of pictures (B, 3, 32, 32)."""
        # As oneDNN's convolutions like it: 1.2 times as fast a step.
        x = x.contiguous(memory_format=torch.channels_last)
        tokens: Tensor = self.layers(x).flatten(2).transpose(1, 2)
        return tokens


def build(config: ModelConfig, seed: int) -> VisionTransformer:
    """The model with random weights; ``forward`` takes normalised pictures (B, 3, 32, 32)."""
    torch.manual_seed(seed)
    model = VisionTransformer(
        img_size=SIDE,
        patch_size=PATCH,
        num_classes=10,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=config.mlp_ratio,
        class_token=False,
        global_pool="avg",
        embed_layer=Stem,
    ).to(memory_format=torch.channels_last)
    # Where timm's distillation looks for the normalisation.
    facts = {"mean": MEAN, "std": STD, "input_size": (3, SIDE, SIDE)}
    model.__dict__["pretrained_cfg"] = facts
    return model
