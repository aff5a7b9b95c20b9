# SPDX-License-Identifier: Apache-2.0
"""bench/ as a suite of pytest-benchmark: entries, samples in turns, checks, reasons."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import session
from bench.entries import Clock, Entry
from bench.rows import read
from kdfast.machine import timing

pytest.importorskip("pytest_benchmark")
ROOT = Path(__file__).resolve().parents[1]
CASES = """
from pathlib import Path

import pytest
import torch

from bench import session

LOG = Path(__file__).with_name("log")


def called(name):
    def call():
        with LOG.open("a") as file:
            file.write(f"{name} ")
        return torch.tensor([2.0 if name == "wrong" else 1.0])
    return call


@pytest.mark.benchmark(min_rounds=3, max_time=0.001)
@pytest.mark.candidates("kdfast", "eager", "wrong", "other work", "openvino")
@pytest.mark.parametrize("index", range(2))
def bench_one(compare, index):
    LOG.open("a").write(f"body{index}:{','.join(compare.selected)} ")
    compare(
        "op",
        f"case {index} torch.float32",
        {name: called(name) for name in ("kdfast", "eager", "wrong")},
        check=session.near(torch.tensor([1.0]), 1e-3),
        yardsticks={"other work": called("other work")},
        missing={"openvino": "not installed"},
        nbytes=1 << 20,
        flops=1000,
        memory=True,
    )
"""


@pytest.fixture
def run_bench(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., str]]:
    """Runs pytest on a benchmark beside bench/conftest.py; what it printed."""
    shutil.copy(ROOT / "bench" / "conftest.py", tmp_path)
    (tmp_path / "bench_one.py").write_text(CASES)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    # The limits of this machine are another test's, and take a second.
    monkeypatch.setattr(session, "rate", lambda *_: session.Rate(2e9, 1e9))
    modules = set(sys.modules)

    def run(*arguments: str, text: str = CASES) -> str:
        (tmp_path / "log").unlink(missing_ok=True)
        (tmp_path / "bench_one.py").write_text(text)
        options = ["-s", "-p", "no:cacheprovider", "-c", os.devnull, "--import-mode=importlib"]
        options += ["--rootdir", str(tmp_path), "-o", "python_functions=bench_*", "-ra"]
        if "no:benchmark" not in arguments:
            options += [f"--benchmark-storage=file://{tmp_path}/saved"]
        pytest.main([*options, *arguments, str(tmp_path / "bench_one.py")])
        for name in set(sys.modules) - modules:
            if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]
        found = capsys.readouterr()
        return found.out + found.err

    yield run


def log(tmp_path: Path) -> list[str]:
    return (tmp_path / "log").read_text().replace("other work", "other").split()


def test_entries_of_the_plugin(tmp_path: Path, run_bench: Callable[..., str]) -> None:
    file = tmp_path / "run.json"
    text = run_bench(f"--benchmark-json={file}")
    assert "2 cases, none is begun after 13:30" in text
    assert "[1/2 0:" in text and "] op: case 0 float32: kdfast " in text
    assert "x the best other, " in text and " % of limit" in text
    assert "torch.float32: limit 2 GFLOP/s, best library 1 GFLOP/s" in text
    assert "6 passed" in text and "2 failed" in text and "2 skipped" in text
    assert "wrong: relative error 1.00e+00, above 1e-03" in text
    assert "openvino: not installed" in text
    found = json.loads(file.read_text())
    entries = {row["fullname"]: row for row in found["benchmarks"]}
    names = [f"bench_one.py::bench_one[{i}-{c}]" for i in (0, 1) for c in ("kdfast", "eager")]
    assert {*names, "bench_one.py::bench_one[1-other work]"} <= entries.keys()
    assert len(entries) == 6  # none of the wrong
    for row in entries.values():
        info, stats = row["extra_info"], row["stats"]
        assert row["group"] == f"op: {info['case']}" and info["op"] == "op"
        assert info["case"] in ("case 0 float32", "case 1 float32")
        assert stats["rounds"] == len(stats["data"]) == info["samples"] == 3
        assert stats["median"] == pytest.approx(info["ms_all"] / 1e3)
        assert stats["min"] > 0 and stats["iterations"] >= 1
        assert (info["bytes"], info["flops"]) == (1 << 20, 1000)
        assert info["limit_share"] == pytest.approx(info["limit_ms"] / info["ms"])
        assert (info["limit_gflop_s"], info["library_gflop_s"]) == (2, 1)
        assert info["yardstick"] == (info["candidate"] == "other work")
        assert info["threads"] == 1 and info["commit"] and info["family"] and "peak_bytes" in info
    assert found["rates"] == {"float32": {"limit": 2e9, "library": 1e9}}
    assert [row["reason"] for row in found["skipped"]] == ["openvino: not installed"] * 2
    assert found["machine_info"]["torch"] == torch.__version__
    assert found["machine_info"].keys().isdisjoint({"commit", "date", "dirty"})


def test_candidates_are_sampled_in_turns_by_the_first(
    tmp_path: Path, run_bench: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "calls_per_sample", lambda call: 1)
    run_bench("-k", "not openvino and not wrong and 0-")
    words = log(tmp_path)
    assert words[0] == "body0:kdfast,eager,other"
    assert sum(word.startswith("body") for word in words) == 1
    # Two are checked; three rounds, each beginning with the next; then the memory of each.
    turns = ["kdfast", "eager", "other", "eager", "other", "kdfast", "other", "kdfast", "eager"]
    assert words[1:12] == ["kdfast", "eager", *turns]


def test_rows_are_written_after_every_case(tmp_path: Path, run_bench: Callable[..., str]) -> None:
    """So a run that is killed has lost the case in work."""
    file = tmp_path / "rows.json"
    stop = "    if index:\n        raise KeyboardInterrupt\n    compare(\n"
    run_bench(f"--rows={file}", text=CASES.replace("    compare(\n", stop))
    found = read(file)
    assert {row["case"] for row in found["rows"]} == {"case 0 float32"}
    assert {row["candidate"] for row in found["rows"]} == {"kdfast", "eager", "other work"}
    assert found["rates"]["float32"] == {"limit": 2e9, "library": 1e9}
    assert found["machine"]["torch"] == torch.__version__
    assert [row["reason"] for row in found["skipped"]] == ["openvino: not installed"]


def test_without_the_plugin_the_samples_are_the_same(
    tmp_path: Path, run_bench: Callable[..., str]
) -> None:
    file = tmp_path / "rows.json"
    text = run_bench("-p", "no:benchmark", f"--rows={file}", "--benchmark-max-time=0.001")
    assert "pytest-benchmark is not installed" in text
    assert "6 passed" in text and "2 failed" in text and "2 skipped" in text
    found = read(file)
    assert len(found["rows"]) == 6 and len(found["skipped"]) == 2
    assert all(row["ms"] > 0 and row["samples"] == 3 for row in found["rows"])


def test_files_take_turns_if_asked_to(
    tmp_path: Path, run_bench: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "bench_two.py"
    other.write_text(CASES)
    found = {}
    for options in ([], ["--in-turns"]):
        text = run_bench("--collect-only", "-q", *options, str(other))
        entries = [line.split("::") for line in text.splitlines() if "kdfast]" in line]
        found[len(options)] = [f"{file[6:-3]} {name[10]}" for file, name in entries]
    assert found[0] == ["two 0", "two 1", "one 0", "one 1"]
    assert found[1] == ["two 0", "one 0", "two 1", "one 1"]


def test_only_what_is_selected_is_checked_and_called(
    tmp_path: Path, run_bench: Callable[..., str]
) -> None:
    text = run_bench("-k", "kdfast")
    assert "2 passed" in text and "wrong" not in text
    assert {w for w in log(tmp_path) if not w.startswith("body")} == {"kdfast"}
    assert "body0:kdfast" in log(tmp_path)


def test_disabled_benchmarks_are_called_and_not_timed(
    tmp_path: Path, run_bench: Callable[..., str]
) -> None:
    text = run_bench("--benchmark-disable", "-k", "kdfast or other")
    assert "4 passed" in text and "Median" not in text
    # Once for the check, once for the plugin.
    assert [log(tmp_path).count(name) for name in ("kdfast", "other")] == [4, 2]


def test_runs_are_compared(run_bench: Callable[..., str]) -> None:
    run_bench("--benchmark-save=before", "-k", "kdfast")
    text = run_bench("--benchmark-compare=0001", "-k", "kdfast")
    assert "bench_one[0-kdfast] (NOW)" in text and "bench_one[0-kdfast] (0001_before)" in text
    assert "machine_info is different" not in text


def test_no_time_is_a_reason(tmp_path: Path, run_bench: Callable[..., str]) -> None:
    text = run_bench("--budget=0")
    assert "10 skipped" in text and "the budget of 0 s was used up" in text
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("compare(\n", "raise OSError('broken')\n    compare(\n", "as its case failed: OSError"),
        ("compare(\n", "pytest.skip('no such data')\n    compare(\n", "no such data"),
        ('"eager", "wrong")}', '"wrong")}', "given every selected name, got no {'eager'}"),
        ("compare(\n", "compare('op', 'x', {'sdpa': int})\n    compare(\n", "got no "),
        ("missing={", "missing={'sdpa': 'x', ", "must name all, got no {'sdpa'}"),
        ('@pytest.mark.candidates("kdfast", "eager", "wrong", "other work", "openvino")\n', "", ""),
    ],
    ids=["raises", "skips", "lacks", "lacks all", "unknown", "unnamed"],
)
def test_what_goes_wrong_is_said(
    run_bench: Callable[..., str], old: str, new: str, expected: str
) -> None:
    assert old in CASES
    text = run_bench("-k", "0-", text=CASES.replace(old, new))
    assert expected in text and "1 passed" not in text
    if not new:
        assert "must name its candidates, pytest.mark.candidates" in text


def test_a_stopped_run_keeps_what_it_has(tmp_path: Path, run_bench: Callable[..., str]) -> None:
    file = tmp_path / "run.json"
    stop = "    if index:\n        raise KeyboardInterrupt\n    compare(\n"
    text = run_bench(f"--benchmark-json={file}", text=CASES.replace("    compare(\n", stop))
    assert "KeyboardInterrupt" in text
    names = {row["extra_info"]["case"] for row in json.loads(file.read_text())["benchmarks"]}
    assert names == {"case 0 float32"}


def test_calls_can_be_profiled(run_bench: Callable[..., str]) -> None:
    text = run_bench("-k", "0-kdfast", "--benchmark-cprofile=tottime")
    assert "1 passed" in text and "bench_one.py:" in text.partition("cProfile")[2]


def test_a_test_compares_once(run_bench: Callable[..., str]) -> None:
    twice = "    compare('op', 'again', {'kdfast': int})\n"
    text = run_bench("-k", "0-kdfast", text=CASES + twice)
    assert "must compare one case, got a second: op: again" in text


class Plugin:
    """What the clock needs of the fixture ``benchmark``."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.seconds = clock, list[float]()

    def pedantic(self, target: Callable[[], object], rounds: int, iterations: int) -> None:
        for _ in range(rounds):
            start = self.clock.recorded_time()
            assert [target() for _ in range(iterations)] == [None] * iterations
            self.seconds.append((self.clock.recorded_time() - start) / iterations)
        assert target() == "called"


def test_the_clock_tells_recorded_times() -> None:
    clock = Clock()
    plugin = Plugin(clock)
    samples = [(0.25, True), (0.5, False)]
    clock.replay(plugin, Entry(call=lambda: "called", calls=4, samples=samples))
    assert plugin.seconds == [0.25, 0.5]


def test_near_takes_tensors_and_sequences() -> None:
    one = torch.ones(3)
    session.near(one, 1e-3)("x", lambda: 1.0005 * one)
    session.near((one, 2 * one), 1e-3)("x", lambda: [one, 2 * one])
    with pytest.raises(AssertionError, match="x: relative error 1.00e-02, above 1e-03"):
        session.near((one, one), 1e-3)("x", lambda: (one, 1.01 * one))
    with pytest.raises(AssertionError, match="nan"):
        session.near(one, 1e-3)("x", lambda: torch.nan * one)
    with pytest.raises(ValueError, match="zip"):
        session.near((one, one), 1e-3)("x", lambda: (one,))


def test_rates_are_those_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = session.rate(torch.float32, False)._asdict()
    assert found.keys() == {"limit", "library"} and all(value > 0 for value in found.values())
