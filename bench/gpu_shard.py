# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin for one of several processes that share a test file until time is up.

``python -m pytest -p bench.gpu_shard FILE --shard=0/4 --until=SECONDS``; bench/gpu.py does.
"""

import time

import pytest

NO_TIME = "no time left"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="0/1", help="I/N: every N-th test, from the I-th on")
    parser.addoption(
        "--until", type=float, default=float("inf"), help="no test begins after it (Unix time)"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Neighbours differ in a parameter and take as long: they go to different processes."""
    index, count = map(int, config.getoption("--shard").split("/"))
    config.hook.pytest_deselected(items=[x for i, x in enumerate(items) if i % count != index])
    items[:] = items[index::count]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.time() > item.config.getoption("--until"):
        pytest.skip(NO_TIME)
