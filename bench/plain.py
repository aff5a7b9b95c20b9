# SPDX-License-Identifier: Apache-2.0
"""What bench/conftest.py needs of pytest-benchmark, for machines without it.

bench.compare takes the samples and ``--rows`` writes them either way. What is missing then are the
plugin's own tables, files and comparisons.
"""

from collections.abc import Callable
from typing import Any

import pytest

NOTE = "pytest-benchmark is not installed: no tables and no --benchmark-json, --rows=FILE has all"


def add_options(parser: pytest.Parser) -> None:
    """Those of the plugin that say how long to sample."""
    group = parser.getgroup("benchmark")
    group.addoption("--benchmark-max-time", type=float, default=1.0, help="seconds of a candidate")
    group.addoption("--benchmark-min-rounds", type=int, default=5, help="samples of a candidate")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "benchmark: how long to sample")


def pytest_report_header() -> str:
    return NOTE


class Benchmark:
    """Takes what the plugin's fixture is given."""

    enabled = True

    def __init__(self) -> None:
        self.group: str | None = None
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, target: Callable[[], object], rounds: int, iterations: int) -> None:
        """The samples are there already."""


@pytest.fixture
def benchmark() -> Benchmark:
    return Benchmark()
