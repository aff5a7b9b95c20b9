# SPDX-License-Identifier: Apache-2.0
"""LayerNorm inside fused blocks against torch's, and which norms it takes the place of."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm as TimmLayerNorm
from timm.layers import LayerNormFp32
from torch import Tensor, nn

from kdfast.ops._layer_norm import is_layer_norm, normed
from kdfast.testing import assert_no_worse

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Rows shorter than a vector, with every number of sums and a rest, of ViTs, and long ones.
SHAPES = [(5, 1), (4, 3), (2, 3, 37), (7, 64), (3, 90), (2, 197, 96), (9, 384), (2, 5, 1029)]
OP = torch.ops.kdfast.layer_norm.default


def exact(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    parameters = [None if t is None else t.double() for t in (weight, bias)]
    return F.layer_norm(x.double(), x.shape[-1:], *parameters, eps)


def compare(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-6) -> None:
    got = OP(x, weight, bias, eps)
    assert got.shape == x.shape and got.dtype == x.dtype and got.is_contiguous()
    eager = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if x.dtype == torch.float64:
        torch.testing.assert_close(got, eager, rtol=1e-12, atol=1e-12)
    else:
        assert_no_worse(f"{tuple(x.shape)}", got, exact(x, weight, bias, eps), eager)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parameters", ["both", "weight", "bias", "none", "fp32"])
def test_no_worse_than_torch(parameters: str, dtype: torch.dtype, isa: str) -> None:
    wide = torch.promote_types(dtype, torch.float32) if parameters == "fp32" else dtype
    for shape in SHAPES:
        x = (torch.randn(shape) * 2 + 0.5).to(dtype)
        weight, bias = torch.rand(shape[-1]).to(wide), torch.randn(shape[-1]).to(wide)
        given = {"weight": (weight, None), "bias": (None, bias), "none": (None, None)}
        compare(x, *given.get(parameters, (weight, bias)))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_rows_far_from_zero_and_without_variance(dtype: torch.dtype, isa: str) -> None:
    for offset, size in ((1000.0, 1.0), (-3e4, 16.0), (0.0, 1e-4)):
        compare((torch.randn(6, 200) * size + offset).to(dtype), None, None)
    for value in (0.0, 0.1, 1e4):
        row = torch.full((3, 77), value).to(dtype)
        bias = torch.randn(77).to(dtype)
        assert torch.equal(OP(row, torch.ones_like(bias), bias, 1e-6), bias.expand(3, 77))
    outlier = torch.randn(4, 384).to(dtype)
    outlier[:, 7] = 900
    compare(outlier, None, None)


def test_nan_and_infinity_stay_in_their_row(isa: str) -> None:
    x = torch.randn(5, 40)
    x[1, 3], x[3, 39] = float("nan"), float("inf")
    got = OP(x, None, None, 1e-6)
    assert got.isnan().all(1).tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_rows_strides_and_threads(threads: int, compiled: None) -> None:
    torch.set_num_threads(threads)
    weight, bias = torch.rand(48), torch.randn(48)
    big = torch.randn(4, 5000, 48)
    cases = [
        big,
        big[:, ::3],
        big.transpose(0, 1),
        torch.randn(3, 7, 96)[..., 48:],
        torch.randn(3, 7, 96)[..., ::2],
        torch.randn(1, 7, 48).expand(3, 7, 48),
        torch.randn(48),
        torch.randn(0, 48),
    ]
    for x in cases:
        before = x.clone()
        got = OP(x, weight, bias, 1e-5)
        torch.testing.assert_close(got, F.layer_norm(x, (48,), weight, bias, 1e-5))
        assert torch.equal(x, before)


def test_what_the_op_refuses(compiled: None) -> None:
    x, weight = torch.randn(3, 8), torch.rand(8)
    for args, text in (
        ((x, weight[:7], None, 1e-6), r"weight must be \(C,\)"),
        ((x, None, weight.double(), 1e-6), "bias must be"),
        ((x, torch.rand(16)[::2], None, 1e-6), "contiguous"),
        ((x.bfloat16(), weight, weight.bfloat16(), 1e-6), "one type"),
        ((torch.randn(()), None, None, 1e-6), r"x must be \(\.\.\., C\)"),
        ((x[:, :0], None, None, 1e-6), r"x must be \(\.\.\., C\)"),
        ((x, weight, None, -1.0), "eps must not be negative"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=text):
            OP(*args)
    with pytest.raises(TypeError, match="floating"):
        OP(torch.ones(2, 3, dtype=torch.int64), None, None, 1e-6)


class Counting(nn.LayerNorm):
    """A subclass, which may compute anything."""


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(24), TimmLayerNorm(24), nn.LayerNorm(24, bias=False)]
)
def test_norms_it_stands_in_for(norm: Any, monkeypatch: pytest.MonkeyPatch, compiled: None) -> None:
    x = torch.randn(2, 5, 24)
    with torch.no_grad():
        want = norm(x)
        monkeypatch.setattr(type(norm), "forward", None)
        torch.testing.assert_close(normed(norm, x), want)


def test_norms_that_run_their_own_code(compiled: None) -> None:
    seen: list[int] = []
    hooked = nn.LayerNorm(24)
    hooked.register_forward_hook(lambda *_: seen.append(1))
    mixed = nn.LayerNorm(24)
    mixed.bias = nn.Parameter(mixed.bias.detach().double())
    x = torch.randn(2, 5, 24)
    for norm in (hooked, Counting(24), nn.LayerNorm((5, 24)), nn.Identity(), LayerNormFp32(24)):
        assert not is_layer_norm(norm)
        with torch.no_grad():
            assert torch.equal(normed(norm, x), norm(x))
    assert len(seen) == 2
    with pytest.raises(RuntimeError):  # torch's own error
        normed(mixed, x)
    with pytest.raises(RuntimeError, match="normalized_shape"):
        normed(nn.LayerNorm(23), x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        norm = nn.LayerNorm(24)
        assert normed(norm, x.bfloat16()).dtype == norm(x.bfloat16()).dtype
