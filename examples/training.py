# SPDX-License-Identifier: Apache-2.0
"""One training of an example by the trainer's loop: resumable, with its processor time counted."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import CutMix

from examples.pictures import Pictures
from kdfast.machine.signals import run_command
from kdfast.trainer.feed import Feed
from kdfast.trainer.job import Job, Length
from kdfast.trainer.logs import open_log
from kdfast.trainer.loop import Loop
from kdfast.trainer.processes import make_accelerator
from kdfast.trainer.watch import Row, Watch


@dataclass(frozen=True)
class Recipe:
    """How long and how fast something is trained: AdamW, a linear warm-up, a cosine to zero.

    Attributes:
        epochs: Passes over the pictures.
        lr: Largest learning rate.
        warmup: Part of all steps in which it rises.
        weight_decay: Of matrices and kernels; vectors have none.
        batch: Pictures of a step.
    """

    epochs: int
    lr: float
    batch: int
    warmup: float = 0.15
    weight_decay: float = 0.05


class Clock(Watch):
    """Counts seconds over all parts of a training, however often it was stopped.

    Attributes:
        evaluate: Called after every epoch; what it returns goes into the log.
        saved: Processor seconds of this process's threads, and seconds that passed, up to the last
            checkpoint.
    """

    def __init__(self, evaluate: Callable[[], Row] | None = None) -> None:
        self.evaluate = evaluate
        self.saved = (0.0, 0.0)
        self._before = self.saved
        self._start = (time.process_time(), time.perf_counter())

    def _seconds(self) -> tuple[float, float]:
        now = (time.process_time(), time.perf_counter())
        cpu, wall = (b + n - s for b, n, s in zip(self._before, now, self._start, strict=True))
        return cpu, wall

    def on_epoch(self, epoch: int, step: int, lr: float) -> Row | None:
        """See ``Watch``."""
        found = {} if self.evaluate is None else self.evaluate()
        cpu, wall = self._seconds()
        return {"step": step, "epoch": epoch + 1, **found, "cpu_s": cpu, "wall_s": wall}

    def state_dict(self) -> dict[str, Any]:
        """See ``Watch``."""
        self.saved = self._seconds()
        return {"seconds": list(self.saved)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``Watch``."""
        cpu, wall = state["seconds"]
        self.saved = self._before = (float(cpu), float(wall))
        self._start = (time.process_time(), time.perf_counter())


def train(
    title: str,
    module: nn.Module,
    feed: Feed[Pictures],
    recipe: Recipe,
    folder: Path,
    meta: dict[str, Any],
    evaluate: Callable[[], Row] | None = None,
    precision: str = "bf16",
) -> tuple[float, float]:
    """Train a module, or go on where an earlier call was stopped; a finished one is only loaded.

    Args:
        title: Shown on the terminal.
        module: ``forward(images, labels, epoch)`` gives scalars, of which ``total`` is minimised.
        feed: Training pictures.
        recipe: Length and learning rate.
        folder: Checkpoints and logs go here.
        meta: Plain values that must be the same when the training goes on.
        evaluate: Called after every epoch.
        precision: "bf16": the module runs under autocast; or "fp32".

    Returns:
        Processor seconds and seconds of the whole training, evaluation included.
    """
    folder.mkdir(parents=True, exist_ok=True)
    open_log(folder)
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, fused=True)
    length = Length(recipe.epochs, feed.steps, save_every=100, log_every=50)

    def set_lr(step: int) -> float:
        lr = recipe.lr * factor(step, length.total, recipe.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        return lr

    clock = Clock(evaluate)
    job = Job(
        title=title,
        folder=folder,
        logs=folder,
        module=module,
        feed=feed,
        length=length,
        optimizer=optimizer,
        set_lr=set_lr,
        clip=1.0,
        meta=meta,
        watch=clock,
    )
    Loop(job, make_accelerator(precision, "cpu")).fit(resume=True)
    return clock.saved


def factor(step: int, total: int, warmup: float) -> float:
    """Part of the largest learning rate in a step, counted from 0."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def command(main: Callable[[], None]) -> None:
    """Runs a program, which a signal ends with a line and without a traceback."""

    def body() -> int:
        main()
        return 0

    sys.exit(run_command(body, "the same command goes on from here"))


class Supervised(nn.Module):
    """Training on labels by cross-entropy.

    Attributes:
        cutmix: Part of the batches whose pictures get a rectangle of another picture each, and the
            share of its label (CutMix, arXiv 1905.04899); drawn from torch's generator, which
            checkpoints hold.
    """

    def __init__(
        self, model: nn.Module, smoothing: float, cutmix: float = 0.0, classes: int | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = nn.CrossEntropyLoss(label_smoothing=smoothing)
        self.cutmix = cutmix
        self.mix = CutMix(num_classes=classes)

    def forward(self, images: Tensor, labels: Tensor, epoch: int) -> dict[str, Tensor]:
        """The loss of a batch."""
        if self.cutmix and float(torch.rand(())) < self.cutmix:
            images, labels = self.mix(images, labels)
        return {"total": self.loss(self.model(images).float(), labels)}
