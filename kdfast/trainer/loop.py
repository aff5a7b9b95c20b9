# SPDX-License-Identifier: Apache-2.0
"""The training loop: steps, checkpoints and records of a job, on any number of processes."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from kdfast.configs.fields import ConfigError
from kdfast.machine.files import write_text
from kdfast.machine.memory import memory_mib
from kdfast.machine.signals import Interrupted, Signals, noting
from kdfast.trainer.commits import changed, load_checkpoint, newest, save_checkpoint, settle
from kdfast.trainer.curves import draw_curves
from kdfast.trainer.display import Display
from kdfast.trainer.feed import Batch
from kdfast.trainer.job import Job
from kdfast.trainer.logs import LOG, STEPS, Records
from kdfast.trainer.runs import refuse_other
from kdfast.trainer.state import differences, rng_state, set_rng_state
from kdfast.trainer.step import Prepared, StepResult

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
        module, self.optimizer = accelerator.prepare(job.module, job.optimizer)
        self.prepared = Prepared(
            accelerator, module, self.optimizer, job.length.accumulate, self._leaves_now
        )
        self.step, self.stop = 0, job.length.stop
        self.window: dict[str, float] = {}
        self.window_steps = 0
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
        resumed = self._load() if resume else False
        self.records = Records(
            job.logs, self.step if resumed else None, enabled=self.main, epochs_file=job.epochs_file
        )
        self.display = Display(job.title, self.stop, self.step, enabled=self.main)
        self._restart_clock()
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
        batches = self._waiting(self.job.feed.batches(epoch, done * length.accumulate))
        end = min(self.stop, (epoch + 1) * self.per_epoch)
        while self.step < end:
            lr = self._train_step(batches, epoch)
            if self.step == (epoch + 1) * self.per_epoch:
                self._close_epoch(epoch, lr)
            elif self.step % length.save_every == 0 or self.step == self.stop:
                self.save(self._snapshot())

    def _waiting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, with the time that the training waits for them."""
        while True:
            asked = time.monotonic()
            batch = next(batches, None)
            self.data_seconds += time.monotonic() - asked
            if batch is None:
                return
            yield batch

    def _close_epoch(self, epoch: int, lr: float) -> None:
        """Evaluate and save; a signal saves the steps, and a resume begins with the evaluation."""
        snapshot, self.open_epoch = self._snapshot(), lr
        try:
            with self._untimed():
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
        self.save(self._snapshot())

    def _train_step(self, batches: Iterator[Batch], epoch: int) -> float:
        """One step of the optimiser; returns its learning rate."""
        before = self._snapshot()
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
        losses = result.losses
        values = dict(zip(losses, torch.stack(list(losses.values())).tolist(), strict=True))
        for name, value in {**values, **extra}.items():
            self.window[name] = self.window.get(name, 0.0) + value
        self.window_steps += 1
        self.timed_steps += 1
        self.images += sum(len(b.index) for b in result.batches) * self.world
        ends = self.step in (1, self.stop) or self.step % self.per_epoch == 0
        if ends or self.window_steps >= self.job.length.log_every:
            values = {name: value / self.window_steps for name, value in self.window.items()}
            if self.world > 1:
                names = sorted(values)
                mean = torch.tensor([values[n] for n in names], device=self.device)
                dist.all_reduce(mean)
                values |= dict(zip(names, (mean / self.world).tolist(), strict=True))
            values["lr"] = extra["lr"]
            values |= self._speed()
            values["memory_mib"] = memory_mib(self.device)
            self._restart_clock()
            self.records.step({"step": self.step, "epoch": epoch + 1, **values})
            self.window, self.window_steps = {}, 0
            self.display.update(self.step, values)
        else:
            self.display.update(self.step, None)

    def _restart_clock(self) -> None:
        """Begin to measure the steps of a row of the log."""
        self.clock, self.timed_steps = time.monotonic(), 0
        self.images, self.data_seconds = 0, 0.0

    @contextmanager
    def _untimed(self) -> Iterator[None]:
        """Context for what is no step: its time is not that of the steps around it."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.clock += time.monotonic() - began

    def _speed(self) -> dict[str, float]:
        """Images per second, seconds per step, and how many of those waited for data."""
        seconds = max(time.monotonic() - self.clock, 1e-9)
        return {
            "images_per_s": self.images / seconds,
            "time": seconds / self.timed_steps,
            "data_time": self.data_seconds / self.timed_steps,
        }

    def _snapshot(self) -> dict[str, Any]:
        """What changes during a step besides weights and optimiser, of this process."""
        return {
            "rng": rng_state(),
            "feed": self.job.feed.state_dict(),
            "window": dict(self.window),
            "window_steps": self.window_steps,
        }

    def save(self, snapshot: dict[str, Any]) -> None:
        """Write the checkpoint of all processes at the current step."""
        with self._untimed():
            self._save(snapshot)

    def _save(self, snapshot: dict[str, Any]) -> None:
        snapshots = [snapshot]
        if self.world > 1:
            snapshots = [{}] * self.world
            dist.all_gather_object(snapshots, snapshot)
        if self.main:
            scaler = self.accelerator.scaler
            state = {
                "meta": self.job.meta,
                "step": self.step,
                "per_epoch": self.per_epoch,
                "world": self.world,
                "module": self.job.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "ranks": snapshots,
                "open_epoch": self.open_epoch,
                **self.job.watch.state_dict(),
            }
            beside = (*self.job.beside, *self.records.files)
            best = self.job.watch.is_best()
            save_checkpoint(self.job.folder, state, best=best, beside=beside)
        self.accelerator.wait_for_everyone()

    def _load(self) -> bool:
        folder = self.job.folder
        try:
            if self.main:
                settle(folder)
            self.accelerator.wait_for_everyone()
            path = newest(folder)
            if path is None:
                return False
            state = load_checkpoint(path)
            for log in (self.job.logs / STEPS, self.job.logs / self.job.epochs_file):
                if changed(folder, log):
                    LOG.warning("%s is not as it was saved: rows may be missing", log)
        except ValueError as error:
            raise ConfigError([f"--resume: {error}"]) from error
        try:
            self._take(path, state)
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, IndexError, KeyError, TypeError, RuntimeError) as error:
            raise ConfigError(
                [f"--resume: {path} is no checkpoint of this training: {error!r}; delete it"]
            ) from error
        LOG.info(
            "%s continues after step %d of %d from %s", self.job.title, self.step, self.total, path
        )
        return True

    def _take(self, path: Path, state: dict[str, Any]) -> None:
        """Go on from a checkpoint, which has to be of this training."""
        refuse_other(path, differences(state["meta"], self.job.meta, self.job.defaults))
        for name, mine in (("world", self.world), ("per_epoch", self.per_epoch)):
            if state[name] != mine:
                what = {"world": "processes", "per_epoch": "steps per epoch"}[name]
                raise ConfigError(
                    [f"--resume: {path} was made with {state[name]} {what}, got {mine}"]
                )
        self.job.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.open_epoch = state["step"], state["open_epoch"]
        self.job.watch.load_state_dict(state)
        mine = state["ranks"][self.rank]
        set_rng_state(mine["rng"])
        self.job.feed.load_state_dict(mine["feed"])
        self.window, self.window_steps = mine["window"], mine["window_steps"]
