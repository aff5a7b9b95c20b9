# SPDX-License-Identifier: Apache-2.0
"""kd_loss at the ends of its arguments (temperatures, weights of 0, one class), and its kinds."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast
from kdfast.ops import _library
from kdfast.ops._divergence import KINDS

INF = float("inf")
BACKENDS = ["reference", "fused"]


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test of this file holds for both."""
    if request.param == "fused":
        request.getfixturevalue("compiled")
    monkeypatch.setattr(_library, "DEFAULT_BACKEND", request.param)
    return str(request.param)


def logits(dtype: torch.dtype, classes: int = 50) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(5)
    s, t = (2 * torch.randn(6, classes, generator=draw, dtype=torch.float64) for _ in range(2))
    return s.to(dtype).requires_grad_(), t.to(dtype)


def loss_and_gradient(s: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    loss = kdfast.kd_loss(s, *args, **options)[0]
    return loss.detach(), torch.autograd.grad(loss, s)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1e4, 1e6, 1e18, 1e30, 1e100])
def test_hot(temperature: float, dtype: torch.dtype) -> None:
    """T^2 KL goes to half the variance of s - t, its gradient to the centred difference over C."""
    s, t = logits(dtype)
    loss, grad = loss_and_gradient(s, t, temperature=temperature, alpha=1.0, reduction="sum")
    u = (s.detach() - t).double() if dtype == torch.float64 else s.detach().float() - t.float()
    u = u - u.mean(-1, keepdim=True)
    close = 20 / temperature + (1e-12 if dtype == torch.float64 else 1e-5)
    assert loss.item() == pytest.approx(u.square().mean(-1).sum().item() / 2, rel=close)
    grad_close = close + (8e-3 if dtype == torch.bfloat16 else 0)
    torch.testing.assert_close(
        grad.double(), u.double() / u.shape[-1], rtol=grad_close, atol=grad_close / 10
    )


@pytest.mark.parametrize("temperature", [31.0, 33.0, 200.0, 3000.0])
def test_warm_as_in_fp64(temperature: float) -> None:
    """Where fp32 would lose what T^2 brings back."""
    s, t = logits(torch.float32)
    exact = s.detach().double().requires_grad_()
    options: Any = {"temperature": temperature, "alpha": 1.0, "reduction": "none"}
    got = kdfast.kd_loss(s, t, **options)[0]
    want = kdfast.kd_loss(exact, t.double(), **options, backend="reference")[0]
    torch.testing.assert_close(got.double(), want, rtol=2e-4 if temperature < 32 else 2e-6, atol=0)
    grads = [torch.autograd.grad(x.sum(), y)[0] for x, y in ((got, s), (want, exact))]
    torch.testing.assert_close(grads[0].double(), grads[1], rtol=1e-4, atol=1e-6)


def test_warm_rows_that_are_far_or_ruled_out() -> None:
    s, t = torch.zeros(4, 3), torch.zeros(4, 3)
    s[1, 0], t[2, 1] = 1e4, -INF
    s[3, 2] = t[3, 2] = -INF
    s.requires_grad_()
    rows = kdfast.kd_loss(s, t, temperature=100.0, alpha=1.0, reduction="none")[0]
    exact = kdfast.kd_loss(
        s.double(), t.double(), temperature=100.0, alpha=1.0, reduction="none", backend="reference"
    )[0]
    torch.testing.assert_close(rows.double(), exact, rtol=1e-5, atol=1e-6)
    assert rows[0] == 0 and rows[3] == 0
    (grad,) = torch.autograd.grad(rows.sum(), s)
    assert grad.isfinite().all()


@pytest.mark.parametrize("temperature", [1e-3, 1e-10, 1e-30, 1e-42, 1e-300])
def test_cold(temperature: float) -> None:
    """T^2 KL goes to T times the student's gap from its largest logit to the teacher's choice."""
    s, t = logits(torch.float32)
    loss, grad = loss_and_gradient(s, t, temperature=temperature, alpha=1.0, reduction="sum")
    rows = s.detach().double()
    gap = rows.amax(-1) - rows.gather(-1, t.argmax(-1, keepdim=True))[:, 0]
    assert loss.item() == pytest.approx(temperature * gap.sum().item(), rel=1e-4, abs=1e-37)
    assert grad.isfinite().all()


def test_a_part_without_weight_is_left_out() -> None:
    labels = torch.tensor([1, 0, 2])
    ignored = torch.full((3,), -100)
    s, t = torch.randn(3, 4).requires_grad_(), torch.randn(3, 4)
    plain = F.cross_entropy(s, labels)
    for wild in (INF, math.nan):
        odd = t.clone()
        odd[0, 1] = wild
        loss, grad = loss_and_gradient(s, odd, labels, alpha=0.0)
        torch.testing.assert_close(loss, plain.detach())
        torch.testing.assert_close(grad, torch.autograd.grad(plain, s, retain_graph=True)[0])
    out = s.detach().clone()
    out[0, 3] = -INF  # kd is infinite, ce is not
    loss, grad = loss_and_gradient(out.requires_grad_(), t, labels, alpha=0.0)
    torch.testing.assert_close(loss, F.cross_entropy(out, labels).detach())
    assert grad.isfinite().all()
    for target in (ignored, labels):
        loss, grad = loss_and_gradient(s, t, target, alpha=1.0)
        want, want_grad = loss_and_gradient(s, t, alpha=1.0)
        assert torch.equal(loss, want) and torch.equal(grad, want_grad)
    loss, grad = loss_and_gradient(s, t, alpha=0.0)
    assert loss == 0 and not grad.any()


def test_all_rows_ignored() -> None:
    """As in torch the mean over no rows is NaN, and nothing flows from it; the sum is 0."""
    s, t = torch.randn(3, 4).requires_grad_(), torch.randn(3, 4)
    ignored = torch.full((3,), -100)
    loss, grad = loss_and_gradient(s, t, ignored, alpha=0.5)
    assert loss.isnan()
    _, kd_grad = loss_and_gradient(s, t, alpha=0.5)
    torch.testing.assert_close(grad, kd_grad)
    for reduction in ("sum", "none"):
        loss, kd, ce = kdfast.kd_loss(s, t, ignored, alpha=0.5, reduction=reduction)
        assert not ce.any()
        torch.testing.assert_close(loss.detach(), 0.5 * kd)


@pytest.mark.parametrize("temperature", [1e-40, 1.0, 1e30])
@pytest.mark.parametrize("kind", KINDS)
def test_one_class(kind: str, temperature: float) -> None:
    s, t = torch.randn(3, 1).requires_grad_(), torch.randn(3, 1)
    target = torch.zeros(3, dtype=torch.int64)
    options: Any = {"temperature": temperature, "kind": kind, "label_smoothing": 0.3}
    loss, grad = loss_and_gradient(s, t, target, **options, backend="reference")
    assert loss == 0 and grad.abs().max() < 1e-30
    if kind == "kl":
        loss, grad = loss_and_gradient(s, t, target, **options)
        assert loss == 0 and grad.abs().max() < 1e-30


def test_a_loss_too_large_for_its_type_is_infinite() -> None:
    s, t = torch.tensor([[3e38, -3e38]]), torch.tensor([[-3e38, 3e38]])
    assert kdfast.kd_loss(s, t, temperature=1.0)[0] == INF
    assert kdfast.feature_loss(s, t) == INF


def by_hand(s: Tensor, t: Tensor, temperature: float, kind: str) -> Tensor:
    log_p, log_r = F.log_softmax(s / temperature, -1), F.log_softmax(t / temperature, -1)
    p, r = log_p.exp(), log_r.exp()
    m = (p + r) / 2
    each = {
        "kl": r * (log_r - log_p),
        "reverse_kl": p * (log_p - log_r),
        "jsd": (r * (log_r - m.log()) + p * (log_p - m.log())) / 2,
    }
    return temperature**2 * each[kind].sum(-1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 60.0])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str, temperature: float) -> None:
    s, t = logits(torch.float64, 7)
    options: Any = {"temperature": temperature, "kind": kind, "alpha": 1.0, "reduction": "none"}
    rows = kdfast.kd_loss(s, t, **options, backend="reference")[0]
    want = by_hand(s, t, temperature, kind)
    torch.testing.assert_close(rows, want, rtol=1e-10, atol=1e-11)
    got, exact = (torch.autograd.grad(x.sum(), s)[0] for x in (rows, want))
    torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-10)
    small = s.detach()[:2, :4].clone().requires_grad_()
    options["temperature"] = min(temperature, 4.0)
    assert torch.autograd.gradcheck(
        lambda x: kdfast.kd_loss(x, t[:2, :4], **options, backend="reference")[0], small
    )


def test_kinds_say_what_has_no_kernel(compiled: None) -> None:
    s, t = torch.randn(2, 3), torch.randn(2, 3)
    with pytest.raises(NotImplementedError, match="have the kind 'kl', got 'jsd'"):
        kdfast.kd_loss(s, t, kind="jsd", backend="fused")
    with pytest.raises(NotImplementedError, match="inplace cannot run here: .*'reverse_kl'"):
        kdfast.kd_loss(s, t, kind="reverse_kl", inplace=True)
    with pytest.raises(ValueError, match=r"kind must be one of .* got 'js'"):
        kdfast.kd_loss(s, t, kind="js")
    with pytest.warns(kdfast.FallbackWarning, match="have the kind 'kl', got 'jsd'"):
        _library._warned.clear()
        kdfast.kd_loss(s, t, kind="jsd", backend="auto")


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_mean_is_torchs(alpha: float) -> None:
    s, t = logits(torch.float64, 9)
    target = torch.tensor([1, 0, -100, 8, 3, 3])
    loss, kd, ce = kdfast.kd_loss(s, t, target, temperature=2.0, alpha=alpha, reduction="mean")
    log_s, log_t = F.log_softmax(s / 2, -1), F.log_softmax(t / 2, -1)
    want_kd = 4 * F.kl_div(log_s, log_t, reduction="mean", log_target=True)
    want = alpha * want_kd + (1 - alpha) * F.cross_entropy(s, target)
    for got, value in ((loss, want), (kd, want_kd), (ce, F.cross_entropy(s, target))):
        torch.testing.assert_close(got, value)
    grads = [torch.autograd.grad(x, s)[0] for x in (loss, want)]
    torch.testing.assert_close(*grads)
    layer = torch.randn(9, 5, dtype=torch.float64)
    hidden = torch.randn(6, 5, dtype=torch.float64)
    found = kdfast.linear_kd_loss(hidden, layer, t, target, alpha=alpha, reduction="mean", chunk=2)
    exact = kdfast.kd_loss(hidden @ layer.T, t, target, alpha=alpha, reduction="mean")
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b)
