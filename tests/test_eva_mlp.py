# SPDX-License-Identifier: Apache-2.0
"""EVA's MLP: the fused norm, and the width that the matrix products are given."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast.machine.memory import saved_bytes
from kdfast.models import eva_layers
from kdfast.models.eva_layers import SwiGLU
from kdfast.ops._matmul import rule
from kdfast.ops._processor import processor
from kdfast.testing import assert_no_worse

ROWS, DIM, HIDDEN = 2 * eva_layers.PAD_ROWS, 12, 42


def mlp(hidden: int = HIDDEN, dtype: torch.dtype = torch.float32) -> SwiGLU:
    layer = SwiGLU(DIM, hidden).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def by_hand(layer: SwiGLU, x: Tensor) -> Tensor:
    """ORION's formula, in plain torch."""
    norm = layer.ffn_ln
    hidden = F.silu(F.linear(x, layer.w1.weight, layer.w1.bias))
    hidden = hidden * F.linear(x, layer.w2.weight, layer.w2.bias)
    hidden = F.layer_norm(hidden, norm.weight.shape, norm.weight, norm.bias, 1e-6)
    return F.linear(hidden, layer.w3.weight, layer.w3.bias)


def results(function: Any, layer: SwiGLU, x: Tensor, upstream: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = function(x)
    return [out.detach(), *torch.autograd.grad(out, [x, *layer.parameters()], upstream)]


def widths(layer: SwiGLU, x: Tensor) -> list[int]:
    """Columns of what the MLP's norm is given."""
    seen = []
    handle = layer.ffn_ln.register_forward_pre_hook(lambda _, a: seen.append(a[0].shape[-1]))
    layer(x)
    handle.remove()
    return seen


@pytest.mark.parametrize("hidden", [HIDDEN, 64])
@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_equals_the_formula(hidden: int, rows: int, dtype: torch.dtype) -> None:
    layer = mlp(hidden, dtype)
    x, upstream = torch.randn(2, rows, DIM).to(dtype), torch.randn(2, rows, DIM).to(dtype)
    got = results(layer, layer, x, upstream)
    want = results(lambda y: by_hand(layer, y), layer, x, upstream)
    exact = mlp(hidden, torch.float64)
    exact.load_state_dict(layer.state_dict())
    best = results(lambda y: by_hand(exact, y), exact, x.double(), upstream.double())
    names = ["out", "x", *(name for name, _ in layer.named_parameters())]
    for name, one, true, other in zip(names, got, best, want, strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(one, true, msg=name)
        else:
            assert_no_worse(name, one, true, other, eps=4 * torch.finfo(dtype).eps)


def test_fp32_products_are_padded_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = mlp(), torch.randn(2, ROWS // 2, DIM)
    torchs = rule(torch.float32, processor(), "torch", True)
    monkeypatch.setattr("kdfast.models.eva_layers.choice", lambda dtype: torchs)
    assert widths(layer, x) == [64]
    assert widths(layer, x[:, :3]) == [HIDDEN]
    assert widths(mlp(64), x) == [64]
    assert widths(mlp(dtype=torch.bfloat16), x.bfloat16()) == [HIDDEN]
    with torch.autocast("cpu", torch.bfloat16):
        assert widths(layer, x) == [HIDDEN]


def test_onednn_needs_no_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    onednn = rule(torch.float32, processor(), "onednn", True)
    monkeypatch.setattr("kdfast.models.eva_layers.choice", lambda dtype: onednn)
    assert widths(mlp(), torch.randn(2, ROWS // 2, DIM)) == [HIDDEN]


@pytest.mark.parametrize("name", ["w1", "w2", "w3"])
def test_hooked_and_replaced_projections_are_called(name: str) -> None:
    layer, x = mlp(), torch.randn(1, ROWS, DIM)
    want, calls = layer(x), []
    handle = getattr(layer, name).register_forward_hook(lambda *_: calls.append(name))
    torch.testing.assert_close(layer(x), want)
    assert calls == [name]
    handle.remove()

    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    before = getattr(layer, name)
    other = Doubled(before.in_features, before.out_features)
    other.load_state_dict(before.state_dict())
    setattr(layer, name, other)
    assert not torch.allclose(layer(x), want)


def test_frozen_projections_get_no_gradient() -> None:
    layer, x = mlp(), torch.randn(1, ROWS, DIM)
    layer.w1.requires_grad_(False)
    layer.w3.bias.requires_grad_(False)
    layer(x).sum().backward()
    missing = {name for name, p in layer.named_parameters() if p.grad is None}
    assert missing == {"w1.weight", "w1.bias", "w3.bias"}


def test_padding_keeps_no_copy_of_the_weights() -> None:
    layer, x = mlp(), torch.randn(1, ROWS, DIM)
    x.requires_grad_()
    few = sum(p.nbytes for p in layer.parameters())
    activations = 4 * ROWS * (DIM + 3 * 64 + 2)
    assert saved_bytes(lambda: layer(x)) <= activations + few


@pytest.mark.usefixtures("compiled")
def test_autocast_gives_eagers_dtypes() -> None:
    layer, x = mlp(), torch.randn(2, ROWS, DIM)
    with torch.autocast("cpu", torch.bfloat16):
        out, want = layer(x), by_hand(layer, x)
        hidden = layer.ffn_ln(layer.w1(x), layer.w2(x))
    assert out.dtype == want.dtype == hidden.dtype == torch.bfloat16
    torch.testing.assert_close(out, want, rtol=0.05, atol=0.5)
    out.float().sum().backward()
    assert {p.grad.dtype for p in layer.parameters() if p.grad is not None} == {torch.float32}
