# SPDX-License-Identifier: Apache-2.0
"""torch.nn.MultiheadAttention on the fused kernel.

B batch, H heads, N tokens, M queries, D head dim, C channels.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from kdfast.nn.attention import FusedAttention, qualified_name
from kdfast.nn.heads import AttentionCall, HeadAxis
from kdfast.nn.linear import is_weights_alone, projected
from kdfast.nn.pool import folded_attention
from kdfast.ops._no_heads import no_heads
from kdfast.ops._packed import Layer
from kdfast.ops.linear import linear


class TorchMultiheadAttention(FusedAttention):
    """``torch.nn.MultiheadAttention``, as torchvision's ViT and pooling heads use it.

    Fused: self-attention without weights asked for, and few queries over keys that are values
    (also with weights). Everything else runs the original's own forward.
    """

    axes: ClassVar[Mapping[str, HeadAxis]] = {
        "in_proj_weight": HeadAxis(0, parts=3),
        "in_proj_bias": HeadAxis(0, parts=3),
        "out_proj.weight": HeadAxis(1),
    }

    @classmethod
    def why_not(cls, original: nn.Module) -> str | None:
        module: Any = original
        if module.in_proj_weight is None:
            return "keys or values have another width than queries"
        if module.bias_k is not None or module.add_zero_attn:
            return "it adds tokens to keys and values"
        if not is_weights_alone(module.out_proj):
            return f"its out_proj is a {qualified_name(module.out_proj)}, which it never calls"
        return None

    def _configure(self) -> None:
        self.scale = self.head_dim**-0.5

    def projection(self) -> nn.Module:
        out: nn.Module = self.out_proj
        return out

    def dropout_p(self) -> float:
        return float(self.__dict__["dropout"])

    def project(self, x: Tensor, *args: Any, **kwargs: Any) -> AttentionCall:
        x = x if self.batch_first else x.transpose(0, 1)
        return self.split(projected(self, x, (self.in_proj_bias,), "in_proj_weight"))

    def projections(self) -> Layer | None:
        """The layer in front of ``split``; None where its weight is computed anew at every call."""
        if "in_proj_weight" not in self._parameters:
            return None
        return Layer((self.in_proj_weight,), (self.in_proj_bias,))

    def split(self, packed: Tensor) -> AttentionCall:
        """Queries, keys and values of what the projections made, (B, N, 3 * H * D)."""
        heads = (3, self.num_heads, self.head_dim)
        q, k, v = packed.unflatten(2, heads).permute(2, 0, 3, 1, 4).unbind(0)
        return AttentionCall(q, k, None, None, self.scale, v)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The arguments and results of ``torch.nn.MultiheadAttention``."""
        masked = key_padding_mask is not None or attn_mask is not None or is_causal
        plain = not masked and query.dim() == 3
        if plain and query is key and key is value and not need_weights:
            batch, tokens = query.shape[:2] if self.batch_first else query.shape[1::-1]
            if self.num_heads:
                context = self.attend(self.project(query))
            else:
                context = no_heads(self, query.new_zeros(batch, tokens, 0), query)
            return self._finish(context), None
        few = query.shape[1 if self.batch_first else 0] <= self.head_dim
        if plain and few and key is value and query is not key and self.num_heads:
            context, weights = self._few(query, key)
            if average_attn_weights:
                weights = weights.mean(1)
            return self._finish(context), weights if need_weights else None
        original = self.original()
        if original is None:
            raise NotImplementedError(
                f"{self.source}: after heads were removed it must be called for self-attention, "
                "without masks and with need_weights=False"
            )
        self._say_once("a mask" if masked else "attention weights that are asked for")
        # Not by calling the module: its hooks are those of this one, which runs them.
        out: tuple[Tensor, Tensor | None] = original.forward(
            query,
            key,
            value,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return out

    def _few(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Contexts (B, M, H * D) and weights (B, H, M, N); keys and values are never computed."""
        if not self.batch_first:
            query, key = query.transpose(0, 1), key.transpose(0, 1)
        biases: Any = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        wq, wk, wv = self.in_proj_weight.chunk(3)
        q = linear(query, wq, biases[0]).unflatten(2, (self.num_heads, self.head_dim))
        pairs = (wk, biases[1]), (wv, biases[2])
        return folded_attention(q.transpose(1, 2), key, *pairs, self.scale)

    def _finish(self, context: Tensor) -> Tensor:
        out: Tensor = self.out_proj(context)
        return out if self.batch_first else out.transpose(0, 1)
