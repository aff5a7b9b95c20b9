# SPDX-License-Identifier: Apache-2.0
"""How hundreds of ranks fill one teacher cache, without a model. See docs/scale.md.

The code is that of a training: batches, shards, their take-over and restarts. Ranks are threads of
this process, and the teacher's logits say which picture they are of.
"""

from __future__ import annotations

import math
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdfast.chain.cache_files import SHARDS, partial_of
from kdfast.chain.teacher_cache import TeacherCache
from kdfast.machine.ranks import Ranks

T = TypeVar("T")
CLASSES = 2
# Where a folder needs no disk, if the system has it: hundreds of shards are hundreds of waits.
MEMORY = Path("/dev/shm")
# Bytes that a kill takes from the end of every shard: a part of its last row.
TORN = 5


class Killed(BaseException):
    """A rank ends here, without a word to the others."""


class Meeting:
    """Where the ranks of a run, threads of one process, exchange what they have.

    Exchanges are kept, so that who only tells need not wait for who only hears.
    """

    def __init__(self, world: int) -> None:
        self.world = world
        self._said: list[dict[int, Any]] = []
        self._heard = [0] * world
        self._changed = threading.Condition()
        self._ended = False

    def exchange(self, rank: int, value: Any, tellers: int) -> list[Any]:
        """What the first ``tellers`` ranks say in this rank's next exchange.

        Raises:
            Killed: Not all of them come any more.
        """
        number = self._heard[rank]
        self._heard[rank] += 1
        with self._changed:
            while len(self._said) <= number:
                self._said.append({})
            said = self._said[number]
            if rank < tellers:
                said[rank] = value
                if len(said) == tellers:
                    self._changed.notify_all()
            self._changed.wait_for(lambda: len(said) == tellers or self._ended)
            if len(said) < tellers:
                raise Killed
        return [said[one] for one in range(tellers)]

    def end(self) -> None:
        """Somebody comes no more, and all that wait for it are killed, as torchrun does."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    """Ranks that are threads; an error of one is not told to the others, but ends them."""

    meeting: Meeting = field(default_factory=lambda: Meeting(1))

    def shared(self, work: Callable[[], T]) -> list[T]:
        """What the work of every rank returned."""
        return self.meeting.exchange(self.rank, work(), self.world)

    def by_main(self, work: Callable[[], T]) -> T:
        """What the work of the first rank returned."""
        found: T = self.meeting.exchange(self.rank, work() if self.main else None, 1)[0]
        return found


class Places:
    """A dataset whose images are their own indices."""

    def __init__(self, length: int) -> None:
        self.images = torch.arange(length, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, places: list[int]) -> list[dict[str, Tensor]]:
        """What the loader asks for, a batch at a time."""
        return [{"image": image} for image in self.images[places].unbind()]


class Teacher:
    """Notes which pictures it saw, and kills its rank before a batch."""

    def __init__(self, last: int | None) -> None:
        self.last = last
        self.seen: list[NDArray[np.int64]] = []

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, ``CLASSES``) of a batch (B,), exact in float32 as two halves of an index."""
        if len(self.seen) == self.last:
            raise Killed
        index = images.long()
        self.seen.append(index.numpy())
        return torch.stack([index >> 16, index & 0xFFFF], 1).float()

    @property
    def places(self) -> NDArray[np.int64]:
        """All pictures that it saw."""
        return np.concatenate([np.empty(0, np.int64), *self.seen])


def built(
    directory: Path, pictures: int, batch: int, world: int, last: int | None
) -> list[Teacher]:
    """Fill a cache with some ranks, as far as they come.

    Args:
        directory: Of the cache.
        pictures: N.
        batch: Pictures a call of a teacher.
        world: Number of ranks.
        last: Batches after which the last rank is killed, and with it all; None: nobody is.

    Returns:
        The teacher of every rank.

    Raises:
        RuntimeError: A rank failed.
    """
    meeting, data = Meeting(world), Places(pictures)
    teachers = [Teacher(last if rank == world - 1 else None) for rank in range(world)]
    errors: list[Exception] = []

    def run(rank: int) -> None:
        try:
            TeacherCache.build(
                teachers[rank],
                data,  # type: ignore[arg-type]
                directory,
                key={"teacher": "none"},
                dtype="float32",
                batch_size=batch,
                device="cpu",
                ranks=ThreadRanks(rank, world, meeting),
            )
        except Killed:
            meeting.end()
        except Exception as error:  # told to the caller, when all have ended
            errors.append(error)
            meeting.end()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise RuntimeError(f"a rank of {world} failed: {errors[0]}") from errors[0]
    return teachers


def tear(directory: Path) -> list[str]:
    """Takes the end of every shard's last row away, as a kill in the middle of a write does.

    Returns:
        The names of the shards.
    """
    shards = sorted(partial_of(directory).glob(SHARDS))
    for path in shards:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - TORN)
    return [path.name for path in shards]


def simulate_cache(name: str, pictures: int, batch: int, worlds: Sequence[int]) -> dict[str, Any]:
    """A cache that is filled without a stop, and one whose ranks are killed and become others.

    Args:
        name: What the pictures are.
        pictures: N.
        batch: Pictures a call of the teacher.
        worlds: Ranks of each part; each but the last is killed after an equal share of batches.

    Returns:
        What was found, as JSON types.

    Raises:
        ValueError: A rank would be killed before its first batch.
    """
    share = math.ceil(pictures / batch) // len(worlds)
    if max(worlds) > share:
        raise ValueError(
            f"worlds: each of a part's ranks must have one of its {share} batches, got {worlds}"
        )
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        whole, parts = Path(folder, "whole"), Path(folder, "parts")
        once = built(whole, pictures, batch, worlds[0], None)
        teachers: list[Teacher] = []
        names = []
        for world in worlds[:-1]:
            teachers += built(parts, pictures, batch, world, share // world)
            names.append(tear(parts))
        teachers += built(parts, pictures, batch, worlds[-1], None)
        times, again = (_times(group, pictures) for group in (once, teachers))
        batches = [len(teacher.seen) for teacher in once]
        return {
            "name": name,
            "pictures": pictures,
            "batch": batch,
            "worlds": list(worlds),
            "fewest": min(batches),
            "most": max(batches),
            "twice": int((times > 1).sum()),
            "missing": int((times == 0).sum()) + int((again == 0).sum()),
            "shards": [len(group) for group in names],
            "misnamed": sum(
                group != [SHARDS.replace("*", f"{rank:05d}") for rank in range(1, world)]
                for group, world in zip(names, worlds, strict=False)
            ),
            "again": int(again.sum()) - pictures,
            "wrong": _wrong(whole, pictures) + _wrong(parts, pictures),
            "different": _different(whole, parts),
        }


def _times(teachers: Sequence[Teacher], pictures: int) -> NDArray[np.int64]:
    """(N,) how often a teacher saw each picture."""
    return np.bincount(np.concatenate([x.places for x in teachers]), minlength=pictures)


def _wrong(directory: Path, pictures: int) -> int:
    """Rows of a finished cache that are of another picture than their place says."""
    cache, wrong = TeacherCache(directory), 0
    for start in range(0, pictures, 1 << 16):
        index = torch.arange(start, min(start + (1 << 16), pictures))
        halves = cache.logits(index, 0).long()
        wrong += int(((halves[:, 0] << 16) + halves[:, 1] != index).sum())
    return wrong


def _different(one: Path, other: Path) -> int:
    """Files that are not the same, or in one of the folders only."""
    first, second = ({p.name: p.read_bytes() for p in d.iterdir()} for d in (one, other))
    return sum(first.get(name) != second.get(name) for name in first.keys() | second.keys())
