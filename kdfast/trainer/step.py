# SPDX-License-Identifier: Apache-2.0
"""One training step up to the gradient: batches in, losses and accumulated gradients out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kdfast.trainer.feed import Batch


@dataclass(frozen=True)
class Prepared:
    """What a step works with: a job's module and optimiser as Accelerate runs them.

    Attributes:
        accelerator: Device, autocast, loss scale and processes.
        module: The job's module behind Accelerate's wrapper; forwards go through it.
        optimizer: The job's optimiser behind Accelerate's wrapper.
        accumulate: Batches per step.
        leaves_now: Says whether a signal asks this process to leave in mid-step. A process that
            trains with others never does: it ends the step, so that all stop at the same one.
    """

    accelerator: Accelerator
    module: nn.Module
    optimizer: torch.optim.Optimizer
    accumulate: int
    leaves_now: Callable[[], bool]


@dataclass(frozen=True)
class StepResult:
    """What a step found; its gradient is in the parameters.

    Attributes:
        losses: Scalars for the log; ``total`` is the one that was minimised.
        batches: The batches that were used.
        outputs: What the job's step has to tell the job's watch.
    """

    losses: dict[str, Tensor]
    batches: list[Batch]
    outputs: Any = None


class Step(Protocol):
    """What a job does in a step before its optimiser: forward, loss and backward."""

    def __call__(self, prepared: Prepared, batches: Iterator[Batch], epoch: int) -> StepResult:
        """Leave the gradient of the step's mean loss in the parameters.

        Args:
            prepared: Module, optimiser and processes.
            batches: The rest of the epoch; a step takes ``prepared.accumulate`` of them.
            epoch: Counted from 0.
        """


def mean_of_batches(prepared: Prepared, batches: Iterator[Batch], epoch: int) -> StepResult:
    """The gradient of the mean loss of ``prepared.accumulate`` batches.

    ``module(images, labels, epoch)`` gives the losses of a batch as scalars.
    """
    count = prepared.accumulate
    used: list[Batch] = []
    means: dict[str, Tensor] = {}
    for number in range(count):
        batch = next(batches)
        used.append(batch)
        with synchronised(prepared, number == count - 1):
            losses = prepared.module(batch.images, batch.labels, epoch)
            prepared.accelerator.backward(losses["total"] * (batch.weight / count))
        add(means, {name: value.detach().float() / count for name, value in losses.items()})
        if prepared.leaves_now():
            break
    return StepResult(means, used)


def synchronised(prepared: Prepared, last: bool) -> Any:
    """Context of a forward and backward: processes add up their gradients in the last one only."""
    return nullcontext() if last else prepared.accelerator.no_sync(prepared.module)


def add(sums: dict[str, Tensor], parts: dict[str, Tensor]) -> None:
    """Add the losses of a part of a step, weighted already, to those of the step."""
    for name, part in parts.items():
        sums[name] = sums[name] + part if name in sums else part
