# SPDX-License-Identifier: Apache-2.0
"""Fused attention modules that stand in for those of other libraries.

See docs/use/accelerate.md.
"""

from kdfast.nn.accelerate import AccelerateReport, Replacement, accelerate, restore
from kdfast.nn.attention import FusedAttention
from kdfast.nn.heads import AttentionCall, HeadAxis
from kdfast.nn.pool import (
    TimmClassAttention,
    TimmCrossAttention,
    TimmLatentPool,
    TimmPackedClassAttention,
)
from kdfast.nn.timm_attention import (
    TimmAttention,
    TimmEvaAttention,
    TimmParallelBlock,
    TimmRopeAttention,
)
from kdfast.nn.torch_attention import TorchMultiheadAttention
from kdfast.nn.transformers_attention import register_transformers

__all__ = [
    "AccelerateReport",
    "AttentionCall",
    "FusedAttention",
    "HeadAxis",
    "Replacement",
    "TimmAttention",
    "TimmClassAttention",
    "TimmCrossAttention",
    "TimmEvaAttention",
    "TimmLatentPool",
    "TimmPackedClassAttention",
    "TimmParallelBlock",
    "TimmRopeAttention",
    "TorchMultiheadAttention",
    "accelerate",
    "register_transformers",
    "restore",
]
