# SPDX-License-Identifier: Apache-2.0
"""What a loop saves of itself and goes on from, with any number of processes."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator

from kdfast.configs.fields import ConfigError
from kdfast.machine.files import load_torch
from kdfast.machine.ranks import Ranks
from kdfast.trainer.commits import changed, load_checkpoint, newest, save_checkpoint, settle
from kdfast.trainer.feed import Feed
from kdfast.trainer.gathered import (
    load_module_state,
    load_optimizer_state,
    module_state,
    optimizer_state,
)
from kdfast.trainer.job import Job
from kdfast.trainer.logs import LOG, STEPS
from kdfast.trainer.runs import refuse_other
from kdfast.trainer.state import differences, rng_state, seed_everything, set_rng_state
from kdfast.trainer.window import Window


class Position(NamedTuple):
    """Where a training is.

    Attributes:
        step: Optimiser steps that are done.
        open_epoch: Learning rate of an epoch whose steps are done, but not what comes after them;
            None: there is no such epoch.
    """

    step: int
    open_epoch: float | None


class Progress:
    """Commits of one job by all of its processes."""

    def __init__(
        self,
        job: Job,
        accelerator: Accelerator,
        optimizer: torch.optim.Optimizer,
        window: Window,
    ) -> None:
        """Set up.

        Args:
            job: What is trained.
            accelerator: Processes and the scale of the loss.
            optimizer: The job's, as Accelerate runs it.
            window: What the log has not written yet; a part of every commit.
        """
        self.job, self.accelerator = job, accelerator
        self.optimizer, self.window = optimizer, window
        self.world, self.rank = accelerator.num_processes, accelerator.process_index

    def snapshot(self) -> dict[str, Any]:
        """What changes during a step besides weights and optimiser, of this process."""
        feed = self.job.feed.state_dict()
        return {"rng": rng_state(), "feed": feed, **self.window.state_dict()}

    def save(self, at: Position, snapshot: dict[str, Any], records: tuple[Path, ...]) -> None:
        """Write the checkpoint of all processes.

        Args:
            at: Where the training is.
            snapshot: Of this process, perhaps from before the last step.
            records: Files of the log, which belong to it.
        """
        job, main = self.job, self.accelerator.is_main_process
        snapshots = [snapshot]
        if self.world > 1:
            snapshots = [{}] * self.world
            dist.all_gather_object(snapshots, snapshot)
        module = module_state(job.module, keep=main)
        optimizer = optimizer_state(self.optimizer, keep=main)
        watch = job.watch.state_dict()
        if main:
            scaler = self.accelerator.scaler
            state = {
                "meta": job.meta,
                "step": at.step,
                "per_epoch": job.length.per_epoch,
                "world": self.world,
                "together": job.feed.shares.together,
                "parts": job.step.parts,
                "module": module,
                "optimizer": optimizer,
                "scaler": None if scaler is None else scaler.state_dict(),
                "ranks": snapshots,
                "open_epoch": at.open_epoch,
                **watch,
            }
            beside = (*job.beside, *records)
            save_checkpoint(job.folder, state, best=job.watch.is_best(), beside=beside)
        self.accelerator.wait_for_everyone()

    def load(self) -> Position | None:
        """Go on from the folder's newest checkpoint; None: there is none.

        Raises:
            ConfigError: It is damaged, or of another training.
        """
        folder = self.job.folder
        try:
            if self.accelerator.is_main_process:
                settle(folder)
            self.accelerator.wait_for_everyone()
            path = newest(folder)
            state = None if path is None else load_checkpoint(path)
            self._check_same(None if state is None else state.get("step"))
            if path is None or state is None:
                return None
            for log in (self.job.logs / STEPS, self.job.logs / self.job.epochs_file):
                if changed(folder, log):
                    LOG.warning("%s is not as it was saved: rows may be missing", log)
        except ValueError as error:
            raise ConfigError([f"--resume: {error}"]) from error
        self._check(path, state)
        try:
            self._take(state)
        except (torch.OutOfMemoryError, ConfigError):
            raise
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(
                [f"--resume: {path} is no checkpoint of this training: {error!r}; delete it"]
            ) from error
        LOG.info(
            "%s continues after step %d of %d from %s",
            *(self.job.title, state["step"], self.job.length.total, path),
        )
        return Position(state["step"], state["open_epoch"])

    def _check_same(self, step: Any) -> None:
        """Raises ConfigError, in all processes, where they would not go on from one checkpoint."""
        found = Ranks(self.rank, self.world).shared(lambda: step)
        if any(other != found[0] for other in found):
            folder, steps = self.job.folder, ", ".join(map(str, found))
            raise ConfigError(
                [
                    f"--resume: all processes must see one folder {folder}, got checkpoints of "
                    f"these steps in them: {steps}"
                ]
            )

    def _check(self, path: Path, state: dict[str, Any]) -> None:
        """Raises ConfigError where a checkpoint is of another training."""
        together = self.job.feed.shares.together
        try:
            differing = differences(state["meta"], self.job.meta, self.job.defaults)
            sizes = {
                "steps per epoch": (state["per_epoch"], self.job.length.per_epoch),
                "images a step": (images_of(state, together), together),
            }
        except (KeyError, TypeError) as error:
            raise ConfigError(
                [f"--resume: {path} is no checkpoint of this training: {error!r}; delete it"]
            ) from error
        differing += [
            f"{old} {what}, got {new}" for what, (old, new) in sizes.items() if old != new
        ]
        refuse_other(path, differing)

    def _take(self, state: dict[str, Any]) -> None:
        """Put everything where it was."""
        job, ranks = self.job, state["ranks"]
        load_module_state(job.module, state["module"])
        load_optimizer_state(self.optimizer, state["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        job.step.parts = state.get("parts", 1)
        job.watch.load_state_dict(state)
        if len(ranks) != self.world:
            self._take_over(state)
            return
        mine = ranks[self.rank]
        set_rng_state(mine["rng"])
        job.feed.load_state_dict(mine["feed"])
        self.window.load_state_dict(mine)

    def _take_over(self, state: dict[str, Any]) -> None:
        """Go on from another number of processes: same steps, other random numbers."""
        job, ranks = self.job, state["ranks"]
        try:
            job.feed.merge_state_dicts([rank["feed"] for rank in ranks])
        except ValueError as error:
            raise ConfigError([f"--resume: {error}"]) from error
        self.window.merge_state_dicts(ranks)
        seed_everything(_seed(ranks[0]["rng"]["torch"], state["step"], self.rank))
        shares = job.feed.shares
        # The first process has the most images, the last one the fewest.
        each = ["+".join(map(str, shares.sizes(rank))) for rank in (0, self.world - 1)]
        words = " or ".join(dict.fromkeys(each))
        LOG.info(
            "%s goes on with other processes, %d instead of %d: a step still has %d images, %s of "
            "each; what is drawn at random in a step, as by drop path, is other than it would have "
            "been",
            *(job.title, self.world, len(ranks), shares.together, words),
        )


def images_of(state: dict[str, Any], otherwise: int) -> int:
    """Images of a step of a checkpoint; ``otherwise`` where it is too old to say it."""
    found: int = state.get("together", otherwise)
    return found


def deal_steps(
    feed: Feed[Any], accelerator: Accelerator, *, accumulate: int = 1, goes_on: Path | None = None
) -> None:
    """Give every step of a feed as many images as at the beginning of the training.

    Args:
        feed: Training data.
        accelerator: Processes, all of which call this.
        accumulate: Batches of a process in a step, where the training begins.
        goes_on: Folder of the checkpoints that it goes on from; None: it begins.

    Raises:
        ValueError: The processes cannot share the images of a step, or an epoch has fewer.
    """
    batches, world = feed.batch_size * accumulate, accelerator.num_processes
    together = batches * world
    if goes_on is not None:
        if accelerator.is_main_process:
            settle(goes_on)
        accelerator.wait_for_everyone()
        if (path := newest(goes_on)) is not None:
            # Mapped, not read: the loop will read all of it, and say what may be wrong with it.
            with suppress(KeyError, TypeError, ValueError):
                state = load_torch(path, mmap=True)
                together = images_of(state, batches * int(state["world"]))
    feed.share_out(together)


def _seed(generator: torch.Tensor, step: int, rank: int) -> int:
    """A seed of a process, from the first one's generator."""
    digest = hashlib.sha256(generator.cpu().numpy().tobytes() + f" {step} {rank}".encode())
    return int.from_bytes(digest.digest()[:7], "little")
