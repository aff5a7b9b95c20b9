# SPDX-License-Identifier: Apache-2.0
"""The processes of one run, as torchrun starts them: shared results, and errors that all get."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class PeerError(RuntimeError):
    """Another process of the run failed; the message names it and repeats what it said."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run.

    Every process calls the same methods in the same order. Where the work of one raises an
    ``Exception``, that one raises it, and all others ``PeerError``: none waits for ever.

    Attributes:
        rank: Number of this process.
        world: How many there are.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def here(cls) -> Ranks:
        """Those of ``torch.distributed`` where it is initialised, else this process alone."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def main(self) -> bool:
        """Whether this is the first process."""
        return self.rank == 0

    def shared(self, work: Callable[[], T]) -> list[T]:
        """What the work of every process returned, by rank.

        Args:
            work: This process's part; its result is pickled.

        Raises:
            PeerError: The work of another process failed.
        """
        if self.world == 1:
            return [work()]
        answer, error = _tried(work)
        answers: list[Any] = [None] * self.world
        dist.all_gather_object(answers, answer)
        if error is not None:
            raise error
        for rank, (_, words) in enumerate(answers):
            self._raise(rank, words)
        return [value for value, _ in answers]

    def by_main(self, work: Callable[[], T]) -> T:
        """What the work of the first process returned; the others do not run it.

        Raises:
            PeerError: The work failed, and this is another process.
        """
        if self.world == 1:
            return work()
        answer, error = _tried(work) if self.main else (None, None)
        answers: list[Any] = [answer]
        dist.broadcast_object_list(answers, 0)
        if error is not None:
            raise error
        value, words = answers[0]
        self._raise(0, words)
        found: T = value
        return found

    def _raise(self, rank: int, words: str | None) -> None:
        if words is not None:
            raise PeerError(f"process {rank} of {self.world} failed: {words}")


def _tried(work: Callable[[], T]) -> tuple[tuple[T | None, str | None], Exception | None]:
    """The result and the words of an error, one of them None, and the error."""
    try:
        return (work(), None), None
    except Exception as error:  # raised again once the others know
        return (None, f"{type(error).__name__}: {error} (on {socket.gethostname()})"), error
