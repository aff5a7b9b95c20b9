# SPDX-License-Identifier: Apache-2.0
"""The training loop: any module that turns a batch into losses, on any number of processes."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from kdfast.configs.chain import ChainOptimConfig
from kdfast.configs.fields import ConfigError
from kdfast.configs.recovery import OptimConfig, RunConfig
from kdfast.machine.memory import memory_mib
from kdfast.trainer.feed import Batch, BatchFeed
from kdfast.trainer.logs import LOG, Display, Records, draw_curves
from kdfast.trainer.optim import WARMUP_SHARE, adamw, param_groups, schedule
from kdfast.trainer.signals import Interrupted, Signals
from kdfast.trainer.state import load_checkpoint, newest, rng_state, save_checkpoint, set_rng_state

GOING, STOPPED, BROKEN = 0, 1, 2


class NonFiniteLoss(RuntimeError):
    """A loss or gradient was not finite; the state before that step was saved."""


@dataclass(frozen=True)
class Job:
    """What a loop trains, and under which name.

    Attributes:
        title: Shown on the terminal.
        folder: Checkpoints and records go here.
        module: ``module(images, labels, epoch)`` gives scalars: ``total`` is minimised, the others
            are logged. Its parameters that require a gradient are trained and saved.
        depth: Number of blocks, for layer decay.
        feed: Training data.
        optim: Optimiser.
        run: Epochs, accumulation, intervals.
        meta: Plain values to keep in the checkpoint: what is needed to build ``module`` again.
        evaluate: Called after each epoch on every process; its values are logged.
        logs: Folder of the records; ``folder`` if None.
        epochs_file: Name of the CSV with a row per epoch.
    """

    title: str
    folder: Path
    module: nn.Module
    depth: int
    feed: BatchFeed
    optim: OptimConfig | ChainOptimConfig
    run: RunConfig
    meta: dict[str, Any]
    evaluate: Callable[[], dict[str, float]] | None = None
    logs: Path | None = None
    epochs_file: str = "epochs.csv"


class Loop:
    """Runs a job to its end, or to a signal; ``fit`` may follow an earlier process's checkpoint.

    Attributes:
        step: Optimiser steps that are done.
        total: Optimiser steps of the whole run.
    """

    def __init__(self, job: Job, accelerator: Accelerator) -> None:
        self.job, self.accelerator = job, accelerator
        self.device, self.main = accelerator.device, accelerator.is_main_process
        self.world, self.rank = accelerator.num_processes, accelerator.process_index
        run = job.run
        self.per_epoch = len(job.feed) // run.accumulate
        if self.per_epoch == 0:
            raise ValueError(
                f"run.accumulate: an epoch has {len(job.feed)} batches per process, which must be "
                f"at least one step, got steps of {run.accumulate}"
            )
        self.total = self.per_epoch * run.epochs
        self.stop = min(self.total, run.max_steps or self.total)
        optimizer = self._optimizer()
        self.trainable = [p for group in optimizer.param_groups for p in group["params"]]
        self.module, self.optimizer = accelerator.prepare(job.module, optimizer)
        self.step = 0
        self.window: dict[str, float] = {}
        self.window_steps = 0
        self.signals = Signals()

    def _optimizer(self) -> torch.optim.Optimizer:
        """The optimiser of the job's module, and what ``_set_lr`` needs."""
        optim = self.job.optim
        if not isinstance(optim, OptimConfig):
            raise TypeError(f"Loop: optim must be OptimConfig, got {type(optim).__name__}")
        self.factor = schedule(optim, self.total)
        if self.main and optim.warmup > self.total * WARMUP_SHARE:
            cut = int(self.total * WARMUP_SHARE)
            LOG.info("warm-up of %d steps cut to %d of %d", optim.warmup, cut, self.total)
        return adamw(param_groups(self.job.module, optim, self.job.depth), optim)

    def _set_lr(self) -> float:
        """Set the learning rate of the step that comes; returns its largest value."""
        lr = self.job.optim.lr * self.factor(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        return lr

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
        resumed = self._load() if resume else False
        logs = job.folder if job.logs is None else job.logs
        self.records = Records(
            logs, self.step if resumed else None, enabled=self.main, epochs_file=job.epochs_file
        )
        self.display = Display(job.title, self.stop, self.step, enabled=self.main)
        self.clock, self.images = time.monotonic(), 0
        job.module.train()
        try:
            with self.signals:
                while self.step < self.stop:
                    self._epoch()
        finally:
            self.display.close()
            self.records.close()
            if self.main:
                draw_curves(logs)
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

    def _epoch(self) -> None:
        epoch, done = divmod(self.step, self.per_epoch)
        run = self.job.run
        batches = self.job.feed.batches(epoch, done * run.accumulate)
        end = min(self.stop, (epoch + 1) * self.per_epoch)
        while self.step < end:
            self._train_step(batches, epoch)
            finished = self.step == (epoch + 1) * self.per_epoch
            if finished:
                self._finish_epoch(epoch)
            if finished or self.step % run.save_every == 0 or self.step == self.stop:
                self.save(self._snapshot())

    def _finish_epoch(self, epoch: int) -> None:
        """Evaluate and log; called before the checkpoint of an epoch is saved."""
        if self.job.evaluate is None:
            return
        values = self.job.evaluate()
        self.job.module.train()
        self.records.epoch({"step": self.step, "epoch": epoch + 1, **values})
        text = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        LOG.info("%s epoch %d  %s", self.job.title, epoch + 1, text)

    def _train_step(self, batches: Iterator[Batch], epoch: int) -> None:
        before = self._snapshot()
        lr = self._set_lr()
        losses, used = self._backward(batches, epoch)
        status, norm = self._judge(losses)
        if status == GOING:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if status == BROKEN:
            self._stop_broken(before, used, losses)
        if status == STOPPED:
            self.save(before)
            raise Interrupted(self.signals.caught or signal.SIGTERM)
        self.step += 1
        self._book(losses, {"lr": lr, "grad_norm": norm}, epoch, sum(len(b.index) for b in used))

    def _backward(
        self, batches: Iterator[Batch], epoch: int
    ) -> tuple[dict[str, Tensor], list[Batch]]:
        """Accumulate the gradient of one step; the mean losses and the batches used."""
        count = self.job.run.accumulate
        used: list[Batch] = []
        sums: dict[str, Tensor] = {}
        for number in range(count):
            batch = next(batches)
            used.append(batch)
            last = number == count - 1
            with nullcontext() if last else self.accelerator.no_sync(self.module):
                losses = self.module(batch.images, batch.labels, epoch)
                self.accelerator.backward(losses["total"] * (batch.weight / count))
            for name, value in losses.items():
                part = value.detach().float() / count
                sums[name] = sums[name] + part if name in sums else part
            # Alone, stop at once; with others the step ends first, so that all stop at the same.
            if self.signals.caught and self.world == 1:
                break
        return sums, used

    def _judge(self, losses: dict[str, Tensor]) -> tuple[int, float]:
        """Whether all processes may go on, and the norm of the gradient."""
        if self.signals.caught and self.world == 1:
            return STOPPED, 0.0
        clip = self.job.optim.clip
        norm = self.accelerator.clip_grad_norm_(self.trainable, math.inf if clip is None else clip)
        good = torch.isfinite(losses["total"])
        if self.accelerator.scaler is None:
            # Under loss scaling an infinite gradient is ordinary: the scaler skips that step.
            good &= torch.isfinite(norm)
        status = torch.where(good, STOPPED if self.signals.caught else GOING, BROKEN)
        if self.world > 1:
            dist.all_reduce(status, dist.ReduceOp.MAX)
        return int(status), float(norm)

    def _stop_broken(
        self, before: dict[str, Any], used: list[Batch], losses: dict[str, Tensor]
    ) -> None:
        batches = [{"index": b.index, "path": b.path} for b in used]
        values = {name: float(value) for name, value in losses.items()}
        report = {"step": self.step + 1, "rank": self.rank, "losses": values, "batches": batches}
        path = self.job.folder / f"nonfinite-rank{self.rank}.json"
        path.write_text(json.dumps(report, indent=1), encoding="utf-8")
        self.save(before)
        bad = ", ".join(f"{name} {value}" for name, value in values.items() if value - value != 0)
        indices = [i for b in used for i in b.index]
        paths = ", ".join([p for b in used for p in b.path][:4])
        raise NonFiniteLoss(
            f"{self.job.title} step {self.step + 1}: loss and gradient must be finite, got "
            f"{bad or 'a gradient that is not'} for items {indices} ({paths}, ...); the state "
            f"before this step is saved, the batch is named in {path}"
        )

    def _book(
        self, losses: dict[str, Tensor], extra: dict[str, float], epoch: int, images: int
    ) -> None:
        """Add a step to the window of the log, and write the window out when it is full."""
        run = self.job.run
        values = dict(zip(losses, torch.stack(list(losses.values())).tolist(), strict=True))
        for name, value in {**values, **extra}.items():
            self.window[name] = self.window.get(name, 0.0) + value
        self.window_steps += 1
        self.images += images * self.world
        ends = self.step in (1, self.stop) or self.step % self.per_epoch == 0
        if ends or self.window_steps >= run.log_every:
            values = {name: value / self.window_steps for name, value in self.window.items()}
            if self.world > 1:
                names = sorted(values)
                mean = torch.tensor([values[n] for n in names], device=self.device)
                dist.all_reduce(mean)
                values |= dict(zip(names, (mean / self.world).tolist(), strict=True))
            values["lr"] = extra["lr"]
            now = time.monotonic()
            values["images_per_s"] = self.images / max(now - self.clock, 1e-9)
            values["memory_mib"] = memory_mib(self.device)
            self.clock, self.images = now, 0
            self.records.step({"step": self.step, "epoch": epoch + 1, **values})
            self.window, self.window_steps = {}, 0
            self.display.update(self.step, values)
        else:
            self.display.update(self.step, None)

    def _snapshot(self) -> dict[str, Any]:
        """What changes during a step besides weights and optimiser, of this process."""
        return {
            "rng": rng_state(),
            "corrupt": self.job.feed.counter.state_dict(),
            "window": dict(self.window),
            "window_steps": self.window_steps,
        }

    def save(self, snapshot: dict[str, Any]) -> None:
        """Write the checkpoint of all processes at the current step."""
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
                **self._extra(),
            }
            save_checkpoint(self.job.folder, state)
            self._saved()
        self.accelerator.wait_for_everyone()

    def _saved(self) -> None:
        """Called on the first process when a checkpoint is there, while the others wait."""

    def _extra(self) -> dict[str, Any]:
        """What else a checkpoint holds, of the first process."""
        return {}

    def _load_extra(self, state: dict[str, Any]) -> None:
        """Go back to what ``_extra`` put into a checkpoint."""

    def _load(self) -> bool:
        path = newest(self.job.folder)
        if path is None:
            return False
        try:
            state = load_checkpoint(path)
        except ValueError as error:
            raise ConfigError([f"--resume: {error}"]) from error
        differing = differences(state["meta"], self.job.meta)
        if differing:
            raise ConfigError([f"--resume: {path} was made with {line}" for line in differing])
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
        self.step = state["step"]
        self._load_extra(state)
        mine = state["ranks"][self.rank]
        set_rng_state(mine["rng"])
        self.job.feed.counter.load_state_dict(mine["corrupt"])
        self.window, self.window_steps = mine["window"], mine["window_steps"]
        LOG.info(
            "%s continues after step %d of %d from %s", self.job.title, self.step, self.total, path
        )
        return True


def differences(saved: Any, mine: Any, key: str = "") -> list[str]:
    """One line for every value of two trees of plain values that is not the same."""
    if isinstance(saved, dict) and isinstance(mine, dict):
        names = [*saved, *(name for name in mine if name not in saved)]
        return [
            line
            for name in names
            for line in differences(saved.get(name), mine.get(name), f"{key}.{name}".strip("."))
        ]
    return [] if saved == mine else [f"{key} {saved!r}, got {mine!r}"]
