# SPDX-License-Identifier: Apache-2.0
"""Fused attention modules that stand in for those of other libraries. See docs/accelerate.md."""

from kdfast.nn.accelerate import AccelerateReport, Site, accelerate, restore
from kdfast.nn.attention import FusedAttention
from kdfast.nn.heads import AttentionCall, HeadAxis
from kdfast.nn.timm_attention import TimmAttention

__all__ = [
    "AccelerateReport",
    "AttentionCall",
    "FusedAttention",
    "HeadAxis",
    "Site",
    "TimmAttention",
    "accelerate",
    "restore",
]
