# SPDX-License-Identifier: Apache-2.0
"""Distillation with the loss of ORION's frozen heads: (1 - alpha) * task + alpha * KD."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.configs.recovery import DistillConfig
from kdfast.models.eva import EVAViT
from kdfast.models.orion import Batch, OrionHeads, task_loss
from kdfast.nn.frozen import Frozen
from kdfast.ops.feature_loss import feature_loss
from kdfast.recovery.objective import Distiller, alpha_at
from kdfast.recovery.orion.feed import Streams

# Terms of the last decoder layer that are logged by name beside the sums.
SHOWN = ("loss_cls", "loss_bbox", "loss_cls_lane", "loss_bbox_lane")


class TaskDistiller(Distiller):
    """``Distiller`` whose task term is the detection and map loss through frozen heads.

    Gradients reach the student alone; the heads are in eval mode and without denoising queries.
    """

    def __init__(
        self,
        student: EVAViT,
        teacher: EVAViT,
        heads: OrionHeads,
        config: DistillConfig,
        streams: Streams,
    ) -> None:
        """See ``Distiller``.

        Args:
            student: Pruned from the teacher.
            teacher: Runs in eval mode without gradient.
            heads: Both heads; frozen here.
            config: Weights and kinds; ``vl`` weighs the tokens for the language model.
            streams: What the heads remember from step to step.
        """
        super().__init__(student, teacher, None, config)
        self._heads = Frozen(heads)
        self.streams = streams

    @property
    def heads(self) -> OrionHeads:
        """The frozen heads."""
        return self._heads.module

    def forward(self, images: Tensor, labels: Batch | None, epoch: int) -> dict[str, Tensor]:  # type: ignore[override]
        """Losses of one frame of every stream.

        Args:
            images: (B * V, 3, H, W) normalised, masked and augmented already.
            labels: What the heads need beside features.
            epoch: Counted from 0.

        Returns:
            Scalars: ``total``, the only one with a gradient; detached ``task`` and its parts
            ``detection`` and ``map``, the terms ``SHOWN``, ``kd``, ``feature``, ``attention``,
            ``output``, ``vl`` where it has a weight, and ``alpha``.

        Raises:
            ValueError: There are no labels.
        """
        if labels is None:
            raise ValueError("TaskDistiller: labels must be a Batch of the heads, got None")
        config, alpha, streams = self.config, alpha_at(epoch, self.config), self.streams
        tokens = config.vl > 0
        with torch.no_grad():
            teacher = self.teacher.trace(images, features=self.layers, qk=config.attention > 0)
            goal = None
            if tokens:
                found, streams.teacher = self.heads(teacher.output, labels.frame, streams.teacher)
                goal = found.vlm_tokens
        target = self._target(teacher) if config.attention else None
        student = self.student.trace(images, features=self.layers, target=target)
        terms = {"feature": self._feature(student, teacher), "attention": self._attention(student)}
        terms["output"] = self._output(student.output, teacher.output, None, (1.0, 0.0))[0]
        task = task_loss(self.heads, student.output, labels, streams.student, tokens=tokens)
        streams.student = task.memory
        if goal is not None:
            made = task.output.vlm_tokens
            assert made is not None
            terms["vl"] = feature_loss(made, goal, kind="mse", normalize="layer")
        weights = {name: getattr(config, name) for name in terms}
        kd = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        total = (1 - alpha) * task.total + alpha * kd
        logged = {"task": task.total, **_parts(task.terms), "kd": kd, **terms}
        losses = {name: value.detach() for name, value in logged.items()}
        return {"total": total, **losses, "alpha": total.new_tensor(alpha)}


def _parts(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums of the detection and of the map losses over all layers, and the terms to show."""
    sums: dict[str, list[Tensor]] = {"detection": [], "map": []}
    for name, value in terms.items():
        sums["map" if name.endswith(("_lane", "_H")) else "detection"].append(value)
    found = {name: torch.stack(values).sum() for name, values in sums.items()}
    return found | {name: terms[name] for name in SHOWN}
