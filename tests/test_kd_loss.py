# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast
from kdfast.ops import _library

INF = float("inf")


@pytest.fixture(autouse=True, params=["reference", "fused"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test of this file holds for both."""
    if request.param == "fused":
        request.getfixturevalue("compiled")
    monkeypatch.setattr(_library, "DEFAULT_BACKEND", request.param)


def composed(
    s: Tensor, t: Tensor, target: Tensor | None, temperature: float, alpha: float, **options: float
) -> Tensor:
    """The documented objective out of PyTorch's own losses, averaged over rows."""
    log_s, log_t = (F.log_softmax(x.flatten(0, -2) / temperature, -1) for x in (s, t))
    loss = alpha * temperature**2 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)
    if target is not None:
        flat = target.flatten(0, -2) if target.is_floating_point() else target.flatten()
        loss = loss + (1 - alpha) * F.cross_entropy(s.flatten(0, -2), flat, **options)
    return loss


def targets(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor | None]:
    hard = torch.randint(0, shape[-1], shape[:-1])
    ignored = hard.clone()
    ignored.view(-1)[::3] = -100
    soft = torch.rand(shape, dtype=dtype).softmax(-1)
    return {"none": None, "hard": hard, "ignored": ignored, "soft": soft}


def test_reference_literal() -> None:
    # Student odds 3:1, teacher 1:1, T = 1: KL = ln(2 / sqrt 3), cross-entropy = ln(4 / 3).
    s = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    t = torch.zeros(1, 2, dtype=torch.float64)
    call = kdfast.kd_loss(s, t, torch.tensor([0]), temperature=1.0, alpha=0.25)
    kl, ce = math.log(2 / math.sqrt(3)), math.log(4 / 3)
    assert [x.item() for x in call] == pytest.approx([0.25 * kl + 0.75 * ce, kl, ce], rel=1e-12)
    # T = 2 halves the logits and multiplies by 4: odds sqrt 3 : 1.
    _, kd, _ = kdfast.kd_loss(s, t, temperature=2.0)
    odds = math.sqrt(3)
    assert kd.item() == pytest.approx(4 * math.log((1 + odds) / (2 * math.sqrt(odds))), rel=1e-12)


@pytest.mark.parametrize("kind", ["none", "hard", "ignored", "soft"])
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 4, 9), (4, 1), (3, 2)])
@pytest.mark.parametrize(("temperature", "alpha"), [(4.0, 0.7), (0.5, 0.0), (1.0, 1.0)])
def test_equals_torch_losses(
    shape: tuple[int, ...], kind: str, temperature: float, alpha: float
) -> None:
    s, t = (3 * torch.randn(shape, dtype=torch.float64) for _ in range(2))
    s.requires_grad_()
    target = targets(shape, torch.float64)[kind]
    smoothing = {"label_smoothing": 0.2}
    loss, kd, ce = kdfast.kd_loss(s, t, target, temperature=temperature, alpha=alpha, **smoothing)
    want = composed(s, t, target, temperature, alpha, **smoothing)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(loss, alpha * kd + (1 - alpha) * ce)
    grad, want_grad = (torch.autograd.grad(x, s)[0] for x in (loss, want))
    torch.testing.assert_close(grad, want_grad)


@pytest.mark.parametrize("kind", ["none", "hard", "ignored", "soft"])
def test_reductions(kind: str) -> None:
    s, t = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    target = targets((2, 3, 5), torch.float32)[kind]
    rows = kdfast.kd_loss(s, t, target, reduction="none")
    sums = kdfast.kd_loss(s, t, target, reduction="sum")
    means = kdfast.kd_loss(s, t, target)
    counted = 4 if kind == "ignored" else 6
    for row, total, mean, n in zip(rows[1:], sums[1:], means[1:], (6, counted), strict=True):
        assert row.shape == (2, 3)
        torch.testing.assert_close(row.sum(), total)
        torch.testing.assert_close(total / n, mean)
    torch.testing.assert_close(rows[0].sum(), sums[0])


@pytest.mark.parametrize("kind", ["none", "hard", "ignored", "soft"])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
def test_gradcheck(kind: str, reduction: str) -> None:
    s = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    t = torch.randn(2, 3, 4, dtype=torch.float64)
    target = targets((2, 3, 4), torch.float64)[kind]

    def loss(x: Tensor) -> Tensor:
        options = {"reduction": reduction, "label_smoothing": 0.1}
        return kdfast.kd_loss(x, t, target, temperature=2.5, **options)[0]

    assert torch.autograd.gradcheck(loss, (s,))


def test_zero_at_the_teacher() -> None:
    t = 5 * torch.randn(6, 11)
    s = t.clone().requires_grad_()
    loss, kd, ce = kdfast.kd_loss(s, t, alpha=1.0)
    loss.backward()
    assert (loss.item(), kd.item(), ce.item()) == (0, 0, 0)
    # Probabilities that do not quite sum to 1 leave a residue in the reference.
    assert s.grad is not None and s.grad.abs().max() < 1e-7


def test_only_the_student_gets_a_gradient() -> None:
    s, t = (torch.randn(4, 5, requires_grad=True) for _ in range(2))
    soft = torch.rand(4, 5, requires_grad=True)
    loss, kd, ce = kdfast.kd_loss(s, t, soft)
    assert loss.requires_grad and not kd.requires_grad and not ce.requires_grad
    loss.backward()
    assert s.grad is not None and t.grad is None and soft.grad is None


def test_dtypes() -> None:
    s, t = torch.randn(4, 5, dtype=torch.bfloat16), torch.randn(4, 5)
    s.requires_grad_()
    loss, _, _ = kdfast.kd_loss(s, t, torch.tensor([0, 1, 2, 3]))
    loss.backward()
    assert loss.dtype == torch.float32
    assert s.grad is not None and s.grad.dtype == torch.bfloat16
    assert kdfast.kd_loss(s.detach().double(), t)[0].dtype == torch.float64


def test_classes_ruled_out() -> None:
    s = torch.tensor([[1.0, 2.0, -INF, 3.0]], requires_grad=True)
    t = torch.tensor([[0.5, -INF, -INF, 1.0]])
    loss, kd, ce = kdfast.kd_loss(s, t, torch.tensor([0]), temperature=2.0)
    kept = kdfast.kd_loss(s[:, [0, 1, 3]], torch.tensor([[0.5, -1e30, 1.0]]), temperature=2.0)
    torch.testing.assert_close(kd, kept[1])
    assert ce.item() == pytest.approx(math.log(math.e + math.e**2 + math.e**3) - 1)
    loss.backward()
    assert s.grad is not None and torch.isfinite(s.grad).all() and s.grad[0, 2] == 0
    # What the student rules out and the teacher does not is infinitely far away.
    assert kdfast.kd_loss(t, torch.zeros(1, 4))[1].item() == INF


@pytest.mark.parametrize("bad", [INF, float("nan")])
@pytest.mark.parametrize("side", [0, 1])
def test_bad_values_are_not_hidden(bad: float, side: int) -> None:
    logits = [torch.zeros(2, 3), torch.zeros(2, 3)]
    logits[side][1, 2] = bad
    loss, kd, _ = kdfast.kd_loss(*logits, reduction="none")
    assert loss.isnan().tolist() == kd.isnan().tolist() == [False, True]


def test_extreme_logits() -> None:
    s = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    t = torch.tensor([[-1e4, 0.0, 1e4]])
    loss, kd, _ = kdfast.kd_loss(s, t, temperature=1.0, alpha=1.0)
    loss.backward()
    assert kd.item() == 2e4
    assert s.grad is not None and s.grad.tolist() == [[1, 0, -1]]


def test_no_rows() -> None:
    s = torch.randn(0, 5, requires_grad=True)
    target = torch.zeros(0, dtype=torch.int64)
    assert all(x.isnan() for x in kdfast.kd_loss(s, s.detach(), target))
    assert [x.item() for x in kdfast.kd_loss(s, s.detach(), target, reduction="sum")] == [0] * 3
    loss, _, _ = kdfast.kd_loss(s, s.detach(), target, reduction="none")
    assert loss.shape == (0,)
    loss.sum().backward()
    assert s.grad is not None and s.grad.shape == (0, 5)


def test_all_rows_ignored() -> None:
    # As F.cross_entropy: the mean is NaN and its gradient is zero.
    s = torch.zeros(2, 3, requires_grad=True)
    ignored = torch.full((2,), -100)
    t = torch.tensor([[1.0, 0.0, 0.0]]).repeat(2, 1)
    loss, kd, ce = kdfast.kd_loss(s, t, ignored)
    assert loss.isnan() and ce.isnan() and kd.item() > 0
    loss.backward()
    want = s.detach().clone().requires_grad_()
    kdfast.kd_loss(want, t)[0].backward()
    assert torch.equal(s.grad, want.grad)
    assert kdfast.kd_loss(s, t, ignored, reduction="sum")[2].item() == 0


def test_class_probabilities_of_zero_at_ruled_out_classes() -> None:
    s = torch.tensor([[0.0, 0.0, -INF]], requires_grad=True)
    loss, _, ce = kdfast.kd_loss(s, s.detach(), torch.tensor([[1.0, 0.0, 0.0]]))
    loss.backward()
    assert ce.item() == pytest.approx(math.log(2))
    assert s.grad is not None
    torch.testing.assert_close(s.grad, 0.3 * torch.tensor([[-0.5, 0.5, 0.0]]))


S = torch.zeros(2, 3)
LABELS = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("args", "options", "error", "match"),
    [
        ((S.long(), S), {}, TypeError, "student_logits must be one of .* got torch.int64"),
        ((S, S.to(torch.complex64)), {}, TypeError, "teacher_logits must be one of"),
        ((S, S, LABELS.int()), {}, TypeError, "target must be int64 or one of .*int32"),
        ((S[0, 0], S[0, 0]), {}, ValueError, r"\(\.\.\., C\) with C >= 1, got \(\)"),
        ((S[:, :0], S[:, :0]), {}, ValueError, r"C >= 1, got \(2, 0\)"),
        (
            (S, S[:1]),
            {},
            ValueError,
            r"teacher_logits must have the shape .* \(1, 3\) and \(2, 3\)",
        ),
        ((S, S.to("meta")), {}, ValueError, "teacher_logits must be on the device"),
        ((S, S, LABELS.to("meta")), {}, ValueError, "target must be on the device"),
        ((S, S, LABELS[:1]), {}, ValueError, r"class indices must be \(2,\), got \(1,\)"),
        ((S, S, S[:1]), {}, ValueError, r"class probabilities must be \(2, 3\), got \(1, 3\)"),
        ((S, S, S), {"ignore_index": 0}, ValueError, "ignore_index must be negative"),
        ((S, S), {"temperature": 0.0}, ValueError, "temperature must be above 0"),
        ((S, S), {"temperature": INF}, ValueError, "above 0 and finite, got inf"),
        ((S, S), {"alpha": 1.5}, ValueError, r"alpha must be in \[0, 1\], got 1.5"),
        ((S, S), {"reduction": "average"}, ValueError, "reduction must be one of"),
        ((S, S), {"label_smoothing": -0.1}, ValueError, r"label_smoothing must be in \[0, 1\]"),
        ((S, S), {"backend": "fast"}, ValueError, "backend must be one of"),
        ((S, S, LABELS + 3), {}, IndexError, "[Tt]arget .*3"),
        ((S, S, LABELS - 1), {}, IndexError, "[Tt]arget .*-1"),
    ],
)
def test_rejects(args, options, error, match) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=match):
        kdfast.kd_loss(*args, **options)
