# SPDX-License-Identifier: Apache-2.0
import itertools
import time

import pytest
import torch

from bench import session
from kdfast.machine import facts, memory, timing


def test_interleave_alternates_and_tells_fast_from_slow() -> None:
    calls: list[str] = []

    def slow() -> None:
        calls.append("slow")
        time.sleep(0.06)

    def fast() -> None:
        calls.append("fast")
        time.sleep(0.02)

    samples = timing.interleave({"slow": slow, "fast": fast}, rounds=4, warmup=1)
    assert [len(s) for s in samples.values()] == [4, 4]
    rows = {name: timing.summarize(s) for name, s in samples.items()}
    assert 55 < rows["slow"]["ms"] < 200
    assert rows["slow"]["ms"] > 1.5 * rows["fast"]["ms"]
    # The order flips every round, so neither candidate always runs second.
    order = [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]
    assert order.count("slow") >= 3


def test_summary_takes_fast_samples_when_there_are_enough() -> None:
    enough = timing.summarize([*[(0.001, True)] * 5, *[(1.0, False)] * 6])
    assert enough["ms"] == pytest.approx(1) and enough["ms_all"] == pytest.approx(1000)
    assert (enough["fast"], enough["samples"]) == (5, 11)
    few = timing.summarize([*[(0.001, True)] * 4, *[(0.003, False)] * 5])
    assert few["ms"] == few["ms_all"] == pytest.approx(3) and few["fast"] == 4


class Script(timing.Calibration):
    """Calibration loops that take what they are told."""

    def __init__(self, seconds: list[float]) -> None:
        self.loops = iter(seconds)
        self._found = [1.0]

    def _loop(self) -> float:
        return next(self.loops)


def quiet(call: timing.Candidate, repeats: int) -> tuple[float, bool]:
    call()
    return 1.0, True


def test_samples_beside_a_slow_loop_are_not_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "timed_sample", quiet)
    # A loop is the faster of two; the third is slow, so the samples on both its sides are.
    loops = [1.0, 9.0, 1.4, 1.4, 1.6, 1.6, 9.0, 1.0, 1.4, 9.0]
    found = timing.interleave({"x": int}, rounds=4, calibration=Script(loops))
    assert [fast for _, fast in found["x"]] == [True, False, False, True]
    # A faster one makes slow ones of those before: nothing is fast but against the best.
    calibration = Script([1.4] * 4 + [0.9] * 6)
    found = timing.interleave({"x": int}, rounds=4, calibration=calibration)
    assert [fast for _, fast in found["x"]] == [False, False, True, True]
    assert calibration.best == 0.9


def test_a_busy_machine_gives_no_fast_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "timed_sample", lambda call, repeats: (1.0, False))
    found = timing.interleave({"x": int}, rounds=2, calibration=Script([1.0] * 6))
    assert found["x"] == [(1.0, False)] * 2


def test_rounds_end_with_the_time_but_not_before_there_are_a_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timing, "timed_sample", quiet)
    clock = itertools.count()
    monkeypatch.setattr(timing.time, "monotonic", lambda: next(clock))
    counts = [
        len(timing.interleave({"x": int}, rounds=15, seconds=seconds)["x"])
        for seconds in (0, 3, 20)
    ]
    # The clock ticks once a round, and is first read after FEW of them.
    assert counts == [timing.FEW, 8, 15]


def test_few_samples_are_enough_where_less_are_asked_for() -> None:
    found = timing.interleave({"x": int}, rounds=9, least=2, seconds=0, repeats={"x": 3})
    assert len(found["x"]) == 2


def test_long_calls_warm_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    took = {"long": 1.1 * timing.LONG_SECONDS, "short": 0.6 * timing.SAMPLE_SECONDS}

    def timed(call: timing.Candidate, repeats: int) -> float:
        for _ in range(repeats):
            call()
        return repeats * took[calls[-1]]

    monkeypatch.setattr(timing, "_timed", timed)
    candidates = {name: lambda name=name: calls.append(name) for name in took}
    timing.interleave(candidates, rounds=1)
    assert (calls.count("long"), calls.count("short")) == (2, 5)


def test_one_lucky_loop_is_not_the_best() -> None:
    calibration = Script([2.0] * 58 + [0.1] * 2)
    for _ in range(30):
        calibration.seconds()
    assert calibration.best == 1.0  # of 31: 0.1, 1.0, then 2.0


def test_calibration_loop_is_short() -> None:
    calibration = timing.Calibration(torch.device("cpu"))
    found = [calibration.seconds() for _ in range(20)]
    assert 0 < calibration.best <= sorted(found)[2]
    assert min(found) < 0.05 * timing.SAMPLE_SECONDS


def test_saved_and_peak_bytes() -> None:
    x = torch.randn(1000, requires_grad=True)
    assert memory.saved_bytes(lambda: x.exp()) == 4000
    assert memory.saved_bytes(lambda: x + 1) == 0

    def two_then_one() -> torch.Tensor:
        a = torch.empty(1 << 20)
        b = a + 1
        del a
        return b.sum()

    peak = memory.peak_bytes(two_then_one)
    assert 2 * 4 << 20 <= peak < (2 * 4 << 20) + 10_000
    assert memory.memory_bytes(two_then_one) == (peak, 0)
    assert memory.memory_bytes(lambda: x.exp())[1] == 4000


def test_limits_are_positive() -> None:
    cpu = torch.device("cpu")
    assert session.copy_seconds(cpu, 1 << 20) > 0
    assert session.matmul_rate(cpu, torch.float32, 64) > 0
    found = facts.machine_facts()
    assert found["threads"] == 1 and found["torch"] == torch.__version__
