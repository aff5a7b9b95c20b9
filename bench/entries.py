# SPDX-License-Identifier: Apache-2.0
"""Entries of pytest-benchmark whose samples were taken before, and what those of a session share.

An entry is one candidate of a case. The plugin reads the samples of it through the clock that it is
given, so its statistics, table, files and comparisons are those of the samples.
"""

import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from bench import rows, session
from bench.gpu_stages import replace
from kdfast.machine import timing
from kdfast.machine.facts import machine_facts
from kdfast.testing import DRY_RUN

# Of the time that is left, divided by the cases that are left: the rest compiles and checks.
SAMPLES_SHARE = 0.5


class Clock:
    """A timer that tells pytest-benchmark the times of samples that were taken before."""

    def __init__(self) -> None:
        self._readings: deque[float] = deque()

    def recorded_time(self) -> float:
        """The next reading: every sample has one before and one after it."""
        return self._readings.popleft()

    def replay(self, benchmark: Any, entry: "Entry") -> None:
        """Gives an entry's samples to the plugin, one a round."""
        self._readings.clear()
        for seconds, _ in entry.samples:
            self._readings.extend((0.0, seconds * entry.calls))

        def target() -> object:
            # Not while a round is read; afterwards the plugin may want a call, to profile it.
            return None if self._readings else entry.call()

        benchmark.pedantic(target, rounds=max(1, len(entry.samples)), iterations=entry.calls)


@dataclass
class Entry:
    """One candidate of a case.

    Attributes:
        call: What was timed.
        yardstick: Whether it does other work than the case.
        calls: How many calls a sample has.
        samples: Seconds per call, and whether it was a fast sample.
        info: The ``extra_info`` of the entry.
        error: What the entry raises instead: it is wrong, or missing.
    """

    call: timing.Candidate = int
    yardstick: bool = False
    calls: int = 1
    samples: list[tuple[float, bool]] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    error: BaseException | None = None


@dataclass
class Case:
    """The entries of a comparison by candidate; of one whose test raised, only the error."""

    op: str = ""
    name: str = ""
    entries: dict[str, Entry] = field(default_factory=dict)
    error: BaseException | None = None

    @property
    def group(self) -> str:
        """What the entries have in common, for the plugin."""
        return f"{self.op}: {self.name}"


class Run:
    """What the entries of a session share.

    Attributes:
        device: Where inputs have to be.
        cases: The cases that were run, by ``case_of``.
        skipped: Entry and reason of what was not timed.
        clock: The timer of every entry.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.facts = machine_facts()
        self.cases: dict[str, Case] = {}
        self.skipped: dict[str, str] = {}
        self.clock = Clock()
        self.rates: dict[torch.dtype, session.Rate] = {}
        self._calibration: timing.Calibration | None = None
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the session began."""
        return time.monotonic() - self._started

    def calibration(self) -> timing.Calibration | None:
        """Tells the slow windows of this machine."""
        if self._calibration is None and not DRY_RUN:
            self._calibration = timing.Calibration(self.device)
        return self._calibration

    def rate(self, dtype: torch.dtype) -> session.Rate:
        """FLOP per second of a dtype, measured when it is first asked for."""
        if dtype not in self.rates:
            self.rates[dtype] = session.rate(dtype, self.device.type == "cuda")
        return self.rates[dtype]

    def late(self) -> bool:
        """Whether the time of --budget is used up, after which no case is begun."""
        return self.seconds > self.config.getoption("--budget")

    def sampling(self, item: pytest.Item, candidates: int) -> dict[str, Any]:
        """Rounds and seconds of a case: what the plugin's options say, less if it gets late."""
        mark = item.get_closest_marker("benchmark")
        asked = mark.kwargs if mark else {}
        option = self.config.getoption
        seconds = float(asked.get("max_time", option("benchmark_max_time")))
        least = int(asked.get("min_rounds", option("benchmark_min_rounds")))
        share = (option("--budget") - self.seconds) / max(1, len(cases_left(item)))
        return {
            "rounds": max(least, math.ceil(seconds / timing.SAMPLE_SECONDS)),
            "least": least,
            "seconds": min(seconds * candidates, SAMPLES_SHARE * share),
        }

    def shared(self) -> dict[str, Any]:
        """What the entries of a file have in common: what was not timed and why, and the rates."""
        return {
            "skipped": [{"entry": k, "reason": v} for k, v in self.skipped.items()],
            "rates": {
                str(dtype).removeprefix("torch."): rate._asdict()
                for dtype, rate in self.rates.items()
            },
        }

    def save(self) -> None:
        """Writes the result file of ``--rows``, of what there is so far."""
        if path := self.config.getoption("--rows"):
            entries = (x for case in self.cases.values() for x in case.entries.values() if x.info)
            found = {"machine": self.facts, **self.shared()}
            found["rows"] = [rows.row_of({"extra_info": entry.info}) for entry in entries]
            replace(path, rows.text(found))

    def forget_calls(self) -> None:
        """Lets go of the inputs and models of the cases so far."""
        for case in self.cases.values():
            for entry in case.entries.values():
                entry.call = int

    def give(self, item: pytest.Item, benchmark: Any, candidate: str) -> None:
        """Makes an entry of what was found for a candidate, or raises what it raised."""
        case = self.cases[case_of(item)]
        if isinstance(case.error, pytest.skip.Exception):
            pytest.skip(str(case.error))
        if case.error is not None:
            pytest.fail(f"not timed, as its case failed: {case.error!r}", pytrace=False)
        entry = case.entries[candidate]
        if entry.error is not None:
            raise entry.error
        benchmark.group = case.group
        benchmark.extra_info.update(entry.info)
        self.clock.replay(benchmark, entry)


def case_of(item: pytest.Item) -> str:
    """What the entries of a case have in common: the name up to the candidate, which is last."""
    return item.nodeid.removesuffix(f"{item.callspec.params['candidate']}]")


def is_entry(item: pytest.Item) -> bool:
    """Whether a test compares candidates."""
    return "compare" in getattr(item, "fixturenames", ())


def entries_of(item: pytest.Item) -> Iterator[pytest.Item]:
    """The selected tests of the case of ``item``."""
    key = case_of(item)
    return (x for x in item.session.items if is_entry(x) and case_of(x) == key)


def cases_left(item: pytest.Item) -> set[str]:
    """The cases of this test and of those after it."""
    items = item.session.items
    return {case_of(x) for x in items[items.index(item) :] if is_entry(x)}


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
