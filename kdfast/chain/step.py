# SPDX-License-Identifier: Apache-2.0
"""A step of a link: Mixup, and kept teacher outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from timm.data.mixup import Mixup
from torch import Tensor

from kdfast.configs.chain import ChainOptimConfig
from kdfast.data.shares import Shares
from kdfast.trainer.feed import Batch
from kdfast.trainer.step import Inputs, Piecewise, Prepared, StepResult


class Seen(NamedTuple):
    """What a step tells the watch about the student.

    Attributes:
        logits: (B, C) of the step's images in this process, as they were trained on.
        target: Their targets before Mixup.
        loss: Their loss that was minimised.
    """

    logits: Tensor
    target: Tensor
    loss: Tensor


class LinkStep(Piecewise):
    """Takes the batches of a step to ``module(images, target, epoch, teacher's logits)``."""

    def __init__(
        self,
        mixup: Mixup | None = None,
        kept_logits: Callable[[Batch], Tensor] | None = None,
    ) -> None:
        """Set up.

        Args:
            mixup: Changes images and targets; None: they stay.
            kept_logits: Gives a teacher's kept logits of a batch; None: the teacher runs.
        """
        super().__init__()
        self.mixup, self.kept_logits = mixup, kept_logits

    def check(self, shares: Shares) -> None:
        """Raise ValueError where Mixup cannot mix a batch of a step with itself."""
        sizes = {size for rank in range(shares.world) for size in shares.sizes(rank)}
        if self.mixup is not None and any(size % 2 for size in sizes):
            raise ValueError(
                f"optim.mixup: batches must have an even number of images, got {sorted(sizes)} for "
                f"{shares.world} process(es)"
            )

    def __call__(self, prepared: Prepared, batches: Iterator[Batch], epoch: int) -> StepResult:
        """See ``kdfast.trainer.step.Step``; ``outputs`` is what was ``Seen``."""
        used = [next(batches) for _ in prepared.weights]
        losses, logits = self.gradient(prepared, [self._inputs(batch) for batch in used], epoch)
        target = torch.cat([batch.labels for batch in used])
        loss = losses["total"] / sum(prepared.weights)
        return StepResult(losses, used, Seen(torch.cat(logits), target, loss))

    def _inputs(self, batch: Batch) -> Inputs:
        images, target = batch.images, batch.labels
        if self.mixup is not None:
            images, target = self.mixup(images, target)
        kept = None if self.kept_logits is None else self.kept_logits(batch)
        return Inputs(images, target, (kept,))


def mixup_of(config: ChainOptimConfig, task: str, classes: int) -> Mixup | None:
    """timm's Mixup and CutMix as the config wants them; None: neither.

    Args:
        config: Their strengths.
        task: Kind of classification, as in ``Classification.task``.
        classes: Number of classes.

    Raises:
        ValueError: Images have several labels.
    """
    if not (config.mixup or config.cutmix):
        return None
    if task == "multilabel":
        raise ValueError("optim.mixup: must be 0 for several labels per image")
    return Mixup(config.mixup, config.cutmix, label_smoothing=0.0, num_classes=classes)
