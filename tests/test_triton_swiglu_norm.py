# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels in the interpreter, against the reference."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import kdfast
from kdfast.ops import swiglu_norm as op
from kdfast.testing import assert_no_worse, interpreted_kernels, run

kernels = interpreted_kernels("swiglu_norm")
pytestmark = pytest.mark.interpret
NAMES = ["out", "d gate", "d value", "d weight", "d bias"]


class Launch(torch.autograd.Function):
    """The functions registered for CUDA, called on CPU tensors."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Any:
        out, mean, rstd = op._cuda(*inputs, 1e-6)
        ctx.save_for_backward(*inputs[:3], mean, rstd)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return op._cuda_bwd(grad, *ctx.saved_tensors)


def fused(*inputs: Tensor) -> Any:
    return Launch.apply(*inputs)  # type: ignore[no-untyped-call]


def eager(*inputs: Tensor) -> Any:
    return op.reference(*inputs, 1e-6)


def make(*shape: int) -> list[Tensor]:
    wide = [torch.randn(shape), torch.randn(shape), torch.randn(shape[-1]), torch.randn(shape[-1])]
    return [x.double() for x in wide]


@pytest.mark.parametrize("parameters", [torch.float32, None], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 24), (3, 1000), (25, 33), (4, 3)], ids=str)
def test_forward_backward(
    shape: tuple[int, ...], dtype: torch.dtype, parameters: torch.dtype | None
) -> None:
    dtypes = [dtype] * 2 + [parameters or dtype] * 2
    low = [x.to(d) for x, d in zip(make(*shape), dtypes, strict=True)]
    exact = run(eager, [x.double() for x in low])
    for name, one, best, other in zip(NAMES, run(fused, low), exact, run(eager, low), strict=True):
        assert one.dtype == other.dtype
        assert_no_worse(name, one, best, other, eps=torch.finfo(dtype).eps)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(2, 30),
    channels=st.integers(4, 150),
    padding=st.integers(0, 9),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_any_call(rows: int, channels: int, padding: int, dtype: torch.dtype) -> None:
    low = [x.to(dtype) for x in make(rows, channels + padding)]
    low[2:] = [x[:channels] for x in low[2:]]
    exact = run(eager, [x.double() for x in low])
    for name, *triple in zip(NAMES, run(fused, low), exact, run(eager, low), strict=True):
        # Of few numbers the eager error may be small by luck.
        assert_no_worse(name, *triple, eps=max(2.0**-19, torch.finfo(dtype).eps))


def test_more_rows_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    # 11 programs of 3 rows and one of 1; more parts than are added up at a time.
    monkeypatch.setattr(kernels, "PROGRAMS", 12)
    monkeypatch.setattr(kernels, "SUM_ROWS", 4)
    low = [x.float() for x in make(34, 20)]
    exact = run(eager, [x.double() for x in low])
    for name, *triple in zip(NAMES, run(fused, low), exact, run(eager, low), strict=True):
        assert_no_worse(name, *triple)


def test_padding_is_ignored_and_zero() -> None:
    gate, value, weight, bias = (x.float() for x in make(5, 20))
    wide = [torch.cat((x, torch.full((5, 4), float("nan"))), -1) for x in (gate, value)]
    out, mean, rstd = op._cuda(*wide, weight, bias, 1e-6)
    want, *moments = op._cuda(gate, value, weight, bias, 1e-6)
    torch.testing.assert_close([out[:, :20], mean, rstd], [want, *moments])
    grad = torch.randn(5, 24)
    grads = op._cuda_bwd(grad, *wide, weight, mean, rstd)
    expected = op._cuda_bwd(grad[:, :20], gate, value, weight, *moments)
    for one, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(one[..., :20], other)
    for x in (out, *grads[:2]):
        assert not x[:, 20:].any()


def test_strides_and_no_rows() -> None:
    packed = torch.randn(6, 48)
    weight, bias = torch.randn(24), torch.randn(24)
    halves = [*packed.chunk(2, -1), weight, bias]
    copies = [x.contiguous() for x in halves]
    for one, other in zip(run(fused, halves), run(fused, copies), strict=True):
        assert torch.equal(one, other)
    empty = [packed[:0, :24], packed[:0, 24:], weight, bias]
    out, dgate, _, dweight, dbias = run(fused, empty)
    assert out.shape == dgate.shape == (0, 24)
    assert not dweight.any() and not dbias.any()


def test_large_gates_do_not_overflow() -> None:
    gate = torch.tensor([[-1e4, -90.0, 0.0, 90.0]])
    low = [gate, torch.ones(1, 4), torch.ones(4), torch.zeros(4)]
    for one, other in zip(run(fused, low), run(eager, low), strict=True):
        torch.testing.assert_close(one, other)


def test_cuda_takes_the_kernel_or_says_why_not() -> None:
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(2, 3, 8, device="cuda", requires_grad=True)
        w = torch.empty(8, device="cuda")
        assert kdfast.swiglu_norm(x, x, w, w, backend="fused").grad_fn is not None
        wide, w2 = x.repeat(1, 1, 2000), w.repeat(2000)
        for bad, p, reason in (
            (x.double(), w.double(), "not fp64"),
            (wide, w2, "rows of up to 8192"),
        ):
            with pytest.raises(NotImplementedError, match=reason):
                kdfast.swiglu_norm(bad, bad, p, p, backend="fused")
