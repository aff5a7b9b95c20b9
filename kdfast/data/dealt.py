# SPDX-License-Identifier: Apache-2.0
"""Order of a set that is looked at once: its batches are the same for any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from kdfast.data.sampler import EpochSampler


class DealtSampler(EpochSampler):
    """Indices of one rank, to be read in batches of a size that is known here.

    One order of all items is cut into batches, and these are dealt out to the ranks in turn: rank r
    of w has the batches r, r + w, and so on, which may be none. An epoch has no position.
    """

    def __init__(
        self,
        length: int,
        batch: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        group: int = 1,
        shuffle: bool = False,
    ) -> None:
        """Set the order up.

        Args:
            length: Items in the dataset.
            batch: Items of a batch.
            seed: Seed of the run.
            rank: This process.
            world: Number of processes.
            group: Consecutive items that stay together (a dataset's ``views``).
            shuffle: Permute the groups; otherwise they come in order.

        Raises:
            ValueError: An argument is out of range, or ``length`` is no multiple of ``group``.
        """
        if batch < 1:
            raise ValueError(f"DealtSampler: batch must be positive, got {batch}")
        self.batch = batch
        options = {"seed": seed, "group": group, "shuffle": shuffle, "even": False}
        self._whole = EpochSampler(length, **options)  # type: ignore[arg-type]
        super().__init__(length, rank=rank, world=world, **options)  # type: ignore[arg-type]

    def order(self) -> NDArray[np.int64]:
        """Indices of this rank in the whole epoch."""
        self._whole.set_epoch(self.epoch)
        number = np.arange(self.length) // self.batch
        return self._whole.order()[number % self.world == self.rank]

    def __iter__(self) -> Iterator[int]:
        """Indices of this rank.

        Raises:
            ValueError: Reading was to start anywhere else than at the beginning.
        """
        if self.start:
            raise ValueError(f"DealtSampler: an epoch must be read from 0 on, got {self.start}")
        return iter(self.order().tolist())

    def __len__(self) -> int:
        """Indices of this rank."""
        return len(self.order())
