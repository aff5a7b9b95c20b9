# SPDX-License-Identifier: Apache-2.0
"""Batches of a dataset for one process, from any position of any epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from kdfast.data.sampler import EpochSampler
from kdfast.data.shares import Batches, Shares


@dataclass(frozen=True)
class Batch:
    """One batch on the device of the run.

    Attributes:
        images: (B, 3, H, W).
        labels: What the dataset says about the images, as the job's module takes it; None: nothing.
        index: Indices in the dataset.
        path: Where the images come from, for messages.
        weight: 0 for a batch whose pictures were all unreadable (``images`` is one black image
            then, so that every process still takes part in the step), else 1.
        variant: Number of the augmentation that the images show, for data that counts them.
    """

    images: Tensor
    labels: Any
    index: list[int]
    path: list[str]
    weight: float = 1.0
    variant: int = 0


class EpochDataset(Protocol):
    """A map-style dataset whose items depend on the epoch."""

    def __len__(self) -> int:
        """Number of items."""

    def set_epoch(self, epoch: int) -> None:
        """Show the items of this epoch from now on."""


class Counter(Protocol):
    """What a feed counts while it reads; a part of every checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to values of ``state_dict``."""

    def merged(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One state of those of several processes.

        Raises:
            ValueError: What is counted belongs to its process.
        """


D = TypeVar("D", bound=EpochDataset)


class Feed(Generic[D]):
    """Reads a dataset in the order of its sampler, which is shared among processes.

    Attributes:
        dataset: Where the items come from.
        shares: How the items of a step become batches; a step is one batch of each process until
            ``share_out`` says otherwise.
    """

    def __init__(
        self,
        dataset: D,
        sampler: EpochSampler,
        to_batch: Callable[[Any, int, int], Batch],
        *,
        key: str,
        batch_size: int,
        train: bool,
        device: torch.device,
        workers: int = 0,
        seed: int = 0,
        counter: Counter | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        worker_init: Callable[[int], None] | None = None,
    ) -> None:
        """Set the loader up.

        Args:
            dataset: Items by index.
            sampler: The indices of this process, in their order.
            to_batch: Makes a batch on the device from what the loader gives, the epoch, and the
                number of the batch in the epoch; all batches go through it in their order.
            key: Name of the batch size in the config, for the message.
            batch_size: Items per process and batch.
            train: Whole batches only; otherwise every item once.
            device: Where ``to_batch`` puts the batches.
            workers: Loader processes.
            seed: Seed of the loader's own generator.
            counter: What ``to_batch`` counts; None: nothing.
            collate: Joins items; torch's own if None.
            worker_init: Called in every loader process.

        Raises:
            ValueError: Training items do not fill one batch for every process.
        """
        if train and len(sampler) < batch_size:
            raise ValueError(
                f"{key}: {sampler.length} training images on {sampler.world} process(es) must give "
                f"at least one batch, got batches of {batch_size}"
            )
        self.dataset, self.sampler, self.batch_size = dataset, sampler, batch_size
        self._to_batch, self._counter, self._train = to_batch, counter, train
        self._make: Callable[..., DataLoader[Any]] = partial(
            DataLoader,
            dataset,  # type: ignore[arg-type]
            num_workers=workers,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
            # Its own: making an iterator must not touch the generator of drop path.
            generator=torch.Generator().manual_seed(seed),
            collate_fn=collate,
            worker_init_fn=worker_init,
        )
        self.share_out(batch_size * sampler.world)

    def share_out(self, together: int) -> None:
        """Say how many items a step of the optimiser has in all processes together.

        Raises:
            ValueError: They cannot be dealt out to the processes, or an epoch has fewer.
        """
        sampler = self.sampler
        if self._train and sampler.length < together:
            raise ValueError(
                f"run.accumulate: an epoch has {sampler.length} images, which must be at least one "
                f"step, got steps of {together}"
            )
        self.shares = Shares(together, self.batch_size, sampler.world)
        if self._train:
            sampler.deal(together)
        self._open()

    def _open(self) -> None:
        sizes = self.shares.sizes(self.sampler.rank) if self._train else (self.batch_size,)
        batches = Batches(self.sampler, sizes, whole=self._train)
        self._loader: DataLoader[Any] = self._make(batch_sampler=batches)

    @property
    def steps(self) -> int:
        """Whole steps of an epoch, whatever the number of processes."""
        return self.sampler.length // self.shares.together

    def batches(self, epoch: int, done: int = 0, limit: int | None = None) -> Iterator[Batch]:
        """Batches of an epoch.

        Args:
            epoch: Says the order and the augmentation.
            done: Steps to leave out at the start.
            limit: Stop after about so many items of all processes.
        """
        together, forwards = self.shares.together, self.shares.forwards
        self.sampler.set_epoch(epoch, done * together)
        self.dataset.set_epoch(epoch)
        count = None if limit is None else math.ceil(limit * forwards / together)
        for number, item in enumerate(islice(self._loader, count), done * forwards):
            yield self._to_batch(item, epoch, number)

    def close(self) -> None:
        """End the loader's processes; ``batches`` starts new ones.

        Left to the collector of cycles, which ends their queues first, each would be waited for
        for five seconds.
        """
        self._open()

    def state_dict(self) -> dict[str, Any]:
        """What was counted so far, for a checkpoint."""
        return {} if self._counter is None else self._counter.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of ``state_dict``."""
        if self._counter is not None:
            self._counter.load_state_dict(state)

    def merge_state_dicts(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on from the states of another number of processes, which this one goes on with.

        The first process counts on from all of them, the others from nothing.

        Raises:
            ValueError: What was counted belongs to its process.
        """
        if self._counter is not None:
            merged = self._counter.merged(states)
            if self.sampler.rank == 0:
                self._counter.load_state_dict(merged)
