# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast
from kdfast.ops import _library

KINDS = ["mse", "cosine", "smooth_l1"]
NORMALIZATIONS = [None, "layer", "channel"]


@pytest.fixture(autouse=True, params=["reference", "fused"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test of this file holds for both."""
    if request.param == "fused":
        request.getfixturevalue("compiled")
    monkeypatch.setattr(_library, "DEFAULT_BACKEND", request.param)


def composed(s: Tensor, t: Tensor, kind: str, normalize: str | None) -> Tensor:
    """The documented loss out of torch's functions, for features in the last dimension."""
    if normalize is not None:
        over = (-1,) if normalize == "layer" else tuple(range(t.dim() - 1))
        sources = (s, t) if normalize == "layer" else (t, t)
        moments = [torch.var_mean(x, over, unbiased=False, keepdim=True) for x in sources]
        s, t = ((x - m) / (v + 1e-6).sqrt() for x, (v, m) in zip((s, t), moments, strict=True))
    if kind == "cosine":
        return (1 - F.cosine_similarity(s, t, dim=-1)).mean()
    return {"mse": F.mse_loss, "smooth_l1": F.smooth_l1_loss}[kind](s, t)


def test_reference_literal() -> None:
    s, t = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[4.0, 3.0], [0.5, 2.0]])
    call = {k: kdfast.feature_loss(s, t, kind=k).item() for k in KINDS}
    assert call["mse"] == (1 + 1 + 0.25) / 4
    assert call["smooth_l1"] == (0.5 + 0.5 + 0.125) / 4
    assert call["cosine"] == pytest.approx((1 - 24 / 25 + 1 - 4 / math.sqrt(17)) / 2)
    # Two features normalise to -1 and 1, whatever they were.
    layer = kdfast.feature_loss(s, t, normalize="layer")
    assert layer.item() == pytest.approx((4 + 4 + 0 + 0) / 4, rel=1e-4)
    # Teacher variances: 1.75^2 and 0.5^2.
    channel = kdfast.feature_loss(s, t, normalize="channel")
    assert channel.item() == pytest.approx((1.25 / 1.75**2 + 1 / 0.25) / 4, rel=1e-5)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "dim"), [((6, 5), -1), ((2, 3, 4, 7), 3), ((2, 5, 3, 4), 1)])
def test_equals_torch_losses(
    shape: tuple[int, ...], dim: int, kind: str, normalize: str | None
) -> None:
    s, t = (2 * torch.randn(shape, dtype=torch.float64) + 1 for _ in range(2))
    s.requires_grad_()
    loss = kdfast.feature_loss(s, t, kind=kind, normalize=normalize, dim=dim)
    want = composed(s.movedim(dim, -1), t.movedim(dim, -1), kind, normalize)
    torch.testing.assert_close(loss, want)
    grad, want_grad = (torch.autograd.grad(x, s)[0] for x in (loss, want))
    torch.testing.assert_close(grad, want_grad)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, normalize: str | None) -> None:
    s = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    t = torch.randn(2, 4, 3, dtype=torch.float64)
    options = {"kind": kind, "normalize": normalize, "dim": 1}
    assert torch.autograd.gradcheck(lambda x: kdfast.feature_loss(x, t, **options), (s,))


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_zero_at_the_teacher(kind: str, normalize: str | None) -> None:
    t = torch.randn(7, 33)
    s = t.clone().requires_grad_()
    loss = kdfast.feature_loss(s, t, kind=kind, normalize=normalize)
    loss.backward()
    assert loss.item() == 0
    assert s.grad is not None and not s.grad.any()


def test_zero_vectors() -> None:
    s = torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 4.0], [1e-9, 0.0]], requires_grad=True)
    t = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    loss = kdfast.feature_loss(s, t, kind="cosine")
    loss.backward()
    assert loss.item() == (0 + 1 + 1 + 1) / 4
    assert s.grad is not None and not s.grad.any()


def test_layer_ignores_scale_and_shift_of_a_position() -> None:
    t = torch.randn(5, 16, dtype=torch.float64)
    assert kdfast.feature_loss(3 * t + 2, t, normalize="layer").item() < 1e-11
    assert kdfast.feature_loss(3 * t + 2, t, normalize="channel").item() > 1


def test_channel_makes_channels_count_alike() -> None:
    scale = torch.tensor([1e-2, 1.0, 100.0], dtype=torch.float64)
    s, t = (torch.randn(64, 3, dtype=torch.float64) for _ in range(2))
    want = kdfast.feature_loss(s, t, normalize="channel")
    got = kdfast.feature_loss(s * scale + 5, t * scale + 5, normalize="channel")
    torch.testing.assert_close(got, want, rtol=1e-2, atol=0)


def test_only_the_student_gets_a_gradient() -> None:
    s, t = (torch.randn(4, 5, requires_grad=True) for _ in range(2))
    kdfast.feature_loss(s, t, normalize="channel").backward()
    assert s.grad is not None and t.grad is None


def test_dtypes() -> None:
    s, t = torch.randn(4, 5, dtype=torch.bfloat16, requires_grad=True), torch.randn(4, 5)
    loss = kdfast.feature_loss(s, t)
    loss.backward()
    assert loss.dtype == torch.float32
    assert s.grad is not None and s.grad.dtype == torch.bfloat16
    assert kdfast.feature_loss(s.detach().double(), t).dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_bad_values_are_not_hidden(kind: str) -> None:
    t = torch.ones(3, 4)
    s = t.clone()
    s[1, 2] = float("nan")
    assert kdfast.feature_loss(s, t, kind=kind).isnan()
    assert kdfast.feature_loss(t, s, kind=kind, normalize="channel").isnan()
    assert kdfast.feature_loss(s, torch.zeros(3, 4), kind=kind).isnan()


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_positions(kind: str, normalize: str | None) -> None:
    s = torch.randn(0, 5, requires_grad=True)
    loss = kdfast.feature_loss(s, s.detach(), kind=kind, normalize=normalize)
    loss.backward()
    assert loss.isnan() and s.grad is not None and s.grad.shape == (0, 5)


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("args", "options", "error", "match"),
    [
        ((X.int(), X), {}, TypeError, "student must be one of .* got torch.int32"),
        ((X, X.bool()), {}, TypeError, "teacher must be one of .* got torch.bool"),
        ((X, X), {"kind": "l2"}, ValueError, "kind must be one of .* got 'l2'"),
        ((X, X), {"normalize": "batch"}, ValueError, "normalize must be None or one of"),
        ((X, X), {"normalize": "none"}, ValueError, "normalize must be None or one of"),
        ((X, X[:1]), {}, ValueError, r"teacher must have the shape .* \(1, 3\) and \(2, 3\)"),
        ((X, X.to("meta")), {}, ValueError, "teacher must be on the device of student"),
        ((X, X), {"dim": 2}, ValueError, r"dim must be in \[-2, 2\), got 2"),
        ((X[0, 0], X[0, 0]), {}, ValueError, r"dim must be in \[0, 0\), got -1"),
        ((X[:, :0], X[:, :0]), {}, ValueError, "at least one feature"),
        ((X, X), {"backend": "fast"}, ValueError, "backend must be one of"),
    ],
)
def test_rejects(args, options, error, match) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=match):
        kdfast.feature_loss(*args, **options)
