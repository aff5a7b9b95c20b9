# SPDX-License-Identifier: Apache-2.0
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import kdfast
from kdfast.ops import _library
from kdfast.ops._autocast import without_autocast
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
    done = python("import torch, kdfast", KDFAST_BACKEND="fast")
    assert done.returncode != 0
    assert (
        "KDFAST_BACKEND: must be one of ('auto', 'fused', 'reference'), got 'fast'" in done.stderr
    )


@pytest.mark.usefixtures("compiled")
def test_isa_is_forced_or_fails() -> None:
    code = "from kdfast.ops._library import EXTENSION as e; print(e.cpu_isa())"
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


def on_cuda(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor without values, inside FakeTensorMode."""
    return torch.empty(shape, device="cuda", dtype=dtype, requires_grad=True)


# By op: shape, call, and what each takes no kernel for on CUDA.
ON_CUDA: dict[str, tuple[tuple[int, ...], Any, dict[str, tuple[int, ...]]]] = {
    "pruned_attention": (
        (2, 3, 5, 16),
        lambda x: kdfast.pruned_attention(x, x, x, heads=[2, 0]),
        {"up to 128, got 144": (2, 3, 5, 144)},
    ),
    "attention_distill": (
        (2, 3, 5, 16),
        lambda x: kdfast.attention_distill(x, x, x, x, x)[1],
        {"up to 128, got 144": (2, 3, 5, 144)},
    ),
    "kd_loss": ((4, 10), lambda x: kdfast.kd_loss(x, x)[0], {}),
    "linear_kd_loss": ((4, 10), lambda x: kdfast.linear_kd_loss(x, x, x @ x.t())[0], {}),
    "feature_loss": (
        (4, 10),
        lambda x: kdfast.feature_loss(x, x),
        {"up to 8192 features, got 9000": (2, 9000)},
    ),
    "swiglu_norm": (
        (4, 10),
        lambda x: kdfast.swiglu_norm(x, x, x[0], x[0]),
        {"rows of up to 8192, got 9000": (2, 9000)},
    ),
}


@pytest.mark.skipif(not _library.HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("op", ON_CUDA)
def test_auto_takes_the_kernel_on_cuda_or_says_why_not(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_library, "_warned", set())
    shape, call, limits = ON_CUDA[op]
    with torch._subclasses.FakeTensorMode():
        # A warning would be an error here.
        assert call(on_cuda(*shape)).grad_fn.name() == "GradientBackward"
        cases = {"not fp64": on_cuda(*shape, dtype=torch.float64)}
        cases |= {reason: on_cuda(*sizes) for reason, sizes in limits.items()}
        for reason, x in cases.items():
            with pytest.warns(kdfast.FallbackWarning, match=f"^{op} runs its eager.*{reason}"):
                assert call(x).is_cuda


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.library.Library]:
    """The op ``scaled``, x * y + z, in a library that is gone after the test."""
    with torch.library._scoped_library("kdfast", "FRAGMENT") as lib:
        monkeypatch.setattr(_library, "LIB", lib)
        lib.define("scaled(Tensor x, float y, Tensor? z) -> Tensor")
        lib.impl("scaled", lambda x, y, z: x * y if z is None else x * y + z, "CPU")
        yield lib


def setup_scaled(ctx: Any, given: Any, output: Tensor) -> None:
    ctx.y = given.y
    assert given._fields == ("x", "y", "z")
    assert output.shape == given.x.shape


@pytest.mark.usefixtures("library")
def test_gradients_go_by_name() -> None:
    needs = []

    def backward(ctx: Any, grad: Tensor) -> dict[str, Tensor | None]:
        needs.append(ctx.needs._asdict())
        return {"z": grad, "x": ctx.y * grad} if ctx.needs.z else {"x": ctx.y * grad}

    _library.register_gradient("scaled", backward, setup_scaled)
    x, z = (torch.ones(2, requires_grad=True) for _ in range(2))
    op = torch.ops.kdfast.scaled.default
    got = torch.autograd.grad(op(x, 3.0, z).sum(), [x, z])
    assert [g.tolist() for g in got] == [[3.0, 3.0], [1.0, 1.0]]
    (got_x,) = torch.autograd.grad(op(x, 3.0, None).sum(), [x])
    assert got_x.tolist() == [3.0, 3.0]
    assert needs == [
        {"x": True, "y": False, "z": True},
        {"x": True, "y": False, "z": False},
    ]
    assert not op(x.detach(), 3.0, None).requires_grad


@pytest.mark.usefixtures("library")
def test_gradient_of_an_unknown_name_is_an_error() -> None:
    _library.register_gradient("scaled", lambda ctx, grad: {"w": grad}, setup_scaled)
    out = torch.ops.kdfast.scaled.default(torch.ones(2, requires_grad=True), 3.0, None)
    with pytest.raises(
        TypeError, match=r"scaled: gradients must be of \['x', 'y', 'z'\], got .* \['w'\]"
    ):
        out.sum().backward()


@pytest.mark.usefixtures("library")
def test_second_derivative_of_a_backward_op_raises() -> None:
    _library.forbid_second_derivative("scaled", "unscaled")
    out = torch.ops.kdfast.scaled.default(torch.ones(2, requires_grad=True), 3.0, None)
    with pytest.raises(NotImplementedError, match="unscaled: the fused op has no second deriv"):
        out.sum().backward()


def test_schemas_have_no_defaults(library: torch.library.Library) -> None:
    library.define("optional(Tensor x, Tensor? y=None) -> Tensor")
    with pytest.raises(ValueError, match=r"optional: no argument .* default, got \['y'\]"):
        _library.register_gradient("optional", lambda ctx, grad: {})


@pytest.mark.usefixtures("library")
def test_fake_takes_the_arguments_that_it_names() -> None:
    @_library.register_fake("scaled")
    def fake(*, x: Tensor, z: Tensor | None, **_: Any) -> Tensor:
        return x.new_empty(x.shape) if z is None else z.new_empty(z.shape)

    with torch._subclasses.FakeTensorMode():
        out = torch.ops.kdfast.scaled.default(torch.ones(1), 3.0, torch.ones(4))
    assert out.shape == (4,)


def test_without_autocast() -> None:
    tensors = (torch.ones(1), torch.ones(1).half(), torch.ones(1).double(), None)
    context, same = without_autocast("cpu", *tensors)
    assert all(a is b for a, b in zip(same, tensors, strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        context, cast = without_autocast("cpu", *tensors)
        assert [None if x is None else x.dtype for x in cast] == [
            torch.bfloat16,
            torch.bfloat16,
            torch.float64,
            None,
        ]
        with context:
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")
