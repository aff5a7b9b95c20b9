# SPDX-License-Identifier: Apache-2.0
"""A small head that labels every pixel from a backbone's feature map.

B batch, C channels, (h, w) grid of patches, L classes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from kdfast.models.eva_layers import apply_linear


class DenseHead(nn.Module):
    """Per-pixel logits: norm over channels, two 3x3 convolutions around one upsampling.

    Args:
        in_dim: C of the feature map.
        hidden_dim: Width of the convolutions.
        classes: L.
        patch_size: Pixels per side of a patch, even.

    Raises:
        ValueError: ``patch_size`` is odd.
    """

    def __init__(self, in_dim: int, hidden_dim: int, classes: int, patch_size: int) -> None:
        super().__init__()
        if patch_size % 2:
            raise ValueError(f"DenseHead: patch_size must be even, got {patch_size}")
        self.norm = nn.LayerNorm(in_dim)
        # Pixel shuffle: the channels of a patch hold what its half-size cells look like.
        self.expand = nn.Linear(in_dim, 4 * hidden_dim)
        self.shuffle = nn.PixelShuffle(2)
        self.mix = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1)
        self.classify = nn.Conv2d(hidden_dim, classes, 1)
        self.scale = patch_size // 2

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, L, h * patch, w * patch) of a feature map (B, C, h, w)."""
        x = apply_linear(self.expand, self.norm(features.movedim(1, -1))).movedim(-1, 1)
        x = F.gelu(self.shuffle(x))
        x = self.classify(F.gelu(self.mix(x)))
        return F.interpolate(x, scale_factor=self.scale, mode="bilinear", align_corners=False)
