# SPDX-License-Identifier: Apache-2.0
"""Batches of a classification set for one process, from any position of any epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdfast.data.labelled import LabelledImages, worker_init
from kdfast.data.rng import ORDER, generator
from kdfast.data.sampler import EpochSampler
from kdfast.trainer.feed import Batch, batch_loader


@dataclass
class ClassBatch(Batch):
    """A batch with targets in ``labels``: (B,) int64 or (B, C) float.

    Attributes:
        variant: Which augmentation of the images this is.
    """

    variant: int = 0


class NoState:
    """Stands for the counter of a feed that has nothing to count."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""


class _Chosen(EpochSampler):
    """Goes through some of a dataset's items."""

    def __init__(self, chosen: Sequence[int], **options: Any) -> None:
        self.chosen = np.asarray(chosen, np.int64)
        super().__init__(len(chosen), **options)

    def __iter__(self) -> Iterator[int]:
        return iter(self.chosen[self.order()[self.start // self.world :]].tolist())


class ClassFeed:
    """Reads a set in the order of (seed, epoch), shared among processes.

    Attributes:
        counter: Nothing to save: an unreadable picture is an error here.
    """

    def __init__(
        self,
        dataset: LabelledImages,
        *,
        batch_size: int,
        device: torch.device,
        workers: int = 0,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        train: bool = True,
        chosen: Sequence[int] | None = None,
    ) -> None:
        """Set the order and the loader up.

        Args:
            dataset: Items as ``LabelledImages`` describes them.
            batch_size: Images per process and batch.
            device: Where the batches go.
            workers: Loader processes.
            seed: Seed of the order.
            rank: This process.
            world: Number of processes.
            train: Shuffled, whole batches only; otherwise every item once, in order.
            chosen: Indices to use; None: all.

        Raises:
            ValueError: There is less than one batch for every process.
        """
        self.dataset, self.device, self.batch_size, self.world = dataset, device, batch_size, world
        self.counter = NoState()
        indices = range(len(dataset)) if chosen is None else chosen
        self.sampler = _Chosen(
            indices, seed=seed, rank=rank, world=world, shuffle=train, even=train
        )
        self.loader = batch_loader(
            dataset,
            self.sampler,
            key="batch",
            batch_size=batch_size,
            train=train,
            device=device,
            num_workers=workers,
            seed=seed,
            worker_init_fn=worker_init,
        )

    def __len__(self) -> int:
        """Whole batches of this process in an epoch."""
        return len(self.sampler.order()) // self.batch_size

    def batches(self, epoch: int, done: int = 0) -> Iterator[ClassBatch]:
        """Batches of an epoch from number ``done`` on."""
        self.sampler.set_epoch(epoch, done * self.batch_size * self.world)
        self.dataset.set_epoch(epoch)
        for item in self.loader:
            index: list[int] = item["index"].tolist()
            yield ClassBatch(
                images=item["image"].to(self.device, non_blocking=True),
                labels=item["target"].to(self.device, non_blocking=True),
                index=index,
                path=[f"item {i}" for i in index],
                weight=1.0,
                variant=int(item["variant"][0]),
            )


def even_part(targets: Tensor, limit: int | None, seed: int) -> list[int] | None:
    """Indices of about ``limit`` items, the same share of every class; None for all.

    Args:
        targets: (N,) class numbers, or (N, C) ones and zeros, of which no balance is kept.
        limit: How many; None: all.
        seed: Seed of the choice.
    """
    if limit is None or limit >= len(targets):
        return None
    order = generator(ORDER, seed, 0, len(targets)).permutation(len(targets))
    if targets.dim() > 1:
        return sorted(order[:limit].tolist())
    labels = targets.numpy()[order]
    # Rank of every item within its class: the first ones of all classes come first.
    rank = np.empty(len(order), np.int64)
    for label in np.unique(labels):
        mine = labels == label
        rank[mine] = np.arange(mine.sum())
    return sorted(order[np.argsort(rank, kind="stable")[:limit]].tolist())
