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
from kdfast.nn.timm_bias import (
    TimmBeitAttention,
    TimmGlobalWindowAttention,
    TimmMaxxAttention,
    TimmRelPosAttention,
    TimmSwinAttention,
    TimmSwinCrAttention,
    TimmSwinV2Attention,
    TimmTinyAttention,
)
from kdfast.nn.timm_grid import (
    TimmBlockAttention,
    TimmChannelsFirstAttention,
    TimmConvAttention,
    TimmDiffAttention,
    TimmMapAttention,
    TimmMaskUnitAttention,
    TimmPlainAttention,
    TimmScaleAttention,
)
from kdfast.nn.torch_attention import TorchMultiheadAttention
from kdfast.nn.torchvision_swin import TorchvisionSwinAttention, TorchvisionSwinV2Attention

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
    "timm.models.fastvit.Attention": TimmChannelsFirstAttention,
    "timm.models.volo.Attention": TimmMapAttention,
    "torch.nn.modules.activation.MultiheadAttention": TorchMultiheadAttention,
    "torchvision.models.swin_transformer.ShiftedWindowAttention": TorchvisionSwinAttention,
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": TorchvisionSwinV2Attention,
    "timm.models.metaformer.Attention": TimmPlainAttention,
    "timm.models.nest.Attention": TimmBlockAttention,
    "timm.models.visformer.Attention": TimmConvAttention,
    "timm.models.cait.ClassAttn": TimmClassAttention,
    "timm.models.crossvit.CrossAttention": TimmCrossAttention,
    "timm.models.volo.ClassAttention": TimmPackedClassAttention,
    "timm.models.beit.Attention": TimmBeitAttention,
    "timm.models.gcvit.WindowAttentionGlobal": TimmGlobalWindowAttention,
    "timm.models.maxxvit.Attention2d": TimmMaxxAttention,
    "timm.models.maxxvit.AttentionCl": TimmMaxxAttention,
    "timm.models.swin_transformer.WindowAttention": TimmSwinAttention,
    "timm.models.swin_transformer_v2.WindowAttention": TimmSwinV2Attention,
    "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention": TimmSwinCrAttention,
    "timm.models.tiny_vit.Attention": TimmTinyAttention,
    "timm.models.vision_transformer_relpos.RelPosAttention": TimmRelPosAttention,
}

UNKNOWN = "not a class that kdfast knows"

_BIAS = "its position bias depends on the queries"
_FEW_KEYS = "its keys are pooled or strided: fewer keys than queries"
_CHANNELS = "it attends over channels, not tokens: a D x D matrix, nothing to fuse"
_LINEAR = "linear attention: no softmax over keys"
_WIDE = "values are wider than keys, and a position bias is added"

# Exact reasons for classes that have no stand-in, by their name inside ``timm``.
_REASONS: dict[str, tuple[str, ...]] = {
    _BIAS: (
        "layers.bottleneck_attn.BottleneckAttn",
        "layers.halo_attn.HaloAttn",
        "layers.lambda_layer.LambdaLayer",
        "models.vision_transformer_sam.Attention",
    ),
    _WIDE: (
        "models.efficientformer.Attention",
        "models.efficientformer_v2.Attention2d",
        "models.efficientformer_v2.Attention2dDownsample",
        "models.efficientvit_msra.CascadedGroupAttention",
        "models.levit.Attention",
        "models.levit.AttentionDownsample",
    ),
    _FEW_KEYS: (
        "layers.attention2d.MultiQueryAttention2d",
        "models.mvitv2.MultiScaleAttention",
        "models.nextvit.EfficientAttention",
        "models.pvt_v2.Attention",
        "models.twins.GlobalSubSampleAttn",
    ),
    _CHANNELS: (
        "models.davit.ChannelAttention",
        "models.davit.ChannelAttentionV2",
        "models.edgenext.CrossCovarianceAttn",
        "models.xcit.XCA",
    ),
    _LINEAR: (
        "models.coat.FactorAttnConvRelPosEnc",
        "models.mobilevit.LinearSelfAttention",
        "models.swiftformer.EfficientAdditiveAttention",
    ),
    "it mixes heads before and after the softmax": ("models.cait.TalkingHeadAttn",),
    "it weighs its neighbourhood by a projection: no queries and keys": (
        "models.volo.OutlookAttention",
    ),
    "two softmaxes mixed by a learned gate": ("models.convit.GPSA",),
    "it rotates two halves of its channels apart, which no Rope says": (
        "models.gemma4_vit.Gemma4Attention",
    ),
    "queries, keys or values come out of strided convolutions": (
        "models.cpubone.ConvAttention",
        "models.lowformer.ConvAttention",
        "models.nextvit.ConvAttention",
    ),
}
UNFUSED = {f"timm.{name}": reason for reason, names in _REASONS.items() for name in names}

# Gates that multiply channels or places: attention in name only, so they are not even listed.
GATES = {
    "timm.layers.cbam.ChannelAttn",
    "timm.layers.cbam.LightChannelAttn",
    "timm.layers.cbam.LightSpatialAttn",
    "timm.layers.cbam.SpatialAttn",
    "timm.layers.selective_kernel.SelectiveKernelAttn",
    "timm.layers.split_attn.SplitAttn",
    "timm.models.csatv2.SpatialAttention",
}
_NAME = re.compile(r"attention|attn", re.IGNORECASE)


def unfused_reason(module: nn.Module) -> str | None:
    """The reason why an attention without a stand-in is left; None if it is no attention."""
    source = qualified_name(module)
    if source in GATES:
        return None
    if source in UNFUSED:
        return UNFUSED[source]
    for base in type(module).__mro__[1:]:
        known = f"{base.__module__}.{base.__qualname__}"
        if known in FUSED:
            return f"a subclass of {known}, whose forward may differ"
    if hasattr(module, "fused_attn") or _NAME.search(type(module).__name__):
        return UNKNOWN
    return None
