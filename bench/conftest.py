# SPDX-License-Identifier: Apache-2.0
"""`pytest bench/`: interleaved comparisons, a table at the end, rows to a JSON file on request."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from kdfast.machine import timing
from kdfast.machine.facts import machine_facts
from kdfast.machine.memory import memory_bytes
from kdfast.testing import DRY_RUN, launch_on_cpu

# Behind what is installed, so that `pytest bench` finds the modules beside this file.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import session  # noqa: E402
from bench.report import best_other  # noqa: E402

Compare = Callable[..., dict[str, session.Row]]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STARTED = time.monotonic()
# Seconds of samples in a comparison of short calls, and of everything where no file knows better.
CASE_SECONDS, UNKNOWN_SECONDS = 2.0, 7.0
# Of the time that is left, divided by the cases that are left: the rest compiles and checks.
SAMPLES_SHARE = 0.5
# Whole models take the longest, so they come last and are what is left out when time is up.
LAST = ("bench_accelerate.py", "bench_eva.py", "bench_vit.py")
KNOWN = Path(__file__).resolve().parent / "results"
RESULTS = pytest.StashKey[session.Results]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--save", metavar="FILE", help="write the rows to a JSON file, case by case")
    parser.addoption("--resume", action="store_true", help="only what FILE of --save has not")
    parser.addoption("--rounds", type=int, default=15, help="samples per candidate, at most")
    parser.addoption(
        "--budget", type=float, default=810.0, help="seconds after which no comparison is begun"
    )


def pytest_configure(config: pytest.Config) -> None:
    """The rows of this session; threads are fixed for all candidates by KDFAST_BENCH_THREADS."""
    torch.set_num_threads(int(os.environ.get("KDFAST_BENCH_THREADS", torch.get_num_threads())))
    results = session.Results(machine_facts())
    if config.getoption("--resume"):
        results = resumed(config.getoption("--save"), results.machine)
    config.stash[RESULTS] = results


def resumed(path: str | None, machine: dict[str, Any]) -> session.Results:
    """The rows of an interrupted run.

    Raises:
        pytest.UsageError: There is no such file, or another machine or commit wrote it.
    """
    if path is None or not Path(path).is_file():
        raise pytest.UsageError(f"--resume: --save must name a file that exists, got {path}")
    results = session.Results.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
    for fact in machine.keys() - {"date"}:
        if results.machine[fact] != machine[fact]:
            raise pytest.UsageError(
                f"--resume: {fact} must be that of {path}, {results.machine[fact]!r}, "
                f"got {machine[fact]!r}"
            )
    results.left_out.clear()
    return results


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what a resumed run has, and puts the longest last."""
    done = config.stash[RESULTS].cases
    items[:] = [item for item in items if item.nodeid not in done]
    items.sort(key=lambda item: item.path.name in LAST)


def pytest_report_collectionfinish(config: pytest.Config, items: Sequence[pytest.Item]) -> str:
    """How long this is going to take, by the result files of earlier runs."""
    known: dict[str, float] = {}
    for path in sorted(KNOWN.glob("*.json")):
        known |= json.loads(path.read_text(encoding="utf-8")).get("cases", {})
    planned = sum(known.get(item.nodeid, UNKNOWN_SECONDS) for item in items)
    old = sum(item.nodeid in known for item in items)
    budget = clock(config.getoption("--budget"))
    return f"planned: {clock(planned)} (times of {old} of {len(items)} are known), budget {budget}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leaves out what there is no time for."""
    budget = item.config.getoption("--budget")
    if time.monotonic() - STARTED > budget:
        left_out = item.config.stash[RESULTS].left_out
        left_out.append(f"{item.name}: the budget of {budget:.0f} s was used up")
        pytest.skip(left_out[-1])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Keeps the rows of a case that went through, and writes them: a run may be interrupted."""
    results, started = item.config.stash[RESULTS], time.monotonic()
    before = len(results.rows)
    try:
        yield
    except BaseException:
        del results.rows[before:]
        raise
    results.cases[item.nodeid] = round(time.monotonic() - started, 1)
    save(item.config)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """What was left out is in the file, too."""
    save(session.config)


def save(config: pytest.Config) -> None:
    """Writes FILE of --save; renamed, so that it is whole at any time."""
    if path := config.getoption("--save"):
        part = Path(f"{path}.part")
        text = json.dumps(config.stash[RESULTS].to_json(), indent=1) + "\n"
        part.write_text(text, encoding="utf-8")
        part.replace(path)


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the inputs have to be."""
    return DEVICE


@pytest.fixture(scope="session", autouse=True)
def _interpreted() -> Iterator[None]:
    """In a dry run the Triton kernels take the place of those for the CPU."""
    registered = launch_on_cpu() if DRY_RUN else None
    yield
    del registered


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest) -> session.Results:
    """Rows of this session."""
    return request.config.stash[RESULTS]


@pytest.fixture(scope="session")
def peak() -> Callable[[torch.dtype], float]:
    """Matmul rate of this session in FLOP/s, measured when a dtype is first asked for."""
    # A GPU is not full before that.
    size = session.sized(8192 if DEVICE.type == "cuda" else 1024, 64)
    return cache(lambda dtype: session.matmul_peak(DEVICE, dtype, size))


@pytest.fixture(scope="session")
def calibration() -> timing.Calibration | None:
    """Tells the slow windows of this machine."""
    return None if DRY_RUN else timing.Calibration(DEVICE)


@pytest.fixture
def compare(
    request: pytest.FixtureRequest,
    results: session.Results,
    peak: Callable[[torch.dtype], float],
    calibration: timing.Calibration | None,
) -> Compare:
    """Times candidates against each other and records one row for each."""
    options = request.config.option

    def seconds() -> float:
        """Time for samples: short calls get all rounds, unless the session is late."""
        left = request.session.items[request.session.items.index(request.node) :]
        share = (options.budget - (time.monotonic() - STARTED)) / len(left)
        return min(CASE_SECONDS, SAMPLES_SHARE * share)

    def run(
        op: str,
        case: str,
        candidates: Mapping[str, timing.Candidate],
        *,
        nbytes: int | None = None,
        flops: int | None = None,
        dtype: torch.dtype = torch.float32,
        memory: bool = False,
    ) -> dict[str, session.Row]:
        timed = timing.interleave(
            candidates,
            rounds=options.rounds,
            repeats=1 if DRY_RUN else None,
            seconds=seconds(),
            calibration=calibration,
        )
        limits = []
        if nbytes is not None:
            limits.append(session.copy_seconds(DEVICE, nbytes))
        if flops is not None:
            limits.append(flops / peak(dtype))
        rows = {}
        for name, samples in timed.items():
            row = session.Row(op, case, name, **timing.summarize(samples))
            if nbytes is not None:
                row.gb_s = nbytes / row.ms / 1e6
            if flops is not None:
                row.gflop_s = flops / row.ms / 1e6
            if limits:
                row.limit_ms = 1e3 * max(limits)
                row.limit_share = row.limit_ms / row.ms
            if memory:
                row.peak_bytes, row.saved_bytes = memory_bytes(candidates[name])
            rows[name] = row
        results.rows.extend(rows.values())
        progress(request, rows)
        return rows

    return run


def progress(request: pytest.FixtureRequest, rows: Mapping[str, session.Row]) -> None:
    """One line for the comparison that just ended."""
    plugins = request.config.pluginmanager
    reporter, capture = (plugins.get_plugin(x) for x in ("terminalreporter", "capturemanager"))
    items = request.session.items
    first = next(iter(rows.values()))
    times = ", ".join(f"{name} {row.ms:.2f}" for name, row in rows.items())
    at = f"{items.index(request.node) + 1}/{len(items)} {clock(time.monotonic() - STARTED)}"
    with capture.global_and_fixture_disabled():
        reporter.ensure_newline()
        reporter.write_line(f"[{at}] {first.op}: {first.case}: {times} ms")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One table per comparison; a slower row is printed too."""
    results = terminalreporter.config.stash.get(RESULTS, None)
    if results is None or not results.rows:
        return
    write = terminalreporter.write_line
    facts = results.machine
    write(
        f"{facts['gpu'] or facts['cpu']}, {facts['isa']}, {facts['threads']} threads, "
        f"torch {facts['torch']}, commit {facts['commit']}{' + changes' if facts['dirty'] else ''}"
    )
    group = None
    for row in results.rows:
        if (row.op, row.case) != group:
            group = (row.op, row.case)
            write(f"\n{row.op}: {row.case}")
            best = best_other(asdict(r) for r in results.rows if (r.op, r.case) == group)
        ratio = f"{best['ms'] / row.ms:5.2f}x the best other" if best else ""
        share = f"{100 * row.limit_share:4.0f} % of limit" if row.limit_share else ""
        few = ", too few for a median" if row.fast < timing.FEW else ""
        write(
            f"  {row.candidate:<12}{row.ms:10.3f} ms  (all {row.ms_all:.3f}, iqr {row.iqr:.3f}, "
            f"{row.fast} of {row.samples} fast{few})  {ratio}  {share}"
        )
