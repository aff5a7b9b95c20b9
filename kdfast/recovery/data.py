# SPDX-License-Identifier: Apache-2.0
"""The images of a pruning run: datasets that a config names, and feeds of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from kdfast.configs.recovery import Config
from kdfast.data import build
from kdfast.data.corrupt import Corrupt, CorruptCounter
from kdfast.data.dealt import DealtSampler
from kdfast.data.sampler import EpochSampler
from kdfast.data.views.base import Item, ViewDataset, collate
from kdfast.data.views.gridmask import GridMask
from kdfast.trainer.feed import Batch, Feed

Views = Feed[ViewDataset]


class Remembered(ViewDataset):
    """A dataset without augmentation that keeps every item it has made."""

    def __init__(self, source: ViewDataset) -> None:
        """Wrap ``source``, whose items must not change from epoch to epoch."""
        super().__init__(split=source.split, size=source.size, augment=False, seed=source.seed)
        self.views, self.classes, self.source = source.views, source.classes, source
        self._items: dict[int, Item | Corrupt] = {}

    def __len__(self) -> int:
        """Number of items of the source."""
        return len(self.source)

    def load(self, index: int) -> Item | Corrupt:
        """The item, made at most once."""
        if index not in self._items:
            self._items[index] = self.source.load(index)
        return self._items[index]


@dataclass(frozen=True)
class Data:
    """Feeds of a run.

    Attributes:
        train: Training images, augmented and masked.
        scoring: The same images as they are, for head scores.
        calibration: The same, views of a frame apart, for the compensation.
        held_out: Images for evaluation.

    All are shared among the processes; but for ``train`` the batches of all processes together are
    those of one.
    """

    train: Views
    scoring: Views
    calibration: Views
    held_out: Views

    def fingerprint(self) -> str:
        """Hash of the first training item and the number of items: other data, other hash."""
        dataset = self.scoring.dataset
        item = dataset[0]
        digest = hashlib.sha256(f"{len(dataset)} {dataset.classes}".encode())
        if not isinstance(item, Corrupt):
            for name in ("image", "label"):
                digest.update(item[name].numpy().tobytes() if name in item else b"")
        return digest.hexdigest()


def build_data(config: Config, accelerator: Accelerator) -> Data:
    """Datasets and feeds of the config.

    Raises:
        FileNotFoundError: A folder or file is missing; the message says what belongs there.
        ValueError: A split is empty or too small.
    """
    data = config.data

    def dataset(split: str, augment: bool) -> ViewDataset:
        made = _dataset(config, split, augment)
        return Remembered(made) if data.cache else made

    train = dataset("train", data.augment)
    plain = dataset("train", False) if data.augment else train
    common: dict[str, Any] = {
        "device": accelerator.device,
        "workers": data.workers,
        "seed": config.seed,
    }
    shared = {"rank": accelerator.process_index, "world": accelerator.num_processes}
    size, few = config.run.batch_size, config.prune.batch_size
    return Data(
        view_feed(train, batch_size=size, gridmask=data.gridmask, **common, **shared),
        view_feed(plain, batch_size=few, train=False, **common, **shared),
        view_feed(plain, batch_size=few, train=False, whole_frames=False, **common, **shared),
        view_feed(dataset("val", False), batch_size=size, train=False, **common, **shared),
    )


def _dataset(config: Config, split: str, augment: bool) -> ViewDataset:
    data = config.data
    scenes = data.kind == "scenes"
    return build(
        kind=data.kind,
        root=None if scenes else data.root,
        split=split,
        size=data.size,
        augment=augment,
        seed=config.seed,
        photometric=data.photometric and augment and not scenes,
        val_fraction=None if data.kind in ("scenes", "bench2drive") else data.val_fraction,
        image_key=data.image_key,
        split_file=data.split_file if data.kind == "bench2drive" else None,
        frames=(data.frames if split == "train" else data.val_frames) if scenes else None,
    )


def view_feed(
    dataset: ViewDataset,
    *,
    batch_size: int,
    device: torch.device,
    workers: int = 0,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    train: bool = True,
    whole_frames: bool = True,
    gridmask: float = 0.0,
) -> Views:
    """Feed of camera views; unreadable pictures are left out and counted.

    Args:
        dataset: Items as ``ViewDataset`` describes them.
        batch_size: Images per process and batch.
        device: Where the batches go.
        workers: Loader processes.
        seed: Seed of the order and the masks.
        rank: This process.
        world: Number of processes.
        train: Whole batches only; otherwise every item once, in batches that are the same for any
            number of processes.
        whole_frames: Keep the views of a frame together where it is not for training.
        gridmask: Probability of GridMask.

    Raises:
        ValueError: The dataset has less than one batch for every process.
    """
    counter = CorruptCounter(len(dataset))
    mask = GridMask(seed, rank, prob=gridmask) if gridmask else None

    def to_batch(item: Item, epoch: int, number: int) -> Batch:
        counter.update(item)
        images, labels, index = item["image"], item.get("label"), item["index"].tolist()
        weight = 1.0
        if not index:
            size = dataset.size
            images, weight = torch.zeros(1, 3, *size), 0.0
            labels = torch.zeros(1, *size, dtype=torch.int64) if dataset.classes else None
        images = images.to(device, non_blocking=True)
        if mask is not None:
            images = mask(images, epoch=epoch, step=number)
        if labels is not None:
            labels = labels.to(device, non_blocking=True)
        return Batch(images, labels, index, item["path"], weight)

    place: dict[str, Any] = {"seed": seed, "rank": rank, "world": world}
    sampler = EpochSampler(len(dataset), **place)
    if not train:
        group = dataset.views if whole_frames else 1
        sampler = DealtSampler(len(dataset), batch_size, group=group, shuffle=True, **place)
    return Feed(
        dataset,
        sampler,
        to_batch,
        key="run.batch_size",
        batch_size=batch_size,
        train=train,
        device=device,
        workers=workers,
        seed=seed,
        counter=counter,
        collate=collate,
    )


def some_views(
    dataset: ViewDataset, count: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Readable images of a dataset, spread over frames and cameras, and their labels.

    Args:
        dataset: Has one readable image at least.
        count: How many, if there are so many.
        device: Where the images go.
    """
    step = max(1, len(dataset) // count + 1)
    spread = [*range(0, len(dataset), step), *range(len(dataset))]
    items: list[Item] = []
    for index in dict.fromkeys(spread):
        item = dataset[index]
        if not isinstance(item, Corrupt):
            items.append(item)
        if len(items) == count:
            break
    labels = None
    if "label" in items[0]:
        labels = torch.stack([item["label"] for item in items])
    return torch.stack([item["image"] for item in items]).to(device), labels
