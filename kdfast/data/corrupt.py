# SPDX-License-Identifier: Apache-2.0
"""Pictures that cannot be read: named, counted, and too many of them stop a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdfast.data.files import CorruptDataError

LOG = logging.getLogger("kdfast.data")


class Unreadable(RuntimeError):
    """The bytes of one picture are not what the index of its shard says."""


@dataclass(frozen=True)
class Corrupt:
    """Stands for an item whose picture could not be read.

    Attributes:
        index: Index of the item in its dataset.
        path: The file.
        reason: Why it could not be read.
    """

    index: int
    path: str
    reason: str


class CorruptCounter:
    """Counts unreadable pictures of a run and stops it when there are too many.

    The run stops when more than one file is bad and the bad reads exceed ``limit`` of the reads,
    where a run counts as at least ``min(files, 1000)`` reads: one bad file among few is only
    reported, and bad luck in the first batches of a large set does not stop it.

    Attributes:
        seen: Items read, good or bad.
        bad: Items that could not be read.
        paths: Files that could not be read, with the reason.
    """

    FLOOR = 1000

    def __init__(self, files: int, *, limit: float = 0.01, quiet: bool = False) -> None:
        """Start at zero.

        Args:
            files: Items of the dataset.
            limit: The part that may be bad.
            quiet: Leave the log to another counter, which reads the same items later.
        """
        if files < 1:
            raise ValueError(f"files: must be positive, got {files}")
        if not 0 <= limit < 1:
            raise ValueError(f"limit: must be in [0, 1), got {limit}")
        self.files = files
        self.limit, self.quiet = limit, quiet
        self.seen = 0
        self.bad = 0
        self.paths: dict[str, str] = {}

    def update(self, batch: Mapping[str, Any]) -> None:
        """Count one batch.

        Args:
            batch: ``path``, one of every item that could be read, and ``corrupt``, the others.

        Raises:
            CorruptDataError: Too many items were bad.
        """
        self.add(len(batch["path"]), [(item.path, item.reason) for item in batch["corrupt"]])

    def add(self, good: int, bad: Sequence[tuple[str, str]]) -> None:
        """Count items; log every bad file once.

        Args:
            good: How many could be read.
            bad: Path and reason of the others.

        Raises:
            CorruptDataError: Too many items were bad.
        """
        self.seen += good + len(bad)
        self.bad += len(bad)
        for path, reason in bad:
            if path not in self.paths:
                self.paths[path] = reason
                if not self.quiet:
                    LOG.warning("skipped %s: %s", path, reason)
        reads = max(self.seen, min(self.files, self.FLOOR))
        if len(self.paths) > 1 and self.bad > self.limit * reads:
            names = ", ".join(list(self.paths)[:5])
            raise CorruptDataError(
                f"pictures: at most {self.limit:.1%} may be unreadable, got {self.bad} of "
                f"{self.seen} read ({len(self.paths)} files, first {names})"
            )

    def state_dict(self) -> dict[str, Any]:
        """State to save in a checkpoint."""
        return {"seen": self.seen, "bad": self.bad, "paths": dict(self.paths)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; an empty one is of a run that did not count."""
        if not state:
            return
        self.seen, self.bad = int(state["seen"]), int(state["bad"])
        self.paths = dict(state["paths"])

    def merged(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One state for what several processes have counted; empty ones did not count."""
        counted = [state for state in states if state]
        return {
            "seen": sum(int(state["seen"]) for state in counted),
            "bad": sum(int(state["bad"]) for state in counted),
            "paths": {path: why for state in counted for path, why in state["paths"].items()},
        }
