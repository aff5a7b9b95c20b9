# SPDX-License-Identifier: Apache-2.0
"""A training step that can be planned, and what it needs of this machine's memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kdfast.machine.memory import free_bytes
from kdfast.machine.needs import NO_FIT, Need, gib
from kdfast.memory.measure import MemoryPlan, Step, plan_step

# "auto" is what it will be on a GPU.
PRECISION = {
    "auto": torch.bfloat16,
    "fp32": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


class Before(NamedTuple):
    """A part of a run before the training step: its name, its bytes, and what makes them fewer."""

    title: str
    bytes: int
    fix: str


@dataclass(frozen=True)
class PlannedStep:
    """The training step of one part of a run, built as the run builds it, without data and files.

    Attributes:
        title: What is trained.
        build: Makes the step, with checkpointing or not.
        batch: Images per step that the config says; None: the planner chooses.
        image_size: (height, width).
        amp: Dtype of autocast; None: fp32.
        checkpointing: Whether the config says to recompute activations.
        before: What comes before the training, with the bytes that it keeps, activations left out,
            and what to set where they are too many; None: nothing that counts.
        epochs: Passes over the training images.
        images: Training images of all processes in an epoch; None: only the data knows.
        shard: What the config says of sharded models: "fsdp" or "none".
    """

    title: str
    build: Callable[[bool], Step]
    batch: int | None
    image_size: tuple[int, int]
    amp: torch.dtype | None
    checkpointing: bool
    before: Before | None = None
    epochs: int = 1
    images: int | None = None
    shard: str = "none"

    def plan(
        self, batch: int, checkpointing: bool, device: str = "cuda", processes: int = 1
    ) -> MemoryPlan:
        """Predicted peak with this batch; ``device`` and ``processes`` as in ``plan_step``."""
        return plan_step(
            lambda: self.build(checkpointing),
            batch,
            image_size=self.image_size,
            amp=self.amp,
            checkpointing=checkpointing,
            device=device,
            processes=processes,
            shard=self.shard,
        )

    def configured_plan(self, device: str, processes: int = 1) -> MemoryPlan:
        """Predicted peak as the config says; with one image where it leaves the batch open."""
        return self.plan(self.batch or 1, self.checkpointing, device, processes)


def device_of(choice: str) -> str:
    """The device type that ``auto``, ``cpu`` or ``cuda`` of a config means on this machine."""
    if choice == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return choice


def memory_need(plans: Sequence[MemoryPlan], fix: str) -> Need:
    """Memory of the largest of some training steps, against what this machine has free.

    On the CPU only tensors are predicted: what Python, libraries and data take comes on top.

    Args:
        plans: The steps, planned for the device of the run.
        fix: What to do if that is too much.
    """
    largest = max(plans, key=lambda plan: plan.peak_bytes)
    device = torch.device(largest.device)
    need, free = largest.peak_bytes, free_bytes(device)
    what, where = ("", "on the GPU") if device.type == "cuda" else (" of tensors", "of memory")
    found = (
        f"a step of {largest.batch} is predicted to need {gib(need)}{what}, "
        f"{gib(free)} {where} free"
    )
    return Need("memory", found, "" if need < free else fix, NO_FIT)


def before_need(before: Before, device: str) -> Need:
    """Memory of what comes before a training, against what this machine has free.

    Args:
        before: Of a ``PlannedStep``.
        device: Type of the device of the run.
    """
    free = free_bytes(torch.device(device))
    found = f"{before.title} keeps {gib(before.bytes)}, {gib(free)} free"
    return Need("start", found, "" if before.bytes < free else before.fix, NO_FIT)
