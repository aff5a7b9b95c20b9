# SPDX-License-Identifier: Apache-2.0
"""timm's attention modules on the fused kernel. B batch, H heads, N tokens, D head dim, C channels.

timm itself is never imported: an adopted module brings its submodules along.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from kdfast.nn.attention import FusedAttention
from kdfast.nn.heads import AttentionCall, HeadAxis


def drops_attention(original: nn.Module) -> str | None:
    """A reason if the module drops attention weights in training."""
    drop = original._modules.get("attn_drop")
    if isinstance(drop, nn.Dropout) and drop.p > 0:
        return f"attention dropout {drop.p} (the kernels have none)"
    return None


class TimmAttention(FusedAttention):
    """``timm.layers.Attention``: packed qkv, optional q/k norm, scale norm and gate."""

    axes: ClassVar[Mapping[str, HeadAxis]] = {
        "qkv.weight": HeadAxis(0, parts=3),
        "qkv.bias": HeadAxis(0, parts=3),
        "norm.weight": HeadAxis(0),
        "norm.bias": HeadAxis(0),
        "gate.weight": HeadAxis(0),
        "gate.bias": HeadAxis(0),
        "proj.weight": HeadAxis(1),
    }

    @classmethod
    def why_not(cls, original: nn.Module) -> str | None:
        return drops_attention(original)

    def project(self, x: Tensor, *args: Any, **kwargs: Any) -> AttentionCall:
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return AttentionCall(self.q_norm(q), self.k_norm(k), None, None, self.scale, v)

    def finish(self, x: Tensor, context: Tensor) -> Tensor:
        """The branch's output (B, N, C') from the heads' outputs (B, N, H * D)."""
        if self.num_heads:
            context = self.norm(context)
            if self.gate is not None:
                context = context * self.gate(x).sigmoid()
        out: Tensor = self.proj_drop(self.proj(context))
        return out

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """(B, N, C) to (B, N, C'); a mask or a causal call runs torch's attention."""
        if self.num_heads == 0:
            return self.finish(x, x.new_zeros(x.shape[0], x.shape[1], 0))
        return self.finish(x, self.attend(self.project(x), attn_mask, is_causal))
