# SPDX-License-Identifier: Apache-2.0
"""`pytest bench/`: pytest-benchmark, with the candidates of a case sampled in turns.

Without that plugin the samples are the same, see bench/plain.py.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kdfast.testing import DRY_RUN, launch_on_cpu

# Behind what is installed, so that `pytest bench` finds the modules beside this file.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import plain  # noqa: E402
from bench.compare import Compare  # noqa: E402
from bench.entries import Case, Run, case_of, clock, is_entry  # noqa: E402
from bench.rows import facts_line  # noqa: E402

# Whole models take the longest, so they come last and are what is left out when time is up.
LAST = ("bench_accelerate.py", "bench_orion.py", "bench_vit.py")
RUN = pytest.StashKey[Run]()


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    parser.addoption(
        "--budget", type=float, default=810.0, help="seconds after which no case is begun"
    )
    parser.addoption(
        "--in-turns", action="store_true", help="the first case of every file, then the second"
    )
    parser.addoption("--rows", type=Path, help="a result file, written after every case")
    if not pluginmanager.has_plugin("benchmark"):
        plain.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Threads are fixed for all candidates by KDFAST_BENCH_THREADS."""
    torch.set_num_threads(int(os.environ.get("KDFAST_BENCH_THREADS", torch.get_num_threads())))
    config.stash[RUN] = Run(config)
    if not config.pluginmanager.has_plugin("benchmark"):
        config.pluginmanager.register(plain)


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The candidate is the last parameter, so the entries of a case follow each other."""
    if "candidate" in metafunc.fixturenames:
        mark = metafunc.definition.get_closest_marker("candidates")
        if mark is None or not mark.args:
            name = metafunc.definition.nodeid
            raise pytest.UsageError(f"{name}: must name its candidates, pytest.mark.candidates")
        metafunc.parametrize("candidate", mark.args)


def pytest_itemcollected(item: pytest.Item) -> None:
    """The plugin takes the clock of an entry from its mark; what the test asks for stays."""
    if is_entry(item):
        mark = item.get_closest_marker("benchmark")
        options = dict(mark.kwargs) if mark else {}
        options["timer"] = item.config.stash[RUN].clock.recorded_time
        item.add_marker(pytest.mark.benchmark(**options), append=False)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name in LAST)
    if config.getoption("--in-turns"):
        # Each case gets its place among the cases of its file.
        places: dict[Path, dict[str, int]] = {}
        for item in filter(is_entry, items):
            mine = places.setdefault(item.path, {})
            mine.setdefault(case_of(item), len(mine))
        items.sort(key=lambda x: places[x.path][case_of(x)] if is_entry(x) else 0)


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> str:
    """What is going to run, where, and how long it may take."""
    cases = len({case_of(item) for item in items if is_entry(item)})
    budget = clock(config.getoption("--budget"))
    return f"{facts_line(config.stash[RUN].facts)}\n{cases} cases, none is begun after {budget}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leaves out what there is no time for."""
    bench = item.config.stash[RUN]
    if is_entry(item) and bench.late() and case_of(item) not in bench.cases:
        pytest.skip(f"the budget of {item.config.getoption('--budget'):.0f} s was used up")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Runs the test of a case once; its other entries have their samples from that."""
    if not is_entry(pyfuncitem):
        return None
    bench = pyfuncitem.config.stash[RUN]
    if case_of(pyfuncitem) in bench.cases:
        arguments = pyfuncitem.funcargs
        bench.give(pyfuncitem, arguments["benchmark"], arguments["candidate"])
        return True
    bench.forget_calls()
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A test that raises does so for all entries of its case."""
    try:
        yield
    except BaseException as error:
        if is_entry(item):
            item.config.stash[RUN].cases.setdefault(case_of(item), Case(error=error))
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Keeps the reasons of what was skipped."""
    report: Any = yield
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        item.config.stash[RUN].skipped[item.nodeid] = reason
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """The last entries may have been skipped."""
    session.config.stash[RUN].save()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """The rates that limits come from, before the plugin's tables."""
    for dtype, rate in config.stash[RUN].rates.items():
        limit, library = rate.limit / 1e9, rate.library / 1e9
        line = f"{dtype}: limit {limit:.0f} GFLOP/s, best library {library:.0f} GFLOP/s"
        terminalreporter.write_line(line)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    """What has to be equal for times to be compared; the commit is the plugin's commit_info."""
    facts = config.stash[RUN].facts
    return {k: v for k, v in facts.items() if k not in ("commit", "dirty", "date")}


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """What was not timed and why, and the rates that limits come from."""
    output_json |= config.stash[RUN].shared()


@pytest.fixture(scope="session", autouse=True)
def _interpreted() -> Iterator[None]:
    """In a dry run the Triton kernels take the place of those for the CPU."""
    registered = launch_on_cpu() if DRY_RUN else None
    yield
    del registered


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark: Any, candidate: str) -> Compare:
    """Times candidates against each other, see ``bench.compare.Compare``."""
    return Compare(request.config.stash[RUN], request.node, benchmark, candidate)
