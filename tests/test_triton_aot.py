# SPDX-License-Identifier: Apache-2.0
"""Kernels compiled for GPUs that are not here; each call in a process without the interpreter."""

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from kdfast.aot import SPILL_BUDGET

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
# Every architecture's instruction for tensor cores, and shared memory of one block (99 KiB is what
# sm_86 and sm_89 have; the table of block sizes keeps to it everywhere).
SHARED = 99 << 10
ATTENTION = {"fwd_kernel", "bwd_kernel"}


def compiled(op: str, *arguments: str) -> list[dict[str, Any]]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kdfast.aot", op, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_attention(rows: list[dict[str, Any]], wide_loads: float = 0.4) -> None:
    assert {row["name"] for row in rows} >= ATTENTION
    for row in rows:
        assert row["spill_bytes"] <= SPILL_BUDGET, row
        assert row["shared_bytes"] <= SHARED, row
        assert (row["tensor_core"] > 0) == (row["name"] in ATTENTION), row
        # The rest are row statistics, 4 bytes each, and tiles too small for 16 bytes per thread.
        assert row["loads_16"] >= wide_loads * row["loads"], row


def test_attention_compiles() -> None:
    check_attention(compiled("pruned_attention", "--arch", "90"))


def test_attention_compiles_for_amd() -> None:
    rows = compiled("pruned_attention", "--arch", "942")
    check_attention(rows, 0.05)
    assert all(row["shared_bytes"] <= 64 << 10 for row in rows)


def check_distill(rows: list[dict[str, Any]]) -> None:
    streaming = {"fwd_kernel", "_distance_kernel", "bwd_kernel"}
    assert {row["name"] for row in rows} >= streaming
    for row in rows:
        assert row["spill_bytes"] <= SPILL_BUDGET, row
        assert row["shared_bytes"] <= SHARED, row
        assert (row["tensor_core"] > 0) == (row["name"] in streaming), row


def test_distill_compiles() -> None:
    check_distill(compiled("attention_distill", "--arch", "90"))


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("dim", [16, 64, 72, 128])
def test_distill_sweep(arch: int, dtype: str, dim: int) -> None:
    common = ("--arch", str(arch), "--dtype", dtype, "--dim", str(dim))
    check_distill(compiled("attention_distill", *common))
    if dim == 64:
        for kind in ("reverse_kl", "jsd", "mse", "cosine", "logit_mse"):
            choice = ("--set", f"kind={kind}", "temperature=2")
            check_distill(compiled("attention_distill", *common, *choice))


def check_losses(rows: list[dict[str, Any]], main: str, wide: bool) -> None:
    assert main in {row["name"] for row in rows}
    for row in rows:
        assert row["spill_bytes"] == 0, row
        assert row["shared_bytes"] <= SHARED, row
        if row["name"] == main and wide:
            assert row["loads_16"] >= 2, row


# Both ways of a row; an odd number of classes has rows that are not aligned.
@pytest.mark.parametrize(("classes", "wide"), [(1000, True), (21841, False)])
def test_kd_loss_compiles(classes: int, wide: bool) -> None:
    rows = compiled("kd_loss", "--dim", str(classes), "--set", "target=indices")
    check_losses(rows, "_rows_kernel", wide)


def test_feature_loss_compiles() -> None:
    rows = compiled("feature_loss", "--dim", "1024", "--set", "kind=cosine", "normalize=channel")
    check_losses(rows, "_positions_kernel", True)


def check_swiglu(rows: list[dict[str, Any]], wide: bool) -> None:
    assert {row["name"] for row in rows} == {"_fwd_kernel", "_bwd_kernel", "_sum_kernel"}
    for row in rows:
        assert row["spill_bytes"] == 0, row
        assert row["shared_bytes"] <= SHARED, row
        if row["name"] != "_sum_kernel" and wide:
            assert row["loads_16"] >= 2, row


def test_swiglu_norm_compiles() -> None:
    check_swiglu(compiled("swiglu_norm", "--dim", "2048"), True)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("channels", [192, 2048, 2730, 8192])
def test_swiglu_norm_sweep(arch: int, dtype: str, channels: int) -> None:
    rows = compiled("swiglu_norm", "--arch", str(arch), "--dtype", dtype, "--dim", str(channels))
    check_swiglu(rows, channels % 16 == 0 and channels > 1000)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_losses_sweep(arch: int, dtype: str) -> None:
    common = ("--arch", str(arch), "--dtype", dtype, "--dim")
    for classes in (2, 100, 1000, 8192, 21841, 131072):
        for target in ("", "indices", "probabilities"):
            rows = compiled("kd_loss", *common, str(classes), "--set", f"target={target}")
            check_losses(rows, "_rows_kernel", classes % 8 == 0)
    for features in (192, 1000, 8192):
        for kind in ("mse", "cosine", "smooth_l1"):
            for norm in ("none", "layer", "channel"):
                choice = ("--set", f"kind={kind}", f"normalize={norm}")
                rows = compiled("feature_loss", *common, str(features), *choice)
                check_losses(rows, "_positions_kernel", features >= 1000)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("dim", [16, 24, 64, 72, 80, 88, 96, 128])
def test_attention_sweep(arch: int, dtype: str, dim: int) -> None:
    common = ("--arch", str(arch), "--dtype", dtype, "--dim", str(dim))
    wide = 0.4 if dim >= 64 else 0.0
    check_attention(compiled("pruned_attention", *common), wide)
    if dim == 64:
        check_attention(compiled("pruned_attention", *common, "--set", "window=16"))
        check_attention(compiled("pruned_attention", *common, "--set", "layout=half", "tokens=197"))
        check_attention(compiled("pruned_attention", *common, "--set", "layout=", "tokens=577"))


def test_interpreter_and_compiler_do_not_mix() -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "kdfast.aot", "pruned_attention"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode != 0
    assert "cannot compile with TRITON_INTERPRET set" in done.stderr
