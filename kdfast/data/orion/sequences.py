# SPDX-License-Identifier: Apache-2.0
"""Order of frames for heads with a memory: every slot of a batch walks through clips."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from kdfast.data.orion.infos import Infos
from kdfast.data.rng import ORDER, generator


class SequenceSampler(Sampler[list[int]]):
    """Batches of frames in which slot i of a batch follows slot i of the batch before.

    Clips are cut into sequences of ``length`` frames; their order is drawn from (seed, epoch), and
    a slot whose sequence ends takes the next. The epoch ends when none is left for a slot, so less
    than one sequence a slot is left out. All ranks draw the same order and take their own slots.
    """

    def __init__(
        self,
        infos: Infos,
        batch: int,
        *,
        length: int = 80,
        stride: int = 1,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
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
            epoch: First epoch.
            start: Batches of this epoch that are done.
            rank: This process.
            world: Number of processes.
            shuffle: Draw the order of the sequences; otherwise clips come one after another.

        Raises:
            ValueError: An argument is out of range, or there are fewer sequences than slots.
        """
        if batch < 1 or length < 0 or stride < 1 or epoch < 0 or start < 0:
            raise ValueError(
                f"SequenceSampler: batch and stride must be positive, length, epoch and start 0 or "
                f"more, got {batch}, {stride}, {length}, {epoch}, {start}"
            )
        if world < 1 or not 0 <= rank < world:
            raise ValueError(f"SequenceSampler: need 0 <= rank < world, got rank {rank} of {world}")
        self.batch, self.rank, self.world = batch, rank, world
        self.seed, self.shuffle, self.epoch, self.start = seed, shuffle, epoch, start
        self.sequences: list[range] = []
        for clip in range(len(infos.clips)):
            first, last = infos.span(clip)
            taken = range(first, last, stride)
            step = length or len(taken)
            self.sequences += [taken[at : at + step] for at in range(0, len(taken), step)]
        if len(self.sequences) < batch * world:
            raise ValueError(
                f"SequenceSampler: {batch * world} slots need as many sequences, got "
                f"{len(self.sequences)}; take a smaller batch or shorter sequences"
            )

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Go to batch ``start`` of an epoch."""
        self.epoch, self.start = epoch, start

    def _batches(self) -> Iterator[list[int]]:
        order = np.arange(len(self.sequences))
        if self.shuffle:
            order = generator(ORDER, self.seed, self.epoch).permutation(len(order))
        queue = iter(order.tolist())
        slots: list[Iterator[int]] = [iter(()) for _ in range(self.batch * self.world)]
        while True:
            frames = []
            for slot, walk in enumerate(slots):
                frame = next(walk, None)
                if frame is None:
                    following = next(queue, None)
                    if following is None:
                        return
                    slots[slot] = iter(self.sequences[following])
                    frame = next(slots[slot])
                frames.append(frame)
            yield frames[self.rank * self.batch : (self.rank + 1) * self.batch]

    def __iter__(self) -> Iterator[list[int]]:
        """Batches from ``start`` to the end of the epoch."""
        for at, frames in enumerate(self._batches()):
            if at >= self.start:
                yield frames

    def __len__(self) -> int:
        """Batches that are left of the epoch."""
        return max(0, sum(1 for _ in self._batches()) - self.start)
