# SPDX-License-Identifier: Apache-2.0
"""The distillation objective: teacher, student and the sum of their terms.

See docs/use/distillation.md.

B batch, C channels, N tokens, L classes, (H, W) pixels, (h, w) grid of patches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast.configs.recovery import DistillConfig
from kdfast.models.eva import EVAViT
from kdfast.models.trace import AttentionTarget, Trace
from kdfast.nn.frozen import Frozen
from kdfast.ops.feature_loss import feature_loss
from kdfast.ops.kd_loss import kd_loss

# Added to variances, as in kdfast.feature_loss.
EPS = 1e-6


def alpha_at(epoch: int, config: DistillConfig) -> float:
    """Weight of distillation in an epoch, counted from 0."""
    return config.alpha_warmup if epoch < config.warmup_epochs else config.alpha


def feature_layers(model: EVAViT, layers: str | Sequence[int]) -> list[int]:
    """Blocks whose residual streams the feature term compares.

    Args:
        model: Teacher or student.
        layers: "global": blocks without windows; "all"; or indices. The last block is never among
            the first two, because the output term compares it.

    Raises:
        ValueError: An index is repeated, is not a block, or is the last one; or none is left.
    """
    last = len(model.blocks) - 1
    if isinstance(layers, str):
        windows = [getattr(block.attn, "window_size", 0) for block in model.blocks]
        chosen = [i for i in range(last) if layers == "all" or not windows[i]]
    else:
        chosen = list(layers)
    if len(set(chosen)) != len(chosen) or not all(0 <= i < last for i in chosen):
        raise ValueError(
            f"distill.feature_layers: must be different blocks of [0, {last}) (the last block is "
            f"the output term's), got {chosen}"
        )
    if not chosen:
        raise ValueError(
            f"distill.feature_layers: {layers!r} must leave a block before the last one, got none"
        )
    return chosen


class Distiller(nn.Module):
    """Student and objective as one module, whose forward gives the losses of a batch.

    Only the student is a submodule: the teacher and the head are neither saved, broadcast,
    optimised nor switched to training mode with it.

    Attributes:
        student: The backbone that is trained.
    """

    def __init__(
        self,
        student: EVAViT,
        teacher: EVAViT,
        head: nn.Module | None,
        config: DistillConfig,
    ) -> None:
        """Freeze the teacher and the head, and pair the heads of each block.

        Args:
            student: Pruned from the teacher: ``student.heads`` are among ``teacher.heads``.
            teacher: Runs in eval mode without gradient; put it on the student's device yourself.
            head: (B, C, h, w) -> (B, L, H, W) logits; None: the final maps are compared.
            config: Weights and kinds.

        Raises:
            ValueError: The models do not fit each other, or ``config.feature_layers`` the model.
        """
        super().__init__()
        if len(student.blocks) != len(teacher.blocks):
            raise ValueError(
                f"Distiller: student must have the teacher's {len(teacher.blocks)} blocks, "
                f"got {len(student.blocks)}"
            )
        self.student = student
        self._teacher = Frozen(teacher)
        self._head = None if head is None else Frozen(head)
        self.config = config
        self.layers = feature_layers(teacher, config.feature_layers) if config.feature else []
        self.teacher_heads = paired_heads(student, teacher)

    @property
    def teacher(self) -> EVAViT:
        """The frozen teacher."""
        return self._teacher.module

    @property
    def head(self) -> nn.Module | None:
        """The frozen head."""
        return None if self._head is None else self._head.module

    def forward(self, images: Tensor, labels: Tensor | None, epoch: int) -> dict[str, Tensor]:
        """Losses of one batch; teacher and student see the same tensor.

        Args:
            images: (B, 3, H, W) normalised, masked and augmented already.
            labels: (B, H, W) int64, -100 where there is none. None, or no head: there is no task
                term.
            epoch: Epoch, counted from 0.

        Returns:
            Scalars: ``total``, the only one with a gradient; and detached ``task`` (where there
            are labels), ``kd``, ``feature``, ``attention``, ``output`` and ``alpha``.
        """
        config, alpha = self.config, alpha_at(epoch, self.config)
        if self.head is None:
            labels = None
        with torch.no_grad():
            teacher = self.teacher.trace(images, features=self.layers, qk=config.attention > 0)
        target = self._target(teacher) if config.attention else None
        student = self.student.trace(images, features=self.layers, target=target)
        feature, attention = self._feature(student, teacher), self._attention(student)
        # One pass over the logits serves the output and the task term.
        weights = (alpha * config.output, 0.0 if labels is None else 1 - alpha)
        mixed, output, task = self._output(student.output, teacher.output, labels, weights)
        total = alpha * (config.feature * feature + config.attention * attention) + mixed
        kd = config.feature * feature + config.attention * attention + config.output * output
        logged = {"kd": kd, "feature": feature, "attention": attention, "output": output}
        if task is not None:
            logged = {"task": task, **logged}
        losses = {name: value.detach() for name, value in logged.items()}
        return {"total": total, **losses, "alpha": total.new_tensor(alpha)}

    def _target(self, teacher: Trace) -> AttentionTarget:
        config = self.config
        return AttentionTarget(
            teacher.qk, self.teacher_heads, config.attention_kind, config.temperature
        )

    def _feature(self, student: Trace, teacher: Trace) -> Tensor:
        """Mean over the chosen blocks of the distance of the normalised residual streams."""
        config = self.config
        losses = [
            feature_loss(
                student.features[i],
                teacher.features[i],
                kind=config.feature_kind,
                normalize=config.feature_normalize,
            )
            for i in self.layers
        ]
        return torch.stack(losses).mean() if losses else student.output.new_zeros(())

    def _attention(self, student: Trace) -> Tensor:
        """T^2 times the mean over all blocks of the distance of the attention maps."""
        losses = list(student.attention_losses.values())
        if not losses:
            return student.output.new_zeros(())
        return self.config.temperature**2 * torch.stack(losses).mean()

    def _output(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None, weights: tuple[float, float]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The weighted sum of output and task term, and both of them detached.

        Only the sum has a gradient; without labels there is no task term.
        """
        if self.head is not None:
            with torch.no_grad():
                goal = _rows(self.head(teacher))
            rows = _rows(self.head(student))
        else:
            rows, goal = _normalised(student), _normalised(teacher)
        scale = sum(weights)
        loss, kd, ce = kd_loss(
            rows,
            goal,
            None if labels is None else labels.flatten(),
            temperature=self.config.temperature,
            alpha=weights[0] / scale if scale else 1.0,
        )
        return scale * loss, kd, None if labels is None else ce


def paired_heads(student: EVAViT, teacher: EVAViT) -> list[list[int]]:
    """For each head of the student, its position among the teacher's heads of that block.

    Raises:
        ValueError: The student holds a head that the teacher does not.
    """
    pairs: list[list[int]] = []
    for block, (kept, held) in enumerate(zip(student.heads, teacher.heads, strict=True)):
        position = {head: i for i, head in enumerate(held)}
        extra = sorted(set(kept) - set(held))
        if extra:
            raise ValueError(
                f"Distiller: the student's heads must be among the teacher's, got {extra} in "
                f"block {block}"
            )
        pairs.append([position[head] for head in kept])
    return pairs


def _rows(logits: Tensor) -> Tensor:
    """(B, L, H, W) as one row of L per position."""
    return logits.movedim(1, -1).flatten(0, -2)


def _normalised(features: Tensor) -> Tensor:
    """(B, C, h, w) as rows of C channels, each shifted and scaled to mean 0 and variance 1."""
    rows = _rows(features)
    return F.layer_norm(rows, rows.shape[-1:], eps=EPS)
