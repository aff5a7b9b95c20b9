# SPDX-License-Identifier: Apache-2.0
"""Means of the steps since the last row of the log, and how fast they were."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


class Window:
    """Sums of what the steps of a row of the log gave.

    Attributes:
        steps: How many steps were added, in all parts of the run.
    """

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.steps = 0
        self.restart_clock()

    def add(self, values: Mapping[str, float], images: float) -> None:
        """Add a step.

        Args:
            values: Its losses and the like.
            images: Of all processes.
        """
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.steps += 1
        self._timed += 1
        self._images += images

    def means(self, world: int, device: torch.device) -> dict[str, float]:
        """Means over the steps, and over processes."""
        values = {name: value / self.steps for name, value in self.sums.items()}
        if world > 1:
            names = sorted(values)
            mean = torch.tensor([values[n] for n in names], device=device)
            dist.all_reduce(mean)
            values |= dict(zip(names, (mean / world).tolist(), strict=True))
        return values

    def clear(self) -> None:
        """Begin the next row."""
        self.sums, self.steps = {}, 0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Begin to measure time; what was added before counts for the means alone."""
        self._clock, self._timed = time.monotonic(), 0
        self._images, self._waited = 0.0, 0.0

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """Context for what is no step: its time is not that of the steps around it."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._clock += time.monotonic() - began

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Context in which a step waits for data."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._waited += time.monotonic() - began

    def speed(self) -> dict[str, float]:
        """Images per second, seconds per step, and how many of those waited for data."""
        seconds = max(time.monotonic() - self._clock, 1e-9)
        return {
            "images_per_s": self._images / seconds,
            "time": seconds / self._timed,
            "data_time": self._waited / self._timed,
        }

    def state_dict(self) -> dict[str, Any]:
        """The sums, for a checkpoint."""
        return {"window": dict(self.sums), "window_steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a state of ``state_dict``."""
        self.sums, self.steps = dict(state["window"]), state["window_steps"]

    def merge_state_dicts(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on from the states of another number of processes, with their mean in each."""
        sums = [state["window"] for state in states]
        self.sums = {name: sum(part[name] for part in sums) / len(sums) for name in sums[0]}
        self.steps = states[0]["window_steps"]
