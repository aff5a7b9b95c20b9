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
AGAIN = "the kernels have changed: run `make gpu-static` (ARGS=--core for the least that passes)"


@pytest.fixture(scope="module")
def bench() -> Any:
    """Gives modules of bench/."""
    return lambda name: importlib.import_module(f"bench.{name}")


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    """The result file."""
    text = (ROOT / "bench" / "results" / "gpu_static.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def test_every_case_is_compiled_or_named_as_missing(bench: Any, facts: dict[str, Any]) -> None:
    """Each stored case is of the kernels as they are now."""
    static, cases = bench("gpu_static"), bench("gpu_cases")
    if facts["triton"] != triton.__version__:
        pytest.skip(f"triton {triton.__version__} makes other binaries than {facts['triton']}")
    assert not static.changed_ops(facts), AGAIN
    done = static.stored(facts)
    lacking = [case for case in cases.cases() if case not in done]
    assert facts["missing"] == list(map(str, lacking)), AGAIN
    assert not [str(case) for case in lacking if cases.core(case)], AGAIN


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
    (90, "pruned_attention", 64, "bias=1"): {"_bias_grad_kernel"},
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
    done = static.stored(facts)
    if case in done and facts["triton"] == triton.__version__:
        assert answer["trace"] == done[case]["trace"]
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


@pytest.mark.parametrize("op", ["kd_loss", "swiglu_norm", "pruned_attention", "attention_distill"])
def test_the_ir_is_the_same_for_all_of_nvidia(bench: Any, op: str) -> None:
    code = f"""
import torch
from bench import aot
found = set()
for arch in (80, 86, 89, 90, 100):
    with aot.trace_only(arch) as made:
        aot.OPS[{op!r}](torch.float32, 64)
    found.add(tuple(made))
print(len(found), len(made) > 1)
"""
    assert compiler(code) == "1 True"


KERNEL = """
from typing import NamedTuple

import triton
import triton.language as tl


@triton.jit
def copy_kernel(x_ptr, y_ptr, stride, n, ROWS: tl.constexpr):
    # A comment.
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x = tl.load(x_ptr + at * stride, mask=at < n, other=0.0)
    tl.store(y_ptr + at, x + 1.0, mask=at < n)


def launch(x, y):
    copy_kernel[(1,)](x, y, x.stride(0), x.shape[0], ROWS=16, num_warps=4)
"""
# What is replaced by what.
SAME = {
    "a comment": [("# A comment.", "# Another.")],
    "a local": [("at ", "offset "), ("at,", "offset,")],
    "a parameter": [("x_ptr", "from_ptr")],
    "a function": [
        ("@triton.jit\n", "@triton.jit\ndef more(x):\n    return x + 1.0\n\n\n@triton.jit\n"),
        ("x + 1.0,", "more(x),"),
    ],
    "an order": [("x_ptr, y_ptr, stride", "y_ptr, x_ptr, stride"), ("(x, y, x.s", "(y, x, x.s")],
    "an argument that is not used": [
        ("stride, n, ROWS", "stride, n, m, ROWS"),
        ("[0], ", "[0], 9, "),
    ],
    "a group": [
        ("@triton.jit\n", "class Row(NamedTuple):\n    s: int\n    n: int\n\n\n@triton.jit\n"),
        ("stride, n,", "row,"),
        ("* stride", "* row.s"),
        ("< n", "< row.n"),
        ("x.stride(0), x.shape[0]", "Row(x.stride(0), x.shape[0])"),
    ],
}
OTHER = {
    "a number": [("1.0", "2.0")],
    "a size": [("ROWS=16", "ROWS=32")],
    "warps": [("num_warps=4", "num_warps=8")],
    "a divisibility": [("x.stride(0)", "16 * x.stride(0)")],
}


def test_what_a_binary_depends_on(tmp_path: Path) -> None:
    """Of an edit the compiler sees neither names nor comments nor how the text is divided."""
    texts = {"as it is": KERNEL}
    for name, replaced in (SAME | OTHER).items():
        texts[name] = KERNEL
        for old, new in replaced:
            assert old in texts[name]
            texts[name] = texts[name].replace(old, new)
    for number, text in enumerate(texts.values()):
        (tmp_path / f"edit{number}.py").write_text(text)
    code = f"""
import importlib, json, sys, torch
from bench import aot
sys.path.insert(0, {str(tmp_path)!r})
found = []
for number in range({len(texts)}):
    with aot.trace_only(90) as made:
        importlib.import_module(f"edit{{number}}").launch(torch.zeros(32, 2)[:, 0], torch.zeros(32))
    found += made
print(json.dumps(found))
"""
    first, *traces = json.loads(compiler(code))
    found = dict(zip(SAME | OTHER, traces, strict=True))
    assert [name for name, trace in found.items() if trace == first] == list(SAME)
    assert len(set(traces)) == 1 + len(OTHER)


def compiler(code: str) -> str:
    """What a process with Triton's compiler, not its interpreter, prints."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_interpreter_and_compiler_do_not_mix() -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "bench.aot", "pruned_attention"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode != 0
    assert "cannot compile with TRITON_INTERPRET set" in done.stderr
