# SPDX-License-Identifier: Apache-2.0
"""`python -m bench.gpu` without a GPU: every stage, small, in Triton's interpreter."""

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    # In a worker of pytest-xdist pytest-benchmark would write no file.
    unset = ("TRITON_INTERPRET", "KDFAST_DRY_RUN", "PYTEST_XDIST_WORKER")
    env = {k: v for k, v in os.environ.items() if k not in unset}
    run = [sys.executable, "-m", "bench.gpu", *arguments]
    return subprocess.run(run, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_dry_run(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    done = command("--dry-run", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads((tmp_path / "gpu_dry_run.json").read_text())
    assert results["failed"] == results["incomplete"] == []
    assert results["tests"]["passed"] > 25
    assert "no CUDA device" in results["tests"]["skipped"]["test_memory_is_linear_in_tokens"]
    assert set(results["stages"]) == {"tests", "limits", "probes", "benches"}
    assert {row["goal"] for row in results["goals"]} >= {"G1", "G2", "G5", "G6 RoPE", "G7"}
    assert all(row["different"] == 0 for row in results["determinism"])
    repeated = {row["call"] for row in results["determinism"]}
    assert repeated >= {"linear_kd_loss", "swiglu_norm", "swiglu_norm_bwd"}
    ops = {(row["op"], row["candidate"]) for row in results["rows"]}
    assert {("pruned_attention", c) for c in ("kdfast", "eager", "sdpa", "compile")} <= ops
    benches = {"attention_distill", "kd_loss", "linear_kd_loss", "feature_loss", "swiglu_norm"}
    assert {(op, "kdfast") for op in benches | {"head_gather", "head_gather_block"}} <= ops
    reasons = {row["reason"] for row in results["skipped"]}
    assert "flash-attn: not installed" in reasons
    report = (tmp_path / "gpu_dry_run.md").read_text()
    for part in ("A dry run", "Nothing failed.", "## Goals", "| G1 |", "| pruned_attention |"):
        assert part in report


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_device() -> None:
    done = command()
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr


@pytest.fixture
def gpu() -> Iterator[Any]:
    """The module bench.gpu."""
    sys.path.insert(0, str(ROOT))
    yield importlib.import_module("bench.gpu")
    sys.path.remove(str(ROOT))


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
    assert gpu.verdict(results) == [
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
    assert gpu.stage("two", [talk, ["-c", "raise SystemExit(3)"]], 60, True)["code"] == 3
    assert capfd.readouterr().out == "== two\nout\nerr\n"


def test_a_process_that_hangs_is_stopped(gpu: Any) -> None:
    done = gpu.stage("hang", [["-c", "import time; time.sleep(60)"]], 0.5, True)
    assert done["code"] == "stopped: no time left"
    assert done["seconds"] < 30


TESTS = """
import pytest

@pytest.mark.parametrize("i", range(7))
def test_it(i):
    print("ran", i)
"""


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
