# SPDX-License-Identifier: Apache-2.0
import os
import platform
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kdfast.machine import peak
from kdfast.machine.peak import library_flops, library_rates, peak_flops
from kdfast.ops._library import EXTENSION

FP32, BF16 = torch.float32, torch.bfloat16
ISAS = EXTENSION.testable_isas() if EXTENSION else []
# Multiply-adds of one call: steps, sums, lanes of a sum, and multiply-adds to a lane.
WIDE, DOTS, TILES = 16384 * 24 * 16, 16384 * 24 * 16 * 2, 4096 * 6 * 256 * 32
LOOPS = {
    "generic": (16384 * 14 * 4,) * 2,
    "avx2": (16384 * 12 * 8,) * 2,
    "avx512": (WIDE, WIDE),
    "avx512_bf16": (WIDE, DOTS),
    "amx": (WIDE, TILES),
    "amx_emulated": (WIDE, TILES),
}


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("compiled", "_threads")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the counts are those of x86")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("isa", ISAS)
def test_sums_count_what_was_done(isa: str, bf16: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    flops, _ = EXTENSION.run_peak(isa, bf16, 0.0)  # one call a thread
    assert flops == threads * 2 * LOOPS[isa][bf16]
    flops, rate = EXTENSION.run_peak(isa, bf16, 0.002)
    assert flops % (2 * LOOPS[isa][bf16]) == 0
    # Every thread had at least 2 ms, and the last call of the loop is counted whole.
    assert 0 < rate < threads * flops / 0.002


@pytest.mark.usefixtures("compiled")
def test_unknown_instruction_set() -> None:
    with pytest.raises(ValueError, match="must be one of generic, .*, got sse9"):
        EXTENSION.run_peak("sse9", False, 0.01)


class FakeExtension:
    """Answers with rates that are known, and notes which loops were run on how many threads."""

    def __init__(self, isas: list[str], rates: dict[tuple[str, bool], list[float]]) -> None:
        self.isas, self.rates, self.threads = isas, rates, set[int]()

    def available_isas(self) -> list[str]:
        return self.isas

    def run_peak(self, isa: str, bf16: bool, seconds: float) -> tuple[float, float]:
        self.threads.add(torch.get_num_threads())
        assert seconds == peak.SECONDS
        return 1.0, self.rates[isa, bf16].pop(0)


ALL = ["generic", "avx2", "avx512", "avx512_bf16", "amx"]


@pytest.mark.parametrize(
    ("isas", "dtype", "rates", "best"),
    [
        (["generic"], FP32, {("generic", False): [3, 1, 2, 1]}, 3),
        (["generic"], BF16, {("generic", False): [3, 1, 2, 1]}, 3),
        (ALL[:2], BF16, {("avx2", False): [3, 5, 2, 1]}, 5),
        (ALL[:3], FP32, {("avx2", False): [7, 5, 2, 1], ("avx512", False): [6, 6, 6, 6]}, 7),
        (
            ALL[:4],
            BF16,
            {
                ("avx2", False): [1, 1, 1, 1],
                ("avx512", False): [2, 2, 2, 2],
                ("avx512_bf16", True): [3, 3, 4, 3],
            },
            4,
        ),
        (
            ALL,
            BF16,
            {
                ("avx2", False): [1, 1, 1, 1],
                ("avx512", False): [2, 2, 2, 2],
                ("amx", True): [9, 30, 20, 20],
            },
            30,
        ),
    ],
)
def test_peak_is_the_best_of_all_loops(
    isas: list[str],
    dtype: torch.dtype,
    rates: dict[tuple[str, bool], list[float]],
    best: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeExtension(isas, rates)
    monkeypatch.setattr(peak, "EXTENSION", fake)
    monkeypatch.setattr(peak, "ROUNDS", 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    before = torch.get_num_threads()
    assert peak_flops(dtype, threads=3) == best
    assert fake.threads == {3} and torch.get_num_threads() == before
    assert not any(rates.values())  # every loop ran in every round


def test_more_threads_than_cpus_have_the_rate_of_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        peak, "EXTENSION", FakeExtension(["generic"], {("generic", False): [80] * 9})
    )
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert peak_flops(FP32, threads=8) == 20


@pytest.mark.usefixtures("compiled")
def test_peak_here() -> None:
    # Any processor does more than one multiply-add in a nanosecond, and none a million.
    assert 1e9 < peak_flops(FP32) < 1e15
    assert 1e9 < peak_flops(BF16) < 1e15


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_library_rates(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "SHAPES", ((8, 32, 16), (9, 16, 48)))
    rates = library_rates(dtype)
    assert list(rates) == (["torch", "oneDNN"] if peak._has_onednn(dtype == BF16) else ["torch"])
    assert all(rate > 0 for rate in rates.values())
    monkeypatch.setattr(peak, "library_rates", lambda _: {"torch": 1.0, "oneDNN": 2.0})
    assert library_flops(dtype) == 2.0


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_what_is_timed_is_the_layer(dtype: torch.dtype) -> None:
    if not peak._has_onednn(dtype == BF16):
        pytest.skip("this torch has no oneDNN for the dtype")
    x, weight = torch.randn(5, 32).to(dtype), torch.randn(7, 32).to(dtype)
    found = peak._onednn_linear(x, weight)()
    torch.testing.assert_close(found, torch.nn.functional.linear(x, weight))


def test_without_onednn_only_torch_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "SHAPES", ((8, 32, 16),))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert list(library_rates(FP32)) == ["torch"]


@pytest.mark.parametrize("call", [peak_flops, library_rates, library_flops])
def test_rejects_other_dtypes(call: Any) -> None:
    if EXTENSION is None and call is peak_flops:
        pytest.skip("needs the extension")
    with pytest.raises(ValueError, match="dtype must be float32 or bfloat16, got torch.float64"):
        call(torch.float64)


def test_peak_rejects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "EXTENSION", FakeExtension(["generic"], {}))
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        peak_flops(FP32, threads=0)
    monkeypatch.setattr(peak, "EXTENSION", None)
    with pytest.raises(RuntimeError, match="needs the compiled extension kdfast._C"):
        peak_flops(FP32)
