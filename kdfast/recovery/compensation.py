# SPDX-License-Identifier: Apache-2.0
"""Folds what a student's removed heads computed into what stays. See docs/use/compensation.md."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from statistics import mean

from accelerate import Accelerator

from kdfast.configs.recovery import PruneConfig
from kdfast.data.views.base import Item
from kdfast.models.eva import EVAViT
from kdfast.pruning import Calibration, calibrate
from kdfast.pruning.compensate import SiteError
from kdfast.pruning.surgery import prune_heads
from kdfast.recovery.data import Views
from kdfast.recovery.heads import Kept
from kdfast.trainer.held_out import own_batches
from kdfast.trainer.logs import LOG


@dataclass(frozen=True)
class CalibrationViews:
    """Training images without their labels, as batches that can be read more than once.

    Attributes:
        feed: This process's share of them.
        count: Images of all processes, rounded up to whole batches.
    """

    feed: Views
    count: int

    def __iter__(self) -> Iterator[Item]:
        for batch in islice(self.feed.batches(0), own_batches(self.feed, self.count)):
            if batch.weight:
                yield {"image": batch.images}


def calibrate_teacher(
    teacher: EVAViT, views: CalibrationViews, accelerator: Accelerator, *, mlps: bool
) -> Calibration:
    """Moments of the teacher's heads, and of its hidden units, over the views of all processes.

    Args:
        teacher: The whole model.
        views: At least one readable image in all processes.
        accelerator: Autocast, and which process shows progress.
        mlps: Whether hidden units are removed too.
    """
    with accelerator.autocast():
        found = calibrate(teacher, views, mlps=mlps, progress=accelerator.is_main_process)
    LOG.info("calibration: %d views", found.metadata["images"])
    return found


def compensated_student(
    teacher: EVAViT,
    kept: Kept,
    calibration: Calibration,
    views: CalibrationViews,
    config: PruneConfig,
    accelerator: Accelerator,
) -> EVAViT:
    """A copy of the teacher with what is kept of every block, fitted to make up for the rest.

    Args:
        teacher: The whole model.
        kept: Heads and hidden units of every block.
        calibration: Of the teacher.
        views: What the calibration was made on.
        config: How to fit.
        accelerator: Autocast, and which process shows progress.

    Raises:
        ValueError: The ridge term is too small for a fit.
    """
    errors: list[SiteError] = []
    with accelerator.autocast():
        student = prune_heads(
            teacher,
            kept.heads,
            mlp=kept.units,
            compensate=calibration,
            sequential=config.sequential,
            ridge=config.ridge,
            data=views if config.sequential else None,
            progress=accelerator.is_main_process,
            errors=errors,
        )
    if errors:
        LOG.info(
            "error of %d layers' outputs / variance: cut %.4f, compensated %.4f",
            *(len(errors), mean(e.cut for e in errors), mean(e.compensated for e in errors)),
        )
    return student
