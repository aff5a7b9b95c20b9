# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel in the interpreter, against the reference."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import kdfast
from kdfast.ops import _linear_kd
from kdfast.ops import kd_loss as op
from kdfast.testing import assert_no_worse, interpreted_kernels, run

kernels = interpreted_kernels("kd_loss")
# NaN and infinity are what some of these tests are about; NumPy, which interprets, warns of them.
pytestmark = [
    pytest.mark.interpret,
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning"),
]


class Launch(torch.autograd.Function):
    """The function registered for CUDA, called on CPU tensors with the op's own arguments."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, *args: Any) -> Any:
        loss, kd, ce, grad = op._cuda(student, *args, True)
        ctx.save_for_backward(grad)
        ctx.dtype = student.dtype
        ctx.mark_non_differentiable(kd, ce)
        return loss, kd, ce

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> Any:
        (grad,) = ctx.saved_tensors
        upstream = upstream.unsqueeze(-1) if upstream.dim() else upstream
        return (grad * upstream).to(ctx.dtype), *(None,) * 7


def make_target(kind: str, shape: tuple[int, ...]) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "soft":
        return torch.rand(shape)
    label = torch.randint(shape[-1], shape[:-1])
    label.flatten()[::3] = -100
    return label


def check(
    shape: tuple[int, ...],
    kind: str,
    *,
    dtype: torch.dtype = torch.float32,
    temperature: float = 4.0,
    reduction: str = "batchmean",
    smoothing: float = 0.0,
    spread: float = 1.0,
    eps: float | None = None,
) -> None:
    target = make_target(kind, shape)
    options = (temperature, 0.7, reduction, smoothing, -100)
    logits = [spread * torch.randn(shape, dtype=torch.float64) for _ in range(2)]

    def fused(s: Tensor, t: Tensor) -> Any:
        return Launch.apply(s, t.detach(), target, *options)  # type: ignore[no-untyped-call]

    def eager(s: Tensor, t: Tensor) -> Any:
        soft = target is not None and target.is_floating_point()
        q = target.to(op.accumulator(s.dtype)) if soft and target is not None else target
        return op.reference(s, t, q, *options)

    def loss_only(function: Any) -> Any:
        # kd and ce carry no gradient; they are compared as values.
        return lambda s, t: tuple(x if i == 0 else x.detach() for i, x in enumerate(function(s, t)))

    low = [x.to(dtype) for x in logits]
    got, want = run(loss_only(fused), low), run(loss_only(eager), low)
    exact = run(loss_only(eager), logits)
    for name, *triple in zip(("loss", "kd", "ce", "grad"), got, exact, want, strict=False):
        # The error of a single number may be 0 by luck.
        assert_no_worse(name, *triple, eps=eps if triple[0].numel() == 1 else None)


@pytest.mark.parametrize("kind", ["none", "hard", "soft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(7, 10), (2, 3, 65), (3, 1000), (2, 2)], ids=str)
def test_one_tile(shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> None:
    check(shape, kind, dtype=dtype)


@pytest.mark.parametrize("kind", ["none", "hard", "soft"])
@pytest.mark.parametrize("shape", [(3, 47), (2, 64)], ids=str)
def test_many_tiles(shape: tuple[int, ...], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "ONE_TILE", 8)
    monkeypatch.setattr(kernels, "TILE", 16)
    check(shape, kind, spread=5.0)
    check(shape, kind, smoothing=0.1, temperature=0.5)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_150k_classes(kind: str) -> None:
    check((2, 150_000), kind, smoothing=0.1, spread=3.0)


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(2, 9),
    classes=st.integers(2, 300),
    kind=st.sampled_from(["none", "hard", "soft"]),
    reduction=st.sampled_from(op.REDUCTIONS),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_any_call(
    rows: int, classes: int, kind: str, reduction: str, temperature: float, dtype: torch.dtype
) -> None:
    options: dict[str, Any] = {"reduction": reduction, "temperature": temperature, "eps": 2.0**-17}
    check((rows, classes), kind, dtype=dtype, **options)


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_reductions(reduction: str, smoothing: float) -> None:
    check((5, 12), "hard", reduction=reduction, smoothing=smoothing, temperature=2.0)


def both(s: Tensor, t: Tensor, target: Tensor | None = None, reduction: str = "none") -> Any:
    options = (2.0, 0.5, reduction, 0.0, -100)
    got = op._cuda(s, t, target, *options, True)
    leaf = s.clone().requires_grad_()
    want = op.reference(leaf, t, target, *options)
    want[0].sum().backward()
    return got, (*(x.detach() for x in want), leaf.grad)


@pytest.mark.parametrize("tile", [8192, 4])
def test_infinities(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "ONE_TILE", tile)
    monkeypatch.setattr(kernels, "TILE", 16)
    inf = math.inf
    s, t = torch.randn(4, 40), torch.randn(4, 40)
    t[0, :20] = -inf  # ruled out by the teacher, a whole tile of it
    s[1, 3] = -inf  # only by the student
    s[2, :20], t[2, :20] = -inf, -inf  # by both
    t[3, 5] = inf
    got, want = both(s, t)
    for a, b in zip(got[:3], want[:3], strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    assert got[1][1] == inf
    assert got[1][3].isnan()
    torch.testing.assert_close(got[3][0], want[3][0])
    assert (got[3][0, :20] > 0).all()
    torch.testing.assert_close(got[3][2], 0.5 * 2 * (s[2] / 2).softmax(0) - (t[2] / 2).softmax(0))


def test_equal_rows_are_exactly_zero() -> None:
    s = torch.randn(3, 50)
    (loss, kd, ce, grad), _ = both(s, s, reduction="batchmean")
    assert (loss.item(), kd.item(), ce.item()) == (0, 0, 0)
    assert not grad.any()


def test_all_rows_ignored() -> None:
    s, t = torch.randn(3, 5), torch.randn(3, 5)
    (loss, kd, ce, grad), (_, want, _, want_grad) = both(
        s, t, torch.full((3,), -100), reduction="batchmean"
    )
    assert loss.isnan()
    assert ce.isnan()
    torch.testing.assert_close(kd, want)
    torch.testing.assert_close(grad, want_grad)


def test_strided_rows_and_no_rows() -> None:
    wide = torch.randn(4, 24)
    (loss, *_, grad), _ = both(wide[:, :10], wide[:, 12:22])
    (want, *_, want_grad), _ = both(wide[:, :10].clone(), wide[:, 12:22].clone())
    assert torch.equal(loss, want)
    assert torch.equal(grad, want_grad)
    empty = torch.zeros(0, 5)
    loss, kd, ce, grad = op._cuda(empty, empty, None, 2.0, 0.5, "batchmean", 0.0, -100, True)
    assert loss.isnan()
    assert kd.isnan()
    assert grad.shape == (0, 5)
    assert op._cuda(empty, empty, None, 2.0, 0.5, "sum", 0.0, -100, False)[0] == 0
    assert op._cuda(empty, empty, None, 2.0, 0.5, "none", 0.0, -100, False)[0].shape == (0,)


def test_cuda_takes_the_kernel_or_says_why_not() -> None:
    with torch._subclasses.FakeTensorMode():
        logits = torch.empty(4, 10, device="cuda", requires_grad=True)
        loss, _, _ = kdfast.kd_loss(logits, logits, backend="fused")
        assert loss.grad_fn is not None
        with pytest.raises(NotImplementedError, match="not fp64"):
            kdfast.kd_loss(logits.double(), logits.double(), backend="fused")


@pytest.fixture
def inplace_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    library = torch.library.Library("kdfast", "IMPL")
    library.impl("kd_loss_", op._cuda_inplace, "CPU")
    monkeypatch.setattr(op, "INPLACE_ON", frozenset({"cpu"}))
    yield
    library._destroy()


@pytest.mark.parametrize("reduction", op.REDUCTIONS)
@pytest.mark.parametrize("classes", [33, 9000])
def test_inplace(inplace_on_cpu: None, classes: int, reduction: str) -> None:
    hidden, weight = torch.randn(3, 8), torch.randn(8, classes)
    teacher, target = torch.randn(3, classes), torch.tensor([1, -100, 2])
    results = []
    for inplace in (True, False):
        x = hidden.clone().requires_grad_()
        logits = x @ weight
        choice: dict[str, Any] = {"inplace": True} if inplace else {"backend": "reference"}
        losses = kdfast.kd_loss(logits, teacher, target, reduction=reduction, **choice)
        upstream = 0.5 * losses[0].sum()
        upstream.backward(retain_graph=True)
        results.append([*(y.detach() for y in losses), x.grad])
        if inplace:
            # The gradient of the logits, in the memory of the logits.
            torch.testing.assert_close(logits.detach() @ weight.T, x.grad)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                upstream.backward()
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_inplace_is_refused_where_it_would_do_harm(inplace_on_cpu: None) -> None:
    leaf, other = torch.randn(2, 5, requires_grad=True), torch.randn(2, 5)
    saved = leaf.sigmoid()
    kdfast.kd_loss(saved, other, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()
    with pytest.raises(ValueError, match="a leaf that requires a gradient"):
        kdfast.kd_loss(leaf, other, inplace=True)
    for student, teacher in ((other, other[:]), (leaf.T + 0.0, other.T.contiguous().mT.T)):
        with pytest.raises(ValueError, match="contiguous student_logits that share no memory"):
            kdfast.kd_loss(student, teacher, inplace=True)
    with pytest.raises(NotImplementedError, match="fp32 or bf16 logits of one dtype"):
        kdfast.kd_loss(other.half(), torch.randn(2, 5).half(), inplace=True)
    with pytest.raises(NotImplementedError, match="inplace needs a compiled kernel"):
        kdfast.kd_loss(other, torch.randn(2, 5), inplace=True, backend="reference")


def test_inplace_needs_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "INPLACE_ON", frozenset())
    x, y = torch.randn(2, 5), torch.randn(2, 5)
    with pytest.raises(NotImplementedError, match="inplace needs a compiled kernel, got cpu"):
        kdfast.kd_loss(x, y, inplace=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ignored", [slice(0, 0), slice(0, None, 3), slice(None)])
def test_linear_kd_loss_with_a_count_on_the_device(
    ignored: slice, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_linear_kd, "COUNTED_ON", frozenset({"cpu"}))
    label = torch.randint(19, (11,))
    label[ignored] = -100
    teacher = (3 * torch.randn(11, 19)).to(dtype)
    layer = [torch.randn(shape).to(dtype) for shape in ((11, 8), (19, 8), (19,))]

    def call(backend: str) -> Any:
        def losses(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            chunk = {"chunk": 4} if backend == "fused" else {}
            goal = teacher.to(hidden.dtype)
            every = kdfast.linear_kd_loss(
                *(hidden, weight, goal, label),
                bias=bias,
                label_smoothing=0.1,
                backend=backend,
                **chunk,
            )
            # Without a row that counts, ce and the loss are NaN; their gradient is not.
            return every[0].nan_to_num(), every[1].detach()

        return losses

    got, eager = run(call("fused"), layer), run(call("reference"), layer)
    exact = run(call("reference"), [x.double() for x in layer])
    if label.max() < 0:
        got, eager, exact = got[1:2], eager[1:2], exact[1:2]
    for i, triple in enumerate(zip(got, exact, eager, strict=True)):
        limit = 4 * torch.finfo(dtype).eps if triple[0].dim() == 0 else None
        assert_no_worse(f"result {i}", *triple, eps=limit)
