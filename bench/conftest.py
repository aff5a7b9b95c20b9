# SPDX-License-Identifier: Apache-2.0
"""`pytest bench/`: interleaved comparisons, a table at the end, rows to a JSON file on request."""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch

from kdfast import benchmark
from kdfast.testing import DRY_RUN, launch_on_cpu

Compare = Callable[..., dict[str, benchmark.Row]]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STARTED = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--save", metavar="FILE", help="write the rows of this session to a JSON file")
    parser.addoption("--rounds", type=int, default=15, help="samples per candidate")
    parser.addoption("--budget", type=float, help="seconds after which no comparison is begun")


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


@pytest.fixture(autouse=True)
def _in_time(request: pytest.FixtureRequest, results: benchmark.Results) -> None:
    budget = request.config.getoption("--budget")
    if budget is not None and time.monotonic() - STARTED > budget:
        results.left_out.append(f"{request.node.name}: the budget of {budget:.0f} s was used up")
        pytest.skip(results.left_out[-1])


@pytest.fixture(scope="session")
def results() -> benchmark.Results:
    """Rows of this session; threads are fixed for all candidates by KDFAST_BENCH_THREADS."""
    torch.set_num_threads(int(os.environ.get("KDFAST_BENCH_THREADS", torch.get_num_threads())))
    return benchmark.Results(benchmark.machine_facts())


@pytest.fixture(scope="session", autouse=True)
def _save(request: pytest.FixtureRequest, results: benchmark.Results) -> Iterator[None]:
    request.config.stash[RESULTS] = results
    yield
    if path := request.config.getoption("--save"):
        Path(path).write_text(json.dumps(results.to_json(), indent=1) + "\n")


@pytest.fixture(scope="session")
def peaks() -> dict[str, float]:
    """Matmul rates of this session in FLOP/s, by dtype name."""
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    # A GPU is not full before that.
    size = benchmark.sized(8192 if DEVICE.type == "cuda" else 1024, 64)
    return {str(d).removeprefix("torch."): benchmark.matmul_peak(DEVICE, d, size) for d in dtypes}


@pytest.fixture
def compare(
    request: pytest.FixtureRequest, results: benchmark.Results, peaks: dict[str, float]
) -> Compare:
    """Times candidates against each other and records one row for each."""

    def run(
        op: str,
        case: str,
        candidates: Mapping[str, benchmark.Candidate],
        *,
        nbytes: int | None = None,
        flops: int | None = None,
        dtype: torch.dtype = torch.float32,
        memory: bool = False,
        rounds: int | None = None,
    ) -> dict[str, benchmark.Row]:
        most = request.config.getoption("--rounds")
        slow = {} if rounds is None else {"warmup": 1}
        timed = benchmark.interleave(candidates, rounds=min(rounds or most, most), **slow)
        limits = []
        if nbytes is not None:
            limits.append(benchmark.copy_seconds(DEVICE, nbytes))
        if flops is not None:
            limits.append(flops / peaks[str(dtype).removeprefix("torch.")])
        rows = {}
        for name, samples in timed.items():
            row = benchmark.Row(op, case, name, **benchmark.summarize(samples))
            if nbytes is not None:
                row.gb_s = nbytes / row.ms / 1e6
            if flops is not None:
                row.gflop_s = flops / row.ms / 1e6
            if limits:
                row.limit_ms = 1e3 * max(limits)
                row.limit_share = row.limit_ms / row.ms
            if memory:
                row.saved_bytes = benchmark.saved_bytes(candidates[name])
                row.peak_bytes = benchmark.peak_bytes(candidates[name])
            rows[name] = row
        results.rows.extend(rows.values())
        return rows

    return run


RESULTS = pytest.StashKey[benchmark.Results]()


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
            others = [
                r.ms
                for r in results.rows
                if (r.op, r.case) == group and not r.candidate.startswith("kdfast")
            ]
            best = min(others, default=None)
        ratio = f"{best / row.ms:5.2f}x the best other" if best else ""
        share = f"{100 * row.limit_share:4.0f} % of limit" if row.limit_share else ""
        quiet = f"{row.quiet}/{row.samples} quiet"
        write(
            f"  {row.candidate:<12}{row.ms:10.3f} ms  (all {row.ms_all:.3f}, iqr {row.iqr:.3f}, "
            f"{quiet})  {ratio}  {share}"
        )
