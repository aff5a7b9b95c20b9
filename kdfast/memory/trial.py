# SPDX-License-Identifier: Apache-2.0
"""One training step on made-up images: whether a run can be built, and what a step takes here."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from kdfast.machine.memory import MIB, peak_bytes, release
from kdfast.memory.steps import PlannedStep


@dataclass(frozen=True)
class Trial:
    """A step that was taken.

    Attributes:
        step: Which.
        batch: Images in it.
        loss: Its loss, on noise.
        seconds: Of the step, the first one after building: later ones may be faster.
        peak: Bytes of activations, gradients and optimiser state at most.
    """

    step: PlannedStep
    batch: int
    loss: float
    seconds: float
    peak: int

    def __str__(self) -> str:
        height, width = self.step.image_size
        open_batch = " (the config leaves the batch open)" if self.step.batch is None else ""
        return (
            f"{self.step.title}\n"
            f"  batch {self.batch} of {height} x {width}{open_batch}, epochs {self.step.epochs}\n"
            f"  one step: loss {self.loss:.4g}, {self.seconds:.2f} s, {self.peak / MIB:,.0f} MiB "
            "beside the weights"
        )


def try_step(step: PlannedStep, device: torch.device) -> Trial:
    """Builds what a run would train, and takes one step on noise.

    Args:
        step: Of ``chain_steps`` or ``recovery_step``.
        device: Where the run would be.

    Raises:
        FloatingPointError: The loss is not finite.
    """
    batch = step.batch or 1
    with torch.device(device):
        loss, seconds, peak = _taken(step, batch, device)
    # The models were local to the call.
    release(device)
    if not math.isfinite(loss):
        raise FloatingPointError(f"{step.title}: the loss of one step on noise is {loss}")
    return Trial(step, batch, loss, seconds, peak)


def _taken(step: PlannedStep, batch: int, device: torch.device) -> tuple[float, float, int]:
    """Loss, seconds and bytes of a step."""
    made = step.build(step.checkpointing)
    for module in (made.module, *made.teachers):
        module.to(device)
    made.module.train()
    for teacher in made.teachers:
        teacher.eval()
    make = made.optimizer or (lambda module: torch.optim.AdamW(module.parameters()))
    optimizer = make(made.module)
    images = torch.randn(batch, 3, *step.image_size)
    labels = torch.zeros(batch, dtype=torch.int64)
    losses: list[Tensor] = []

    def take() -> None:
        with torch.autocast(device.type, step.amp, enabled=step.amp is not None):
            losses.append(made.loss(images, labels))
        losses[0].backward()
        optimizer.step()

    begun = time.perf_counter()
    peak = peak_bytes(take, device)
    return losses[0].item(), time.perf_counter() - begun, peak
