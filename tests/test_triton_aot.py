# SPDX-License-Identifier: Apache-2.0
"""Kernels compiled for GPUs that are not here: what the result file says of all, and some again."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]
AGAIN = (
    "the kernels have changed: run `python -m bench.gpu_static` and `python -m bench.gpu_tables`"
)


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """Gives modules of bench/."""
    sys.path.insert(0, str(ROOT))
    yield lambda name: importlib.import_module(f"bench.{name}")
    sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    """The result file."""
    text = (ROOT / "bench" / "results" / "gpu_static.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def test_every_case_is_compiled_or_named_as_missing(bench: Any, facts: dict[str, Any]) -> None:
    """Each stored case is of the kernels as they are now."""
    done = bench("gpu_static").current(facts)
    assert len(done) == len(facts["compiled"]), AGAIN
    lacking = [str(case) for case in bench("gpu_cases").cases() if case not in done]
    assert facts["missing"] == lacking, AGAIN
    # Those that say the most have to be there.
    assert not [x for x in lacking if x.startswith(("sm_80", "sm_90")) and "bfloat16" in x], AGAIN


def test_every_kernel_keeps_to_the_rules(bench: Any, facts: dict[str, Any]) -> None:
    assert facts["violations"] == []
    cases, done = bench("gpu_cases"), bench("gpu_static").stored(facts)
    bad = [
        f"{cases.describe(case, row)}: {fault}"
        for case, stored in done.items()
        for row in stored["kernels"]
        for fault in cases.violations(case, row)
    ]
    assert bad == []
    assert all(stored["kernels"] for stored in done.values())


# Cases to compile once more, and kernels that they must have.
LIVE = {
    (90, "pruned_attention", 64, ""): {"rotate_kernel", "fwd_kernel", "bwd_kernel"},
    (942, "pruned_attention", 64, ""): {"rotate_kernel", "fwd_kernel", "bwd_kernel"},
    (90, "attention_distill", 64, ""): {"fwd_kernel", "_distance_kernel", "bwd_kernel"},
    # Both ways of a row.
    (90, "kd_loss", 1000, "target=indices"): {"_rows_kernel", "_count_kernel", "_total_kernel"},
    (80, "kd_loss", 21841, "target=indices"): {"_rows_kernel", "_count_kernel", "_total_kernel"},
    (90, "feature_loss", 1024, "kind=cosine normalize=channel"): {"_positions_kernel"},
    (90, "swiglu_norm", 2048, ""): {"_fwd_kernel", "_bwd_kernel", "_sum_kernel"},
}


@pytest.fixture(scope="module")
def worker(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One process for all of them, without what was compiled before."""
    sweep = bench("gpu_sweep")
    with closing(sweep.Worker(str(tmp_path_factory.mktemp("cache")))) as worker:
        yield worker


@pytest.mark.parametrize("label", list(LIVE), ids=str)
def test_compiling_again_gives_the_same(
    bench: Any, facts: dict[str, Any], worker: Any, label: tuple[int, str, int, str]
) -> None:
    arch, op, dim, options = label
    static, cases = bench("gpu_static"), bench("gpu_cases")
    case = cases.Case(arch, op, "bfloat16", dim, options)
    assert case in cases.cases()
    answer = worker.ask(case)
    assert "error" not in answer, answer
    assert {row["name"] for row in answer["kernels"]} >= LIVE[label]
    assert [
        cases.violations(case, row) for row in answer["kernels"] if cases.violations(case, row)
    ] == []
    done = static.current(facts)
    if case in done and facts["triton"] == triton.__version__:
        assert answer["source"] == done[case]["source"]
        assert answer["kernels"] == done[case]["kernels"]


def test_what_cannot_be_compiled_is_an_error(bench: Any, worker: Any) -> None:
    case = bench("gpu_cases").Case(90, "feature_loss", "bfloat16", 64, "kind=manhattan")
    assert worker.ask(case)["error"].startswith("ValueError: ")


def test_a_process_that_ends_costs_one_case(
    bench: Any, worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = bench("gpu_cases").Case(90, "feature_loss", "bfloat16", 64, "kind=manhattan")
    worker.ask(case)
    worker.process.kill()
    worker.process.wait()
    assert worker.ask(case) == {"error": "the compiling process ended with -9"}
    assert worker.ask(case)["error"].startswith("ValueError: ")


def test_interpreter_and_compiler_do_not_mix() -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "bench.aot", "pruned_attention"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode != 0
    assert "cannot compile with TRITON_INTERPRET set" in done.stderr
