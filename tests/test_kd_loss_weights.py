# SPDX-License-Identifier: Apache-2.0
"""Class weights, focal terms and several labels per image, against torch's own functions."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast
from kdfast.ops import _library

BACKENDS = ["reference", "auto"]
WEIGHT = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0], dtype=torch.float64)


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test of this file holds for both; FallbackWarning is an error in tests."""
    if request.param == "auto":
        request.getfixturevalue("compiled")
    monkeypatch.setattr(_library, "DEFAULT_BACKEND", request.param)
    return str(request.param)


def logits(*shape: int) -> tuple[Tensor, Tensor]:
    s, t = (2 * torch.randn(*shape, dtype=torch.float64) for _ in range(2))
    return s.requires_grad_(), t


def labels(kind: str, rows: int = 12, classes: int = 5) -> Tensor:
    target = torch.arange(rows) % classes
    if kind == "ignored":
        target[::4] = -100
    if kind == "soft":
        return torch.rand(rows, classes, dtype=torch.float64).softmax(-1)
    return target


def same(got: Tensor, want: Tensor, s: Tensor) -> None:
    """Values and gradients."""
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(x.sum(), s, retain_graph=True)[0] for x in (got, want)]
    torch.testing.assert_close(*grads)


def distance(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    log_s, log_t = ((x / temperature).log_softmax(-1) for x in (s, t))
    return temperature**2 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


def focal(s: Tensor, target: Tensor, gamma: float, weight: Tensor | None = None) -> Tensor:
    """Rows of the formula of arXiv 1708.02002 for class indices."""
    p = s.softmax(-1).gather(-1, target[:, None])[:, 0]
    rows = -((1 - p) ** gamma) * p.log()
    return rows if weight is None else rows * weight[target]


@pytest.mark.parametrize("kind", ["hard", "ignored", "soft"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_weights_are_those_of_cross_entropy(kind: str, smoothing: float, alpha: float) -> None:
    s, t = logits(12, 5)
    target = labels(kind)
    options: dict[str, Any] = {"temperature": 2.0, "alpha": alpha, "label_smoothing": smoothing}
    loss, kd, ce = kdfast.kd_loss(s, t, target, class_weight=WEIGHT, **options)
    want = F.cross_entropy(s, target, weight=WEIGHT, label_smoothing=smoothing)
    torch.testing.assert_close(ce, want.detach())
    same(loss, alpha * distance(s, t, 2.0) + (1 - alpha) * want, s)
    torch.testing.assert_close(kd, distance(s, t, 2.0).detach())


@pytest.mark.parametrize("kind", ["hard", "ignored", "soft"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_reductions_of_weighted_rows(kind: str, reduction: str) -> None:
    s, t = logits(12, 5)
    target = labels(kind)
    _, _, ce = kdfast.kd_loss(s, t, target, class_weight=WEIGHT, reduction=reduction)
    want = F.cross_entropy(s, target, weight=WEIGHT, reduction=reduction)
    torch.testing.assert_close(ce, want.detach())
    whole = kdfast.kd_loss(s, t, target, class_weight=WEIGHT, alpha=0.0, reduction=reduction)[0]
    same(whole, want, s)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_focal_term(gamma: float, weight: Tensor | None, alpha: float) -> None:
    s, t = logits(12, 5)
    target = labels("hard")
    loss, _, ce = kdfast.kd_loss(
        s, t, target, focal_gamma=gamma, class_weight=weight, alpha=alpha, temperature=2.0
    )
    rows = focal(s, target, gamma, weight)
    want = rows.sum() / (12 if weight is None else weight[target].sum())
    torch.testing.assert_close(ce, want.detach())
    same(loss, alpha * distance(s, t, 2.0) + (1 - alpha) * want, s)
    options: dict[str, Any] = {"focal_gamma": gamma, "class_weight": weight}
    each = kdfast.kd_loss(s, t, target, reduction="none", alpha=0.0, **options)[0]
    same(each, rows, s)


@pytest.mark.parametrize("kind", ["hard", "ignored", "soft"])
def test_gradcheck_of_focal_terms(kind: str) -> None:
    s, t = logits(6, 5)
    target = labels(kind, 6)

    def loss(x: Tensor) -> Tensor:
        options: dict[str, Any] = {"class_weight": WEIGHT, "label_smoothing": 0.1}
        return kdfast.kd_loss(x, t, target, focal_gamma=1.5, backend="reference", **options)[0]

    assert torch.autograd.gradcheck(loss, (s,))
    assert torch.autograd.gradgradcheck(loss, (s,))


def test_limits() -> None:
    s, t = logits(12, 5)
    target = labels("ignored")
    plain = kdfast.kd_loss(s, t, target)
    for options in ({"class_weight": torch.ones(5)}, {"focal_gamma": 1e-300}):
        for got, want in zip(kdfast.kd_loss(s, t, target, **options), plain, strict=True):
            torch.testing.assert_close(got, want)
    # gamma 0 is no focal term at all: bit for bit.
    for got, want in zip(kdfast.kd_loss(s, t, target, focal_gamma=0.0), plain, strict=True):
        assert torch.equal(got, want)
    nobody = torch.full((12,), -100)
    for more in ({"class_weight": WEIGHT}, {"focal_gamma": 2.0}):
        assert kdfast.kd_loss(s, t, nobody, **more)[2].isnan()
        assert kdfast.kd_loss(s, t, nobody, reduction="sum", **more)[2] == 0
        loss, kd, _ = kdfast.kd_loss(s, t, nobody, alpha=1.0, **more)
        assert torch.equal(loss, kd) and torch.autograd.grad(loss, s)[0].isfinite().all()
    # A class without weight has no say; a mean of weights 0 is that of torch.
    two = torch.full((12,), 2)
    assert kdfast.kd_loss(s, t, two, class_weight=WEIGHT)[2].isnan()
    assert F.cross_entropy(s, two, weight=WEIGHT).isnan()
    loss = kdfast.kd_loss(s, t, two, class_weight=WEIGHT, alpha=0.0, reduction="sum")[0]
    assert loss == 0 and not torch.autograd.grad(loss, s)[0].any()


@pytest.mark.parametrize("gamma", [0.3, 1.0, 2.0])
def test_certain_rows_have_finite_gradients(gamma: float) -> None:
    """p = 1 and p = 0, where powers and logarithms of the formula are at their ends."""
    s = torch.tensor([[200.0, 0.0], [0.0, 200.0], [-math.inf, 0.0]], requires_grad=True)
    target = torch.tensor([0, 0, 1])
    loss = kdfast.kd_loss(s, s.detach(), target, alpha=0.0, focal_gamma=gamma)[0]
    loss.backward()
    assert loss.item() == pytest.approx(200 / 3)
    assert s.grad is not None and s.grad.isfinite().all()
    assert s.grad[0].tolist() == [0, 0] and s.grad[1].tolist() == pytest.approx([-1 / 3, 1 / 3])
    z = torch.tensor([[200.0, -200.0]], requires_grad=True)
    options: dict[str, Any] = {"alpha": 0.0, "focal_gamma": gamma}
    sure = kdfast.multilabel_kd_loss(z, z.detach(), torch.tensor([[1.0, 0.0]]), **options)[0]
    assert sure == 0 and not torch.autograd.grad(sure, z)[0].any()


def test_dtypes_of_weights() -> None:
    s, t = torch.randn(8, 5, dtype=torch.bfloat16, requires_grad=True), torch.randn(8, 5)
    for weight in (WEIGHT, WEIGHT.half(), WEIGHT.float().requires_grad_()):
        loss, _, ce = kdfast.kd_loss(s, t, torch.arange(8) % 5, class_weight=weight)
        assert loss.dtype == ce.dtype == torch.float32
        want = F.cross_entropy(s.float(), torch.arange(8) % 5, weight=WEIGHT.float())
        torch.testing.assert_close(ce, want.detach(), rtol=1e-5, atol=1e-6)
        loss.backward()
        assert weight.grad is None
    assert s.grad is not None and s.grad.dtype == torch.bfloat16


def test_in_place(backend: str) -> None:
    if backend == "reference":
        pytest.skip("the reference overwrites nothing")
    s, t = (torch.randn(8, 5) for _ in range(2))
    target, weight = torch.arange(8) % 5, WEIGHT.float()
    leaf = s.clone().requires_grad_()
    kdfast.kd_loss(leaf * 1, t, target, class_weight=weight, inplace=True)[0].backward()
    other = s.clone().requires_grad_()
    kdfast.kd_loss(other, t, target, class_weight=weight)[0].backward()
    assert torch.equal(leaf.grad, other.grad)  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="inplace has no focal term"):
        kdfast.kd_loss(leaf * 1, t, target, focal_gamma=2.0, inplace=True)


def test_compiles() -> None:
    s, t = torch.randn(8, 5), torch.randn(8, 5)
    target, weight = torch.arange(8) % 5, WEIGHT.float()

    def loss(s: Tensor, gamma: float) -> Tensor:
        return kdfast.kd_loss(s, t, target, class_weight=weight, focal_gamma=gamma)[0]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for gamma in (0.0, 2.0):
        torch.testing.assert_close(compiled(s, gamma), loss(s, gamma))


@pytest.mark.parametrize("given", ["none", "pos", "both"])
@pytest.mark.parametrize("alpha", [0.0, 0.4])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_several_labels(given: str, alpha: float, reduction: str) -> None:
    s, t = logits(3, 4, 5)
    target = torch.rand(3, 4, 5, dtype=torch.float64)
    target[0] = target[0].round()
    positive = None if given == "none" else torch.rand(5, dtype=torch.float64) + 0.5
    weight = WEIGHT if given == "both" else None
    loss, kd, bce = kdfast.multilabel_kd_loss(
        s, t, target, temperature=2.0, alpha=alpha, reduction=reduction,
        class_weight=weight, pos_weight=positive,
    )  # fmt: skip
    hard = F.binary_cross_entropy_with_logits(
        s, target, weight, pos_weight=positive, reduction=reduction
    )
    p, r = (s / 2).sigmoid(), (t / 2).sigmoid()
    soft = 4 * (r * (r / p).log() + (1 - r) * ((1 - r) / (1 - p)).log())
    soft = {"mean": soft.mean(), "sum": soft.sum(), "none": soft}[reduction]
    torch.testing.assert_close(bce, hard.detach())
    torch.testing.assert_close(kd, soft.detach())
    same(loss, alpha * soft + (1 - alpha) * hard, s)


@pytest.mark.parametrize("focal_alpha", [None, 0.25])
@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_term_of_several_labels(gamma: float, focal_alpha: float | None) -> None:
    """torchvision's sigmoid_focal_loss, whose alpha -1 is none."""
    sigmoid_focal_loss = pytest.importorskip("torchvision.ops").sigmoid_focal_loss
    s, t = logits(6, 5)
    target = torch.randint(0, 2, (6, 5)).double()
    options: dict[str, Any] = {"focal_gamma": gamma, "focal_alpha": focal_alpha}
    for reduction in ("mean", "sum", "none"):
        loss, _, bce = kdfast.multilabel_kd_loss(s, t, target, reduction=reduction, **options)
        want = sigmoid_focal_loss(
            s, target, -1 if focal_alpha is None else focal_alpha, gamma, reduction
        )
        torch.testing.assert_close(bce, want.detach())
        kd = kdfast.multilabel_kd_loss(s, t, alpha=1.0, reduction=reduction)[0]
        same(loss, 0.7 * kd + 0.3 * want, s)


def test_several_labels_without_a_target() -> None:
    s, t = logits(3, 5)
    loss, kd, bce = kdfast.multilabel_kd_loss(s, t, alpha=0.5, focal_gamma=2.0)
    assert bce == 0 and loss == 0.5 * kd and kd > 0
    loss, kd, _ = kdfast.multilabel_kd_loss(
        s, s.detach(), alpha=1.0, kind="jsd", backend="reference"
    )
    assert kd == 0


TWO = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"class_weight": [1.0] * 5}, TypeError, "class_weight must be a tensor, got list"),
        (
            {"class_weight": TWO},
            TypeError,
            "class_weight must be one of .* got torch.int64",
        ),
        ({"class_weight": torch.ones(4)}, ValueError, r"class_weight must be \(5,\), got \(4,\)"),
        ({"class_weight": torch.ones(5, device="meta")}, ValueError, "on the device of student"),
        ({"focal_gamma": -1.0}, ValueError, "focal_gamma must be at least 0 and finite, got -1.0"),
        ({"focal_gamma": math.inf}, ValueError, "focal_gamma must be at least 0 and finite"),
        (
            {"focal_gamma": 2.0, "backend": "fused"},
            NotImplementedError,
            "the kernels have no focal term, which is computed by torch, got focal_gamma 2.0",
        ),
    ],
)
@pytest.mark.parametrize("several", [False, True])
def test_rejects(
    options: dict[str, Any], error: type[Exception], match: str, several: bool
) -> None:
    s, t = torch.randn(4, 5), torch.randn(4, 5)
    with pytest.raises(error, match=match):
        if several:
            kdfast.multilabel_kd_loss(s, t, torch.ones(4, 5), **options)
        else:
            kdfast.kd_loss(s, t, TWO, **options)


def test_rejects_of_one_of_them() -> None:
    s, t = torch.randn(4, 5), torch.randn(4, 5)
    several = kdfast.multilabel_kd_loss
    with pytest.raises(IndexError, match=r"class indices must be in \[0, 5\) or -100"):
        kdfast.kd_loss(s, t, torch.tensor([0, 1, 2, 5]), class_weight=torch.ones(5))
    with pytest.raises(IndexError, match=r"class indices must be in \[0, 5\) or -100"):
        kdfast.kd_loss(s, t, torch.tensor([0, 1, 2, -1]), focal_gamma=1.0)
    with pytest.raises(ValueError, match="focal_alpha must be in .* beside a focal_gamma, got 0.5"):
        several(s, t, torch.ones(4, 5), focal_alpha=0.5)
    with pytest.raises(ValueError, match=r"must have the shape and device .* got \(4,\) on cpu"):
        several(s, t, torch.ones(4))
    with pytest.raises(TypeError, match="target must be one of .*, got torch.int64"):
        several(s, t, torch.ones(4, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="reduction must be one of .*, got 'batchmean'"):
        several(s, t, reduction="batchmean")
    with pytest.raises(ValueError, match=r"multilabel_kd_loss: alpha must be in \[0, 1\], got 2"):
        several(s, t, alpha=2)
