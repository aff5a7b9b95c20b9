# SPDX-License-Identifier: Apache-2.0
"""timm's attention modules on the fused kernel. B batch, H heads, N tokens, D head dim, C channels.

timm itself is never imported: an adopted module brings its submodules along.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kdfast.nn.attention import FusedAttention
from kdfast.nn.heads import AttentionCall, HeadAxis
from kdfast.nn.linear import projected
from kdfast.ops._no_heads import no_heads
from kdfast.ops._packed import Layer, is_plain_linear
from kdfast.ops.geometry import Rope


def biased_qkv(attention: Any, x: Tensor) -> Tensor:
    """(B, N, 3 * H * D) of a packed projection whose q, k and v biases are apart, if any."""
    packed: Tensor
    if attention.q_bias is None:
        packed = attention.qkv(x)
        return packed
    biases = (attention.q_bias, attention.k_bias, attention.v_bias)
    if attention.qkv_bias_separate:
        packed = attention.qkv(x)
        return packed + torch.cat(biases)
    return projected(attention.qkv, x, biases)


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

    def project(self, x: Tensor, *args: Any, **kwargs: Any) -> AttentionCall:
        return self.split(self.qkv(x), *args)

    def projections(self) -> Layer | None:
        """The layer in front of ``split``, if nothing else is done and nobody watches it."""
        if self.qkv is None or self.gate is not None or not is_plain_linear(self.qkv):
            return None
        return Layer((self.qkv.weight,), (self.qkv.bias,))

    def split(self, packed: Tensor, *args: Any) -> AttentionCall:
        """Queries, keys and values of what the projections made, (B, N, 3 * H * D)."""
        qkv = packed.unflatten(2, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return AttentionCall(self.q_norm(q), self.k_norm(k), None, None, self.scale, v)

    def gated(self, x: Tensor, context: Tensor) -> Tensor:
        """What the output projection gets, (B, N, H * D), from the heads' outputs."""
        context = self.norm(context)
        if self.gate is not None:
            context = context * self.gate(x).sigmoid()
        return context

    def finish(self, x: Tensor, context: Tensor) -> Tensor:
        """The branch's output (B, N, C') from the heads' outputs (B, N, H * D)."""
        if self.num_heads:
            context = self.gated(x, context)
        out: Tensor = self.proj_drop(self.proj(context))
        return out

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """(B, N, C) to (B, N, C'); a mask or a causal call runs torch's attention."""
        if self.num_heads == 0:
            return self.finish(x, no_heads(self, x.new_zeros(x.shape[0], x.shape[1], 0), x))
        return self.finish(x, self.attend(self.project(x), attn_mask, is_causal))


class TimmRopeAttention(TimmAttention):
    """``timm.layers.AttentionRope``: rotary patch tokens, perhaps fewer key/value heads.

    One table for all heads is rotated inside the kernel. Tables per head or per image, and those
    that learn, are applied before it.
    """

    axes: ClassVar[Mapping[str, HeadAxis]] = {
        **TimmAttention.axes,
        "q_proj.weight": HeadAxis(0),
        "q_proj.bias": HeadAxis(0),
        "k_proj.weight": HeadAxis(0, grouped=True),
        "k_proj.bias": HeadAxis(0, grouped=True),
        "v_proj.weight": HeadAxis(0, grouped=True),
        "v_proj.bias": HeadAxis(0, grouped=True),
    }

    def _configure(self) -> None:
        self.kv_group = self.num_heads // self.num_kv_heads

    def _recount(self) -> None:
        super()._recount()
        self.num_kv_heads = self.num_heads // self.kv_group
        self.kv_dim = self.num_kv_heads * self.head_dim

    def _packed(self, x: Tensor) -> Tensor:
        """(B, N, 3 * H * D) of a fused projection."""
        qkv: Tensor = self.qkv(x)
        return qkv

    def project(self, x: Tensor, rope: Tensor | None = None, *args: Any) -> AttentionCall:
        if self.qkv is not None:
            return self.split(self._packed(x), rope)
        heads = (-1, self.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(x).unflatten(2, heads).transpose(1, 2) for p in projections)
        return self._turned(q, k, v, rope)

    def split(self, packed: Tensor, rope: Tensor | None = None, *args: Any) -> AttentionCall:
        """See ``TimmAttention``; the tables are those of ``forward``."""
        qkv = packed.unflatten(2, (3, -1, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self._turned(q, k, v, rope)

    def _turned(self, q: Tensor, k: Tensor, v: Tensor, rope: Tensor | None) -> AttentionCall:
        q, k = self.q_norm(q), self.k_norm(k)
        tables = None
        if rope is not None:
            q, k = q.to(v.dtype), k.to(v.dtype)
            sin, cos = rope.chunk(2, -1)
            half = getattr(self, "rotate_half", False)
            tables = Rope(cos, sin, self.num_prefix_tokens, "half" if half else "interleaved")
            if rope.dim() > 2 or rope.requires_grad:
                q, k, tables = self._turn(q, tables), self._turn(k, tables), None
        if self.kv_group > 1:
            k, v = (y.repeat_interleave(self.kv_group, 1) for y in (k, v))
        return AttentionCall(q, k, tables, None, self.scale, v)

    def _turn(self, x: Tensor, rope: Rope) -> Tensor:
        """x (B, H, N, D) rotated by tables ((B,) H or 1, N - prefix, D) of all original heads."""
        cos, sin = rope.cos, rope.sin
        if cos.dim() > 2 and cos.shape[-3] not in (1, x.shape[1]):
            kept = torch.tensor(self.heads, device=cos.device)
            cos, sin = cos.index_select(-3, kept), sin.index_select(-3, kept)
        prefix, y = x.split((rope.prefix, x.shape[2] - rope.prefix), 2)
        if rope.layout == "half":
            first, second = y.chunk(2, -1)
            turned = torch.cat((-second, first), -1)
        else:
            turned = torch.stack((-y[..., 1::2], y[..., ::2]), -1).flatten(-2)
        return torch.cat((prefix, (y * cos + turned * sin).to(x.dtype)), 2)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """(B, N, C) to (B, N, C'); a mask or a causal call runs torch's attention.

        Args:
            x: (B, N, C).
            rope: Sines, then cosines, (N - prefix, 2 D), perhaps after (B,) H dimensions.
            attn_mask: Boolean or additive mask that broadcasts to (B, H, N, N).
            is_causal: Whether a token sees only itself and the tokens before it.
        """
        if self.num_heads == 0:
            return self.finish(x, no_heads(self, x.new_zeros(x.shape[0], x.shape[1], 0), x, rope))
        return self.finish(x, self.attend(self.project(x, rope), attn_mask, is_causal))


class TimmEvaAttention(TimmRopeAttention):
    """``timm.models.eva.EvaAttention``: rotary, with biases on queries and values only."""

    axes: ClassVar[Mapping[str, HeadAxis]] = {
        **TimmRopeAttention.axes,
        "q_bias": HeadAxis(0),
        "k_bias": HeadAxis(0),
        "v_bias": HeadAxis(0),
    }

    def _configure(self) -> None:
        self.num_kv_heads = self.num_heads
        super()._configure()

    def _packed(self, x: Tensor) -> Tensor:
        return biased_qkv(self, x)

    def projections(self) -> Layer | None:
        layer = super().projections()
        if layer is None or self.q_bias is None:
            return layer
        biases = (self.q_bias, self.k_bias, self.v_bias)
        return None if self.qkv_bias_separate else layer._replace(biases=biases)

    def init_non_persistent_buffers(self) -> None:
        """What timm calls after a model left the meta device."""
        if self.k_bias is not None:
            self.k_bias.zero_()


class TimmParallelBlock(FusedAttention):
    """``ParallelScalingBlock``: attention and MLP side by side out of one projection.

    Its heads cannot be removed: ``axes`` is empty.
    """

    unprunable: ClassVar[str | None] = (
        "its projections hold the MLP's channels before those of heads"
    )

    def project(self, x: Tensor, *args: Any, **kwargs: Any) -> AttentionCall:
        return self._project(x)[1]

    def _project(self, x: Tensor) -> tuple[Tensor, AttentionCall]:
        hidden, *qkv = self.in_proj(self.in_norm(x)).split(self.in_split, -1)
        q, k, v = (y.unflatten(2, (self.num_heads, self.head_dim)) for y in qkv)
        q, k, v = (y.transpose(1, 2) for y in (self.q_norm(q), self.k_norm(k), v))
        return hidden, AttentionCall(q, k, None, None, self.scale, v)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """(B, N, C) to (B, N, C), residual included."""
        hidden, call = self._project(x)
        if self.mlp_bias is not None:
            hidden = hidden + self.mlp_bias
        hidden = self.mlp_drop(self.mlp_act(hidden))
        context = self.attend(call, attn_mask, is_causal)
        if self.out_proj is not None:
            y = self.out_proj(torch.cat((context, hidden), -1))
        else:
            y = self.attn_out_proj(context) + self.mlp_out_proj(hidden)
        return x + self.drop_path(self.ls(y))

    def projection(self) -> nn.Module:
        raise NotImplementedError(f"{self.source}: its output projection may hold the MLP's too")
