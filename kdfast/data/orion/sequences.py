# SPDX-License-Identifier: Apache-2.0
"""Order of frames for heads with a memory: every slot of a batch walks through clips."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from kdfast.data.orion.infos import Infos
from kdfast.data.rng import ORDER, generator
from kdfast.data.sampler import EpochSampler


class SequenceSampler(EpochSampler):
    """Indices for batches in which slot i of a batch follows slot i of the batch before.

    Clips are cut into sequences; their order is drawn from (seed, epoch), and a slot whose sequence
    ends takes the next one. Every epoch has frames / slots batches: where the sequences run out
    before, some of its first come again. All ranks draw the same order and take their own slots.
    """

    def __init__(
        self,
        infos: Infos,
        batch: int,
        *,
        length: int = 80,
        stride: int = 1,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        shuffle: bool = True,
    ) -> None:
        """Set the order up.

        Args:
            infos: Infos of the split.
            batch: Slots of this rank.
            length: Frames of a sequence; 0 is whole clips.
            stride: Every how many frames of a clip one is taken.
            seed: Seed of the run.
            rank: This process.
            world: Number of processes.
            shuffle: Draw the order of the sequences; otherwise clips come one after another.

        Raises:
            ValueError: An argument is out of range, or there are fewer sequences than slots.
        """
        if batch < 1 or length < 0 or stride < 1:
            raise ValueError(
                f"SequenceSampler: batch and stride must be positive and length 0 or more, got "
                f"{batch}, {stride} and {length}"
            )
        self.batch = batch
        self.sequences: list[range] = []
        for clip in range(len(infos.clips)):
            first, last = infos.span(clip)
            taken = range(first, last, stride)
            step = length or len(taken)
            self.sequences += [taken[at : at + step] for at in range(0, len(taken), step)]
        slots = batch * world
        if len(self.sequences) < slots:
            raise ValueError(
                f"SequenceSampler: {slots} slots need as many sequences, got "
                f"{len(self.sequences)}; take a smaller batch or shorter sequences"
            )
        self.steps = sum(map(len, self.sequences)) // slots
        super().__init__(
            self.steps * slots, seed=seed, rank=rank, world=world, shuffle=shuffle, even=True
        )

    def deal(self, together: int) -> None:
        """Check a step: slots walk through their clips one frame a batch, however many it has.

        Raises:
            ValueError: It is no whole number of batches of all ranks.
        """
        slots = self.batch * self.world
        if together % slots:
            raise ValueError(
                f"SequenceSampler: slots belong to their processes, so a step of {together} frames "
                f"must be a multiple of {slots}; go on with as many processes as before"
            )

    def order(self) -> NDArray[np.int64]:
        """Indices of this rank in the whole epoch, batch after batch."""
        mine = slice(self.rank * self.batch, (self.rank + 1) * self.batch)
        walks = np.stack(list(islice(self._walk(), self.steps)))
        return walks[:, mine].reshape(-1)

    def _walk(self) -> Iterator[NDArray[np.int64]]:
        order = np.arange(len(self.sequences))
        if self.shuffle:
            order = generator(ORDER, self.seed, self.epoch).permutation(len(order))
        taken = 0
        slots: list[Iterator[int]] = [iter(()) for _ in range(self.batch * self.world)]
        while True:
            frames = []
            for slot, walk in enumerate(slots):
                frame = next(walk, None)
                if frame is None:
                    slots[slot] = iter(self.sequences[order[taken % len(order)]])
                    taken += 1
                    frame = next(slots[slot])
                frames.append(frame)
            yield np.array(frames, np.int64)

    def __len__(self) -> int:
        """Indices that are left for this rank."""
        return max(0, self.length // self.world - self.start // self.world)
