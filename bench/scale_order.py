# SPDX-License-Identifier: Apache-2.0
"""Which pictures hundreds of ranks read, without a model: balance, uniqueness and restarts.

The feeds are those of the trainers; only the pictures are left out. See docs/scale.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdfast.data.sampler import EpochSampler
from kdfast.trainer.feed import Batch, Feed


class Positions:
    """A dataset whose items are their own indices."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, places: list[int]) -> list[int]:
        """What the loader asks for, a batch at a time."""
        return places

    def set_epoch(self, epoch: int) -> None:
        """Items are the same in every epoch."""


@dataclass(frozen=True)
class Part:
    """Some steps of an epoch on a number of processes.

    Attributes:
        world: Number of processes.
        steps: Steps that they take; None: to the end of the epoch.
    """

    world: int
    steps: int | None = None


@dataclass(frozen=True)
class Order:
    """What the processes of an epoch read.

    Attributes:
        times: (N,) how often each picture was read.
        ranks: Samples of each rank, by part.
        steps: Steps of the parts.
        uneven: Steps in which one rank had more than one picture more than another.
    """

    times: NDArray[np.uint8]
    ranks: list[list[int]]
    steps: list[int]
    uneven: int

    @property
    def twice(self) -> int:
        """Pictures that were read more than once."""
        return int((self.times > 1).sum())

    @property
    def unread(self) -> int:
        """Pictures that were not read."""
        return int((self.times == 0).sum())


def feed_of(pictures: int, rank: int, world: int, together: int, seed: int) -> Feed[Positions]:
    """The feed of one process, as a training has it, of pictures that are not there."""
    sampler = EpochSampler(pictures, seed=seed, rank=rank, world=world)
    feed = Feed(
        Positions(pictures),
        sampler,
        _batch,
        key="batch",
        batch_size=math.ceil(together / world),
        train=True,
        device=torch.device("cpu"),
        seed=seed,
        collate=_same,
    )
    feed.share_out(together)
    return feed


def _same(items: list[int]) -> list[int]:
    return items


def _batch(item: Any, epoch: int, number: int) -> Batch:
    return Batch(torch.empty(0), None, item, [])


def ordered(
    pictures: int, together: int, parts: Sequence[Part], *, epoch: int = 0, seed: int = 0
) -> Order:
    """Read an epoch by parts, each of which goes on where the one before stopped.

    Args:
        pictures: N.
        together: Pictures of all processes in a step, the same in every part.
        parts: The processes.
        epoch: Which epoch.
        seed: Seed of the run.

    Raises:
        ValueError: A part has more processes than a step has pictures.
    """
    times = np.zeros(pictures, np.uint8)
    ranks: list[list[int]] = []
    steps: list[int] = []
    uneven = 0
    for part in parts:
        sizes = []
        for rank in range(part.world):
            feed = feed_of(pictures, rank, part.world, together, seed)
            batches = _some(feed.batches(epoch, sum(steps)), part.steps)
            read = [batch.index for batch in batches]
            np.add.at(times, np.array([i for batch in read for i in batch], np.int64), 1)
            sizes.append([len(batch) for batch in read])
        ranks.append([sum(row) for row in sizes])
        steps.append(max(map(len, sizes)))
        uneven += sum(max(step) - min(step) > 1 for step in zip(*sizes, strict=True))
    return Order(times, ranks, steps, uneven)


def _some(batches: Iterator[Batch], steps: int | None) -> Iterator[Batch]:
    for number, batch in enumerate(batches):
        if number == steps:
            return
        yield batch


def simulate(
    name: str, pictures: int, together: int, worlds: Sequence[int], *, epoch: int = 1
) -> dict[str, Any]:
    """An epoch without a stop, and one that is stopped and goes on with other processes.

    Args:
        name: What the pictures are.
        pictures: N.
        together: Pictures of all processes in a step.
        worlds: Processes of each part; each but the last takes an equal share of the steps.
        epoch: Which epoch.

    Returns:
        What was found, as JSON types.
    """
    whole = ordered(pictures, together, [Part(worlds[0])], epoch=epoch)
    share = whole.steps[0] // len(worlds)
    parts = [Part(world, share) for world in worlds[:-1]] + [Part(worlds[-1])]
    again = ordered(pictures, together, parts, epoch=epoch)
    return {
        "name": name,
        "pictures": pictures,
        "together": together,
        "worlds": list(worlds),
        "steps": again.steps,
        "fewest": min(whole.ranks[0]),
        "most": max(whole.ranks[0]),
        "twice": max(whole.twice, again.twice),
        "unread": whole.unread,
        "lost": int(((whole.times > 0) & (again.times == 0)).sum()),
        "gained": int(((whole.times == 0) & (again.times > 0)).sum()),
        "uneven": whole.uneven + again.uneven,
    }
