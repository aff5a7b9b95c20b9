# SPDX-License-Identifier: Apache-2.0
"""Attention probabilities of a finished forward pass, made from its queries and keys in blocks.

See docs/use/attention_pictures.md. B batch, H heads, N tokens, n rows, m keys of a row, D head dim.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.ops.geometry import Window
from kdfast.ops.pruned_attention import math_dtype

# Elements of one block of probabilities: 16 MiB in fp32, whatever N is.
BLOCK = 1 << 22


class Rows(NamedTuple):
    """Some rows of the attention matrix, without the keys that they cannot see.

    Attributes:
        tokens: (n,) the tokens that look.
        keys: (m,) the tokens that they may look at.
        weights: (B, H, n, m) probabilities, fp32 (fp64 for fp64 models).
    """

    tokens: Tensor
    keys: Tensor
    weights: Tensor


@dataclass(frozen=True)
class LayerAttention:
    """One self-attention of a forward pass.

    Attributes:
        name: Name of the module in the model.
        q: (B, H, N, D) as the scores take it: normalised and rotated already.
        k: (B, H, N, D), likewise.
        scale: Factor of the scores.
        heads: Original index of each of the H heads.
        bias: Added to the scores, broadcasts to (B, H, N, N); None where there is none.
        window: Windows of the token grid; live pads take their share of every row.
    """

    name: str
    q: Tensor
    k: Tensor
    scale: float
    heads: Sequence[int]
    bias: Tensor | None = None
    window: Window | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens, N."""
        return self.q.shape[2]

    @property
    def pairs(self) -> int:
        """Entries of one head's matrix that may be above 0: all, or those inside windows."""
        return sum(len(keys) ** 2 for keys, _ in self._groups())

    @torch.no_grad()
    def blocks(self, tokens: Tensor | None = None, *, block: int = BLOCK) -> Iterator[Rows]:
        """Exact probabilities, a block of rows at a time; nothing larger than a block is made.

        Args:
            tokens: The rows to make, in any order; all if None. They come grouped by window.
            block: Elements of a block; at least one whole row per head is made.

        Yields:
            Every row once. A row sums to 1, in windows with live pads to less: the rest is what
            the pads receive.
        """
        batch, heads = self.q.shape[:2]
        # Autocast would round the scores, which attention keeps in fp32.
        with torch.autocast(self.q.device.type, enabled=False):
            for keys, pads in self._groups():
                some = keys
                if tokens is not None:
                    some = tokens if self.window is None else tokens[torch.isin(tokens, keys)]
                rows = max(1, block // max(1, batch * heads * len(keys)))
                for part in some.split(rows) if len(some) else ():
                    yield Rows(part, keys, self._weights(part, keys, pads))

    def _groups(self) -> list[tuple[Tensor, int]]:
        """Tokens that see each other, and the number of live pads that they see too."""
        device, window = self.q.device, self.window
        if window is None:
            return [(torch.arange(self.tokens, device=device), 0)]
        live = window.pad_value is not None
        return [
            (window.token_index(span, device), live * window.pads(span)) for span in window.spans()
        ]

    def _weights(self, tokens: Tensor, keys: Tensor, pads: int) -> Tensor:
        dtype = math_dtype(self.q.dtype)
        q, k = self.q[:, :, tokens].to(dtype), self.k.to(dtype)
        if self.window is not None:
            k = k[:, :, keys]
        scores = self.scale * q @ k.transpose(-1, -2)
        if self.bias is not None:
            shape = (*self.bias.shape[:-2], self.tokens, self.tokens)
            scores = scores + self.bias.expand(shape)[..., tokens, :].to(dtype)
        if not pads:
            return scores.softmax(-1)
        # `pads` equal columns of logit 0 weigh as much as one column of logit log(pads).
        column = scores.new_full((*scores.shape[:-1], 1), math.log(pads))
        return torch.cat((scores, column), -1).softmax(-1)[..., :-1]

    @torch.no_grad()
    def rows(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """What some tokens look at.

        Args:
            tokens: n indices in [0, N).

        Returns:
            (B, H, n, N) probabilities, 0 for the keys outside a token's window.

        Raises:
            ValueError: An index is out of range.
        """
        index = torch.as_tensor(tokens, dtype=torch.int64, device=self.q.device)
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < self.tokens:
            raise ValueError(
                f"attention: tokens must be in [0, {self.tokens}), got {index.tolist()}"
            )
        batch, heads = self.q.shape[:2]
        shape = (batch, heads, len(index), self.tokens)
        out = self.q.new_zeros(shape, dtype=math_dtype(self.q.dtype))
        place = {int(token): i for i, token in enumerate(index)}
        unique = torch.tensor(list(place), dtype=torch.int64, device=index.device)
        for some, keys, weights in self.blocks(unique):
            at = torch.tensor([place[int(token)] for token in some], device=index.device)
            out[:, :, at[:, None], keys] = weights
        return out[:, :, [place[int(token)] for token in index]]

    def map(self) -> Tensor:
        """The whole matrix, (B, H, N, N): the only call that makes one."""
        return self.rows(range(self.tokens))

    @torch.no_grad()
    def mean_row(self) -> Tensor:
        """(B, H, N): what the tokens look at on average, without making the matrix."""
        batch, heads = self.q.shape[:2]
        shape = (batch, heads, self.tokens)
        total = self.q.new_zeros(shape, dtype=math_dtype(self.q.dtype))
        for _, keys, weights in self.blocks():
            total[:, :, keys] += weights.sum(2)
        return total / self.tokens
