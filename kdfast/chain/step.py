# SPDX-License-Identifier: Apache-2.0
"""A step of a link: Mixup, kept teacher outputs, and smaller pieces after out-of-memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from timm.data.mixup import Mixup
from torch import Tensor

from kdfast.configs.chain import ChainOptimConfig
from kdfast.machine.memory import is_out_of_memory, release
from kdfast.trainer.feed import Batch
from kdfast.trainer.logs import LOG
from kdfast.trainer.state import rng_state, set_rng_state
from kdfast.trainer.step import Prepared, StepResult, add, synchronised


class Seen(NamedTuple):
    """What a step tells the watch about the student.

    Attributes:
        logits: (B, C) of the batch, as it was trained on.
        target: Targets of the batch before Mixup.
        loss: The loss that was minimised.
    """

    logits: Tensor
    target: Tensor
    loss: Tensor


class LinkStep:
    """Takes one batch, in several pieces since memory ran out.

    Attributes:
        parts: Pieces that a batch is split into; 1 at first.
    """

    def __init__(
        self,
        title: str,
        mixup: Mixup | None = None,
        kept_logits: Callable[[Batch], Tensor] | None = None,
    ) -> None:
        """Set up.

        Args:
            title: Title of the training, for messages.
            mixup: Changes images and targets; None: they stay.
            kept_logits: Gives a teacher's kept logits of a batch; None: the teacher runs.
        """
        self.title, self.mixup, self.kept_logits = title, mixup, kept_logits
        self.parts = 1

    def __call__(self, prepared: Prepared, batches: Iterator[Batch], epoch: int) -> StepResult:
        """See ``kdfast.trainer.step.Step``; ``outputs`` is what was ``Seen``."""
        batch = next(batches)
        assert batch.labels is not None
        images, target = batch.images, batch.labels
        if self.mixup is not None:
            images, target = self.mixup(images, target)
        teacher = None if self.kept_logits is None else self.kept_logits(batch)
        while True:
            generators = rng_state()
            try:
                losses, logits = self._in_parts(prepared, images, target, epoch, teacher)
                break
            except RuntimeError as error:
                if not is_out_of_memory(error) or prepared.accelerator.num_processes > 1:
                    raise
                self._halve(len(images), error)
            # Outside of the handler, whose traceback keeps the tensors of the step alive.
            prepared.optimizer.zero_grad(set_to_none=True)
            release(prepared.accelerator.device)
            set_rng_state(generators)
        return StepResult(losses, [batch], Seen(logits, batch.labels, losses["total"]))

    def _in_parts(
        self,
        prepared: Prepared,
        images: Tensor,
        target: Tensor,
        epoch: int,
        teacher: Tensor | None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Gradient of the mean loss of a batch, taken in ``parts`` pieces."""
        size = math.ceil(len(images) / self.parts)
        means: dict[str, Tensor] = {}
        logits: list[Tensor] = []
        for start in range(0, len(images), size):
            piece = slice(start, start + size)
            with synchronised(prepared, start + size >= len(images)):
                losses, mine = prepared.module(
                    images[piece],
                    target[piece],
                    epoch,
                    None if teacher is None else teacher[piece],
                )
                share = len(mine) / len(images)
                prepared.accelerator.backward(losses["total"] * share)
            logits.append(mine)
            add(means, {name: value.detach().float() * share for name, value in losses.items()})
        return means, torch.cat(logits)

    def _halve(self, size: int, error: RuntimeError) -> None:
        pieces = self.parts * 2
        if pieces > size:
            raise RuntimeError(
                f"{self.title}: out of memory with single images; a smaller model or size, "
                "checkpointing=true or precision=bf16 needs less"
            ) from error
        self.parts = pieces
        LOG.warning(
            "%s: out of memory: the batch of %d goes on in %d pieces of %d or less, their gradients"
            " are accumulated; the effective batch stays %d",
            *(self.title, size, pieces, math.ceil(size / pieces), size),
        )


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
