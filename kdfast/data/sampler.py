# SPDX-License-Identifier: Apache-2.0
"""Order of an epoch: shuffled by (seed, epoch), resumable, shared among ranks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from kdfast.data.rng import ORDER, generator


class EpochSampler(Sampler[int]):
    """Indices of one epoch for one rank, from a sample position on.

    All ranks permute the same groups and take them in turn, so the first ``p`` samples of an
    epoch are the same set for every number of ranks as long as ``p`` is a multiple of
    ``group * world``; after ``deal`` as long as it is a multiple of a step.

    Attributes:
        together: Samples of a step of all ranks; None: there are no steps.
    """

    def __init__(
        self,
        length: int,
        *,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        group: int = 1,
        shuffle: bool = True,
        even: bool = True,
    ) -> None:
        """Set the order up.

        Args:
            length: Items in the dataset.
            seed: Seed of the run.
            epoch: First epoch.
            start: Samples of this epoch that all ranks together have already consumed.
            rank: This process.
            world: Number of processes.
            group: Consecutive items that stay together (a dataset's ``views``).
            shuffle: Permute the groups; otherwise they come in order.
            even: Give every rank the same number of samples by leaving out the last groups of
                the epoch's order; False visits every item once and ranks may differ by a group.

        Raises:
            ValueError: An argument is out of range, ``length`` is no multiple of ``group``, or
                ``start`` is no multiple of ``world``.
        """
        if length < 1 or group < 1 or length % group:
            raise ValueError(
                f"EpochSampler: length must be a positive multiple of group, "
                f"got length {length}, group {group}"
            )
        if world < 1 or not 0 <= rank < world:
            raise ValueError(f"EpochSampler: need 0 <= rank < world, got rank {rank} of {world}")
        if even and length // group < world:
            raise ValueError(
                f"EpochSampler: {world} ranks need {world} groups or more, got {length // group}"
            )
        self.length, self.seed, self.shuffle, self.even = length, seed, shuffle, even
        self.rank, self.world, self.group = rank, world, group
        self.together: int | None = None
        self.set_epoch(epoch, start)

    def deal(self, together: int) -> None:
        """Deal out one step after another from now on, and only whole ones.

        A step has the same samples for every number of ranks, of which the first ones get one
        more where they must. Where all get as many, a rank's samples are those it had before.

        Args:
            together: Samples of a step of all ranks.

        Raises:
            ValueError: Ranks would be without, an epoch has no step, or groups stay together.
        """
        if not self.even or self.group != 1 or not self.world <= together <= self.length:
            raise ValueError(
                f"EpochSampler: steps must have {self.world} to {self.length} samples, of even "
                f"ranks without groups, got {together}"
            )
        self.together = together
        self.set_epoch(self.epoch)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Go to sample ``start`` (counted over all ranks) of an epoch."""
        if epoch < 0:
            raise ValueError(f"EpochSampler: epoch must be >= 0, got {epoch}")
        unit = self.together or self.world
        if not 0 <= start <= self.length or start % unit:
            what = "a step" if self.together else "world"
            raise ValueError(
                f"EpochSampler: start must be a multiple of {what} {unit} in "
                f"[0, {self.length}], got {start}"
            )
        self.epoch, self.start = epoch, start

    @property
    def done(self) -> int:
        """Samples of this rank before ``start``."""
        if self.together is None:
            return self.start // self.world
        return self.start // self.together * len(range(self.rank, self.together, self.world))

    def order(self) -> NDArray[np.int64]:
        """Indices of this rank in the whole epoch, ``start`` not yet applied."""
        groups = self.length // self.group
        if self.shuffle:
            order = generator(ORDER, self.seed, self.epoch).permutation(groups)
        else:
            order = np.arange(groups)
        if self.together is not None:
            steps = order[: groups // self.together * self.together].reshape(-1, self.together)
            return steps[:, self.rank :: self.world].reshape(-1).astype(np.int64)
        if self.even:
            order = order[: groups // self.world * self.world]
        mine = order[self.rank :: self.world].astype(np.int64)
        return (mine[:, None] * self.group + np.arange(self.group)).reshape(-1)

    def __iter__(self) -> Iterator[int]:
        """Indices from ``start`` to the end of the epoch."""
        return iter(self.order()[self.done :].tolist())

    def __len__(self) -> int:
        """Indices that are left for this rank."""
        groups = self.length // self.group
        if self.together is not None:
            share = len(range(self.rank, self.together, self.world))
            return max(0, groups // self.together * share - self.done)
        if self.even:
            mine = groups // self.world
        else:
            mine = (groups - self.rank + self.world - 1) // self.world
        return max(0, mine * self.group - self.start // self.world)
