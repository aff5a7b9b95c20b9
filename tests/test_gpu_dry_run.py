# SPDX-License-Identifier: Apache-2.0
"""`python -m bench.gpu` without a GPU: every stage, small, in Triton's interpreter."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "KDFAST_DRY_RUN")}
    run = [sys.executable, "-m", "bench.gpu", *arguments]
    return subprocess.run(run, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_dry_run(tmp_path: Path) -> None:
    done = command("--dry-run", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads((tmp_path / "gpu_dry_run.json").read_text())
    assert results["failed"] == []
    assert results["tests"]["passed"] > 25
    assert "no CUDA device" in results["tests"]["skipped"]["test_memory_is_linear_in_tokens"]
    assert set(results["stages"]) == {"tests", "probes", "benches"}
    assert {row["goal"] for row in results["goals"]} >= {"G1", "G2", "G5", "G6 RoPE", "G7"}
    assert all(row["different"] == 0 for row in results["determinism"])
    repeated = {row["call"] for row in results["determinism"]}
    assert repeated >= {"linear_kd_loss", "swiglu_norm", "swiglu_norm_bwd"}
    ops = {(row["op"], row["candidate"]) for row in results["rows"]}
    assert {("pruned_attention", c) for c in ("kdfast", "eager", "sdpa", "compile")} <= ops
    benches = {"attention_distill", "kd_loss", "linear_kd_loss", "feature_loss", "swiglu_norm"}
    assert {(op, "kdfast") for op in benches | {"head_gather", "head_gather_block"}} <= ops
    assert any("flash-attn: not installed" in reason for reason in results["left_out"])
    report = (tmp_path / "gpu_dry_run.md").read_text()
    for part in ("A dry run", "Nothing failed.", "## Goals", "| G1 |", "| pruned_attention |"):
        assert part in report


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_device() -> None:
    done = command()
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr


def test_failures_are_named() -> None:
    sys.path.insert(0, str(ROOT))
    try:
        from bench.gpu import verdict
    finally:
        sys.path.remove(str(ROOT))
    results = {
        "stages": {"tests": {"code": 1}, "probes": {"code": "stopped after 9 s"}},
        "tests": {"failed": {"test_x": "wrong"}},
        "determinism": [{"call": "kd_loss", "runs": 30, "different": 2}],
    }
    assert verdict(results) == [
        "stage tests: 1",
        "stage probes: stopped after 9 s",
        "test test_x: wrong",
        "kd_loss: 2 of 30 runs differ",
    ]
