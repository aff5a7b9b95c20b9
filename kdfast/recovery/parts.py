# SPDX-License-Identifier: Apache-2.0
"""Builds the data and the pruned student that a config names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from kdfast.configs.recovery import Config
from kdfast.data import build
from kdfast.data.views.base import Corrupt, Item, ViewDataset
from kdfast.models.eva import EVAViT
from kdfast.pruning import HeadScores, head_scores, prune_heads, select_heads
from kdfast.trainer.feed import Feed


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
        calibration: The same images as they are, for head scores.
        held_out: Images for evaluation.
    """

    train: Feed
    calibration: Feed
    held_out: Feed

    def fingerprint(self) -> str:
        """Hash of the first training item and the number of items: other data, other hash."""
        dataset = self.calibration.dataset
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
    size = config.run.batch_size
    return Data(
        Feed(train, batch_size=size, gridmask=data.gridmask, **common, **shared),
        # Every process scores the same images.
        Feed(plain, batch_size=config.prune.batch_size, train=False, **common),
        Feed(dataset("val", False), batch_size=size, train=False, **common, **shared),
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
        val_fraction=data.val_fraction if data.kind == "images" else None,
        split_file=data.split_file if data.kind == "bench2drive" else None,
        frames=(data.frames if split == "train" else data.val_frames) if scenes else None,
    )


def score_heads(
    config: Config, accelerator: Accelerator, teacher: EVAViT, head: nn.Module | None, data: Data
) -> HeadScores:
    """Importance of the teacher's heads on training images.

    With a head the loss of "taylor" and "gradient" is the cross-entropy of the labels, without one
    a random projection of the features.
    """
    method = config.prune.method

    def task(output: Tensor, batch: Item) -> Tensor:
        if head is None:
            raise ValueError("score_heads: the task loss needs a head, got none")
        return F.cross_entropy(head(output).float(), batch["label"])

    def batches() -> Iterator[Item]:
        for batch in data.calibration.batches(0):
            if batch.weight:
                yield {"image": batch.images, "label": batch.labels}

    if method == "magnitude":
        return head_scores(teacher, method)
    graded = head is not None and method in ("taylor", "gradient")
    # Gradients of a mean over pixels are below what fp16 can hold, and no loss scale helps here.
    half = accelerator.mixed_precision == "fp16"
    with nullcontext() if half else accelerator.autocast():
        return head_scores(
            teacher,
            method,
            batches(),
            loss=task if graded else None,
            batches=config.prune.batches,
            seed=config.seed,
            progress=accelerator.is_main_process,
        )


def choose_heads(config: Config, scores: HeadScores) -> list[list[int]]:
    """Kept heads of every block, the same on all processes."""
    chosen = [select_heads(scores, config.prune.keep, config.prune.scope)]
    broadcast_object_list(chosen)
    return chosen[0]


def build_student(config: Config, teacher: EVAViT, heads: list[list[int]]) -> EVAViT:
    """The pruned copy of the teacher, ready to train."""
    student = prune_heads(teacher, heads)
    student.with_cp = config.run.checkpointing
    return student.requires_grad_(True)
