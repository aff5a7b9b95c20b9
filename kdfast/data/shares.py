# SPDX-License-Identifier: Apache-2.0
"""How the images of an optimiser step are dealt out to processes and to their forwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice

from torch.utils.data import Sampler

# Numbers of processes that a message names at most.
NAMED = 12


@dataclass(frozen=True)
class Shares:
    """The images of a step, in any number of processes.

    Where they cannot be dealt out evenly, the first processes get one image more.

    Attributes:
        together: Images of a step, in all processes.
        most: Images of a forward at most.
        world: Number of processes.
    """

    together: int
    most: int
    world: int

    def __post_init__(self) -> None:
        if min(self.together, self.most, self.world) < 1:
            raise ValueError(f"Shares: numbers must be positive, got {self}")
        if not self._fits(self.world):
            fitting = [n for n in range(1, self.together + 1) if self._fits(n)]
            named = ", ".join(map(str, fitting[:NAMED])) + (", ..." if fitting[NAMED:] else "")
            raise ValueError(
                f"processes: a step of {self.together} images in batches of {self.most} or less "
                f"must give every process one, got {self.world} processes; these numbers fit: "
                f"{named}"
            )

    def _fits(self, world: int) -> bool:
        return self.together // world >= self._forwards(world)

    def _forwards(self, world: int) -> int:
        return -(-self.together // (world * self.most))

    @property
    def forwards(self) -> int:
        """Forwards of a step, the same in every process."""
        return self._forwards(self.world)

    def sizes(self, rank: int) -> tuple[int, ...]:
        """Images of each forward of a step in a process, in their order."""
        mine, count = _part(self.together, self.world, rank), self.forwards
        return tuple(_part(mine, count, number) for number in range(count))

    def weights(self, rank: int) -> tuple[float, ...]:
        """What the mean loss of each forward counts in a process, whose gradients are averaged
        over the processes: the sum is the mean over all images of the step."""
        return tuple(size * self.world / self.together for size in self.sizes(rank))


def _part(whole: int, parts: int, number: int) -> int:
    """Size of a part of a whole, the first ones being larger by one where it must be."""
    return (whole - number + parts - 1) // parts


class Batches(Sampler[list[int]]):
    """Indices in batches of sizes that come in turn."""

    def __init__(self, indices: Iterable[int], sizes: tuple[int, ...], *, whole: bool) -> None:
        """Set up.

        Args:
            indices: Of one epoch; asked for anew in every epoch.
            sizes: Of the batches.
            whole: Leave out a last batch that is not full.
        """
        self.indices, self.sizes, self.whole = indices, sizes, whole

    def __iter__(self) -> Iterator[list[int]]:
        """The batches of an epoch."""
        left = iter(self.indices)
        for size in cycle(self.sizes):
            batch = list(islice(left, size))
            if not batch or (self.whole and len(batch) < size):
                return
            yield batch
