# SPDX-License-Identifier: Apache-2.0
"""The training loop of a link: the trainer's loop with timm's parts, metrics and recovery."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from timm.data.mixup import Mixup
from timm.optim._optim_factory import create_optimizer_v2
from timm.scheduler.scheduler_factory import create_scheduler_v2
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from kdfast.chain.feed import ClassBatch, ClassFeed
from kdfast.chain.metrics import Meter
from kdfast.chain.objective import Objective, task_loss
from kdfast.configs.chain import ChainOptimConfig
from kdfast.machine.files import replacing
from kdfast.machine.memory import is_out_of_memory, peak_mib, release, reset_peak
from kdfast.trainer.feed import Batch
from kdfast.trainer.logs import LOG
from kdfast.trainer.loop import Job, Loop
from kdfast.trainer.state import LAST

BEST = "best.pt"
# The documented columns, in their order, and what follows them.
METRICS = ("loss", "accuracy", "precision", "recall", "f1_score")
COLUMNS = (
    "epoch",
    *(f"train_{name}" for name in METRICS),
    *(f"val_{name}" for name in METRICS),
    "learning_rate",
    "epoch_time_sec",
    "gpu_memory_mb",
)
WEIGHTED = ("weighted_precision", "weighted_recall", "weighted_f1_score")


@dataclass(frozen=True)
class ChainJob(Job):
    """What a chain's loop trains, beyond a ``Job``.

    Attributes:
        val: Held-out images.
        task: Of ``Classification``.
        classes: Number of classes.
        patience: Epochs without a better score after which the link ends; None: never.
        logits: Gives a teacher's kept logits of a batch; None: the teacher runs.
    """

    val: ClassFeed | None = None
    task: str = "multiclass"
    classes: int = 0
    patience: int | None = None
    logits: Any = None


class ChainLoop(Loop):
    """Trains a link.

    Attributes:
        parts: Pieces that a batch is split into since memory ran out; 1 at first.
        best: Row of the best epoch so far, as in the CSV.
    """

    job: ChainJob

    def __init__(self, job: ChainJob, accelerator: Accelerator) -> None:
        super().__init__(job, accelerator)
        optim = self._optim
        self.objective: Objective = job.module  # type: ignore[assignment]
        self.parts = 1
        self.meter = Meter(job.task, job.classes, scores=False)
        self.best: dict[str, float] = {}
        self.records_best: dict[str, list[float]] = {}
        self.waited = 0
        self.elapsed, self.began = 0.0, time.monotonic()
        self.new_best = False
        self.ema = None
        if optim.ema is not None:
            self.ema = ModelEmaV3(self.objective.student, decay=optim.ema)
        self.mixup = None
        if optim.mixup or optim.cutmix:
            if job.task == "multilabel":
                raise ValueError("optim.mixup: must be 0 for several labels per image")
            self.mixup = Mixup(
                optim.mixup, optim.cutmix, label_smoothing=0.0, num_classes=job.classes
            )

    def _optimizer(self) -> torch.optim.Optimizer:
        optim, run = self._optim, self.job.run
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            self.job.module,
            opt=optim.opt,
            lr=optim.lr,
            weight_decay=optim.weight_decay,
            momentum=optim.momentum,
            layer_decay=optim.layer_decay,
        )
        self.scheduler = None
        if optim.sched != "none":
            self.scheduler, _ = create_scheduler_v2(
                optimizer,
                sched=optim.sched,
                num_epochs=run.epochs,
                decay_epochs=max(1, run.epochs // 3),
                min_lr=optim.lr * optim.min_ratio,
                warmup_epochs=optim.warmup_epochs,
                warmup_lr=optim.lr * optim.warmup_ratio,
                step_on_epochs=False,
                updates_per_epoch=self.per_epoch,
            )
            if self.scheduler is None:
                raise ValueError(f"optim.sched: timm has none of that name, got {optim.sched!r}")
        return optimizer

    @property
    def _optim(self) -> ChainOptimConfig:
        optim = self.job.optim
        if not isinstance(optim, ChainOptimConfig):
            raise TypeError(
                f"ChainLoop: optim must be ChainOptimConfig, got {type(optim).__name__}"
            )
        return optim

    def _set_lr(self) -> float:
        if self.scheduler is not None:
            self.scheduler.step_update(self.step)
        self.lr: float = max(group["lr"] for group in self.optimizer.param_groups)
        return self.lr

    def fit(self, *, resume: bool = False) -> None:
        """See ``Loop.fit``; the peak of memory is measured from here on."""
        reset_peak(self.device)
        self.began = time.monotonic()
        super().fit(resume=resume)

    def _backward(
        self, batches: Iterator[Batch], epoch: int
    ) -> tuple[dict[str, Tensor], list[Batch]]:
        batch = next(batches)
        assert isinstance(batch, ClassBatch) and batch.labels is not None
        images, target = batch.images, batch.labels
        if self.mixup is not None:
            images, target = self.mixup(images, target)
        teacher = None if self.job.logits is None else self.job.logits(batch)
        while True:
            random = torch.get_rng_state()
            try:
                losses, logits = self._in_parts(images, target, epoch, teacher)
                break
            except RuntimeError as error:
                if not is_out_of_memory(error) or self.world > 1:
                    raise
                self._halve(len(images), error)
            # Outside of the handler, whose traceback keeps the tensors of the step alive.
            self.optimizer.zero_grad(set_to_none=True)
            release(self.device)
            torch.set_rng_state(random)
        self.pending = (logits, batch.labels, losses["total"])
        return losses, [batch]

    def _in_parts(
        self, images: Tensor, target: Tensor, epoch: int, teacher: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Gradient of the mean loss of a batch, taken in ``parts`` pieces."""
        size = math.ceil(len(images) / self.parts)
        sums: dict[str, Tensor] = {}
        logits: list[Tensor] = []
        for start in range(0, len(images), size):
            piece = slice(start, start + size)
            last = start + size >= len(images)
            with nullcontext() if last else self.accelerator.no_sync(self.module):
                losses = self.module(
                    images[piece],
                    target[piece],
                    epoch,
                    None if teacher is None else teacher[piece],
                )
                logits.append(losses.pop("logits"))
                share = len(logits[-1]) / len(images)
                self.accelerator.backward(losses["total"] * share)
            for name, value in losses.items():
                part = value.detach().float() * share
                sums[name] = sums[name] + part if name in sums else part
        return sums, torch.cat(logits)

    def _halve(self, size: int, error: RuntimeError) -> None:
        pieces = self.parts * 2
        if pieces > size:
            raise RuntimeError(
                f"{self.job.title}: out of memory with single images; a smaller model or size, "
                "checkpointing=true or precision=bf16 needs less"
            ) from error
        self.parts = pieces
        LOG.warning(
            "%s: out of memory: the batch of %d goes on in %d pieces of %d or less, their gradients"
            " are accumulated; the effective batch stays %d",
            *(self.job.title, size, pieces, math.ceil(size / pieces), size),
        )

    def _book(
        self, losses: dict[str, Tensor], extra: dict[str, float], epoch: int, images: int
    ) -> None:
        if self.ema is not None:
            self.ema.update(self.objective.student, step=self.step)
        self.meter.add(*self.pending)
        super()._book(losses, extra, epoch, images)

    def _finish_epoch(self, epoch: int) -> None:
        job = self.job
        train = self.meter.compute()
        seconds = self.elapsed + time.monotonic() - self.began
        count = self.meter.count * self.world
        found = [self.evaluate(job.val).compute() if job.val is not None else {}]
        # Batch norm has other statistics on every process, and all have to stop at the same epoch.
        broadcast_object_list(found)
        val = found[0]
        row: dict[str, float | int] = {"epoch": epoch + 1}
        row |= {f"train_{name}": train[name] for name in METRICS}
        row |= {f"val_{name}": val[name] for name in METRICS}
        peaks = peak_mib(self.device)
        row["learning_rate"] = self.lr
        row["epoch_time_sec"] = self.elapsed + time.monotonic() - self.began
        row["gpu_memory_mb"] = peaks["gpu"]
        row["step"] = self.step
        row["train_top5_accuracy"] = train["top5_accuracy"]
        row |= {f"val_{name}": val[name] for name in ("top5_accuracy", *WEIGHTED, "auc")}
        row["images_per_s"] = count / max(seconds, 1e-9)
        row["gpu_reserved_mb"], row["host_memory_mb"] = peaks["gpu_reserved"], peaks["host"]
        row["parts"] = self.parts
        self.records.epoch(row)
        self._judge_epoch(row)
        LOG.info(
            "%s epoch %d/%d  train loss %.4f acc %.2f  val loss %.4f acc %.2f%s  %.0f images/s  "
            "peak %.0f MiB",
            *(job.title, epoch + 1, job.run.epochs, train["loss"], train["accuracy"]),
            *(val["loss"], val["accuracy"], " *" if self.new_best else ""),
            *(row["images_per_s"], peaks["gpu"] or peaks["host"]),
        )
        self.meter.reset()
        self.elapsed, self.began = 0.0, time.monotonic()

    def _judge_epoch(self, row: dict[str, float | int]) -> None:
        """Note the best epoch, and end the link when ``patience`` is over."""
        for name in ("val_accuracy", "val_f1_score", "train_accuracy"):
            if name not in self.records_best or row[name] > self.records_best[name][0]:
                self.records_best[name] = [float(row[name]), int(row["epoch"])]
        self.new_best = not self.best or self._score(row) > self._score(self.best)
        if self.new_best:
            self.best, self.waited = dict(row), 0
            return
        self.waited += 1
        if self.job.patience is not None and self.waited >= self.job.patience:
            self.stop = self.step
            LOG.info("%s: no better epoch for %d, stopping early", self.job.title, self.waited)

    def _score(self, row: dict[str, Any]) -> tuple[float, float]:
        """Accuracy (AUC for several labels per image), then the loss; higher is better."""
        name = "val_auc" if self.job.task == "multilabel" else "val_accuracy"
        return row[name], -row["val_loss"]

    @property
    def model(self) -> nn.Module:
        """The model that is evaluated and passed on: the averaged one where there is such."""
        return self.objective.student if self.ema is None else self.ema.module

    @torch.no_grad()
    def evaluate(self, feed: ClassFeed) -> Meter:
        """Predictions of ``model`` on all images of a feed; the module is left in train mode."""
        meter = Meter(self.job.task, self.job.classes, scores=True)
        self.model.eval()
        for batch in feed.batches(0):
            assert batch.labels is not None
            with self.accelerator.autocast():
                logits = self.model(batch.images)
            meter.add(logits, batch.labels, task_loss(logits, batch.labels, self.job.task))
        self.job.module.train()
        return meter

    def save(self, snapshot: dict[str, Any]) -> None:
        """See ``Loop.save``; the best epoch's file stays as ``best.pt``."""
        super().save(snapshot)
        self.new_best = False

    def _saved(self) -> None:
        if self.new_best:
            _link(self.job.folder / LAST, self.job.folder / BEST)

    def _extra(self) -> dict[str, Any]:
        return {
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "chain": {
                "parts": self.parts,
                "meter": self.meter.state_dict(),
                "best": self.best,
                "records_best": self.records_best,
                "waited": self.waited,
                "elapsed": self.elapsed + time.monotonic() - self.began,
                "ended": self.stop == self.step and self.step < self.total and self.patience_over,
            },
        }

    @property
    def patience_over(self) -> bool:
        """Whether the link ended early."""
        return self.job.patience is not None and self.waited >= self.job.patience

    def _load_extra(self, state: dict[str, Any]) -> None:
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        chain = state["chain"]
        self.parts, self.best, self.waited = chain["parts"], chain["best"], chain["waited"]
        self.records_best, self.elapsed = chain["records_best"], chain["elapsed"]
        self.meter.load_state_dict(chain["meter"], self.device)
        if chain["ended"]:
            self.stop = state["step"]


def _link(source: Any, target: Any) -> None:
    """Give a file a second name, atomically: later renames leave that name's content alone."""
    with replacing(target) as partial:
        partial.unlink(missing_ok=True)
        try:
            os.link(source, partial)
        except OSError:
            shutil.copyfile(source, partial)
