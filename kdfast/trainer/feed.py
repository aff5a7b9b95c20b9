# SPDX-License-Identifier: Apache-2.0
"""Batches of a dataset for one process, from any position of any epoch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from kdfast.data.sampler import EpochSampler
from kdfast.data.views.base import CorruptCounter, Item, ViewDataset, collate
from kdfast.data.views.gridmask import GridMask


@dataclass
class Batch:
    """One batch on the device of the run.

    Attributes:
        images: (B, 3, H, W), masked.
        labels: Like the dataset's, or None.
        index: Indices in the dataset.
        path: Where the images come from.
        weight: 0 for a batch whose pictures were all unreadable (``images`` is one black image
            then, so that every process still takes part in the step), else 1.
    """

    images: Tensor
    labels: Tensor | None
    index: list[int]
    path: list[str]
    weight: float


class Counter(Protocol):
    """State of a feed that belongs into checkpoints."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to values of ``state_dict``."""


class BatchFeed(Protocol):
    """What a loop trains on."""

    @property
    def counter(self) -> Counter:
        """State that is saved."""

    def __len__(self) -> int:
        """Whole batches of this process in an epoch."""

    def batches(self, epoch: int, done: int = 0) -> Iterator[Batch]:
        """Batches of an epoch from number ``done`` on."""


def batch_loader(
    dataset: Any,
    sampler: EpochSampler,
    *,
    key: str,
    batch_size: int,
    train: bool,
    device: torch.device,
    num_workers: int,
    seed: int,
    **options: Any,
) -> DataLoader[Any]:
    """The loader of a feed, in the order of ``sampler``; whole batches only if ``train``.

    Args:
        dataset: Map-style.
        sampler: Of this process.
        key: Name of the batch size in the config, for the message.
        batch_size: Per process.
        train: Or evaluation.
        device: Where batches go.
        num_workers: Loader processes.
        seed: Of the loader's own generator.
        **options: Of ``DataLoader``.

    Raises:
        ValueError: Training images do not fill one batch for every process.
    """
    if train and len(sampler) < batch_size:
        raise ValueError(
            f"{key}: {sampler.length} training images on {sampler.world} process(es) must give at "
            f"least one batch, got batches of {batch_size}"
        )
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=train,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        persistent_workers=num_workers > 0,
        # Its own: making an iterator must not touch the generator of drop path.
        generator=torch.Generator().manual_seed(seed),
        **options,
    )


class Feed:
    """Reads a dataset in the order of (seed, epoch), shared among processes.

    Attributes:
        counter: Pictures that could not be read.
    """

    def __init__(
        self,
        dataset: ViewDataset,
        *,
        batch_size: int,
        device: torch.device,
        workers: int = 0,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        train: bool = True,
        gridmask: float = 0.0,
    ) -> None:
        """Set the order and the loader up.

        Args:
            dataset: Items as ``ViewDataset`` describes them.
            batch_size: Images per process and batch.
            device: Where the batches go.
            workers: Loader processes.
            seed: Seed of the order and the masks.
            rank: This process.
            world: Number of processes.
            train: Whole batches only; otherwise every item once, frames kept together.
            gridmask: Probability of GridMask.

        Raises:
            ValueError: The dataset has less than one batch for every process.
        """
        self.dataset, self.device, self.batch_size, self.world = dataset, device, batch_size, world
        self.counter = CorruptCounter(len(dataset))
        self.mask = GridMask(seed, rank, prob=gridmask) if gridmask else None
        self.sampler = EpochSampler(
            len(dataset),
            seed=seed,
            rank=rank,
            world=world,
            group=1 if train else dataset.views,
            even=train,
        )
        self.loader = batch_loader(
            dataset,
            self.sampler,
            key="run.batch_size",
            batch_size=batch_size,
            train=train,
            device=device,
            num_workers=workers,
            seed=seed,
            collate_fn=collate,
        )

    def __len__(self) -> int:
        """Whole batches of this process in an epoch."""
        return len(self.sampler.order()) // self.batch_size

    def batches(self, epoch: int, done: int = 0, limit: int | None = None) -> Iterator[Batch]:
        """Batches of an epoch.

        Args:
            epoch: Says the order and the augmentation.
            done: Batches of this process to leave out at the start.
            limit: Stop after about so many images of all processes, a random part.
        """
        self.sampler.set_epoch(epoch, done * self.batch_size * self.world)
        self.dataset.set_epoch(epoch)
        seen = 0
        for number, item in enumerate(self.loader, done):
            if limit is not None and seen >= limit:
                return
            self.counter.update(item)
            seen += (len(item["path"]) + len(item["corrupt"])) * self.world
            yield self._batch(item, epoch, number)

    def _batch(self, item: Item, epoch: int, number: int) -> Batch:
        images, labels, index = item["image"], item.get("label"), item["index"].tolist()
        weight = 1.0
        if not index:
            size = self.dataset.size
            images, weight = torch.zeros(1, 3, *size), 0.0
            labels = torch.zeros(1, *size, dtype=torch.int64) if self.dataset.classes else None
        images = images.to(self.device, non_blocking=True)
        if self.mask is not None:
            images = self.mask(images, epoch=epoch, step=number)
        if labels is not None:
            labels = labels.to(self.device, non_blocking=True)
        return Batch(images, labels, index, item["path"], weight)
