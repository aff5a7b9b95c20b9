# SPDX-License-Identifier: Apache-2.0
"""Distillation of a pruned model by its original: output, tokens of all blocks, attention maps.

B batch, N tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from kdfast.matching.capture import Capture, attention_layers, readers
from kdfast.matching.features import timm_features
from kdfast.matching.map_distance import map_distance
from kdfast.nn.attention import FusedAttention
from kdfast.nn.frozen import Frozen
from kdfast.nn.heads import AttentionCall
from kdfast.ops.feature_loss import feature_loss

# Distance of the outputs: (student's, teacher's, labels or None) -> scalar.
OutputLoss = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Distiller(nn.Module):
    """Student and objective as one module; the teacher is no submodule and is never trained.

    Blocks are paired by position, heads by their index in the original.

    Attributes:
        student: The model that is trained.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        output: OutputLoss,
        *,
        feature: float,
        attention: float,
        heads: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Pair the layers.

        Args:
            student: The pruned model.
            teacher: The model that it was pruned from.
            output: Distance of what the models return.
            feature: Weight of the distance of the tokens after every block.
            attention: Weight of the distance of the attention maps.
            heads: For every attention the teacher's head that each of the student's imitates;
                None: what ``kdfast.prune_heads`` kept.
        """
        super().__init__()
        self.student = student
        self._teacher = Frozen(teacher)
        self.output = output
        self.weights = (feature, attention)
        self.features = [row.module for row in timm_features(teacher, "teacher")] if feature else []
        self.heads: dict[str, list[int]] = {}
        if attention:
            every = attention_layers(teacher, "teacher")
            found = readers(student)
            for block, name in enumerate(every):
                mine = found[name]
                # Not a block that has lost all its heads.
                if isinstance(mine, FusedAttention):
                    self.heads[name] = list(mine.heads if heads is None else heads[block])
        self.attentions = list(self.heads)

    def forward(self, images: Tensor, labels: Tensor | None, epoch: int) -> dict[str, Tensor]:
        """Losses of a batch of pictures (B, 3, H, W) that both models see.

        Returns:
            Scalars: ``total``, the only one with a gradient; and detached ``output`` and, where
            they have a weight, ``feature`` and ``attention``.
        """
        teacher = self._teacher.module
        with torch.no_grad(), Capture(teacher, self.attentions, self.features) as theirs:
            goal = teacher(images).float()
        with Capture(self.student, self.attentions, self.features) as mine:
            made = self.student(images).float()
        total = self.output(made, goal, labels)
        losses = {"output": total}
        if self.features:
            losses["feature"] = self._feature(mine, theirs)
            total = total + self.weights[0] * losses["feature"]
        if self.attentions:
            losses["attention"] = self._attention(mine, theirs)
            total = total + self.weights[1] * losses["attention"]
        return {"total": total, **{name: value.detach() for name, value in losses.items()}}

    def _feature(self, mine: Capture, theirs: Capture) -> Tensor:
        """Mean over the blocks of the squared distance of the normalised tokens."""
        losses = [
            feature_loss(mine.features[name], theirs.features[name], normalize="layer")
            for name in self.features
        ]
        return torch.stack(losses).mean()

    def _attention(self, mine: Capture, theirs: Capture) -> Tensor:
        """Mean over the blocks of KL(teacher's map || student's map) of the kept heads."""
        losses = []
        for name in self.attentions:
            goal = _only(theirs.call(name), self.heads[name])
            losses.append(map_distance(mine.call(name), goal, "kl"))
        return torch.stack(losses).mean()


def _only(call: AttentionCall, heads: list[int]) -> AttentionCall:
    """The call of some heads of an attention without position biases."""
    return call._replace(q=call.q[:, heads], k=call.k[:, heads])
