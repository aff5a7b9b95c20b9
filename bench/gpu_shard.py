# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin for one of several processes that share a test file until time is up.

``python -m pytest -p bench.gpu_shard FILE --shard=0/4 --until=SECONDS --results=FILE``; what
bench/gpu_run.py does. Each outcome is a line of the results as soon as it is known.
"""

import json
import time
from pathlib import Path

import pytest

NO_TIME = "no time left"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="0/1", help="I/N: every N-th test, from the I-th on")
    parser.addoption(
        "--until", type=float, default=float("inf"), help="no test begins after it (Unix time)"
    )
    parser.addoption("--results", type=Path, help="a file that gets a line of JSON for each test")


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("--results"):
        config.pluginmanager.register(Recorder(path))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Neighbours differ in a parameter and take as long: they go to different processes."""
    index, count = map(int, config.getoption("--shard").split("/"))
    config.hook.pytest_deselected(items=[x for i, x in enumerate(items) if i % count != index])
    items[:] = items[index::count]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.time() > item.config.getoption("--until"):
        pytest.skip(NO_TIME)


class Recorder:
    """Appends name, outcome and the first line of the reason to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self.add(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.passed:
            self.add(report)

    def add(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        """One line."""
        row = {"name": report.nodeid.rpartition("::")[2], "outcome": report.outcome}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | {"reason": reason_of(report)}) + "\n")


def reason_of(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why it was skipped or failed, as one line; "" if it passed."""
    found = report.longrepr
    if isinstance(found, tuple):
        return str(found[2]).removeprefix("Skipped: ")
    crash = getattr(found, "reprcrash", None)
    lines = str(found if crash is None else crash.message).splitlines()
    return lines[0] if found and lines else ""
