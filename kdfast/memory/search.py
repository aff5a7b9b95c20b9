# SPDX-License-Identifier: Apache-2.0
"""The largest batch that fits into a GPU's memory, or what would have to change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from kdfast.memory.ledger import FROZEN, OPTIMIZER, SAVED
from kdfast.memory.measure import MemoryPlan, Step, checkpointed, mib, plan_step, supervised

Planner = Callable[[int, bool], MemoryPlan]


class DoesNotFit(ValueError):
    """No batch fits; the message says by how much, and what would help."""


@dataclass(frozen=True)
class BatchPlan:
    """The choice of ``plan_batch``.

    Attributes:
        batch: Images per step.
        checkpointing: Whether activations have to be recomputed for that.
        peak_bytes: What the device must have, overhead included.
        table: Where the bytes go.
    """

    batch: int
    checkpointing: bool
    peak_bytes: int
    table: str


def plan_memory(
    model_fn: Callable[[], nn.Module],
    batch: int,
    *,
    image_size: int | tuple[int, int],
    teacher_fn: Callable[[], nn.Module] | None = None,
    optimizer: str = "adamw",
    amp: torch.dtype | None = None,
    checkpointing: bool = False,
    device: str = "cuda",
) -> MemoryPlan:
    """Predicts the peak memory of training a classifier, with a teacher by distillation.

    Args:
        model_fn: Makes the model that is trained; called where tensors have no memory.
        batch: Images per step.
        image_size: Side, or (height, width).
        teacher_fn: Makes the teacher; None: none, or its outputs come from a cache.
        optimizer: "adamw" (fused), or a name of timm.
        amp: Dtype of autocast; None: fp32.
        checkpointing: Recompute the blocks in the backward.
        device: As in ``plan_step``.

    Raises:
        ValueError: The model has no checkpointing, or an argument is not possible.
    """

    def build() -> Step:
        teacher = None if teacher_fn is None else teacher_fn()
        student = model_fn()
        # A model that has it on already keeps it.
        return supervised(
            checkpointed(student, True) if checkpointing else student, teacher, optimizer
        )

    return plan_step(
        build, batch, image_size=image_size, amp=amp, checkpointing=checkpointing, device=device
    )


def plan_batch(
    student: Callable[[], nn.Module],
    teacher: Callable[[], nn.Module] | None,
    *,
    image_size: int | tuple[int, int],
    vram: int,
    optimizer: str = "adamw",
    amp: torch.dtype | None = None,
    candidates: Sequence[int],
    checkpointing: bool = False,
) -> BatchPlan:
    """The largest batch that fits into a GPU, without checkpointing where that is possible.

    Args:
        student: Makes the model that is trained; called several times, without memory.
        teacher: Makes the teacher; None: none, or its outputs come from a cache.
        image_size: Side, or (height, width).
        vram: Bytes of the device.
        optimizer: As in ``plan_memory``.
        amp: Dtype of autocast; None: fp32.
        candidates: Batches to choose from.
        checkpointing: Recompute activations in any case; False: only if nothing fits otherwise.

    Raises:
        DoesNotFit: Nothing does.
        ValueError: ``candidates`` is empty or an argument is not possible.
    """

    def planner(batch: int, recompute: bool) -> MemoryPlan:
        return plan_memory(
            student,
            batch,
            image_size=image_size,
            teacher_fn=teacher,
            optimizer=optimizer,
            amp=amp,
            checkpointing=recompute,
        )

    return largest(planner, vram, candidates, checkpointing=checkpointing)


def largest(
    planner: Planner, vram: int, candidates: Sequence[int], *, checkpointing: bool = False
) -> BatchPlan:
    """``plan_batch`` where ``planner`` makes the plan of a batch, with checkpointing or not."""
    sizes = sorted(set(candidates))
    if not sizes or sizes[0] < 1:
        raise ValueError(f"plan: candidates must be batches of at least 1, got {list(candidates)}")
    tried: list[MemoryPlan] = []
    for recompute in (True,) if checkpointing else (False, True):
        try:
            smallest = planner(sizes[0], recompute)
        except ValueError:
            if not tried:
                raise
            break  # the model cannot recompute
        tried.append(smallest)
        if smallest.peak_bytes <= vram:
            best = _bisect(planner, vram, sizes, recompute, smallest)
            return BatchPlan(best.batch, recompute, best.peak_bytes, str(best))
    raise DoesNotFit(advice(tried, vram))


def _bisect(
    planner: Planner, vram: int, sizes: list[int], recompute: bool, best: MemoryPlan
) -> MemoryPlan:
    """The largest plan that fits; memory grows with the batch."""
    low, high = 0, len(sizes) - 1
    while low < high:
        middle = (low + high + 1) // 2
        plan = planner(sizes[middle], recompute)
        if plan.peak_bytes <= vram:
            low, best = middle, plan
        else:
            high = middle - 1
    return best


def advice(tried: Sequence[MemoryPlan], vram: int) -> str:
    """What keeps the smallest batch from fitting, and what each change would save."""
    last = tried[-1]
    held = last.categories
    lines = [
        f"plan: batch {last.batch} needs {mib(last.peak_bytes)}, "
        f"{mib(last.peak_bytes - vram)} more than the {mib(vram)} there are"
        + (", even with checkpointing" if last.checkpointing else "")
    ]
    helps = []
    if last.batch > 1:
        activations = held[SAVED] * (last.batch - 1) // last.batch
        helps.append(f"batch 1 with accumulation saves about {mib(activations)}")
    if held[FROZEN]:
        helps.append(f"a teacher cache saves up to {mib(held[FROZEN])}")
    if held[OPTIMIZER]:
        helps.append(f"an optimizer without states (sgd) saves {mib(held[OPTIMIZER])}")
    if not last.checkpointing and held[SAVED]:
        helps.append(
            "checkpointing, which this model does not have, would save most of its "
            f"{mib(held[SAVED])} of activations"
        )
    fixed = last.peak_bytes - held[SAVED] - held[FROZEN] - held[OPTIMIZER]
    if fixed > vram:
        helps.append("parameters and gradients alone do not fit: train a smaller model")
    return "\n  - ".join([lines[0], *helps])
