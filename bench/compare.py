# SPDX-License-Identifier: Apache-2.0
"""The fixture ``compare``: candidates of a case are sampled in turns, each is an entry of its own.

An entry is a test of pytest-benchmark. The first one of a case that runs checks and samples all
candidates of the case that were selected; the others take their samples from it. The plugin reads
the samples through the clock that it is given, so its statistics, table, files and comparisons are
those of the samples.
"""

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from bench import session
from kdfast.machine import timing
from kdfast.machine.facts import machine_facts
from kdfast.machine.memory import memory_bytes
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
        calls: How many calls a sample has.
        samples: Seconds per call, and whether it was a fast sample.
        info: The ``extra_info`` of the entry.
        error: What the entry raises instead: it is wrong, or missing.
    """

    call: timing.Candidate = int
    calls: int = 1
    samples: list[tuple[float, bool]] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    error: BaseException | None = None


@dataclass
class Case:
    """The entries of a comparison by candidate; of one whose test raised, only the error."""

    group: str
    entries: dict[str, Entry] = field(default_factory=dict)
    error: BaseException | None = None


class Session:
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

    def rate(self, dtype: torch.dtype) -> float:
        """FLOP per second that no code exceeds."""
        if dtype not in self.rates:
            self.rates[dtype] = session.rate(dtype, self.device.type == "cuda")
        return self.rates[dtype].limit

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


class Compare:
    """Times the candidates of a case against each other.

    Attributes:
        device: Where inputs have to be.
        selected: The candidates that this session runs: no other has to be built.
    """

    def __init__(self, bench: Session, item: pytest.Item, benchmark: Any, candidate: str) -> None:
        self._bench, self._item, self._benchmark = bench, item, benchmark
        self._candidate = candidate
        self.device = bench.device
        self.selected = [x.callspec.params["candidate"] for x in entries_of(item)]

    def __call__(
        self,
        op: str,
        case: str,
        candidates: Mapping[str, timing.Candidate],
        *,
        check: session.Check | None = None,
        yardsticks: Mapping[str, timing.Candidate] | None = None,
        missing: Mapping[str, str] | None = None,
        nbytes: int | None = None,
        flops: int | None = None,
        dtype: torch.dtype = torch.float32,
        memory: bool = False,
    ) -> None:
        """Checks and times the selected candidates, and makes the entry of this test.

        Args:
            op: First part of the group, and the row of summaries by op.
            case: Second part: shapes, dtype, what is done.
            candidates: Name to a call; all do the same work. Those that begin with "kdfast" are
                ours, the others are rivals. Only the selected ones have to be there.
            check: Raises AssertionError for a candidate that is wrong, whose entry then fails: no
                time is taken of a wrong result.
            yardsticks: Calls that do other work and are timed beside, unchecked.
            missing: Name to the reason why there is no such candidate here: the entry is skipped.
            nbytes: Bytes that must move; the limit is a plain copy of as many.
            flops: Operations that are needed; the limit is the rate of ``dtype`` in registers.
            memory: Measures peak and saved bytes, too.

        Raises:
            ValueError: The names are not those of ``pytest.mark.candidates``.
            RuntimeError: The test has compared already.
        """
        bench, key = self._bench, case_of(self._item)
        if key in bench.cases:
            raise RuntimeError(f"{key}: a test must compare one case, got a second: {op}: {case}")
        missing, yardsticks = missing or {}, yardsticks or {}
        every = {**candidates, **yardsticks}
        self._check_names(every.keys() | missing.keys())
        what = {"op": op, "case": case.replace("torch.", "")}
        found = Case(f"{op}: {what['case']}")
        for name in self.selected:
            entry = found.entries[name] = Entry()
            if name in missing:
                entry.error = pytest.skip.Exception(f"{name}: {missing[name]}")
                continue
            entry.call = every[name]
            entry.info = {**what, "candidate": name, "yardstick": name in yardsticks}
            if check and name in candidates:
                try:
                    check(name, entry.call)
                except Exception as error:
                    entry.error = error
        bench.cases[key] = found
        good = {name: entry for name, entry in found.entries.items() if entry.error is None}
        if good and self._benchmark.enabled:
            self._sample(good)
            limit = self._limit(nbytes, flops, dtype)
            for entry in good.values():
                entry.info |= summary(entry, nbytes, flops, limit) | self._where(flops, dtype)
                if memory:
                    peak, saved = memory_bytes(entry.call)
                    entry.info |= {"peak_bytes": peak, "saved_bytes": saved}
            progress(bench, self._item, found)
        bench.give(self._item, self._benchmark, self._candidate)

    def _check_names(self, given: Iterable[str]) -> None:
        mark = self._item.get_closest_marker("candidates")
        named = set(mark.args) if mark else set()
        if lacking := set(self.selected) - set(given):
            raise ValueError(f"compare: must be given every selected name, got no {lacking}")
        if unknown := set(given) - named:
            raise ValueError(f"compare: pytest.mark.candidates must name all, got no {unknown}")

    def _sample(self, entries: Mapping[str, Entry]) -> None:
        calls = {name: entry.call for name, entry in entries.items()}
        for name, call in calls.items():
            entries[name].calls = 1 if DRY_RUN else timing.calls_per_sample(call)
        options = self._bench.sampling(self._item, len(calls))
        timed = timing.interleave(
            calls,
            repeats={name: entry.calls for name, entry in entries.items()},
            calibration=self._bench.calibration(),
            **(options | ({"rounds": 1} if DRY_RUN else {})),
        )
        for name, samples in timed.items():
            entries[name].samples = samples

    def _limit(self, nbytes: int | None, flops: int | None, dtype: torch.dtype) -> float | None:
        """Milliseconds that no code can beat, where they are known."""
        limits = []
        if nbytes is not None:
            limits.append(session.copy_seconds(self.device, nbytes))
        if flops is not None:
            limits.append(flops / self._bench.rate(dtype))
        return 1e3 * max(limits) if limits else None

    def _where(self, flops: int | None, dtype: torch.dtype) -> dict[str, Any]:
        """The machine, in every entry: files are cut up and joined."""
        facts = self._bench.facts
        info = {key: facts[key] for key in ("family", "isa", "threads", "commit")}
        if flops is not None:
            info |= {f"{k}_gflop_s": v / 1e9 for k, v in self._bench.rates[dtype]._asdict().items()}
        return info


def summary(
    entry: Entry, nbytes: int | None, flops: int | None, limit: float | None
) -> dict[str, Any]:
    """Median of the fast samples, and the rates that follow from it."""
    found = timing.summarize(entry.samples)
    ms = found["ms"]
    if nbytes is not None:
        found |= {"bytes": nbytes, "gb_s": nbytes / ms / 1e6}
    if flops is not None:
        found |= {"flops": flops, "gflop_s": flops / ms / 1e6}
    if limit is not None:
        found |= {"limit_ms": limit, "limit_share": limit / ms}
    return found


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


def progress(bench: Session, item: pytest.Item, case: Case) -> None:
    """One line for the case that was just sampled: times, the time so far and until the end."""
    plugins = item.config.pluginmanager
    reporter, capture = (plugins.get_plugin(x) for x in ("terminalreporter", "capturemanager"))
    done, left = len(bench.cases), len(cases_left(item)) - 1
    times = ", ".join(
        f"{name} {entry.info['ms']:.3g}" for name, entry in case.entries.items() if entry.samples
    )
    at = f"{done}/{done + left} {clock(bench.seconds)}"
    at += f", about {clock(left * bench.seconds / done)} left"
    with capture.global_and_fixture_disabled():
        reporter.ensure_newline()
        reporter.write_line(f"[{at}] {case.group}: {times} ms")
