# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel in the interpreter, against the reference."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import kdfast
from kdfast.ops import feature_loss as op
from kdfast.testing import assert_no_worse, interpreted_kernels, run

kernels = interpreted_kernels("feature_loss")
pytestmark = pytest.mark.interpret


class Launch(torch.autograd.Function):
    """The function registered for CUDA, called on CPU tensors with the op's own arguments."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, *args: Any) -> Any:
        loss, grad = op._cuda(student, *args, True)
        ctx.save_for_backward(grad)
        ctx.dtype = student.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return (ctx.saved_tensors[0] * upstream).to(ctx.dtype), None, None, None


def compare(
    student: Tensor,
    teacher: Tensor,
    kind: str,
    norm: str,
    dtype: torch.dtype,
    eps: float | None = None,
) -> None:
    def fused(s: Tensor, t: Tensor) -> Any:
        return Launch.apply(s, t.detach(), kind, norm)  # type: ignore[no-untyped-call]

    def eager(s: Tensor, t: Tensor) -> Any:
        return op.reference(s, t, kind, norm)

    inputs = [student.double(), teacher.double()]
    low = [x.to(dtype) for x in inputs]
    for name, *triple in zip(
        ("loss", "grad"), run(fused, low), run(eager, inputs), run(eager, low), strict=False
    ):
        # The error of a single number may be 0 by luck.
        assert_no_worse(name, *triple, eps=eps if triple[0].numel() == 1 else None)


@pytest.mark.parametrize("norm", op.NORMALIZATIONS)
@pytest.mark.parametrize("kind", op.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 24), (3, 1000), (150, 33), (2, 1)], ids=str)
def test_forward_backward(shape: tuple[int, ...], dtype: torch.dtype, kind: str, norm: str) -> None:
    # Differences on both sides of smooth_l1's corner, and a mean that is far from 0.
    compare(3 + torch.randn(shape), 3 + 2 * torch.randn(shape), kind, norm, dtype)


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    shape=st.tuples(st.integers(5, 150), st.integers(1, 200)),
    kind=st.sampled_from(op.KINDS),
    norm=st.sampled_from(op.NORMALIZATIONS),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_any_call(shape: tuple[int, int], kind: str, norm: str, dtype: torch.dtype) -> None:
    compare(1 + torch.randn(shape), 1 + 2 * torch.randn(shape), kind, norm, dtype, 2.0**-17)


def test_constants_are_the_op_s() -> None:
    assert (kernels.EPS.value, kernels.ZERO_NORM.value) == (op.EPS, op.ZERO_NORM)
    assert (kernels.KINDS, kernels.NORMALIZATIONS) == (op.KINDS, op.NORMALIZATIONS)


@pytest.mark.parametrize("kind", op.KINDS)
def test_equal_features_are_exactly_zero(kind: str) -> None:
    x = torch.randn(5, 20)
    for norm in op.NORMALIZATIONS:
        loss, grad = op._cuda(x, x, kind, norm, True)
        assert loss == 0
        assert not grad.any()


def test_vectors_without_direction() -> None:
    student, teacher = torch.randn(4, 8), torch.randn(4, 8)
    student[0], teacher[1], student[2], teacher[2] = 0, 0, 0, 0
    loss, grad = op._cuda(student, teacher, "cosine", "none", True)
    cos = torch.nn.functional.cosine_similarity(student[3], teacher[3], 0)
    # One zero vector costs 1, two cost nothing; none of them gives a gradient.
    torch.testing.assert_close(loss, (1 + 1 + 0 + 1 - cos) / 4)
    assert not grad[:3].any()
    assert grad[3].any()


def test_channel_statistics() -> None:
    teacher = 1000 + torch.randn(300, 40)
    mean, factor = kernels.channel_statistics(teacher)
    exact = teacher.double()
    torch.testing.assert_close(mean.double(), exact.mean(0), rtol=1e-6, atol=0)
    want = (exact.var(0, correction=0) + op.EPS).rsqrt()
    torch.testing.assert_close(factor.double(), want, rtol=1e-5, atol=0)


def test_strides_and_no_positions() -> None:
    wide = torch.randn(6, 24)
    got = op._cuda(wide[:, :10], wide[:, 12:22], "cosine", "layer", True)
    want = op._cuda(wide[:, :10].clone(), wide[:, 12:22].clone(), "cosine", "layer", True)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    loss, grad = op._cuda(torch.zeros(0, 4), torch.zeros(0, 4), "mse", "channel", True)
    assert loss.isnan()
    assert grad.shape == (0, 4)
    assert op._cuda(wide, wide, "mse", "none", False)[1].shape == (0,)


def test_cuda_takes_the_kernel_or_says_why_not() -> None:
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(2, 3, 8, device="cuda", requires_grad=True)
        assert kdfast.feature_loss(x, x, backend="fused").grad_fn is not None
        for bad, reason in ((x.double(), "not fp64"), (x.repeat(1, 1, 2000), "up to 8192 feat")):
            with pytest.raises(NotImplementedError, match=reason):
                kdfast.feature_loss(bad, bad, backend="fused")
