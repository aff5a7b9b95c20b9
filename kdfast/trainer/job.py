# SPDX-License-Identifier: Apache-2.0
"""What a loop trains, for how long, and with which parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdfast.trainer.feed import Feed
from kdfast.trainer.step import MeanOfBatches, Step
from kdfast.trainer.watch import Watch


@dataclass(frozen=True)
class Length:
    """How long a training is, and how often it writes something.

    Attributes:
        epochs: Passes over the training data.
        per_epoch: Optimiser steps of an epoch.
        max_steps: Stop and save after so many optimiser steps; None: at the end.
        save_every: Optimiser steps between checkpoints; one is also saved after each epoch.
        log_every: Optimiser steps between rows of the log.
    """

    epochs: int
    per_epoch: int
    max_steps: int | None = None
    save_every: int = 500
    log_every: int = 10

    @property
    def total(self) -> int:
        """Optimiser steps of the whole training; schedules are made for it."""
        return self.per_epoch * self.epochs

    @property
    def stop(self) -> int:
        """Optimiser steps after which this part of the training ends."""
        return min(self.total, self.max_steps or self.total)


@dataclass(frozen=True)
class Job:
    """Everything that a loop is given, ready to use.

    Attributes:
        title: Shown on the terminal.
        folder: Checkpoints go here.
        logs: CSV files, curves and TensorBoard go here.
        module: What is trained and saved; its forward is called by ``step``.
        feed: Training data.
        length: Epochs, steps and intervals.
        optimizer: Over the parameters of ``module`` that are trained.
        set_lr: Sets the learning rates of a step, counted from 0; returns the largest one.
        clip: Largest L2 norm of the gradient; None: no clipping.
        meta: Plain values to keep in the checkpoint: what is needed to build ``module`` again.
            A run is resumed only with the same ones.
        defaults: What of ``meta`` a checkpoint of an older version may lack, as it had it.
        step: Turns batches into losses and gradients.
        watch: Is told about steps, epochs and checkpoints.
        epochs_file: Name of the CSV with a row per epoch.
        beside: Files that belong to the training, made before it; every commit names them.
    """

    title: str
    folder: Path
    logs: Path
    module: nn.Module
    feed: Feed[Any]
    length: Length
    optimizer: torch.optim.Optimizer
    set_lr: Callable[[int], float]
    clip: float | None
    meta: dict[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    step: Step = field(default_factory=MeanOfBatches)
    watch: Watch = field(default_factory=Watch)
    epochs_file: str = "epochs.csv"
    beside: tuple[Path, ...] = ()
