# SPDX-License-Identifier: Apache-2.0
"""The fixture ``compare``: checks the candidates of a case and samples them in turns.

The first entry of a case that runs does so for all candidates of the case that were selected; the
others take their samples from it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import torch

from bench import session
from bench.entries import Case, Entry, Run, case_of, cases_left, clock, entries_of
from bench.report import OURS, best_other
from kdfast.machine import timing
from kdfast.machine.memory import memory_bytes
from kdfast.testing import DRY_RUN


class Work(NamedTuple):
    """What a case needs; see ``Compare.__call__``."""

    nbytes: int | None
    flops: int | None
    dtype: torch.dtype
    memory: bool


class Compare:
    """Times the candidates of a case against each other.

    Attributes:
        device: Where inputs have to be.
        selected: The candidates that this session runs: no other has to be built.
    """

    def __init__(self, bench: Run, item: pytest.Item, benchmark: Any, candidate: str) -> None:
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
        self._check_names([*candidates, *yardsticks, *missing])
        found = bench.cases[key] = Case(op, case.replace("torch.", ""))
        for name in self.selected:
            if name in missing:
                error = pytest.skip.Exception(f"{name}: {missing[name]}")
                found.entries[name] = Entry(error=error)
            elif name in yardsticks:
                found.entries[name] = Entry(yardsticks[name], yardstick=True)
            else:
                call = candidates[name]
                found.entries[name] = Entry(call, error=error_of(check, name, call))
        right = {name: entry for name, entry in found.entries.items() if entry.error is None}
        if right and self._benchmark.enabled:
            self._sample(right)
            work = Work(nbytes, flops, dtype, memory)
            limit = self._limit(work)
            for name, entry in right.items():
                entry.info = self._info(found, name, work, limit)
            progress(bench, self._item, found)
            bench.save()
        bench.give(self._item, self._benchmark, self._candidate)

    def _check_names(self, given: Sequence[str]) -> None:
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

    def _limit(self, work: Work) -> float | None:
        """Milliseconds that no code can beat, where they are known."""
        limits = []
        if work.nbytes is not None:
            limits.append(session.copy_seconds(self.device, work.nbytes))
        if work.flops is not None:
            limits.append(work.flops / self._bench.rate(work.dtype).limit)
        return 1e3 * max(limits) if limits else None

    def _info(self, case: Case, name: str, work: Work, limit: float | None) -> dict[str, Any]:
        """The ``extra_info`` of an entry that was sampled."""
        entry, facts = case.entries[name], self._bench.facts
        info: dict[str, Any] = {"op": case.op, "case": case.name, "candidate": name}
        info |= {"yardstick": entry.yardstick, **timing.summarize(entry.samples)}
        ms = info["ms"]
        if limit is not None:
            info |= {"limit_ms": limit, "limit_share": limit / ms}
        if work.nbytes is not None:
            info |= {"bytes": work.nbytes, "gb_s": work.nbytes / ms / 1e6}
        if work.flops is not None:
            rate = self._bench.rate(work.dtype)
            info |= {"flops": work.flops, "gflop_s": work.flops / ms / 1e6}
            info |= {"limit_gflop_s": rate.limit / 1e9, "library_gflop_s": rate.library / 1e9}
        if work.memory:
            info["peak_bytes"], info["saved_bytes"] = memory_bytes(entry.call)
        # The machine is in every entry, since files are cut up and joined.
        return info | {key: facts[key] for key in ("family", "isa", "threads", "commit")}


def error_of(check: session.Check | None, name: str, call: timing.Candidate) -> Exception | None:
    """What a check raises of a candidate, which is the outcome of its entry."""
    try:
        if check:
            check(name, call)
    except Exception as error:
        return error
    return None


def progress(bench: Run, item: pytest.Item, case: Case) -> None:
    """One line for the case that was just sampled, with the time until the end."""
    plugins = item.config.pluginmanager
    reporter, capture = (plugins.get_plugin(x) for x in ("terminalreporter", "capturemanager"))
    done, left = len(bench.cases), len(cases_left(item)) - 1
    at = f"{done}/{done + left} {clock(bench.seconds)}"
    at += f", about {clock(left * bench.seconds / done)} left"
    with capture.global_and_fixture_disabled():
        reporter.ensure_newline()
        reporter.write_line(f"[{at}] {case.group}: {outcome(case)}")


def outcome(case: Case) -> str:
    """Times of a case, the ratio to the best other candidate and the share of the limit."""
    rows = {name: entry.info for name, entry in case.entries.items() if entry.info}
    text = ", ".join(f"{name} {row['ms']:.2f}" for name, row in rows.items()) + " ms"
    ours, other = rows.get(OURS), best_other(rows.values())
    if ours and other:
        text += f"; {other['ms'] / ours['ms']:.2f}x the best other"
    if ours and "limit_share" in ours:
        text += f", {100 * ours['limit_share']:.0f} % of limit"
    return text
