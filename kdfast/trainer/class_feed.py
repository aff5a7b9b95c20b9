# SPDX-License-Identifier: Apache-2.0
"""Batches of a classification set for one process, from any position of any epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdfast.data.corrupt import CorruptCounter
from kdfast.data.dealt import DealtSampler
from kdfast.data.labelled import LabelledImages, worker_init
from kdfast.data.rng import ORDER, generator
from kdfast.data.sampler import EpochSampler
from kdfast.trainer.feed import Batch, Feed


class _Chosen(EpochSampler):
    """Goes through some of a dataset's items."""

    def __init__(self, chosen: Sequence[int], **options: Any) -> None:
        self.chosen = np.asarray(chosen, np.int64)
        super().__init__(len(chosen), **options)

    def __iter__(self) -> Iterator[int]:
        return iter(self.chosen[self.order()[self.done :]].tolist())


def class_feed(
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
) -> Feed[LabelledImages]:
    """Feed of pictures with targets: labels are (B,) int64, or (B, C) ones and zeros.

    Args:
        dataset: Items as ``LabelledImages`` describes them; where a picture cannot
            be read, another one stands in, and it is counted.
        batch_size: Images per process and batch.
        device: Where the batches go.
        workers: Loader processes.
        seed: Seed of the order.
        rank: This process.
        world: Number of processes.
        train: Shuffled, whole batches only; otherwise every item once, in order, in batches that
            are the same for any number of processes.
        chosen: Indices to train on; None: all.

    Raises:
        ValueError: There is less than one batch for every process, or indices are chosen where it
            is not for training.
    """
    shared: dict[str, Any] = {"seed": seed, "rank": rank, "world": world}
    sampler: EpochSampler
    if train:
        sampler = _Chosen(range(len(dataset)) if chosen is None else chosen, **shared)
    elif chosen is None:
        sampler = DealtSampler(len(dataset), batch_size, **shared)
    else:
        raise ValueError("chosen: must be None where it is not for training")

    counter = CorruptCounter(len(dataset) if chosen is None else len(chosen))

    def to_batch(item: dict[str, Any], epoch: int, number: int) -> Batch:
        index: list[int] = item["index"].tolist()
        # Datasets whose pictures are always there need not say so.
        bad = [pair for pair in zip(*item.get("corrupt", ()), strict=True) if pair[0]]
        counter.add(len(index) - len(bad), bad)
        return Batch(
            images=item["image"].to(device, non_blocking=True),
            labels=item["target"].to(device, non_blocking=True),
            index=index,
            path=[f"item {i}" for i in index],
            variant=int(item["variant"][0]),
        )

    return Feed(
        dataset,
        sampler,
        to_batch,
        key="batch",
        batch_size=batch_size,
        train=train,
        device=device,
        workers=workers,
        seed=seed,
        counter=counter,
        worker_init=worker_init,
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
