# SPDX-License-Identifier: Apache-2.0
"""Order of frames that are looked at once: whole clips for each rank, as heads have a memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from kdfast.data.orion.infos import Infos
from kdfast.data.sampler import EpochSampler


class ClipSampler(EpochSampler):
    """Indices of whole clips, one after another; every frame is one rank's.

    A clip goes to the rank that has the fewest frames of the clips before it, so the first clips
    are shared evenly too. A rank may have none.

    Attributes:
        clips: Frames of every clip, by index.
        places: Number of every frame among those of all ranks, by its index.
    """

    def __init__(self, infos: Infos, *, stride: int = 1, rank: int = 0, world: int = 1) -> None:
        """Set the order up.

        Args:
            infos: Infos of the split.
            stride: Every how many frames of a clip one is taken.
            rank: This process.
            world: Number of processes.

        Raises:
            ValueError: An argument is out of range.
        """
        if stride < 1:
            raise ValueError(f"ClipSampler: stride must be positive, got {stride}")
        self.clips = [range(*infos.span(clip), stride) for clip in range(len(infos.clips))]
        taken = [frame for clip in self.clips for frame in clip]
        self.places = {frame: place for place, frame in enumerate(taken)}
        super().__init__(len(taken), rank=rank, world=world, shuffle=False, even=False)
        self._mine: list[int] = []
        frames = [0] * world
        for clip in self.clips:
            of = frames.index(min(frames))
            frames[of] += len(clip)
            if of == rank:
                self._mine += clip

    def order(self) -> NDArray[np.int64]:
        """Indices of this rank."""
        return np.array(self._mine, np.int64)

    def __iter__(self) -> Iterator[int]:
        """Indices of this rank.

        Raises:
            ValueError: Reading was to start anywhere else than at the beginning.
        """
        if self.start:
            raise ValueError(f"ClipSampler: an epoch must be read from 0 on, got {self.start}")
        return iter(self._mine)

    def __len__(self) -> int:
        """Indices of this rank."""
        return len(self._mine)
