# SPDX-License-Identifier: Apache-2.0
"""The training loop: steps, checkpoints and records of a job, on any number of processes."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from kdfast.machine.files import write_text
from kdfast.machine.memory import memory_mib
from kdfast.machine.signals import Interrupted, Signals, noting
from kdfast.trainer.curves import draw_curves
from kdfast.trainer.display import Display
from kdfast.trainer.exchange import Exchange
from kdfast.trainer.feed import Batch
from kdfast.trainer.gathered import is_sharded
from kdfast.trainer.job import Job
from kdfast.trainer.logs import Records
from kdfast.trainer.progress import Position, Progress
from kdfast.trainer.step import Prepared, StepResult
from kdfast.trainer.window import Window

GOING, STOPPED, BROKEN = 0, 1, 2


class NonFiniteLoss(RuntimeError):
    """A loss or gradient was not finite; the state before that step was saved."""


class Loop:
    """Runs a job to its end, or to a signal; ``fit`` may follow an earlier process's checkpoint.

    Attributes:
        step: Optimiser steps that are done.
        per_epoch: Optimiser steps of an epoch.
        total: Optimiser steps of the whole training.
        stop: The step that ``fit`` trains to, at most ``total``.
    """

    def __init__(self, job: Job, accelerator: Accelerator) -> None:
        self.job, self.accelerator = job, accelerator
        self.device, self.main = accelerator.device, accelerator.is_main_process
        self.world, self.rank = accelerator.num_processes, accelerator.process_index
        self.per_epoch, self.total = job.length.per_epoch, job.length.total
        # Before Accelerate wraps them: the groups hold the module's own parameters.
        self.trainable = [p for group in job.optimizer.param_groups for p in group["params"]]
        # That mode leaves DDP out, whose place the exchange takes.
        module = accelerator.prepare_model(job.module, evaluation_mode=True)
        self.optimizer = accelerator.prepare_optimizer(job.optimizer)
        shares = job.feed.shares
        # A sharded module averages its gradients by itself, as it has to.
        self.exchange = None
        if self.world > 1 and not is_sharded(job.module):
            self.exchange = Exchange(job.module, self.world, self.device)
        self.prepared = Prepared(
            title=job.title,
            accelerator=accelerator,
            module=module,
            optimizer=self.optimizer,
            together=shares.together,
            weights=shares.weights(self.rank),
            leaves_now=self._leaves_now,
            exchange=self.exchange,
        )
        self.step, self.stop = 0, job.length.stop
        self.window = Window()
        self.progress = Progress(job, accelerator, self.optimizer, self.window)
        self.signals = Signals()
        # Learning rate of an epoch whose steps are done, but not what comes after them.
        self.open_epoch: float | None = None

    @property
    def done(self) -> bool:
        """Whether the training is over; False where ``max_steps`` ended this part of it."""
        return self.step >= self.total or self.job.watch.finished()

    def fit(self, *, resume: bool = False) -> None:
        """Train until the end of the run or ``max_steps``; the loss scale is then as it was before.

        Args:
            resume: Continue from the folder's checkpoint where there is one.

        Raises:
            Interrupted: A signal came; the state was saved.
            NonFiniteLoss: The state before the step was saved; the message names the batch.
        """
        job, scaler = self.job, self.accelerator.scaler
        scale = None if scaler is None else scaler.state_dict()
        job.watch.on_start()
        position = self.progress.load() if resume else None
        if position is not None:
            self.step, self.open_epoch = position
        self.records = Records(
            job.logs,
            None if position is None else self.step,
            enabled=self.main,
            epochs_file=job.epochs_file,
        )
        self.display = Display(job.title, self.stop, self.step, enabled=self.main)
        self.window.restart_clock()
        job.module.train()
        try:
            with noting() as self.signals:
                if self.open_epoch is not None:
                    self._close_epoch(self.step // self.per_epoch - 1, self.open_epoch)
                while self.step < self.stop and not job.watch.finished():
                    self._epoch()
        finally:
            self.display.close()
            self.records.close()
            job.feed.close()
            if self.exchange is not None:
                self.exchange.close()
            if self.main:
                draw_curves(job)
            if scaler is not None:
                # Another loop of this process starts as it would in a process of its own.
                scaler.load_state_dict(scale)
        if caught := self._caught():
            raise Interrupted(caught)

    def _caught(self) -> int:
        """The signal that came to any process, or 0: one that left alone would be waited for."""
        caught = self.signals.caught
        if self.world == 1:
            return caught
        shared = torch.tensor(caught, device=self.device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared)

    def _leaves_now(self) -> bool:
        return bool(self.signals.caught) and self.world == 1

    def _epoch(self) -> None:
        epoch, done = divmod(self.step, self.per_epoch)
        length = self.job.length
        batches = self._waiting(self.job.feed.batches(epoch, done))
        end = min(self.stop, (epoch + 1) * self.per_epoch)
        while self.step < end:
            lr = self._train_step(batches, epoch)
            if self.step == (epoch + 1) * self.per_epoch:
                self._close_epoch(epoch, lr)
            elif self.step % length.save_every == 0 or self.step == self.stop:
                self.save(self.progress.snapshot())

    def _waiting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, with the time that the training waits for them."""
        while True:
            with self.window.waiting():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _close_epoch(self, epoch: int, lr: float) -> None:
        """Evaluate and save; a signal saves the steps, and a resume begins with the evaluation."""
        snapshot, self.open_epoch = self.progress.snapshot(), lr
        try:
            with self.window.untimed():
                row = self.job.watch.on_epoch(epoch, self.step, lr)
        except Interrupted:
            self.save(snapshot)
            raise
        self.open_epoch = None
        self.job.module.train()
        if row is not None:
            self.records.epoch(row)
            if name := self.job.watch.headline_of(row):
                self.display.held_out(name, row[name])
        self.save(self.progress.snapshot())

    def _train_step(self, batches: Iterator[Batch], epoch: int) -> float:
        """One step of the optimiser; returns its learning rate."""
        before = self.progress.snapshot()
        lr = self.job.set_lr(self.step)
        result = self.job.step(self.prepared, batches, epoch)
        status, norm = self._judge(result.losses)
        if status == GOING:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if status == BROKEN:
            self._stop_broken(before, result)
        if status == STOPPED:
            self.save(before)
            raise Interrupted(self.signals.caught or signal.SIGTERM)
        self.step += 1
        self.job.watch.on_step(self.step, result)
        self._book(result, {"lr": lr, "grad_norm": norm}, epoch)
        return lr

    def _judge(self, losses: dict[str, Tensor]) -> tuple[int, float]:
        """Whether all processes may go on, and the norm of the gradient."""
        if self._leaves_now():
            return STOPPED, 0.0
        clip = self.job.clip
        norm = self.accelerator.clip_grad_norm_(self.trainable, math.inf if clip is None else clip)
        good = torch.isfinite(losses["total"])
        if self.accelerator.scaler is None:
            # Under loss scaling an infinite gradient is ordinary: the scaler skips that step.
            good &= torch.isfinite(norm)
        status = torch.where(good, STOPPED if self.signals.caught else GOING, BROKEN)
        if self.world > 1:
            dist.all_reduce(status, dist.ReduceOp.MAX)
        return int(status), float(norm)

    def _stop_broken(self, before: dict[str, Any], result: StepResult) -> None:
        used, losses = result.batches, result.losses
        batches = [{"index": b.index, "path": b.path} for b in used]
        values = {name: float(value) for name, value in losses.items()}
        report = {"step": self.step + 1, "rank": self.rank, "losses": values, "batches": batches}
        path = self.job.folder / f"nonfinite-rank{self.rank}.json"
        write_text(path, json.dumps(report, indent=1))
        self.save(before)
        bad = ", ".join(f"{name} {value}" for name, value in values.items() if value - value != 0)
        indices = [i for b in used for i in b.index]
        paths = ", ".join([p for b in used for p in b.path][:4])
        raise NonFiniteLoss(
            f"{self.job.title} step {self.step + 1}: loss and gradient must be finite, got "
            f"{bad or 'a gradient that is not'} for items {indices} ({paths}, ...); the state "
            f"before this step is saved, the batch is named in {path}"
        )

    def _book(self, result: StepResult, extra: dict[str, float], epoch: int) -> None:
        """Add a step to the window of the log, and write the window out when it is full."""
        losses, window = result.losses, self.window
        values = dict(zip(losses, torch.stack(list(losses.values())).tolist(), strict=True))
        # This process's images, times what the others have beside them.
        count = sum(len(b.index) for b in result.batches)
        window.add({**values, **extra}, count * self.world / sum(self.prepared.weights))
        ends = self.step in (1, self.stop) or self.step % self.per_epoch == 0
        if ends or window.steps >= self.job.length.log_every:
            row = window.means(self.world, self.device)
            row["lr"] = extra["lr"]
            row |= window.speed()
            row["memory_mib"] = memory_mib(self.device)
            window.clear()
            self.records.step({"step": self.step, "epoch": epoch + 1, **row})
            self.display.update(self.step, row)
        else:
            self.display.update(self.step, None)

    def save(self, snapshot: dict[str, Any]) -> None:
        """Write the checkpoint of all processes at the current step.

        Args:
            snapshot: What changes during a step, of this process.
        """
        with self.window.untimed():
            at = Position(self.step, self.open_epoch)
            self.progress.save(at, snapshot, self.records.files)
