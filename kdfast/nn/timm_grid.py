# SPDX-License-Identifier: Apache-2.0
"""timm's attentions over windows, grids and image blocks, and differential attention.

B batch, H heads, N tokens, D head dim, C channels, T windows.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from kdfast.nn.attention import FusedAttention, width_of
from kdfast.nn.heads import AttentionCall, HeadAxis
from kdfast.nn.timm_attention import TimmAttention
from kdfast.ops._no_heads import no_heads


class TimmPlainAttention(FusedAttention):
    """Packed qkv and an output projection: MetaFormer, DaViT's windows."""

    axes: ClassVar[Mapping[str, HeadAxis]] = {
        "qkv.weight": HeadAxis(0, parts=3),
        "qkv.bias": HeadAxis(0, parts=3),
        "proj.weight": HeadAxis(1),
    }

    def _configure(self) -> None:
        self.head_dim = width_of(self.proj) // self.num_heads

    def _packed(self, x: Tensor) -> Tensor:
        """(B, N, 3 * H * D)."""
        packed: Tensor = self.qkv(x)
        return packed

    def project(self, x: Tensor, *args: Any, **kwargs: Any) -> AttentionCall:
        return self.split(self._packed(x))

    def split(self, packed: Tensor) -> AttentionCall:
        """Queries, keys and values of what the projections made, (B, N, 3 * H * D)."""
        qkv = packed.unflatten(2, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return AttentionCall(q, k, None, None, self.scale, v)

    def pads(self, x: Tensor) -> Tensor | None:
        # Blocks fill their last windows with zeros, after their norm: no token is all zero.
        return (x == 0).all(-1).flatten(1)

    def context(self, x: Tensor, *args: Any) -> Tensor:
        """The heads' outputs (B, N, H * D) of tokens (B, N, C)."""
        if self.num_heads == 0:
            return no_heads(self, x.new_zeros(x.shape[0], x.shape[1], 0), x, *args)
        return self.attend(self.project(x, *args))

    def finish(self, context: Tensor) -> Tensor:
        """The output projection, and its dropout where there is one."""
        out: Tensor = self.proj(context)
        drop = self._modules.get("proj_drop")
        return out if drop is None else drop(out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C')."""
        return self.finish(self.context(x))


class TimmBlockAttention(TimmPlainAttention):
    """``timm.models.nest.Attention``: inside image blocks, heads interleaved in the output."""

    # In the output projection a head is every H-th channel, which no HeadAxis says.
    axes: ClassVar[Mapping[str, HeadAxis]] = {}
    unprunable: ClassVar[str | None] = "its output projection interleaves the channels of heads"

    def sequences(self, x: Tensor) -> tuple[int, int]:
        return x.shape[0] * x.shape[1], x.shape[2]

    def project(self, x: Tensor, *args: Any, **kwargs: Any) -> AttentionCall:
        return super().project(x.flatten(0, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, N, C) to (B, T, N, C)."""
        context = self.context(x).unflatten(-1, (self.num_heads, self.head_dim))
        return self.finish(context.transpose(-1, -2).flatten(-2)).unflatten(0, x.shape[:2])


class TimmMaskUnitAttention(TimmPlainAttention):
    """``timm.models.hiera.MaskUnitAttention``: inside mask units, or of all tokens."""

    @classmethod
    def why_not(cls, original: nn.Module) -> str | None:
        if original.q_stride != 1:
            return "its queries are pooled: fewer queries than keys"
        return None

    def _configure(self) -> None:
        # The original calls the number of heads ``heads``.
        self.num_heads = int(self.__dict__["heads"])

    def _recount(self) -> None:
        self.dim_out = self.num_heads * self.head_dim

    def _units(self, x: Tensor) -> int:
        return x.shape[1] // self.window_size if self.use_mask_unit_attn else 1

    def sequences(self, x: Tensor) -> tuple[int, int]:
        units = self._units(x)
        return x.shape[0] * units, x.shape[1] // units

    def project(self, x: Tensor, *args: Any, **kwargs: Any) -> AttentionCall:
        units, heads = self._units(x), (3, self.num_heads, self.head_dim)
        # Token n belongs to unit n % T; units go to the batch.
        qkv = self.qkv(x).unflatten(2, heads).unflatten(1, (-1, units))
        q, k, v = qkv.permute(3, 0, 2, 4, 1, 5).flatten(1, 2).unbind(0)
        return AttentionCall(q, k, None, None, self.scale, v)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C')."""
        if self.num_heads == 0:
            return self.finish(no_heads(self, x.new_zeros(x.shape[0], x.shape[1], 0), x))
        context = self.context(x).unflatten(0, (-1, self._units(x)))
        return self.finish(context.transpose(1, 2).flatten(1, 2))


class TimmMapAttention(TimmPlainAttention):
    """Attention of all tokens of a map (B, h, w, C): VOLO."""

    def sequences(self, x: Tensor) -> tuple[int, int]:
        return x.shape[0], x[0, ..., 0].numel()

    def project(self, x: Tensor, *args: Any, **kwargs: Any) -> AttentionCall:
        return super().project(x.flatten(1, -2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) to (B, h, w, C')."""
        return super().forward(x.flatten(1, 2)).unflatten(1, x.shape[1:3])


class TimmScaleAttention(TimmMapAttention):
    """``timm.models.hieradet_sam2.MultiScaleAttention`` without query pooling."""

    @classmethod
    def why_not(cls, original: nn.Module) -> str | None:
        if original.q_pool is not None:
            return "its queries are pooled: fewer queries than keys"
        return None


class TimmChannelsFirstAttention(TimmPlainAttention):
    """``timm.models.fastvit.Attention``: of all tokens of a map (B, C, h, w)."""

    def pads(self, x: Tensor) -> Tensor | None:
        return None

    def sequences(self, x: Tensor) -> tuple[int, int]:
        return x.shape[0], x[0, 0].numel()

    def project(self, x: Tensor, *args: Any, **kwargs: Any) -> AttentionCall:
        return super().project(x.flatten(2).transpose(1, 2) if x.dim() == 4 else x)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C, h, w)."""
        out = super().forward(x.flatten(2).transpose(1, 2))
        return out.transpose(1, 2).unflatten(2, x.shape[2:])


class TimmConvAttention(TimmPlainAttention):
    """``timm.models.visformer.Attention``: projections are 1 x 1 convolutions."""

    unprunable: ClassVar[str | None] = "its projections are convolutions"
    fused_by_default: ClassVar[bool] = False

    def project(self, x: Tensor, *args: Any, **kwargs: Any) -> AttentionCall:
        packed = self.qkv(x).flatten(2).unflatten(1, (3, self.num_heads, self.head_dim))
        q, k, v = (y.transpose(2, 3).contiguous() for y in packed.unbind(1))
        return AttentionCall(q, k, None, None, self.scale, v)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C, h, w)."""
        if self.num_heads == 0:
            return self.finish(no_heads(self, x.new_zeros(x.shape[0], 0, *x.shape[2:]), x))
        context = self.attend(self.project(x)).transpose(1, 2)
        return self.finish(context.unflatten(2, x.shape[2:]))


class TimmDiffAttention(TimmAttention):
    """``timm.layers.DiffAttention``: the difference of two softmaxes on the same values.

    One call of twice the heads: queries and keys, half as wide as values, are padded with zeros.
    """

    def slice_dim(self) -> int:
        return 2 * self.head_dim

    def project(self, x: Tensor, *args: Any, **kwargs: Any) -> AttentionCall:
        q, k, v = self.qkv(x).chunk(3, 2)
        return self._doubled(q, k, v)

    def _doubled(self, q: Tensor, k: Tensor, v: Tensor) -> AttentionCall:
        """From (B, N, C) each to (B, 2 H, N, 2 D) each."""
        half, width = (2 * self.num_heads, self.head_dim), (self.num_heads, 2 * self.head_dim)
        q, k = (y.unflatten(2, half).transpose(1, 2) for y in (q, k))
        q, k = (F.pad(y, (0, self.head_dim)) for y in (self.q_norm(q), self.k_norm(k)))
        v = v.unflatten(2, width).transpose(1, 2).repeat_interleave(2, 1)
        return AttentionCall(q, k, None, None, self.scale, v)

    def _difference(self, both: Tensor) -> Tensor:
        """(B, N, H * 2 D) from the outputs (B, N, 2 H * 2 D) of both softmaxes."""
        first, second = both.unflatten(2, (self.num_heads, 2, -1)).unbind(3)
        if self.lambda_a is not None:
            plus, minus = self.lambda_a.exp(), self.lambda_b.exp()
        else:
            plus = (self.lambda_q1 * self.lambda_k1).sum(-1).float().exp()
            minus = (self.lambda_q2 * self.lambda_k2).sum(-1).float().exp()
        weight = (plus - minus + self.lambda_init).to(both.dtype)
        out = self.sub_norm(first - weight * second) * (1 - self.lambda_init)
        return out.flatten(2)

    def finish(self, x: Tensor, context: Tensor) -> Tensor:
        if self.num_heads:
            context = self.norm(self._difference(context))
        out: Tensor = self.proj_drop(self.proj(context))
        return out
