# SPDX-License-Identifier: Apache-2.0
"""timm's attentions that add a position bias to the scores: Swin, BEiT, MaxViT and others.

B batch, H heads, N tokens, D head dim, C channels, G windows of an image.
"""

import importlib
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast.nn.heads import AttentionCall, HeadAxis
from kdfast.nn.timm_attention import biased_qkv
from kdfast.nn.timm_grid import TimmPlainAttention
from kdfast.ops._remembered import remembered


def masked(bias: Tensor, mask: Tensor | None) -> Tensor:
    """(G, H, N, N) of a bias (H, N, N) and a mask (G, N, N) of windows."""
    return bias.unsqueeze(0) if mask is None else bias + mask.unsqueeze(1).to(bias.dtype)


def indexed(table: Tensor, index: Tensor) -> Tensor:
    """(H, N, N) of a table (positions, H) and the position of every pair of tokens."""
    tokens = math.isqrt(index.numel())
    return table[index.flatten()].unflatten(0, (tokens, tokens)).permute(2, 0, 1)


def as_read(bias: Tensor) -> Tensor:
    """A bias in the dtype of the kernel's sums, to which each call would cast it."""
    return bias.to(torch.promote_types(bias.dtype, torch.float32)).contiguous()


def cosines(call: AttentionCall, logit_scale: Tensor) -> AttentionCall:
    """The call with queries and keys of length 1, times exp of a scale (H,) up to 100."""
    scale = logit_scale.flatten().clamp(max=math.log(100)).exp().unflatten(0, (-1, 1, 1))
    q, k = F.normalize(call.q, dim=-1) * scale, F.normalize(call.k, dim=-1)
    return call._replace(q=q, k=k, scale=1.0)


class TimmBiasAttention(TimmPlainAttention):
    """Base of attentions with a position bias, which a subclass adds to the call of ``project``."""

    around: ClassVar[tuple[str, ...]] = (*TimmPlainAttention.around, "rel_pos")

    def kept(self, bias: Tensor | None) -> Tensor | None:
        """The held heads' part of a bias (1, H, N, N) of all original heads."""
        if bias is None or bias.shape[1] == self.num_heads:
            return bias
        return bias.index_select(1, torch.tensor(self.heads, device=bias.device))

    def _method(self, name: str) -> Any:
        """A function of the original's class; it works on the tables that both modules share."""
        path, _, cls = self.source.rpartition(".")
        return getattr(getattr(importlib.import_module(path), cls), name)

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """What timm calls when the image size of a model changes."""
        self._method("set_window_size")(self, window_size)

    def init_non_persistent_buffers(self) -> None:
        """What timm calls after a model left the meta device."""
        self._method("init_non_persistent_buffers")(self)

    def __getattr__(self, name: str) -> Any:
        # Names that the borrowed functions look up on the module.
        if name in ("_init_buffers", "_make_pair_wise_relative_positions"):
            return self._method(name).__get__(self)
        return super().__getattr__(name)


class TimmSwinAttention(TimmBiasAttention):
    """``timm.models.swin_transformer.WindowAttention``, with the mask of shifted windows."""

    fused_by_default: ClassVar[bool] = False

    axes: ClassVar[Mapping[str, HeadAxis]] = {
        **TimmPlainAttention.axes,
        "relative_position_bias_table": HeadAxis(1),
    }

    def bias_source(self) -> tuple[list[Tensor], nn.Module | None]:
        """What ``position_bias`` reads: tensors, and a network that it calls."""
        return [self.relative_position_bias_table, self.relative_position_index], None

    def position_bias(self) -> Tensor:
        """(H, N, N)."""
        return indexed(self.relative_position_bias_table, self.relative_position_index)

    def windows_bias(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(1 or G, H, N, N): the position bias, and a mask (G, N, N), in a call with ``x``."""
        tensors, network = self.bias_source()
        given = tensors if mask is None else [*tensors, mask]
        return remembered(
            *(self, x, given, lambda: masked(self.position_bias(), mask)),
            network=network,
            keep=as_read,
        )

    def project(self, x: Tensor, mask: Tensor | None = None, *args: Any) -> AttentionCall:
        return super().project(x)._replace(bias=self.windows_bias(x, mask))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Windows (B * G, N, C) to (B * G, N, C'), with a mask (G, N, N)."""
        return self.finish(self.context(x, mask))


class TimmSwinV2Attention(TimmSwinAttention):
    """``timm.models.swin_transformer_v2.WindowAttention``: cosines, and a bias from a network."""

    axes: ClassVar[Mapping[str, HeadAxis]] = {
        **TimmPlainAttention.axes,
        "q_bias": HeadAxis(0),
        "k_bias": HeadAxis(0),
        "v_bias": HeadAxis(0),
        "logit_scale": HeadAxis(0),
        "cpb_mlp.2.weight": HeadAxis(0),
    }

    cosine: ClassVar[bool] = True

    def _configure(self) -> None:
        super()._configure()
        self.scale = 1.0

    def _packed(self, x: Tensor) -> Tensor:
        return biased_qkv(self, x)

    def bias_source(self) -> tuple[list[Tensor], nn.Module | None]:
        return [self.relative_coords_table, self.relative_position_index], self.cpb_mlp

    def position_bias(self) -> Tensor:
        table = self.cpb_mlp(self.relative_coords_table).flatten(0, -2)
        return 16 * torch.sigmoid(indexed(table, self.relative_position_index))

    def project(self, x: Tensor, mask: Tensor | None = None, *args: Any) -> AttentionCall:
        return cosines(super().project(x, mask), self.logit_scale)


class TimmSwinCrAttention(TimmSwinV2Attention):
    """``timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention``."""

    axes: ClassVar[Mapping[str, HeadAxis]] = {
        **TimmPlainAttention.axes,
        "logit_scale": HeadAxis(0),
        "meta_mlp.fc2.weight": HeadAxis(0),
        "meta_mlp.fc2.bias": HeadAxis(0),
    }

    def _packed(self, x: Tensor) -> Tensor:
        packed: Tensor = self.qkv(x)
        return packed

    def bias_source(self) -> tuple[list[Tensor], nn.Module | None]:
        return [self.relative_coordinates_log], self.meta_mlp

    def position_bias(self) -> Tensor:
        tokens = math.prod(self.window_size)
        pairs: Tensor = self.meta_mlp(self.relative_coordinates_log)
        return pairs.unflatten(0, (tokens, tokens)).permute(2, 0, 1)


class TimmBeitAttention(TimmBiasAttention):
    """``timm.models.beit.Attention``: its own table, one shared by all blocks, or both."""

    axes: ClassVar[Mapping[str, HeadAxis]] = {
        **TimmPlainAttention.axes,
        "q_bias": HeadAxis(0),
        "k_bias": HeadAxis(0),
        "v_bias": HeadAxis(0),
        "relative_position_bias_table": HeadAxis(1),
    }

    def _packed(self, x: Tensor) -> Tensor:
        return biased_qkv(self, x)

    def project(
        self, x: Tensor, shared_rel_pos_bias: Tensor | None = None, *args: Any
    ) -> AttentionCall:
        bias = self.kept(shared_rel_pos_bias)
        if self.relative_position_bias_table is not None:
            table, index = self.relative_position_bias_table, self.relative_position_index
            own = remembered(self, x, [table, index], lambda: indexed(table, index), keep=as_read)
            bias = own.unsqueeze(0) if bias is None else own + bias
        return super().project(x)._replace(bias=bias)

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """(B, N, C) to (B, N, C'), with a bias (1, H, N, N) of all original heads."""
        return self.finish(self.context(x, shared_rel_pos_bias))


class TimmRelPosAttention(TimmBiasAttention):
    """``timm.models.vision_transformer_relpos.RelPosAttention``: a module computes the bias.

    That module stays whole when heads are removed; only the held heads' part of its result is used.
    """

    def project(self, x: Tensor, shared_rel_pos: Tensor | None = None, *args: Any) -> AttentionCall:
        call = super().project(x)
        bias = shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias()
        return call._replace(q=self.q_norm(call.q), k=self.k_norm(call.k), bias=self.kept(bias))

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """(B, N, C) to (B, N, C'), with a bias (1, H, N, N) of all original heads."""
        return self.finish(self.context(x, shared_rel_pos))


class TimmMaxxAttention(TimmBiasAttention):
    """``timm.models.maxxvit.AttentionCl`` of windows and grids, and ``Attention2d`` of a map."""

    # Whether heads come first, (H, 3, D), or last, (3, H, D), differs between instances.
    axes: ClassVar[Mapping[str, HeadAxis]] = {}
    unprunable: ClassVar[str | None] = "the order of its channels differs from model to model"

    def _configure(self) -> None:
        self.head_dim = int(self.__dict__["dim_head"])

    def sequences(self, x: Tensor) -> tuple[int, int]:
        flat = x.flatten(2).transpose(1, 2) if isinstance(self.qkv, nn.Conv2d) else x.flatten(1, -2)
        return flat.shape[0], flat.shape[1]

    def project(self, x: Tensor, shared_rel_pos: Tensor | None = None, *args: Any) -> AttentionCall:
        packed = self.qkv(x)
        tokens_first = isinstance(self.qkv, nn.Linear)
        packed = packed.flatten(1, -2) if tokens_first else packed.flatten(2).transpose(1, 2)
        if self.head_first:
            heads = packed.unflatten(2, (self.num_heads, 3, self.head_dim)).transpose(2, 3)
        else:
            heads = packed.unflatten(2, (3, self.num_heads, self.head_dim))
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        if not tokens_first:
            q, k, v = (y.contiguous() for y in (q, k, v))
        bias = shared_rel_pos
        if self.rel_pos is not None:
            bias = self.rel_pos.get_bias()
            bias = bias.unsqueeze(0) if bias.dim() == 3 else bias
        return AttentionCall(q, k, None, None, self.scale, v, bias)

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """(B, ..., C) to (B, ..., C'), or (B, C, h, w) to (B, C', h, w)."""
        context = self.attend(self.project(x, shared_rel_pos))
        if isinstance(self.qkv, nn.Linear):
            return self.finish(context.unflatten(1, x.shape[1:-1]))
        return self.finish(context.transpose(1, 2).unflatten(2, x.shape[2:]))


class TimmGlobalWindowAttention(TimmBiasAttention):
    """``timm.models.gcvit.WindowAttentionGlobal``: queries of the windows or of the whole image."""

    axes: ClassVar[Mapping[str, HeadAxis]] = {}
    unprunable: ClassVar[str | None] = "its queries may come from outside, for all heads"

    def project(self, x: Tensor, q_global: Tensor | None = None, *args: Any) -> AttentionCall:
        if not self.use_global or q_global is None:
            return super().project(x)._replace(bias=self.rel_pos.get_bias())
        heads = (self.num_heads, self.head_dim)
        k, v = self.qkv(x).unflatten(2, (2, *heads)).permute(2, 0, 3, 1, 4).unbind(0)
        # Windows of an image follow one another and share its queries.
        q = q_global.repeat_interleave(x.shape[0] // q_global.shape[0], 0)
        q = q.reshape(*x.shape[:2], *heads).transpose(1, 2)
        return AttentionCall(q, k, None, None, self.scale, v, self.rel_pos.get_bias())

    def forward(self, x: Tensor, q_global: Tensor | None = None) -> Tensor:
        """Windows (B * G, N, C) to (B * G, N, C)."""
        return self.finish(self.context(x, q_global))


class TimmTinyAttention(TimmBiasAttention):
    """``timm.models.tiny_vit.Attention``: packed head by head, a table of distances."""

    axes: ClassVar[Mapping[str, HeadAxis]] = {
        "qkv.weight": HeadAxis(0),
        "qkv.bias": HeadAxis(0),
        "attention_biases": HeadAxis(0),
        "proj.weight": HeadAxis(1),
    }

    @classmethod
    def why_not(cls, original: nn.Module) -> str | None:
        if original.val_dim != original.key_dim:
            return "its values are wider than its keys"
        return None

    def _configure(self) -> None:
        super()._configure()
        # A bias that a forward pass left here could have a gradient, so it could not be copied.
        self.attention_bias_cache.clear()

    def original(self) -> nn.Module | None:
        original = super().original()
        if original is not None:
            # It may hold a bias that was computed before the table changed.
            original.__dict__["attention_bias_cache"] = {}
        return original

    def _recount(self) -> None:
        self.out_dim = self.num_heads * self.head_dim

    def project(self, x: Tensor, *args: Any, **kwargs: Any) -> AttentionCall:
        packed = self.qkv(self.norm(x)).unflatten(2, (self.num_heads, 3, self.head_dim))
        q, k, v = packed.permute(3, 0, 2, 1, 4).unbind(0)
        table, index = self.attention_biases, self.attention_bias_idxs
        bias = remembered(
            self, x, [table, index], lambda: table[:, index].unsqueeze(0), keep=as_read
        )
        return AttentionCall(q, k, None, None, self.scale, v, bias)
