# SPDX-License-Identifier: Apache-2.0
"""linear_kd_loss: values, gradients, memory, arguments."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast
from kdfast.machine.memory import peak_bytes, saved_bytes
from kdfast.ops import linear_kd_loss as op
from kdfast.testing import assert_no_worse, run

ROWS, CLASSES, DIM, TEACHER_DIM = 23, 37, 12, 20
NAMES = ["loss", "kd", "ce", "d hidden", "d weight", "d bias"]
BACKENDS = ["fused", "reference"]
Call = Callable[..., tuple[Tensor, Tensor, Tensor]]


@pytest.fixture(autouse=True)
def _needs_kernel(compiled: None) -> None:
    """Most tests compare with the compiled kernel of kd_loss."""


def make(target: str = "hard", teacher: str = "logits") -> tuple[list[Tensor], dict[str, Tensor]]:
    """hidden, weight and bias; and the other tensors by name."""
    student = [torch.randn(ROWS, DIM), torch.randn(CLASSES, DIM), torch.randn(CLASSES)]
    rest = {"teacher_logits": 3 * torch.randn(ROWS, CLASSES)}
    if teacher == "layer":
        rest = {
            "teacher_hidden": torch.randn(ROWS, TEACHER_DIM),
            "teacher_weight": torch.randn(CLASSES, TEACHER_DIM),
            "teacher_bias": torch.randn(CLASSES),
        }
    labels = torch.randint(0, CLASSES, (ROWS,))
    if target == "ignored":
        labels[::3] = -100
    if target != "none":
        rest["target"] = torch.randn(ROWS, CLASSES).softmax(-1) if target == "soft" else labels
    return student, rest


def caller(rest: dict[str, Tensor], dtype: torch.dtype, **options: Any) -> Call:
    given = {k: x.to(dtype) if x.is_floating_point() else x for k, x in rest.items()}

    def call(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return kdfast.linear_kd_loss(hidden, weight, bias=bias, **given, **options)

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
@pytest.mark.parametrize("target", ["none", "hard", "ignored", "soft"])
@pytest.mark.parametrize("teacher", ["logits", "layer"])
def test_no_worse(teacher: str, target: str, reduction: str, dtype: torch.dtype) -> None:
    student, rest = make(target, teacher)
    low = [x.to(dtype) for x in student]
    rest = {k: x.to(dtype) if x.is_floating_point() else x for k, x in rest.items()}
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": 0.1, "temperature": 2.5}
    exact = run(
        caller(rest, torch.float64, backend="reference", **options), [x.double() for x in low]
    )
    eager = run(caller(rest, dtype, backend="reference", **options), low)
    for chunk in (None, 1, 7, ROWS):
        fused = run(caller(rest, dtype, backend="fused", chunk=chunk, **options), low)
        for name, *triple in zip(NAMES, fused, exact, eager, strict=True):
            if triple[0].dim() == 0:
                # Of a single number the eager error is a matter of luck.
                limit = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 1e-6}
                torch.testing.assert_close(triple[0].double(), triple[1], msg=name, **limit)
            else:
                assert_no_worse(f"{name}, chunk {chunk}", *triple)


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
def test_double_is_exact(reduction: str) -> None:
    student, rest = make("ignored", "layer")
    student = [x.double() for x in student]
    fused, exact = (
        run(caller(rest, torch.float64, backend=b, reduction=reduction, chunk=5), student)
        for b in BACKENDS
    )
    for name, *pair in zip(NAMES, fused, exact, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-12, atol=1e-13, msg=name)


def test_it_is_kd_loss_of_the_layer() -> None:
    (hidden, weight, bias), rest = make("ignored")
    logits = F.linear(hidden, weight, bias)
    want = kdfast.kd_loss(logits, rest["teacher_logits"], rest["target"], backend="reference")
    for backend in BACKENDS:
        got = kdfast.linear_kd_loss(hidden, weight, bias=bias, backend=backend, **rest)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_leading_dimensions_and_a_frozen_layer(reduction: str) -> None:
    (hidden, weight, _), rest = make("soft", "layer")
    shaped = {k: x[:20].view(4, 5, -1) for k, x in rest.items() if len(x) == ROWS}
    flat = {k: x[:20] for k, x in rest.items() if len(x) == ROWS}
    layer = {k: x for k, x in rest.items() if len(x) != ROWS}
    call = partial(kdfast.linear_kd_loss, backend="fused", reduction=reduction, chunk=6, **layer)
    got = run(lambda x: call(x, weight, **shaped), [hidden[:20].view(4, 5, -1)])
    want = run(lambda x: call(x, weight, **flat), [hidden[:20]])
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.flatten(), b.flatten())
    assert got[0].shape == ((4, 5) if reduction == "none" else ())


@pytest.mark.parametrize("which", [0, 1, 2])
def test_one_gradient_alone(which: int) -> None:
    student, rest = make()
    for reduction in ("batchmean", "none"):
        grads = []
        for wanted in (range(3), [which]):
            leaves = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(student)]
            loss = caller(rest, torch.float32, backend="fused", reduction=reduction)(*leaves)[0]
            loss.sum().backward()
            grads.append(leaves[which].grad)
        assert torch.equal(*grads)


@pytest.mark.parametrize("target", ["hard", "none"])
def test_no_rows(target: str) -> None:
    student, rest = make(target)
    student[0] = student[0][:0].requires_grad_()
    student[1].requires_grad_()
    rest = {k: x[:0] for k, x in rest.items()}
    for reduction in ("batchmean", "sum", "none"):
        fused, eager = (
            caller(rest, torch.float32, backend=b, reduction=reduction)(*student) for b in BACKENDS
        )
        torch.testing.assert_close(fused, eager, equal_nan=True)
    fused[0].sum().backward()
    assert not student[1].grad.any()


def test_all_rows_ignored() -> None:
    student, rest = make("hard")
    rest["target"].fill_(-100)
    leaf = student[0].requires_grad_()
    loss, kd, ce = caller(rest, torch.float32, backend="fused")(*student)
    assert loss.isnan() and ce.isnan() and kd.isfinite()
    (got,) = torch.autograd.grad(loss, leaf)
    want = torch.autograd.grad(
        0.7 * caller(rest, torch.float32, backend="fused", alpha=1.0)(*student)[0], leaf
    )
    torch.testing.assert_close(got, want[0])


def test_half_gradients_survive_until_the_loss_scale() -> None:
    hidden = torch.zeros(4096, 1, dtype=torch.float16, requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]], dtype=torch.float16)
    t = torch.tensor([[1e-3, 0.0]], dtype=torch.float16).expand(4096, 2)
    loss = kdfast.linear_kd_loss(hidden, weight, t, temperature=1.0, backend="fused")[0]
    (grad,) = torch.autograd.grad(loss * 65536.0, hidden)
    assert grad.dtype == torch.float16
    assert grad[0, 0].item() == pytest.approx(-65536 * 0.7 * 0.25e-3 / 4096, rel=1e-2)


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_logits_never_exist_whole(reduction: str) -> None:
    rows, classes, dim = 512, 4096, 8
    hidden, weight = torch.randn(rows, dim), torch.randn(classes, dim)
    teacher = (torch.randn(rows, dim), torch.randn(classes, dim))
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    target = torch.randint(0, classes, (rows,))

    def step(backend: str) -> None:
        loss, *_ = kdfast.linear_kd_loss(
            *(hidden, weight, None, target),
            teacher_hidden=teacher[0],
            teacher_weight=teacher[1],
            reduction=reduction,
            chunk=16,
            backend=backend,
        )
        torch.autograd.grad(loss.sum(), leaves)

    whole = 4 * rows * classes
    # Student, teacher and gradient of a chunk of 1/32, and the gradients of the two leaves.
    assert peak_bytes(partial(step, "fused")) < whole / 4
    assert peak_bytes(partial(step, "reference")) > 2 * whole


def test_graph_keeps_the_gradients_only() -> None:
    (hidden, weight, _), rest = make()
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    kept = saved_bytes(lambda: kdfast.linear_kd_loss(*leaves, backend="fused", **rest)[0])
    assert kept == hidden.nbytes + weight.nbytes


@pytest.mark.parametrize(("rows", "classes"), [(1024, 1000), (5, 10), (0, 7), (8192, 150_000)])
def test_default_chunk(rows: int, classes: int) -> None:
    chunk = op.default_chunk("cpu", rows, classes)
    assert 1 <= chunk <= max(rows, 1)
    most = max(op.CHUNK_ROWS["cpu"] * classes, op.CHUNK_LOGITS["cpu"])
    assert chunk * classes <= most
    # Chunks of nearly one size: the last is not a remainder.
    assert rows == 0 or (rows - 1) % chunk + 1 > chunk // 2


def test_autocast() -> None:
    student, rest = make("hard", "layer")
    for x in student:
        x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = kdfast.linear_kd_loss(*student[:2], bias=student[2], backend="fused", **rest)[0]
    low = [x.detach().bfloat16().requires_grad_() for x in student]
    want = caller(rest, torch.bfloat16, backend="fused")(*low)[0]
    assert torch.equal(loss, want)
    for x, y in zip(
        torch.autograd.grad(loss, student), torch.autograd.grad(want, low), strict=True
    ):
        assert x.dtype == torch.float32
        assert torch.equal(x, y.float())


def test_no_second_derivative() -> None:
    student, rest = make()
    leaf = student[0].requires_grad_()
    for reduction in ("sum", "none"):
        loss = caller(rest, torch.float32, backend="fused", reduction=reduction)(*student)[0].sum()
        with pytest.raises(NotImplementedError, match="linear_kd_loss: .* no second derivative"):
            torch.autograd.grad(loss, leaf, create_graph=True)
    loss = caller(rest, torch.float32, backend="reference")(*student)[0]
    assert torch.autograd.grad(loss, leaf, create_graph=True)[0].requires_grad


@pytest.mark.parametrize("teacher", ["logits", "layer"])
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_registration(reduction: str, teacher: str) -> None:
    student, rest = make("hard", teacher)
    for x in student:
        x.requires_grad_()
    names = ("teacher_logits", *op.TEACHER, "target")
    need = [reduction != "none"] * 3
    arguments = (
        *student,
        *(rest.get(n) for n in names),
        None,
        4.0,
        0.7,
        reduction,
        0.1,
        -100,
        7,
        need,
    )
    torch.library.opcheck(torch.ops.kdfast.linear_kd_loss.default, arguments)


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_compile(dtype: torch.dtype, reduction: str) -> None:
    student, rest = make("hard", "layer")
    leaves = [x.to(dtype).requires_grad_() for x in student]
    call = caller(rest, dtype, backend="fused", reduction=reduction)

    def objective(*x: Tensor) -> Tensor:
        return 3 * call(*x)[0].sum()

    got = torch.compile(objective, fullgraph=True, backend="aot_eager")(*leaves)
    want = objective(*leaves)
    assert torch.equal(got, want)
    grads = [torch.autograd.grad(x, leaves) for x in (got, want)]
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


X, W, T = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, 5)
Y = torch.zeros(3, dtype=torch.int64)
LAYER = {"teacher_hidden": torch.zeros(3, 6), "teacher_weight": torch.zeros(5, 6)}


@pytest.mark.parametrize(
    ("args", "options", "error", "match"),
    [
        ((X.long(), W, T), {}, TypeError, "hidden must be one of"),
        ((X, W.double(), T), {}, TypeError, "weight must be torch.float32 like hidden"),
        ((X, W[:, :3], T), {}, ValueError, r"weight must be \(C, features\)"),
        ((X, W[:0], T[:, :0]), {}, ValueError, "C >= 1"),
        ((X, W, T), {"bias": torch.zeros(4)}, ValueError, r"bias must be \(5,\), got \(4,\)"),
        ((X, W, T), {"bias": torch.zeros(5).half()}, TypeError, "bias must be torch.float32"),
        ((X, W), {}, ValueError, "teacher must be either teacher_logits, or teacher_hidden"),
        ((X, W, T), LAYER, ValueError, "teacher must be either"),
        ((X, W), {"teacher_hidden": X}, ValueError, "teacher must be either"),
        ((X, W, T), {"teacher_bias": torch.zeros(5)}, ValueError, "teacher must be either"),
        ((X, W, T[:2]), {}, ValueError, r"teacher_logits must have hidden's rows \(3,\)"),
        ((X, W, T[:, :4]), {}, ValueError, "5 classes, got .* 4 classes"),
        ((X, W, T.long()), {}, TypeError, "teacher_logits must be one of"),
        ((X, W, T.to("meta")), {}, ValueError, "teacher_logits must be on cpu like hidden"),
        ((X, W.to("meta"), T), {}, ValueError, "weight must be on cpu like hidden"),
        (
            (X, W),
            {**LAYER, "teacher_weight": torch.zeros(6, 6)},
            ValueError,
            "teacher_hidden must have .* 5 classes",
        ),
        ((X, W, T, Y[:2]), {}, ValueError, "linear_kd_loss: target of class indices"),
        ((X, W, T, Y.int()), {}, TypeError, "linear_kd_loss: target must be int64"),
        ((X, W, T), {"temperature": 0.0}, ValueError, "linear_kd_loss: temperature must be above"),
        ((X, W, T), {"chunk": 0}, ValueError, "chunk must be at least 1, got 0"),
        ((X, W, T, Y + 5), {"backend": "fused"}, IndexError, r"target must be in \[0, 5\)"),
    ],
)
def test_arguments(args: Any, options: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        kdfast.linear_kd_loss(*args, **options)
