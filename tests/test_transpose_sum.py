# SPDX-License-Identifier: Apache-2.0
"""The transpose of a gradient with the sums of its columns, and the weight gradient made of it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast
from kdfast.ops import _matmul
from kdfast.ops import linear as op_linear
from kdfast.ops._matmul import Choice
from kdfast.testing import assert_no_worse

OP = torch.ops.kdfast.transpose_sum.default
# Less than a block, with rests in both directions, several strips, rows that are summed in parts.
SHAPES = [(1, 1), (3, 70), (16, 16), (33, 64), (70, 3), (200, 130), (1000, 65)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape: tuple[int, int], isa: str) -> None:
    x = torch.randn(shape) + 0.1
    turned, sums = OP(x, True)
    assert torch.equal(turned, x.t()) and turned.is_contiguous()
    assert_no_worse("sums", sums, x.double().sum(0), x.sum(0))
    turned, sums = OP(x, False)
    assert torch.equal(turned, x.t()) and sums.shape == (0,)


def test_strides_and_empty_inputs(compiled: None) -> None:
    big = torch.randn(100, 300)
    for x in (big[::3, 5:80], big.t(), big[:, ::2], big[:1].expand(40, 300), big[:, :1]):
        turned, sums = OP(x, True)
        assert torch.equal(turned, x.t())
        torch.testing.assert_close(sums, x.sum(0))
    for shape in ((0, 5), (5, 0)):
        turned, sums = OP(torch.randn(shape), True)
        assert turned.shape == shape[::-1] and torch.equal(sums, torch.zeros(shape[1]))


def test_nan_stays_in_its_column(isa: str) -> None:
    x = torch.randn(40, 70)
    x[17, 3], x[39, 69] = float("nan"), float("inf")
    sums = OP(x, True)[1]
    assert sums.isfinite().logical_not().nonzero().flatten().tolist() == [3, 69]


def test_threads_do_not_change_the_bits(compiled: None) -> None:
    x, found = torch.randn(700, 500), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(OP(x, True)[1])
    assert all(torch.equal(found[0], other) for other in found)


def test_what_the_op_refuses(compiled: None) -> None:
    for x in (torch.randn(3), torch.randn(2, 3, 4), torch.randn(2, 3).double()):
        with pytest.raises(ValueError, match=r"x must be \(R, C\) of fp32"):
            OP(x, True)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch, compiled: None) -> list[Tensor]:
    """oneDNN computes all products of fp32; what was transposed by the kernel."""
    if not _matmul._available():
        pytest.skip("this torch has no oneDNN")
    choice = Choice(True, True, True, True, True, "as the test wants it")
    monkeypatch.setattr(_matmul, "CHOICES", {torch.float32: choice, torch.bfloat16: choice})
    seen: list[Tensor] = []
    real = op_linear.parameter_gradients

    def counting(grad: Tensor, x: Tensor, weight: bool, bias: bool) -> object:
        seen.append(grad)
        return real(grad, x, weight, bias)

    monkeypatch.setattr(op_linear, "parameter_gradients", counting)
    return seen


@pytest.mark.parametrize("wanted", ["both", "weight", "bias", "none"])
@pytest.mark.parametrize("shape", [(4, 50, 96, 384), (1, 197, 384, 96), (7, 3, 900, 81)], ids=str)
def test_gradients_of_linear(
    shape: tuple[int, int, int, int], wanted: str, always: list[Tensor]
) -> None:
    batch, tokens, width, height = shape
    x = torch.randn(batch, tokens, width, requires_grad=True)
    weight = torch.randn(height, width, requires_grad=wanted in ("both", "weight"))
    bias = torch.randn(height, requires_grad=wanted in ("both", "bias"))
    grad = torch.randn(batch, tokens, height)
    leaves = [t for t in (x, weight, bias) if t.requires_grad]

    def gradients(function: object, *, double: bool = False) -> list[Tensor]:
        given = [t.double() if double else t for t in (x, weight, bias)]
        out = function(*given)  # type: ignore[operator]
        return list(torch.autograd.grad(out, leaves, grad.to(out.dtype)))

    got = gradients(kdfast.linear)
    best, other = gradients(F.linear, double=True), gradients(F.linear)
    assert always
    for one, exact, eager in zip(got, best, other, strict=True):
        assert one.shape == eager.shape and one.dtype == eager.dtype
        assert_no_worse(f"{shape} {wanted}", one, exact.double(), eager)


def test_second_derivatives_still_exist(always: list[Tensor]) -> None:
    x, weight = torch.randn(60, 96, requires_grad=True), torch.randn(192, 96, requires_grad=True)
    found = []
    for function in (kdfast.linear, F.linear):
        (first,) = torch.autograd.grad(function(x, weight).pow(3).sum(), weight, create_graph=True)
        found.append(torch.autograd.grad(first.square().mean(), x)[0])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3 * float(found[1].abs().max()))
