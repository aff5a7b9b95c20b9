# SPDX-License-Identifier: Apache-2.0
import os
import subprocess
import sys
import warnings

import pytest
import torch

import kdfast
from kdfast.ops import _library
from kdfast.testing import assert_no_worse


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_backend_rule() -> None:
    assert _library.use_fused("op", None, None) == (_library.DEFAULT_BACKEND != "reference")
    assert _library.use_fused("op", "fused", None)
    assert not _library.use_fused("op", "reference", None)
    with pytest.raises(NotImplementedError, match="op: backend='fused' cannot run here: odd"):
        _library.use_fused("op", "fused", "odd")
    with pytest.raises(ValueError, match="must be one of"):
        _library.use_fused("op", "eager", None)


def test_fallback_warns_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert not _library.use_fused("op", "auto", "a reason for one warning")
        assert not _library.use_fused("op", "auto", "no kernel at all", compiled=False)
    assert [w.category for w in caught] == [kdfast.FallbackWarning, kdfast.NotCompiledWarning]
    assert "a reason for one warning" in str(caught[0].message)


def test_bad_environment_fails_at_import() -> None:
    done = python("import kdfast", KDFAST_BACKEND="fast")
    assert done.returncode != 0
    assert (
        "KDFAST_BACKEND: must be one of ('auto', 'fused', 'reference'), got 'fast'" in done.stderr
    )


@pytest.mark.usefixtures("compiled")
def test_isa_is_forced_or_fails() -> None:
    code = "import kdfast; from kdfast.ops._library import EXTENSION as e; print(e.cpu_isa())"
    assert python(code, KDFAST_CPU_ISA="generic").stdout.strip() == "generic"
    done = python(code, KDFAST_CPU_ISA="sse9")
    assert done.returncode != 0
    known = "generic, avx2, avx512, avx512_bf16, amx, amx_emulated"
    assert f"must be one of {known}, got sse9" in done.stderr
    assert "another torch" not in done.stderr
    extension = _library.EXTENSION
    assert extension is not None
    before = extension.cpu_isa()
    try:
        assert "amx_emulated" not in extension.available_isas()  # only for tests
        for isa in extension.testable_isas():
            extension.set_cpu_isa(isa)
            assert extension.cpu_isa() == isa
        with pytest.raises(ValueError, match="KDFAST_CPU_ISA"):
            extension.set_cpu_isa("best")
    finally:
        extension.set_cpu_isa(before)


@pytest.mark.usefixtures("compiled")
def test_reference_environment_runs_no_kernel() -> None:
    code = (
        "import torch, kdfast\n"
        "from torch.utils._python_dispatch import TorchDispatchMode\n"
        "class Spy(TorchDispatchMode):\n"
        "    def __torch_dispatch__(self, f, t, a=(), k=None):\n"
        "        print(f); return f(*a, **(k or {}))\n"
        "with Spy(): kdfast.head_gather(torch.ones(4), [0], head_dim=2, dim=0)\n"
    )
    assert "kdfast.head_gather" in python(code).stdout
    assert "kdfast" not in python(code, KDFAST_BACKEND="reference").stdout


def test_tolerance_rule_catches_a_planted_fault() -> None:
    exact = torch.randn(100, 100, dtype=torch.float64)
    eager = exact.float()
    assert_no_worse("same", eager, exact, eager)
    with pytest.raises(AssertionError, match="max error"):
        assert_no_worse("scaled", eager * (1 + 1e-6), exact, eager)
    with pytest.raises(AssertionError, match="not finite"):
        assert_no_worse("nan", eager * float("nan"), exact, eager)
    with pytest.raises(AssertionError, match="shape"):
        assert_no_worse("shape", eager[1:], exact, eager)


@pytest.mark.usefixtures("compiled")
def test_auto_takes_the_kernel_for_any_cpu() -> None:
    code = (
        "import torch, kdfast; q = torch.randn(1, 1, 300, 16, requires_grad=True)\n"
        "out = kdfast.pruned_attention(q, q, q); print(out.grad_fn.name())"
    )
    done = python(code, KDFAST_CPU_ISA="generic")
    assert done.stdout.strip() == "GradientBackward"  # the reference ends in a transpose
    assert "reference" not in done.stderr
