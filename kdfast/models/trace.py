# SPDX-License-Identifier: Apache-2.0
"""Inputs and results of a traced forward pass: features, queries and keys, attention losses.

B batch, H teacher heads, K kept heads, N tokens, D head dim, C channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor


class BlockTarget(NamedTuple):
    """The attention target of one block.

    Attributes:
        q: (B, H, N, D) teacher's queries before the rotation.
        k: (B, H, N, D) teacher's keys before the rotation.
        heads: For each of the student's K heads, the position of the teacher's in ``q`` and ``k``.
        kind: Kind of ``attention_distill``.
        temperature: Temperature of ``attention_distill``.
    """

    q: Tensor
    k: Tensor
    heads: Sequence[int]
    kind: str
    temperature: float


@dataclass
class AttentionTarget:
    """Teacher attention that a student's blocks are compared with, inside the attention op.

    Attributes:
        qk: Per block the teacher's queries and keys before the rotation, both (B, H, N, D); None
            leaves the block out.
        heads: Per block, for each of the student's heads, the position of the teacher's head in
            ``qk``; entries of blocks that are left out are not read.
        kind: Kind of ``attention_distill``.
        temperature: Temperature of ``attention_distill``; its T^2 factor is left to the caller.
    """

    qk: Sequence[tuple[Tensor, Tensor] | None]
    heads: Sequence[Sequence[int]]
    kind: str = "kl"
    temperature: float = 1.0

    def check(self, depth: int) -> None:
        """Raises ValueError unless there is one entry per block."""
        for name, entries in (("qk", self.qk), ("heads", self.heads)):
            if len(entries) != depth:
                raise ValueError(
                    f"trace: target.{name} must have one entry per block ({depth}), "
                    f"got {len(entries)}"
                )

    def block(self, index: int) -> BlockTarget | None:
        """The target of block ``index``, or None where the block is left out."""
        qk = self.qk[index]
        if qk is None:
            return None
        return BlockTarget(*qk, self.heads[index], self.kind, self.temperature)


@dataclass
class Trace:
    """One forward pass with what was asked for; nothing else is kept alive.

    Attributes:
        output: (B, C, h, w), equal to the plain forward.
        features: Residual stream (B, N, C) after each requested block.
        qk: Per block the queries and keys before the rotation, both (B, K, N, D), unscaled; None
            for every block unless asked for.
        attention_losses: Scalar loss of each block that had a target.
    """

    output: Tensor
    features: dict[int, Tensor] = field(default_factory=dict)
    qk: list[tuple[Tensor, Tensor] | None] = field(default_factory=list)
    attention_losses: dict[int, Tensor] = field(default_factory=dict)
