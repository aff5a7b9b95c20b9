# SPDX-License-Identifier: Apache-2.0
"""Backbones whose attention runs on kdfast's ops, and their checkpoints."""

from kdfast.models.checkpoint import load_backbone, load_orion_backbone, save_backbone
from kdfast.models.eva import EVAViT, eva_vit_l_orion
from kdfast.models.trace import AttentionTarget, Trace

__all__ = [
    "AttentionTarget",
    "EVAViT",
    "Trace",
    "eva_vit_l_orion",
    "load_backbone",
    "load_orion_backbone",
    "save_backbone",
]
