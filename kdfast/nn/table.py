# SPDX-License-Identifier: Apache-2.0
"""Which attention classes have a fused stand-in, and why the others have none."""

import re

from torch import nn

from kdfast.nn.attention import FusedAttention, qualified_name
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
from kdfast.nn.timm_grid import (
    TimmBlockAttention,
    TimmConvAttention,
    TimmDiffAttention,
    TimmMaskUnitAttention,
    TimmPlainAttention,
    TimmScaleAttention,
)

# By qualified name, so that no library has to be imported to be known.
FUSED: dict[str, type[FusedAttention]] = {
    "timm.layers.attention.Attention": TimmAttention,
    "timm.layers.attention.AttentionRope": TimmRopeAttention,
    "timm.models.eva.EvaAttention": TimmEvaAttention,
    "timm.models.vision_transformer.ParallelScalingBlock": TimmParallelBlock,
    "timm.layers.attention_pool.AttentionPoolLatent": TimmLatentPool,
    "timm.layers.diff_attention.DiffAttention": TimmDiffAttention,
    "timm.models.davit.WindowAttention": TimmPlainAttention,
    "timm.models.hiera.MaskUnitAttention": TimmMaskUnitAttention,
    "timm.models.hieradet_sam2.MultiScaleAttention": TimmScaleAttention,
    "timm.models.metaformer.Attention": TimmPlainAttention,
    "timm.models.nest.Attention": TimmBlockAttention,
    "timm.models.visformer.Attention": TimmConvAttention,
    "timm.models.cait.ClassAttn": TimmClassAttention,
    "timm.models.crossvit.CrossAttention": TimmCrossAttention,
    "timm.models.volo.ClassAttention": TimmPackedClassAttention,
}

# Exact reasons for classes that have no stand-in.
UNFUSED: dict[str, str] = {}

_NAME = re.compile(r"attention|attn", re.IGNORECASE)


def unfused_reason(module: nn.Module) -> str | None:
    """The reason why an attention without a stand-in is left; None if it is no attention."""
    source = qualified_name(module)
    if source in UNFUSED:
        return UNFUSED[source]
    for base in type(module).__mro__[1:]:
        known = f"{base.__module__}.{base.__qualname__}"
        if known in FUSED:
            return f"a subclass of {known}, whose forward may differ"
    if hasattr(module, "fused_attn") or _NAME.search(type(module).__name__):
        return "not a class that kdfast knows"
    return None
