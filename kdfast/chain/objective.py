# SPDX-License-Identifier: Apache-2.0
"""The objective of a link: task, distillation, attention and feature terms; docs/use/vit_chain.md.

B batch, C classes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast.chain.links import LinkModel
from kdfast.chain.pairing import attention_pairs, feature_pairs
from kdfast.chain.weights import TaskWeights
from kdfast.configs.chain import ChainDistillConfig
from kdfast.matching.capture import Capture, late_readers
from kdfast.matching.map_distance import as_relation, map_distance
from kdfast.nn.frozen import Frozen
from kdfast.ops.feature_loss import feature_loss
from kdfast.ops.kd_loss import kd_loss
from kdfast.ops.multilabel_kd_loss import multilabel_kd_loss

NO_WEIGHTS = TaskWeights()


def scheduled_alpha(epoch: int, epochs: int, config: ChainDistillConfig) -> float:
    """Weight of distillation in an epoch, counted from 0; ``alpha_end`` in the last one.

    Args:
        epoch: In [0, epochs).
        epochs: Number of epochs of the whole link.
        config: Says ``alpha``, ``alpha_end`` and ``schedule``.
    """
    if config.schedule == "constant" or epochs == 1:
        return config.alpha
    part = epoch / (epochs - 1)
    if config.schedule == "cosine":
        part = 0.5 * (1 - math.cos(math.pi * part))
    return config.alpha + (config.alpha_end - config.alpha) * part


def task_loss(
    logits: Tensor,
    target: Tensor,
    task: str,
    config: ChainDistillConfig | None = None,
    weights: TaskWeights = NO_WEIGHTS,
) -> Tensor:
    """Cross-entropy, or for "multilabel" the binary one averaged over images and classes.

    Args:
        logits: (B, C).
        target: (B,) int64, or (B, C): class probabilities, or ones and zeros of "multilabel".
        task: Kind of classification, as in ``Classification.task``.
        config: Label smoothing of the cross-entropy and focal terms; None: neither.
        weights: Of classes and positives.
    """
    logits = logits.float()
    if config is not None and config.focal_gamma:
        # A distillation without weight, from itself, costs little beside a model's forward.
        return distill_loss(logits, logits.detach(), target, task, config, 0.0, weights)[0]
    if task == "multilabel":
        return F.binary_cross_entropy_with_logits(
            logits, target.float(), weights.classes, pos_weight=weights.positives
        )
    smoothing = 0.0 if config is None else config.label_smoothing
    return F.cross_entropy(logits, target, weights.classes, label_smoothing=smoothing)


def distill_loss(
    logits: Tensor,
    teacher: Tensor,
    target: Tensor,
    task: str,
    config: ChainDistillConfig,
    alpha: float,
    weights: TaskWeights = NO_WEIGHTS,
) -> tuple[Tensor, Tensor, Tensor]:
    """``kdfast.kd_loss``, or for "multilabel" ``kdfast.multilabel_kd_loss``.

    Args:
        logits: (B, C) logits of the student.
        teacher: (B, C) logits of the teacher.
        target: As in ``task_loss``.
        task: Kind of classification, as in ``Classification.task``.
        config: Temperature, label smoothing (unused by "multilabel") and focal terms.
        alpha: Weight of the distillation.
        weights: Of classes and positives.

    Returns:
        (loss, distillation, task's loss), the last two detached.
    """
    if task == "multilabel":
        return multilabel_kd_loss(
            logits,
            teacher,
            target.to(logits.dtype),
            temperature=config.temperature,
            alpha=alpha,
            class_weight=weights.classes,
            pos_weight=weights.positives,
            focal_gamma=config.focal_gamma,
            focal_alpha=config.focal_alpha,
        )
    return kd_loss(
        logits,
        teacher,
        target,
        temperature=config.temperature,
        alpha=alpha,
        label_smoothing=config.label_smoothing,
        class_weight=weights.classes,
        focal_gamma=config.focal_gamma,
    )


class Objective(nn.Module):
    """Student and losses as one module; the teacher is no submodule and is never trained.

    Attributes:
        student: The model that is trained.
        projections: Linear maps from the student's to the teacher's width, one for each compared
            layer; empty where there is no feature term or the widths are equal.
    """

    def __init__(
        self,
        student: LinkModel,
        teacher: LinkModel | None,
        task: str,
        config: ChainDistillConfig,
        *,
        epochs: int,
        distilled: bool,
        size: tuple[int, int] | None = None,
        weights: TaskWeights = NO_WEIGHTS,
    ) -> None:
        """Pair the layers of both models; for this both run once, on one black image.

        Args:
            student: The model to train.
            teacher: Frozen; None: there is none, or its logits come from a cache.
            task: Kind of classification, as in ``Classification.task``.
            config: Weights and kinds of the terms.
            epochs: Number of epochs of the link, for the schedule of alpha.
            distilled: False: plain training on the targets.
            size: (height, width) of the images to come; None: what the models are made for.
            weights: Of classes and positives, in the task's loss.

        Raises:
            ValueError: A term does not fit the models; the message names model and reason.
        """
        super().__init__()
        self.student, self.task, self.config = student, task, config
        self.epochs, self.distilled = epochs, distilled
        # They go where the student goes, and are no part of a checkpoint.
        self.register_buffer("_classes", weights.classes, persistent=False)
        self.register_buffer("_positives", weights.positives, persistent=False)
        self._teacher = None if teacher is None else Frozen(teacher)
        self.attention: list[tuple[str, str]] = []
        self.features: list[tuple[str, str]] = []
        self.projections = nn.ModuleList()
        if teacher is None:
            return
        if config.attention:
            self.attention = attention_pairs(student, teacher, config, size)
        if config.feature:
            pairs = feature_pairs(student, teacher, config, size)
            self.features = [(mine.module, theirs.module) for mine, theirs in pairs]
            self.projections.extend(
                nn.Identity() if a.width == b.width else nn.Linear(a.width, b.width)
                for a, b in pairs
            )

    @property
    def weights(self) -> TaskWeights:
        """Weights of the task's loss, on the device of the module."""
        return TaskWeights(self._buffers["_classes"], self._buffers["_positives"])

    @property
    def teacher(self) -> LinkModel | None:
        """The frozen teacher."""
        return None if self._teacher is None else self._teacher.module

    def read_late(self) -> list[nn.Module]:
        """Attentions of the student whose own parameters are read after its forward."""
        return late_readers(self.student.net, [name for name, _ in self.attention])

    def forward(
        self, images: Tensor, target: Tensor, epoch: int, teacher_logits: Tensor | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Losses of one batch, and the student's logits (B, C), detached.

        Args:
            images: (B, 3, H, W) in [0, 1]; teacher and student see the same ones.
            target: As in ``task_loss``.
            epoch: Counted from 0.
            teacher_logits: (B, C) of a cache; None: the teacher runs.

        Returns:
            Scalars ``total``, the only one with a gradient, ``task`` and, with a teacher, ``kd``,
            ``attention`` and ``feature`` where they have a weight, and ``alpha``; the logits.
        """
        config = self.config
        if not self.distilled:
            logits = self.student(images)
            total = task_loss(logits, target, self.task, config, self.weights)
            return {"total": total, "task": total.detach()}, logits.detach()
        theirs = self._run_teacher(images) if teacher_logits is None else None
        names = ([s for s, _ in self.attention], [s for s, _ in self.features])
        with Capture(self.student.net, *names) as mine:
            logits = self.student(images)
        if theirs is not None:
            teacher_logits = theirs[0]
        assert teacher_logits is not None  # one of the two is there
        alpha = scheduled_alpha(epoch, self.epochs, config)
        total, kd, task = distill_loss(
            logits,
            teacher_logits.to(logits.dtype),
            target,
            self.task,
            config,
            alpha,
            self.weights,
        )
        losses = {"task": task, "kd": kd}
        if theirs is not None and self.attention:
            losses["attention"] = self._attention(mine, theirs[1])
            total = total + config.attention * losses["attention"]
        if theirs is not None and self.features:
            losses["feature"] = self._feature(mine, theirs[1])
            total = total + config.feature * losses["feature"]
        logged = {name: value.detach() for name, value in losses.items()}
        return {"total": total, **logged, "alpha": total.new_tensor(alpha)}, logits.detach()

    @torch.no_grad()
    def _run_teacher(self, images: Tensor) -> tuple[Tensor, Capture]:
        if self.teacher is None:
            raise ValueError("Objective: without a teacher its logits must be given, got None")
        names = ([t for _, t in self.attention], [t for _, t in self.features])
        with Capture(self.teacher.net, *names) as seen:
            logits = self.teacher(images)
        return logits, seen

    def _attention(self, mine: Capture, theirs: Capture) -> Tensor:
        """Mean over the layers of the distance of the attention maps."""
        config, losses = self.config, []
        for student, teacher in self.attention:
            own, other = mine.call(student), theirs.call(teacher)
            if config.attention_map == "relation":
                own = as_relation(own, config.relation_heads, student)
                other = as_relation(other, config.relation_heads, teacher)
            losses.append(map_distance(own, other, config.attention_kind))
        return torch.stack(losses).mean()

    def _feature(self, mine: Capture, theirs: Capture) -> Tensor:
        """Mean over the layers of the distance of the features."""
        losses = [
            feature_loss(
                project(mine.features[student]),
                theirs.features[teacher],
                kind=self.config.feature_kind,
                normalize=self.config.feature_normalize,
            )
            for (student, teacher), project in zip(self.features, self.projections, strict=True)
        ]
        return torch.stack(losses).mean()
