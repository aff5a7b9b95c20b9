# SPDX-License-Identifier: Apache-2.0
"""The transformer of ORION's heads, under ORION's parameter names.

B streams, N queries, M keys, P pixels of all cameras, D width, L layers.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from kdfast.models.orion.split_keys import cross_attention
from kdfast.ops.linear import linear
from kdfast.ops.sdpa import scaled_dot_product_attention


class PackedAttention(nn.Module):
    """Attention whose three input projections are one tensor.

    Fused where nothing is masked: see ``cross_attention`` for fewer queries than keys. With a mask
    it is torch's function. The weights are never dropped, as in ORION.
    """

    in_proj_bias: nn.Parameter | None

    def __init__(self, dim: int, heads: int, *, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * dim, dim)))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim)) if bias else None
        self.out_proj = nn.Linear(dim, dim, bias=bias)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
        """(B, N, D) of queries (B, N, D), keys and values (B, M, D).

        Args:
            q: Queries, before their projection.
            k: Keys.
            v: Values.
            seen: (N, M) bool, False where a query must not see a key; None: it sees all.
        """
        weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            linear(x, w, b).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x, w, b in zip((q, k, v), weights, biases, strict=True)
        )
        if seen is None and q.shape[2] < k.shape[2]:
            out = cross_attention(q, k, v)
        else:
            out = scaled_dot_product_attention(q, k, v, seen)
        return linear(out.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)


class _Attend(nn.Module):
    """Holds an attention under the name that ORION gives it."""

    def __init__(self, dim: int, heads: int, *, bias: bool = True) -> None:
        super().__init__()
        self.attn = PackedAttention(dim, heads, bias=bias)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
        out: Tensor = self.attn(q, k, v, seen)
        return out


class _FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        # Identity stands where ORION's dropout is, so that the last layer has its name.
        self._layers = nn.Sequential(
            nn.Linear(dim, hidden), nn.ReLU(), nn.Identity(), nn.Linear(hidden, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self._layers(x)
        return out


class DecoderLayer(nn.Module):
    """Attention among queries and memory, attention to the pixels, feed-forward; norms after."""

    def __init__(self, dim: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.transformer_layers = nn.ModuleList(
            [
                _Attend(dim, heads),
                nn.LayerNorm(dim),
                _Attend(dim, heads),
                nn.LayerNorm(dim),
                _FeedForward(dim, ffn),
                nn.LayerNorm(dim),
            ]
        )

    def forward(
        self,
        x: Tensor,
        pos: Tensor,
        memory: Tensor,
        memory_pos: Tensor,
        pixels: Tensor,
        placed: Tensor,
        seen: Tensor,
    ) -> Tensor:
        """(B, N, D); see ``Decoder``, ``placed`` are the pixels with their position added."""
        among, norm1, across, norm2, feed, norm3 = self.transformer_layers
        q = x + pos
        keys, values = torch.cat((q, memory + memory_pos), 1), torch.cat((x, memory), 1)
        x = norm1(x + among(q, keys, values, seen))
        x = norm2(x + across(x + pos, placed, pixels))
        out: Tensor = norm3(x + feed(x))
        return out


class Decoder(nn.Module):
    """The layers of a head."""

    def __init__(self, dim: int, heads: int, ffn: int, layers: int) -> None:
        super().__init__()
        self._layers = nn.ModuleList([DecoderLayer(dim, heads, ffn) for _ in range(layers)])

    def forward(
        self,
        x: Tensor,
        pos: Tensor,
        memory: Tensor,
        memory_pos: Tensor,
        pixels: Tensor,
        pixels_pos: Tensor,
        blocked: Tensor,
    ) -> Tensor:
        """Results of all layers, (L, B, N, D).

        Args:
            x: (B, N, D) queries.
            pos: (B, N, D) their positions.
            memory: (B, M - N, D) keys beside the queries themselves.
            memory_pos: (B, M - N, D) their positions.
            pixels: (B, P, D) projected features.
            pixels_pos: (B, P, D) their positions.
            blocked: (N, M) bool, True where a query must not see a key.
        """
        placed, seen = pixels + pixels_pos, ~blocked
        states = []
        for layer in self._layers:
            x = layer(x, pos, memory, memory_pos, pixels, placed, seen)
            states.append(x)
        return torch.stack(states)


class Transformer(nn.Module):
    """Holds the decoder under the name that ORION gives it."""

    def __init__(self, dim: int, heads: int, ffn: int, layers: int) -> None:
        super().__init__()
        self.query_decoder = Decoder(dim, heads, ffn, layers)


class _AuxLayer(nn.Module):
    def __init__(self, dim: int, heads: int, ffn: int) -> None:
        super().__init__()
        # ORION hands its attention a dropout of 0 in the place of `bias`.
        self.transformer_layers = nn.ModuleList(
            [
                _Attend(dim, heads, bias=False),
                nn.LayerNorm(dim),
                _FeedForward(dim, ffn),
                nn.LayerNorm(dim),
            ]
        )

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attend, norm1, feed, norm2 = self.transformer_layers
        x = norm1(x + attend(x, k, v))
        out: Tensor = norm2(x + feed(x))
        return out


class AuxDecoder(nn.Module):
    """One layer without self-attention: motion of objects, memory of scenes."""

    def __init__(self, dim: int, heads: int, ffn: int) -> None:
        super().__init__()
        self._layers = nn.ModuleList([_AuxLayer(dim, heads, ffn)])

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, N, D) of queries (B, N, D), keys and values (B, M, D)."""
        return cast(Tensor, self._layers[0](x, k, v))


def normed_branch(dim: int, outputs: int) -> nn.Sequential:
    """A branch that classifies: two hidden layers with norms."""
    hidden: list[nn.Module] = []
    for _ in range(2):
        hidden += [nn.Linear(dim, dim), nn.LayerNorm(dim), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(dim, outputs))


def plain_branch(dim: int, outputs: int) -> nn.Sequential:
    """A branch that gives numbers: two hidden layers."""
    hidden = [nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(dim, outputs))
