# SPDX-License-Identifier: Apache-2.0
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from bench import report, session
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


def test_results_survive_the_file() -> None:
    row = session.Row("op", "case", "kdfast", 1.0, 1.5, 0.1, 9, 7, peak_bytes=3)
    results = session.Results({"cpu": "x"}, [row], ["y"], {"node": 1.5})
    again = session.Results.from_json(json.loads(json.dumps(results.to_json())))
    assert again == results


def test_the_best_other_is_the_fastest_rival_and_no_yardstick() -> None:
    times = {"kdfast": 1.0, "kdfast, weight": 0.5, "native half": 0.7, "sdpa": 3.0, "eager": 2.0}
    rows = [{"candidate": name, "ms": ms} for name, ms in times.items()]
    assert report.best_other(rows) == {"candidate": "eager", "ms": 2.0}
    assert report.best_other(rows[:3]) is None


def test_plots_is_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    from bench import plots

    results = session.Results(facts.machine_facts())
    for name in plots.COLOURS:
        for tokens in (64, 128):
            case = f"fwd+bwd 1x8x{tokens} torch.bfloat16"
            row = session.Row("lengths", case, name, 1.0, 1.0, 0.1, 9, 9, peak_bytes=1 << 20)
            results.rows.append(row)
    file, picture = tmp_path / "rows.json", tmp_path / "lengths.png"
    file.write_text(json.dumps(results.to_json()))
    assert plots.main([str(file), str(picture)]) == 0
    assert picture.read_bytes()[1:4] == b"PNG"
    results.rows.clear()
    file.write_text(json.dumps(results.to_json()))
    with pytest.raises(SystemExit, match="2"):
        plots.main([str(file), str(picture)])
    assert "must have rows of bench_lengths.py, got none" in capsys.readouterr().err


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
    assert session.matmul_peak(cpu, torch.float32, 64) > 0
    found = facts.machine_facts()
    assert found["threads"] == 1 and found["torch"] == torch.__version__


ROOT = Path(__file__).resolve().parents[1]
CASES = """
import time
from pathlib import Path

import pytest


@pytest.mark.parametrize("index", range(3))
def bench_one(compare, index):
    compare("op", f"case {index}", {"kdfast": int, "eager": lambda: time.sleep(0.001)})
    assert index != 1 or not Path(__file__).with_name("fail").exists()
"""


@pytest.fixture
def run_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    """Runs pytest on a benchmark of three cases beside bench/conftest.py; what it printed."""
    shutil.copy(ROOT / "bench" / "conftest.py", tmp_path)
    (tmp_path / "bench_one.py").write_text(CASES)
    (tmp_path / "results").mkdir()
    modules = set(sys.modules)

    def run(*arguments: str) -> str:
        options = ["-s", "-p", "no:cacheprovider", "-c", os.devnull, "--import-mode=importlib"]
        options += ["--rootdir", str(tmp_path), "-o", "python_functions=bench_*"]
        pytest.main([*options, *arguments, str(tmp_path / "bench_one.py")])
        found = capsys.readouterr()
        return found.out + found.err

    yield run
    for name in set(sys.modules) - modules:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_a_session_keeps_its_rows_and_goes_on(
    tmp_path: Path, run_bench: Callable[..., str]
) -> None:
    file, fail = tmp_path / "rows.json", tmp_path / "fail"
    fail.touch()
    text = run_bench("--save", str(file), "--rounds", "6", "-x")
    assert "planned: 0:21 (times of 0 of 3 are known), budget 13:30" in text
    assert "[1/3 0:" in text and "op: case 0: kdfast 0.00, eager" in text
    first = json.loads(file.read_text())
    assert [row["case"] for row in first["rows"]] == ["case 0"] * 2  # not of the failed
    assert all(row["samples"] == 6 and 0 <= row["fast"] <= 6 for row in first["rows"])
    assert list(first["cases"]) == ["bench_one.py::bench_one[0]"]

    fail.unlink()
    text = run_bench("--save", str(file), "--rounds", "1", "--resume")
    assert "2 passed" in text
    rows = json.loads(file.read_text())["rows"]
    assert [row["case"] for row in rows[::2]] == ["case 0", "case 1", "case 2"]
    assert [row["samples"] for row in rows[::2]] == [6, 1, 1]
    assert "too few for a median" in text

    # What a file knows is the plan of the next run.
    (tmp_path / "results" / "x.json").write_text('{"cases": {"bench_one.py::bench_one[1]": 100}}')
    text = run_bench("--budget", "0")
    assert "planned: 1:54 (times of 1 of 3 are known), budget 0:00" in text
    assert "3 skipped" in text

    other = json.loads(file.read_text())
    other["machine"]["cpu"] = "another"
    file.write_text(json.dumps(other))
    text = run_bench("--save", str(file), "--resume")
    assert "--resume: cpu must be that of" in text
    assert "must name a file that exists" in run_bench("--resume")
