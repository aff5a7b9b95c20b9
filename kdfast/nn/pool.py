# SPDX-License-Identifier: Apache-2.0
"""Attention pools: one or few queries over all tokens, without projecting the tokens.

B batch, H heads, N tokens, M queries, D head dim, C channels. For each query of a head,
``q (Wk x + bk) = (q Wk) x + q bk`` and ``sum p (Wv x + bv) = Wv (sum p x) + bv``: keys and values
of the N tokens, which cost 2 N C H D products, are never computed; see docs/use/accelerate.md.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from kdfast.nn.attention import FusedAttention, height_of
from kdfast.nn.heads import AttentionCall, HeadAxis
from kdfast.ops._autocast import without_autocast
from kdfast.ops._no_heads import no_heads
from kdfast.ops._packed import is_plain_linear
from kdfast.ops.pruned_attention import math_dtype


def folded_attention(
    q: Tensor,
    x: Tensor,
    key: tuple[Tensor, Tensor | None],
    value: tuple[Tensor, Tensor | None],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k^T) v for k and v that are linear in x, which are never computed.

    Args:
        q: (B, H, M, D).
        x: (B, N, C).
        key: Weight (H * D, C) and bias (H * D,) or None.
        value: Like ``key``.
        scale: Factor of the logits.

    Returns:
        The heads' outputs (B, M, H * D) and the attention weights (B, H, M, N), in q's dtype;
        everything is computed in fp32 (fp64 for fp64).
    """
    heads, dtype = q.shape[1], math_dtype(q.dtype)
    context, _ = without_autocast(q.device.type)
    with context:
        key_weight, value_weight = (w.to(dtype).unflatten(0, (heads, -1)) for w, _ in (key, value))
        query, tokens = scale * q.to(dtype), x.to(dtype)
        logits = (query @ key_weight).flatten(1, 2) @ tokens.transpose(1, 2)
        if key[1] is not None:
            # Moves all logits of a query alike: no effect, but the bias keeps its place in the
            # graph, as distributed training wants it.
            shift = query @ key[1].to(dtype).unflatten(0, (heads, -1)).unsqueeze(-1)
            logits = logits + shift.flatten(1, 2)
        weights = logits.softmax(-1)
        mean = (weights @ tokens).unflatten(1, (heads, -1))
        out = mean @ value_weight.transpose(1, 2)
        if value[1] is not None:
            out = out + value[1].to(dtype).unflatten(0, (heads, 1, -1))
        weights = weights.unflatten(1, (heads, -1))
        return out.transpose(1, 2).flatten(2).to(q.dtype), weights.to(q.dtype)


class TimmClassAttention(FusedAttention):
    """Class attention of CaiT and XCiT: the first token asks all tokens."""

    axes: ClassVar[Mapping[str, HeadAxis]] = {
        "q.weight": HeadAxis(0),
        "q.bias": HeadAxis(0),
        "k.weight": HeadAxis(0),
        "k.bias": HeadAxis(0),
        "v.weight": HeadAxis(0),
        "v.bias": HeadAxis(0),
        "proj.weight": HeadAxis(1),
    }
    projections: ClassVar[tuple[str, ...]] = ("q", "k", "v")
    unprunable: ClassVar[str | None] = (
        "a pool of few queries is scored by no method; keep_heads cuts it"
    )

    def _configure(self) -> None:
        self.head_dim = height_of(self._linear(0)) // self.num_heads

    def _linear(self, index: int) -> Any:
        return self._modules[self.projections[index]]

    def query(self, x: Tensor) -> Tensor:
        """(B, H, M, D) of tokens (B, N, C)."""
        q = self._linear(0)(x[:, :1])
        return q.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)

    def project(self, x: Tensor, *args: Any, **kwargs: Any) -> AttentionCall:
        heads = (self.num_heads, self.head_dim)
        if len(self.projections) == 2:
            k, v = self._linear(1)(x).unflatten(2, (2, *heads)).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            k, v = (self._linear(i)(x).unflatten(2, heads).transpose(1, 2) for i in (1, 2))
        return AttentionCall(self.query(x), k, None, None, self.scale, v)

    def context(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """(B, M, H * D) of tokens (B, N, C)."""
        if self.num_heads == 0:
            return no_heads(self, x.new_zeros(x.shape[0], 1, 0), x)
        linears = [self._linear(i) for i in range(1, len(self.projections))]
        if attn_mask is not None or self.own_code() or not all(map(is_plain_linear, linears)):
            return self.attend(self.project(x), attn_mask)
        pairs = [(linear.weight, linear.bias) for linear in linears]
        if len(pairs) == 1:
            weight, bias = pairs[0]
            weights, biases = weight.chunk(2), (None, None) if bias is None else bias.chunk(2)
            pairs = list(zip(weights, biases, strict=True))
        return folded_attention(self.query(x), x, pairs[0], pairs[1], self.scale)[0]

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, C) to the new class token (B, 1, C)."""
        out: Tensor = self.proj_drop(self.proj(self.context(x)))
        return out


class TimmCrossAttention(TimmClassAttention):
    """``timm.models.crossvit.CrossAttention``: the same under other names."""

    axes: ClassVar[Mapping[str, HeadAxis]] = {
        f"w{name}" if name[0] in "qkv" else name: axis
        for name, axis in TimmClassAttention.axes.items()
    }
    projections: ClassVar[tuple[str, ...]] = ("wq", "wk", "wv")


class TimmPackedClassAttention(TimmClassAttention):
    """``timm.models.volo.ClassAttention``: keys and values from one projection."""

    axes: ClassVar[Mapping[str, HeadAxis]] = {
        "q.weight": HeadAxis(0),
        "q.bias": HeadAxis(0),
        "kv.weight": HeadAxis(0, parts=2),
        "kv.bias": HeadAxis(0, parts=2),
        "proj.weight": HeadAxis(1),
    }
    projections: ClassVar[tuple[str, ...]] = ("q", "kv")


class TimmLatentPool(TimmPackedClassAttention):
    """``timm.layers.AttentionPoolLatent``: learned queries ask all tokens (MAP head of SigLIP)."""

    around: ClassVar[tuple[str, ...]] = ("k_norm",)

    @classmethod
    def why_not(cls, original: nn.Module) -> str | None:
        if not isinstance(original.k_norm, nn.Identity):
            return "its keys are normalised, so they cannot be folded into its few queries"
        if not isinstance(original.proj, nn.Linear) or not isinstance(original.q, nn.Linear):
            return "it has no query or output projection"
        if original.latent_len > original.head_dim:  # type: ignore[operator]
            return "it has so many latent queries that projecting the tokens is cheaper"
        return None

    def query(self, x: Tensor) -> Tensor:
        q = self.q(self.latent.expand(x.shape[0], -1, -1))
        return self.q_norm(q.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Tokens (B, N, C) to (B, C'), or (B, M, C') where nothing is pooled."""
        if self.pos_embed is not None:
            x = x + self.pos_embed.unsqueeze(0).to(x.dtype)
        out: Tensor = self.proj_drop(self.proj(self.context(x, attn_mask)))
        if self.num_heads == 0:
            out = out.expand(-1, self.latent_len, -1)
        if self.mlp is not None:
            out = out + self.mlp(self.norm(out))
        if self.pool == "token":
            return out[:, 0]
        return out.mean(1) if self.pool == "avg" else out
