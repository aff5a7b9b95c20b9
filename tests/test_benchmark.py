# SPDX-License-Identifier: Apache-2.0
import time

import pytest
import torch

from kdfast import benchmark


def test_interleave_alternates_and_tells_fast_from_slow() -> None:
    calls: list[str] = []

    def slow() -> None:
        calls.append("slow")
        time.sleep(0.06)

    def fast() -> None:
        calls.append("fast")
        time.sleep(0.02)

    samples = benchmark.interleave({"slow": slow, "fast": fast}, rounds=4, warmup=1)
    assert [len(s) for s in samples.values()] == [4, 4]
    rows = {name: benchmark.summarize(s) for name, s in samples.items()}
    assert 55 < rows["slow"]["ms"] < 200
    assert rows["slow"]["ms"] > 1.5 * rows["fast"]["ms"]
    # The order flips every round, so neither candidate always runs second.
    order = [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]
    assert order.count("slow") >= 3


def test_summary_takes_quiet_samples_when_there_are_enough() -> None:
    quiet = [(0.001, True)] * 5
    assert benchmark.summarize([*quiet, (1.0, False)])["ms"] == pytest.approx(1)
    few = benchmark.summarize([(0.001, True), (0.003, False), (0.003, False)])
    assert few["ms"] == pytest.approx(3) and few["quiet"] == 1


def test_saved_and_peak_bytes() -> None:
    x = torch.randn(1000, requires_grad=True)
    assert benchmark.saved_bytes(lambda: x.exp()) == 4000
    assert benchmark.saved_bytes(lambda: x + 1) == 0

    def two_then_one() -> torch.Tensor:
        a = torch.empty(1 << 20)
        b = a + 1
        del a
        return b.sum()

    peak = benchmark.peak_bytes(two_then_one)
    assert 2 * 4 << 20 <= peak < (2 * 4 << 20) + 10_000


def test_limits_are_positive() -> None:
    cpu = torch.device("cpu")
    assert benchmark.copy_seconds(cpu, 1 << 20) > 0
    assert benchmark.matmul_peak(cpu, torch.float32, 64) > 0
    facts = benchmark.machine_facts()
    assert facts["threads"] == 1 and facts["torch"] == torch.__version__
