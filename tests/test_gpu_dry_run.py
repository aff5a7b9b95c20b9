# SPDX-License-Identifier: Apache-2.0
"""`python -m bench.gpu` without a GPU: every stage, small, in Triton's interpreter."""

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    # In a worker of pytest-xdist pytest-benchmark would time nothing.
    unset = ("TRITON_INTERPRET", "KDFAST_DRY_RUN", "PYTEST_XDIST_WORKER")
    env = {k: v for k, v in os.environ.items() if k not in unset}
    run = [sys.executable, "-m", "bench.gpu", *arguments]
    return subprocess.run(run, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_dry_run(tmp_path: Path) -> None:
    done = command("--dry-run", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads((tmp_path / "gpu_dry_run.json").read_text())
    assert results["failed"] == results["incomplete"] == []
    assert results["notes"][0].startswith("- block sizes of ")
    assert results["tests"]["passed"] > 25
    assert "no CUDA device" in results["tests"]["skipped"]["test_memory_is_linear_in_tokens"]
    assert set(results["stages"]) == {"tests", "limits", "probes", "benches"}
    assert {row["goal"] for row in results["goals"]} >= {"G1", "G2", "G5", "G6 RoPE", "G7"}
    assert all(row["different"] == 0 for row in results["determinism"])
    repeated = {row["call"] for row in results["determinism"]}
    assert repeated >= {"linear_kd_loss", "swiglu_norm", "swiglu_norm_bwd"}
    ops = {(row["op"], row["candidate"]) for row in results["rows"]}
    attention = ("kdfast", "eager", "sdpa", "compile", "sdpa flash", "sdpa math")
    assert {("pruned_attention", c) for c in attention} <= ops
    benches = {"attention_distill", "kd_loss", "linear_kd_loss", "feature_loss", "swiglu_norm"}
    assert {(op, "kdfast") for op in benches | {"head_gather", "head_gather_block"}} <= ops
    reasons = {row["reason"] for row in results["skipped"]}
    assert reasons >= {f"{name}: not installed" for name in ("flash-attn", "fa3", "liger")}
    report = (tmp_path / "gpu_dry_run.md").read_text()
    for part in ("A dry run", "Nothing failed.", "## Goals", "| G1 |", "| pruned_attention |"):
        assert part in report


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_device() -> None:
    done = command()
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr


def test_dry_run_of_tuning_goes_on_where_it_was(tmp_path: Path) -> None:
    """Every answer is kept, so that a second run of the command asks nothing."""
    runs = [command("--tune", "--dry-run", "--out", str(tmp_path)) for _ in range(2)]
    for done in runs:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    first, *rows = map(json.loads, (tmp_path / "tune_dry_run.jsonl").read_text().splitlines())
    assert first["arch"] == "interpreter"
    assert {question["do"] for question, _ in rows} >= {"check", "time"}
    assert len({json.dumps(question) for question, _ in rows}) == len(rows)
    blocks = importlib.import_module("kdfast.kernels._blocks")
    table = blocks.read_table(tmp_path / "interpreter.json", "interpreter", "test")
    assert table.blocks.keys() == blocks.BLOCKS.keys() and not table.flash
    report = (tmp_path / "tune_dry_run.md").read_text()
    assert "flash-attn is not installed" in report and "None." in report


def test_dry_run_of_training(tmp_path: Path) -> None:
    done = command("--train", "--dry-run", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads((tmp_path / "train_dry_run.json").read_text())
    found = {(r["trainer"], r["precision"], r["backend"]) for r in results["rows"]}
    assert found == {
        ("orion50", "bf16", "kdfast"),
        ("chain tiny", "bf16", "eager"),
        ("chain tiny", "fp16", "kdfast"),
    }
    assert all(row["finite"] and row["steps"] == 2 and row["ms"] > 0 for row in results["rows"])
    # The teacher is trained where none is kept from an earlier run.
    trained = {run["config"] for run in results["trainers"]}
    assert results["notes"] or {"smoke"} <= trained <= {"smoke", "smoke teacher"}


@pytest.fixture
def gpu() -> Any:
    """Gives modules of bench/."""
    return lambda name: importlib.import_module(f"bench.{name}")


def test_failures_are_named(gpu: Any) -> None:
    results = {
        "stages": {"tests": {"code": 1}, "probes": {"code": "stopped: no time left"}},
        "tests": {
            "failed": {"test_x": "wrong"},
            "skipped": {"test_y": "no time left", "test_z": "no second device"},
        },
        "determinism": [{"call": "kd_loss", "runs": 30, "different": 2}],
        "incomplete": ["goals"],
    }
    assert gpu("gpu_run").verdict(results) == [
        "stage tests: 1",
        "stage probes: stopped: no time left",
        "test test_x: wrong",
        "1 tests were not run: no time left",
        "goals is not complete: no time left",
        "kd_loss: 2 of 30 runs differ",
    ]


def test_figures_without_time_are_named(tmp_path: Path) -> None:
    env = os.environ | {"KDFAST_DRY_RUN": "1", "TRITON_INTERPRET": "1"}
    run = [sys.executable, "-m", "bench.gpu_probes", str(tmp_path / "figures.json"), "5"]
    subprocess.run(run, cwd=ROOT, env=env, check=True)
    figures = json.loads((tmp_path / "figures.json").read_text())
    parts = ["determinism", "memory", "goals"]
    assert figures == {part: [] for part in parts} | {"incomplete": parts}


def test_one_of_several_processes_fails(gpu: Any, capfd: pytest.CaptureFixture[str]) -> None:
    talk = ["-c", "import sys; print('out'); print('err', file=sys.stderr)"]
    stages = gpu("gpu_stages")
    both = [talk, ["-c", "raise SystemExit(3)"]]
    assert stages.stage("two", both, 60, stages.environment(True))["code"] == 3
    assert capfd.readouterr().out == "== two\nout\nerr\n"


def test_a_process_that_hangs_is_stopped(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Meanwhile its results are written again and again."""
    stages, written = gpu("gpu_stages"), list[int]()
    monkeypatch.setattr(stages, "WRITE", 0.1)
    hang = ["-c", "import time; time.sleep(60)"]
    env = stages.environment(True)
    done = stages.stage("hang", [hang], 0.5, env, lambda: written.append(1))
    assert done["code"] == "stopped: no time left"
    assert written
    assert done["seconds"] < 30


TESTS = """
import pytest

@pytest.mark.parametrize("i", range(7))
def test_it(i):
    print("ran", i)
"""
OUTCOMES = """
import pytest

def test_right():
    pass

def test_wrong():
    assert 1 == 2, "not so"

def test_left_out():
    pytest.skip("no device")

def test_cut_off():
    import os
    os._exit(9)
"""


def test_outcomes_are_kept_as_they_come(gpu: Any, tmp_path: Path) -> None:
    """Also of a process that the device takes down."""
    file, results = tmp_path / "test_some.py", tmp_path / "tests_0.jsonl"
    file.write_text(OUTCOMES)
    run = [sys.executable, "-m", "pytest", "-q", "-p", "bench.gpu_shard", "-p"]
    run += ["no:cacheprovider", "-c", os.devnull, f"--rootdir={tmp_path}", str(file)]
    run.append(f"--results={results}")
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 9
    found = gpu("gpu_run").read_tests([results])
    assert found["passed"] == 1 and found["skipped"] == {"test_left_out": "no device"}
    assert found["failed"] == {"test_wrong": "AssertionError: not so"}


@pytest.mark.parametrize(
    ("options", "ran", "skipped"),
    [(["--shard=1/3"], [1, 4], 0), ([], list(range(7)), 0), (["--until=5"], [], 7)],
)
def test_shards(tmp_path: Path, options: list[str], ran: list[int], skipped: int) -> None:
    file = tmp_path / "test_some.py"
    file.write_text(TESTS)
    run = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "bench.gpu_shard", "-p"]
    run += ["no:cacheprovider", "-c", os.devnull, f"--rootdir={tmp_path}", str(file), *options]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
    assert [int(x) for x in re.findall(r"ran (\d)", done.stdout)] == ran
    assert (f"{skipped} skipped" in done.stdout) == bool(skipped)
