# SPDX-License-Identifier: Apache-2.0
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast
from kdfast.ops import _library


@pytest.fixture(autouse=True, params=["reference", "fused"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test of this file holds for both."""
    if request.param == "fused":
        request.getfixturevalue("compiled")
    monkeypatch.setattr(_library, "DEFAULT_BACKEND", request.param)


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    wide = [torch.randn(shape), torch.randn(shape), torch.randn(shape[-1]), torch.randn(shape[-1])]
    return [x.to(dtype).requires_grad_() for x in wide]


def test_literal() -> None:
    # silu(ln 3) = 0.75 ln 3 and silu(-ln 3) = -0.25 ln 3: products 3 and 1 after the scaling.
    log3 = math.log(3)
    gate = torch.tensor([[log3, -log3]], dtype=torch.float64)
    value = torch.tensor([[4 / log3, -4 / log3]], dtype=torch.float64)
    weight, bias = torch.tensor([2.0, 10.0]).double(), torch.tensor([1.0, 0.5]).double()
    # Mean 2 and variance 1; eps = 3 makes the deviation 2.
    out = kdfast.swiglu_norm(gate, value, weight, bias, eps=3.0)
    torch.testing.assert_close(out, torch.tensor([[2.0, -4.5]]).double())


def test_default_eps() -> None:
    gate, value, weight, bias = inputs(2, 5)
    small = value * 1e-3
    got = kdfast.swiglu_norm(gate, small, weight, bias)
    torch.testing.assert_close(got, kdfast.swiglu_norm(gate, small, weight, bias, eps=1e-6))
    assert not torch.allclose(got, kdfast.swiglu_norm(gate, small, weight, bias, eps=1e-5))


def by_hand(gate: Tensor, value: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    h = gate / (1 + torch.exp(-gate)) * value
    centred = h - h.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 50), (2, 3, 41), (40, 16)], ids=str)
def test_values_and_gradients(shape: tuple[int, ...]) -> None:
    leaves = inputs(*shape)
    got = kdfast.swiglu_norm(*leaves, eps=0.1)
    want = by_hand(*leaves, eps=0.1)
    torch.testing.assert_close(got, want)
    upstream = torch.randn_like(want)
    for one, other in zip(
        torch.autograd.grad(got, leaves, upstream),
        torch.autograd.grad(want, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_gradcheck() -> None:
    leaves = inputs(3, 5)
    assert torch.autograd.gradcheck(lambda *x: kdfast.swiglu_norm(*x, eps=0.01), leaves)


@pytest.mark.parametrize("needed", range(4))
def test_one_gradient_alone(needed: int) -> None:
    leaves = [x.detach() for x in inputs(4, 6)]
    leaves[needed].requires_grad_()
    got = torch.autograd.grad(kdfast.swiglu_norm(*leaves).sin().sum(), leaves[needed])[0]
    want = torch.autograd.grad(by_hand(*leaves, eps=1e-6).sin().sum(), leaves[needed])[0]
    torch.testing.assert_close(got, want)


def test_padding_is_ignored_and_zero() -> None:
    gate, value, weight, bias = inputs(7, 40)
    dirty = [torch.cat((x, torch.full((7, 5), math.nan)), -1).detach() for x in (gate, value)]
    wide = [x.requires_grad_() for x in dirty]
    out = kdfast.swiglu_norm(*wide, weight, bias)
    want = kdfast.swiglu_norm(gate, value, weight, bias)
    torch.testing.assert_close(out[:, :40], want)
    assert not out[:, 40:].any()
    upstream = torch.randn(7, 45).double()
    grads = torch.autograd.grad(out, [*wide, weight, bias], upstream)
    expected = torch.autograd.grad(want, [gate, value, weight, bias], upstream[:, :40])
    for one, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(one[..., :40], other)
    assert not grads[0][:, 40:].any() and not grads[1][:, 40:].any()


def test_no_rows() -> None:
    leaves = inputs(0, 5, dtype=torch.float32)
    out = kdfast.swiglu_norm(*leaves)
    assert out.shape == (0, 5)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert not grads[2].any() and not grads[3].any()
    assert grads[0].shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_extreme_gates(dtype: torch.dtype) -> None:
    gate = torch.tensor([[-1e4, -90.0, -20.0, 0.0, 20.0, 90.0, 1e4]], dtype=dtype)
    value = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1e-3]], dtype=dtype)
    one, zero = torch.ones(7, dtype=dtype), torch.zeros(7, dtype=dtype)
    leaves = [gate.requires_grad_(), value.requires_grad_(), one, zero]
    out = kdfast.swiglu_norm(*leaves)
    want = F.layer_norm(torch.tensor([0, 0, 0, 0, 20, 90, 10.0]), (7,), eps=1e-6)
    torch.testing.assert_close(out[0].float(), want, rtol=1e-2, atol=1e-2)
    for grad in torch.autograd.grad(out.square().sum(), leaves[:2]):
        assert grad.isfinite().all()


def test_nan_stays_in_its_row() -> None:
    gate, value, weight, bias = (x.detach() for x in inputs(3, 20, dtype=torch.float32))
    gate[1, 18] = math.nan
    out = kdfast.swiglu_norm(gate, value, weight, bias)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


def test_autocast_dtypes() -> None:
    # What autocast hands over: a low-precision gate, parameters in fp32.
    gate, value, weight, bias = inputs(5, 48, dtype=torch.float32)
    low = [x.detach().bfloat16().requires_grad_() for x in (gate, value)]
    out = kdfast.swiglu_norm(*low, weight, bias)
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out.sum(), [*low, weight, bias])
    assert [g.dtype for g in grads] == [torch.bfloat16] * 2 + [torch.float32] * 2
    want = by_hand(*(x.double() for x in (*low, weight, bias)), eps=1e-6)
    torch.testing.assert_close(out.double(), want, rtol=2e-2, atol=2e-2)


Change = Callable[[dict[str, Any]], None]
REJECTED: list[tuple[type[Exception], str, Change]] = [
    (TypeError, "one dtype of", lambda x: x.update(gate=x["gate"].int(), value=x["value"].int())),
    (TypeError, "float32 and torch.float64", lambda x: x.update(value=x["value"].double())),
    (TypeError, "weight and bias must both", lambda x: x.update(weight=x["weight"].half())),
    (TypeError, "weight and bias must both", lambda x: x.update(bias=x["bias"].double())),
    (ValueError, r"got \(4, 6\) and \(3, 6\)", lambda x: x.update(value=torch.ones(3, 6))),
    (ValueError, r"must both be \(..., P\)", lambda x: x.update(gate=torch.ones(()))),
    (ValueError, "0 < C <= 5", lambda x: x.update(gate=x["gate"][:, 1:], value=x["gate"][:, 1:])),
    (
        ValueError,
        r"0 < C <= 6, got \(0,\) and \(0,\)",
        lambda x: x.update(weight=torch.ones(0), bias=torch.ones(0)),
    ),
    (ValueError, r"got \(6,\) and \(5,\)", lambda x: x.update(bias=torch.ones(5))),
    (ValueError, r"got \(1, 6\) and \(6,\)", lambda x: x.update(weight=torch.ones(1, 6))),
    (
        ValueError,
        "value must be on the device of gate",
        lambda x: x.update(value=torch.empty(4, 6, device="meta")),
    ),
    (ValueError, "eps must not be negative, got -1", lambda x: x.update(eps=-1.0)),
]


@pytest.mark.parametrize(("error", "message", "change"), REJECTED)
def test_rejects(error: type[Exception], message: str, change: Change) -> None:
    names = ("gate", "value", "weight", "bias")
    arguments: dict[str, Any] = dict(zip(names, inputs(4, 6, dtype=torch.float32), strict=True))
    change(arguments)
    tensors = [arguments.pop(name) for name in names]
    with pytest.raises(error, match=message):
        kdfast.swiglu_norm(*tensors, **arguments)
