# SPDX-License-Identifier: Apache-2.0
"""The compiled kernel of kd_loss against its reference."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kdfast
from kdfast.machine.memory import peak_bytes, saved_bytes
from kdfast.testing import assert_right, run

pytestmark = pytest.mark.usefixtures("compiled")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAMES = ["loss", "kd", "ce", "d student", "d teacher"]
# One class, two, below and above a vector, a row with a rest, and one longer than a flush of sums.
CLASSES = [1, 2, 15, 17, 1000, 4500]
OP = torch.ops.kdfast.kd_loss.default


def make(rows: int, classes: int, kind: str) -> list[Tensor]:
    logits = [4 * torch.randn(rows, classes) for _ in range(2)]
    labels = torch.randint(0, classes, (rows,))
    if kind == "ignored":
        labels[::2] = -100
    extra = {"none": [], "soft": [torch.randn(rows, classes).softmax(-1)]}
    return logits + extra.get(kind, [labels])


def compare(inputs: list[Tensor], dtype: torch.dtype, **options: object) -> None:
    """Outputs and gradients are no worse than the reference's in the same dtype."""
    low = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    exact = [x.double() if x.is_floating_point() else x for x in low]
    call = partial(kdfast.kd_loss, **options)
    fused = run(partial(call, backend="fused"), low)
    eager = run(partial(call, backend="reference"), low)
    best = run(partial(call, backend="reference"), exact)
    for name, *triple in zip(NAMES, fused, best, eager, strict=False):
        assert_right(name, *triple)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("kind", ["none", "hard", "ignored", "soft"])
def test_no_worse(kind: str, classes: int, dtype: torch.dtype, isa: str) -> None:
    inputs = make(12, classes, kind)
    compare(inputs, dtype, label_smoothing=0.1)
    compare(inputs, dtype, reduction="none", temperature=1.0)
    compare(inputs, dtype, reduction="sum", temperature=0.5, alpha=0.2)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), max_size=3),
    classes=st.integers(1, 70),
    kind=st.sampled_from(["none", "hard", "ignored", "soft"]),
    temperature=st.floats(0.5, 8),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    size=st.sampled_from([0.1, 3.0, 100.0]),
    seed=st.integers(0, 99),
)
def test_any_shape(
    shape: list[int],
    classes: int,
    kind: str,
    temperature: float,
    smoothing: float,
    size: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    rows = torch.Size(shape).numel()
    inputs = [
        x.view(*shape, -1) if x.is_floating_point() else x.view(shape)
        for x in make(rows, classes, kind)
    ]
    inputs[:2] = [size * x for x in inputs[:2]]
    options = {"temperature": temperature, "label_smoothing": smoothing, "reduction": "sum"}
    got = run(partial(kdfast.kd_loss, backend="fused", **options), inputs)
    inputs = [x.double() if x.is_floating_point() else x for x in inputs]
    want = run(partial(kdfast.kd_loss, backend="reference", **options), inputs)
    for name, *pair in zip(NAMES, got, want, strict=False):
        torch.testing.assert_close(pair[0].double(), pair[1], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exactly_zero_at_the_teacher(isa: str, dtype: torch.dtype) -> None:
    t = (5 * torch.randn(6, 1003)).to(dtype)
    s = t.clone().requires_grad_()
    loss, kd, _ = kdfast.kd_loss(s, t, temperature=3.0, alpha=1.0, backend="fused")
    loss.backward()
    assert (loss.item(), kd.item()) == (0, 0)
    assert s.grad is not None and not s.grad.any()


def test_extremes_on_every_isa(isa: str) -> None:
    inf = float("inf")
    s = torch.tensor([[1e4, -1e4, 0.0] * 9], requires_grad=True)
    t = torch.tensor([[0.0, 1.0, -inf] * 9])
    loss, kd, _ = kdfast.kd_loss(s, t, torch.tensor([1]), backend="fused")
    want = kdfast.kd_loss(s, t, torch.tensor([1]), backend="reference")
    torch.testing.assert_close((loss, kd), want[:2])
    (grad,) = torch.autograd.grad(loss, s)
    torch.testing.assert_close(grad, torch.autograd.grad(want[0], s)[0])
    assert torch.isfinite(grad).all()
    s = torch.randn(3, 40)
    s[1, 39] = float("nan")
    _, kd, _ = kdfast.kd_loss(s, torch.zeros(3, 40), reduction="none", backend="fused")
    assert kd.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("layout", ["columns", "transposed", "expanded", "strided rows"])
def test_layout(layout: str) -> None:
    s, t = {
        "columns": (torch.randn(6, 50)[:, 3:40], torch.randn(6, 37)),
        "transposed": (torch.randn(37, 6).t(), torch.randn(6, 37)),
        "expanded": (torch.randn(6, 37), torch.randn(37).expand(6, 37)),
        "strided rows": (torch.randn(2, 3, 2, 37)[:, :, 1], torch.randn(2, 6, 37)[:, ::2]),
    }[layout]
    target = torch.randint(0, 37, s.shape[:-1])
    got = run(partial(kdfast.kd_loss, backend="fused"), [s, t, target])
    want = run(partial(kdfast.kd_loss, backend="reference"), [s, t, target])
    torch.testing.assert_close(got, want)


def test_threads_do_not_change_a_bit() -> None:
    inputs = make(257, 301, "hard")
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run(partial(kdfast.kd_loss, backend="fused"), inputs))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [1003, 41, 7])
def test_gradients_larger_than_the_cache(classes: int, dtype: torch.dtype, isa: str) -> None:
    # Such gradients are written by other instructions, which depend on the address.
    rows = (9 << 20) // (2 * classes)
    s, t, y = make(rows, classes, "hard")
    inputs = [s.to(dtype), t.to(dtype), y]
    call = partial(kdfast.kd_loss, backend="fused", reduction="sum")
    whole = run(call, inputs)[3]
    step = 512 * 1024 // classes
    parts = [run(call, [x[i : i + step] for x in inputs])[3] for i in range(0, rows, step)]
    assert torch.equal(whole, torch.cat(parts))


def test_backward_scales() -> None:
    s, t, y = make(4, 9, "hard")
    s.requires_grad_()
    loss = kdfast.kd_loss(s, t, y, backend="fused")[0]
    (one,) = torch.autograd.grad(loss, s, retain_graph=True)
    (three,) = torch.autograd.grad(3 * loss, s, retain_graph=True)
    torch.testing.assert_close(three, 3 * one)
    rows = kdfast.kd_loss(s, t, y, reduction="none", backend="fused")[0]
    (row,) = torch.autograd.grad(rows[2], s)
    assert row[2].any() and not row[[0, 1, 3]].any()


def test_a_kept_graph_can_be_used_again() -> None:
    s, t, y = make(64, 100, "hard")
    s.requires_grad_()
    loss = kdfast.kd_loss(s, t, y, backend="fused")[0]
    (one,) = torch.autograd.grad(loss, s, retain_graph=True)
    three = [torch.autograd.grad(3 * loss, s, retain_graph=True)[0] for _ in range(2)]
    # The graph's own buffer, once nobody can ask for it again.
    (last,) = torch.autograd.grad(3 * loss, s)
    for grad in (*three, last):
        torch.testing.assert_close(grad, 3 * one)


def test_a_weight_costs_no_memory() -> None:
    s, t, y = make(64, 100, "hard")
    s.requires_grad_()
    loss = 3 * kdfast.kd_loss(s, t, y, backend="fused")[0]
    assert peak_bytes(lambda: torch.autograd.grad(loss, s)) < s.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("kind", ["none", "hard", "ignored", "soft"])
def test_in_place(kind: str, reduction: str, dtype: torch.dtype, isa: str) -> None:
    s, t, *y = (x.to(dtype) if x.is_floating_point() else x for x in make(12, 301, kind))
    results = []
    for inplace in (False, True):
        leaf = s.clone().requires_grad_()
        logits = leaf * 2
        out = kdfast.kd_loss(logits, t, *y, reduction=reduction, inplace=inplace, backend="fused")
        memory = logits.data_ptr()
        (grad,) = torch.autograd.grad(out[0].sum() * 3, logits)
        assert (grad.data_ptr() == memory) == inplace
        results.append([x.detach() for x in (*out, grad)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_in_place_keeps_nothing_more() -> None:
    s, t, y = make(64, 1000, "hard")
    layer = torch.nn.Linear(1, 1000)

    def step(inplace: bool) -> None:
        logits = layer(s[:, :1])
        kdfast.kd_loss(logits, t, y, inplace=inplace, backend="fused")[0].backward()

    step(True)
    # Logits, their gradient, and, when it is not in place, both at a time.
    assert peak_bytes(lambda: step(False)) > 1.9 * s.nbytes
    assert peak_bytes(lambda: step(True)) < 1.5 * s.nbytes


def test_in_place_needs_contiguous_logits() -> None:
    s, t, y = make(6, 10, "hard")
    arguments = (t[:, ::2].clone(), y // 2, 4.0, 0.7, "sum", 0.0, -100)
    for bad in (s[:, ::2], s[:, :5].half()):
        with pytest.raises(ValueError, match="must be contiguous and not fp16"):
            torch.ops.kdfast.kd_loss_.default(bad, arguments[0].to(bad.dtype), *arguments[1:])


def test_batched_upstream() -> None:
    s, t, y = make(64, 100, "hard")
    s.requires_grad_()
    loss = kdfast.kd_loss(s, t, y, backend="fused")[0]
    (one,) = torch.autograd.grad(loss, s, retain_graph=True)
    weights = torch.tensor([1.0, 2.0, -3.0])
    (many,) = torch.autograd.grad(loss, s, weights, is_grads_batched=True)
    torch.testing.assert_close(many, weights[:, None, None] * one)


def test_half_gradients_survive_until_the_loss_scale() -> None:
    # 1e-4 of a row's probability over 4,096 rows is below the smallest fp16 number.
    s = torch.zeros(4096, 2, dtype=torch.float16, requires_grad=True)
    t = torch.tensor([[1e-3, 0.0]], dtype=torch.float16).expand(4096, 2)
    loss = kdfast.kd_loss(s, t, temperature=1.0, backend="fused")[0]
    (grad,) = torch.autograd.grad(loss * 65536.0, s)
    assert grad.dtype == torch.float16
    assert grad[0, 1].item() == pytest.approx(65536 * 0.7 * 0.25e-3 / 4096, rel=1e-2)


def test_graph_keeps_the_gradient_only() -> None:
    s, t, y = make(64, 100, "hard")
    s.requires_grad_()
    kept = saved_bytes(lambda: kdfast.kd_loss(s, t, y, backend="fused")[0])
    assert kept == s.nbytes
    with torch.no_grad():
        assert OP(s, t, y, 4.0, 0.7, "sum", 0.0, -100, False)[3].shape == (0,)


def test_no_second_derivative() -> None:
    s, t, y = make(4, 9, "hard")
    s.requires_grad_()
    loss = kdfast.kd_loss(s, t, y, backend="fused")[0]
    with pytest.raises(NotImplementedError, match="kd_loss: .* no second derivative"):
        torch.autograd.grad(loss, s, create_graph=True)


@pytest.mark.parametrize("kind", ["none", "hard", "soft"])
def test_registration(kind: str) -> None:
    s, t, *y = make(6, 10, kind)
    s.requires_grad_()
    for reduction in ("batchmean", "none"):
        args = (s, t, y[0] if y else None, 4.0, 0.7, reduction, 0.1, -100, True)
        torch.library.opcheck(OP, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_compile(dtype: torch.dtype) -> None:
    def objective(s: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss, kd, ce = kdfast.kd_loss(s * 2, t, y, backend="fused")
        return 3 * loss, kd, ce

    s, t, y = make(6, 10, "hard")
    s, t = s.to(dtype).requires_grad_(), t.to(dtype)
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    got, want = compiled(s, t, y), objective(s, t, y)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert [x.requires_grad for x in got] == [True, False, False]
    grads = [torch.autograd.grad(x[0], s)[0] for x in (got, want)]
    assert torch.equal(*grads)


def test_autocast() -> None:
    layer = torch.nn.Linear(8, 10)
    x, t, y = torch.randn(4, 8), torch.randn(4, 10), torch.arange(4)
    with torch.autocast("cpu", torch.bfloat16):
        logits = layer(x)
        loss = kdfast.kd_loss(logits, t.bfloat16(), y, backend="fused")[0]
    loss.backward()
    assert (logits.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    assert layer.weight.grad is not None and layer.weight.grad.any()
