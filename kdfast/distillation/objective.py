# SPDX-License-Identifier: Apache-2.0
"""The objective: teacher, student and the sum of the terms; docs/use/distil.md has the formula.

B batch, C channels or classes, H heads, N tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast.configs.distil import DistilConfig
from kdfast.distillation.terms import Terms
from kdfast.matching.capture import Capture, late_readers
from kdfast.matching.map_distance import as_relation, map_distance
from kdfast.models.prepared import PreparedModel
from kdfast.nn.frozen import Frozen
from kdfast.ops.feature_loss import feature_loss
from kdfast.ops.kd_loss import kd_loss
from kdfast.pruning.observe import main_output


class Objective(nn.Module):
    """Student and losses as one module; the teacher is no submodule and is never trained.

    Attributes:
        student: The model that is trained.
    """

    def __init__(
        self, student: PreparedModel, teacher: PreparedModel, terms: Terms, config: DistilConfig
    ) -> None:
        """Freeze the teacher; put it on the student's device yourself.

        Args:
            student: The model that is trained.
            teacher: Runs in eval mode without gradient.
            terms: Of ``find_terms`` for these two.
            config: Kinds and weights.
        """
        super().__init__()
        self.student, self.terms, self.config = student, terms, config
        self._teacher = Frozen(teacher)
        maps, blocks = terms.maps, terms.blocks
        self._mine = (
            [pair.student for pair in maps],
            {x.student.module: x.student for x in blocks},
        )
        self._theirs = (
            [pair.teacher for pair in maps],
            {x.teacher.module: x.teacher for x in blocks},
        )

    @property
    def teacher(self) -> PreparedModel:
        """The frozen teacher."""
        return self._teacher.module

    def read_late(self) -> list[nn.Module]:
        """Attentions of the student whose own parameters are read after its forward."""
        return late_readers(self.student.net, self._mine[0])

    def forward(self, images: Tensor, labels: Tensor | None, epoch: int) -> dict[str, Tensor]:
        """Losses of one batch; teacher and student see the same pictures.

        Args:
            images: (B, 3, H, W) in [0, 1].
            labels: (B,) int64 classes; used where ``config.labels``.
            epoch: Counted from 0; the weights do not depend on it.

        Returns:
            Scalars: ``total``, the only one with a gradient; and detached ``task`` (where there
            are labels) and the terms by their names.
        """
        names, rows = self._theirs
        with torch.no_grad(), Capture(self.teacher.net, names, list(rows), rows=rows) as theirs:
            goal = main_output(self.teacher(images))
        names, rows = self._mine
        with Capture(self.student.net, names, list(rows), rows=rows) as mine:
            made = main_output(self.student(images))
        alpha = self.config.alpha if self.config.labels else 1.0
        weights = {term: alpha * weight for term, weight in self.terms.weights.items()}
        total, losses = self._output(made, goal, labels, weights, 1 - alpha)
        if self.terms.blocks:
            losses["feature"] = self._feature(mine, theirs)
            total = total + weights["feature"] * losses["feature"]
        if self.terms.maps:
            losses["attention"] = self._attention(mine, theirs)
            total = total + weights["attention"] * losses["attention"]
        return {"total": total, **{name: value.detach() for name, value in losses.items()}}

    def _output(
        self,
        made: Tensor,
        goal: Tensor,
        labels: Tensor | None,
        weights: dict[str, float],
        task: float,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the outputs' term and the cross-entropy, and both of them."""
        target = labels if self.config.labels else None
        if "logits" in weights:
            # One pass over the logits serves both.
            scale = weights["logits"] + (0.0 if target is None else task)
            alpha = weights["logits"] / scale if scale else 1.0
            loss, kd, ce = kd_loss(
                made, goal, target, temperature=self.config.temperature, alpha=alpha
            )
            return scale * loss, {"logits": kd} if target is None else {"task": ce, "logits": kd}
        total, losses = made.new_zeros((), dtype=torch.float32), {}
        if target is not None:
            losses["task"] = F.cross_entropy(made.float(), target)
            total = total + task * losses["task"]
        if "embedding" in weights:
            # Channels are second.
            losses["embedding"] = feature_loss(made, goal.to(made.dtype), kind="cosine", dim=1)
            total = total + weights["embedding"] * losses["embedding"]
        return total, losses

    def _feature(self, mine: Capture, theirs: Capture) -> Tensor:
        """Mean over the blocks of the squared distance of the normalised tokens."""
        losses = [
            feature_loss(
                mine.features[pair.student.module],
                theirs.features[pair.teacher.module],
                normalize="layer",
            )
            for pair in self.terms.blocks
        ]
        return torch.stack(losses).mean()

    def _attention(self, mine: Capture, theirs: Capture) -> Tensor:
        """Mean over the attentions of the distance of their maps."""
        count, losses = self.config.relation_heads, []
        for pair in self.terms.maps:
            own, other = mine.call(pair.student), theirs.call(pair.teacher)
            if count is not None:
                own = as_relation(own, count, pair.student)
                other = as_relation(other, count, pair.teacher)
            losses.append(map_distance(own, other, self.config.attention_kind, pair.heads))
        return torch.stack(losses).mean()


def unreached(objective: Objective, size: tuple[int, int]) -> list[str]:
    """Names of the student's parameters that no term depends on, such as an unused pooler.

    Args:
        objective: On any device; its gradients are dropped.
        size: (height, width) of the pictures.
    """
    like = objective.student.mean
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, *size, generator=generator).to(like)
    label = torch.zeros(1, dtype=torch.int64, device=like.device)
    training = objective.training
    objective.eval()
    objective(image, label, 0)["total"].backward()
    objective.train(training)
    named = objective.student.net.named_parameters()
    names = [name for name, p in named if p.requires_grad and p.grad is None]
    objective.zero_grad(set_to_none=True)
    return names
