# SPDX-License-Identifier: Apache-2.0
"""Small EVA-ViTs for tests."""

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from kdfast.models import EVAViT


def tiny_eva(std: float, **overrides: Any) -> "EVAViT":
    """A seeded fp64 EVAViT of three blocks (window, window, global) with 4 heads of 16 channels.

    Args:
        std: Standard deviation of every parameter, so that none is zero and can be forgotten.
        **overrides: Arguments of ``EVAViT`` to change.
    """
    # Imports timm, which takes seconds: not for the tests of ops.
    from kdfast.models import EVAViT

    config: dict[str, Any] = {
        "img_size": 20,
        "patch_size": 4,
        "embed_dim": 64,
        "depth": 3,
        "num_heads": 4,
        "mlp_ratio": 2.0,
        "window_size": 3,
        "window_block_indexes": (0, 1),
        "pretrain_img_size": 12,
        "with_cp": False,
    }
    torch.manual_seed(1)
    model = EVAViT(**{**config, **overrides}).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std)
    return model


def small_eva(**overrides: Any) -> "EVAViT":
    """A seeded fp32 EVAViT of three blocks (window, window, global) with 3 heads of 16 channels.

    Biases are not zero.

    Args:
        **overrides: Arguments of ``EVAViT`` to change.
    """
    from kdfast.models import EVAViT

    config: dict[str, Any] = {
        "img_size": 96,
        "embed_dim": 48,
        "depth": 3,
        "num_heads": 3,
        "window_size": 4,
        "window_block_indexes": (0, 1),
        "with_cp": False,
    }
    torch.manual_seed(1)
    model = EVAViT(**{**config, **overrides})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
    return model
