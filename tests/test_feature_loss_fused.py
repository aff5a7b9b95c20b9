# SPDX-License-Identifier: Apache-2.0
"""The compiled kernel of feature_loss against its reference."""

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
KINDS = ["mse", "cosine", "smooth_l1"]
NORMALIZATIONS = [None, "layer", "channel"]
NAMES = ["loss", "d student", "d teacher"]
OP = torch.ops.kdfast.feature_loss.default


def make(*shape: int) -> list[Tensor]:
    t = 2 * torch.randn(shape) + 1
    return [t + torch.randn(shape), t]


def compare(inputs: list[Tensor], dtype: torch.dtype, **options: object) -> None:
    """The loss and its gradients are no worse than the reference's in the same dtype."""
    low = [x.to(dtype) for x in inputs]
    call = partial(kdfast.feature_loss, **options)
    fused = run(partial(call, backend="fused"), low)
    eager = run(partial(call, backend="reference"), low)
    best = run(partial(call, backend="reference"), [x.double() for x in low])
    for name, *triple in zip(NAMES, fused, best, eager, strict=True):
        assert_right(name, *triple)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_worse(kind: str, normalize: str | None, dtype: torch.dtype, isa: str) -> None:
    # A row shorter than a vector, one with a rest, a real one, and more than one block of rows.
    for shape in ((5, 3), (2, 3, 37), (7, 1024), (600, 16)):
        compare(make(*shape), dtype, kind=kind, normalize=normalize)


@pytest.mark.parametrize("kind", ["mse", "smooth_l1"])
def test_elements_in_chunks(kind: str) -> None:
    # Two chunks and a rest, whose end is not the end of a vector.
    compare(make(8205), torch.float32, kind=kind)
    compare(make(3, 4096), torch.bfloat16, kind=kind)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    kind=st.sampled_from(KINDS),
    normalize=st.sampled_from(NORMALIZATIONS),
    axis=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_any_shape(
    shape: list[int], kind: str, normalize: str | None, axis: int, seed: int
) -> None:
    torch.manual_seed(seed)
    dim = axis % len(shape)
    # A layer of one or two features is nothing but cancellation; a channel needs some positions.
    shape[dim] += 2
    shape.insert(dim, 3)
    call = partial(kdfast.feature_loss, kind=kind, normalize=normalize, dim=dim + 1)
    inputs = make(*shape)
    got = run(partial(call, backend="fused"), inputs)
    eager = run(partial(call, backend="reference"), inputs)
    want = run(partial(call, backend="reference"), [x.double() for x in inputs])
    for name, x, rounded, exact in zip(NAMES, got, eager, want, strict=True):
        limit = 4 * (rounded - exact).abs().max().item() + 1e-5 * exact.abs().max().item()
        torch.testing.assert_close(x.double(), exact, rtol=0, atol=limit, msg=name)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_exactly_zero_at_the_teacher(kind: str, normalize: str | None, isa: str) -> None:
    for dtype in DTYPES:
        t = torch.randn(7, 333).to(dtype)
        s = t.clone().requires_grad_()
        loss = kdfast.feature_loss(s, t, kind=kind, normalize=normalize, backend="fused")
        loss.backward()
        assert loss.item() == 0
        assert s.grad is not None and not s.grad.any()


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["columns", "transposed", "expanded", "map"])
def test_layout(layout: str, kind: str, normalize: str | None) -> None:
    (s, t), dim = {
        "columns": ((torch.randn(6, 50)[:, 3:40], torch.randn(6, 37)), -1),
        "transposed": ((torch.randn(37, 6).t(), torch.randn(6, 37)), -1),
        "expanded": ((torch.randn(6, 37), torch.randn(37).expand(6, 37)), 0),
        "map": ((torch.randn(2, 5, 4, 3), torch.randn(2, 4, 3, 5).movedim(-1, 1)), 1),
    }[layout]
    options = {"kind": kind, "normalize": normalize, "dim": dim}
    got = run(partial(kdfast.feature_loss, backend="fused", **options), [s, t])
    want = run(partial(kdfast.feature_loss, backend="reference", **options), [s, t])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_threads_do_not_change_a_bit(kind: str, normalize: str | None) -> None:
    inputs = make(1025, 65)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        call = partial(kdfast.feature_loss, kind=kind, normalize=normalize, backend="fused")
        results.append(run(call, inputs))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("features", [1024, 1001])
def test_gradients_larger_than_the_cache(features: int, dtype: torch.dtype, isa: str) -> None:
    # Such gradients are written by other instructions, which depend on the address. Row counts are
    # powers of two, so that dividing by them rounds nothing.
    call = partial(kdfast.feature_loss, kind="mse", backend="fused")
    inputs = [x.to(dtype) for x in make(8192, features)]
    whole = run(call, inputs)[1]
    parts = [run(call, [x[i : i + 512] for x in inputs])[1] for i in range(0, 8192, 512)]
    assert torch.equal(16 * whole, torch.cat(parts))


def test_a_kept_graph_can_be_used_again() -> None:
    s, t = make(64, 100)
    s.requires_grad_()
    loss = kdfast.feature_loss(s, t, backend="fused")
    (one,) = torch.autograd.grad(loss, s, retain_graph=True)
    three = [torch.autograd.grad(3 * loss, s, retain_graph=True)[0] for _ in range(2)]
    # The graph's own buffer, once nobody can ask for it again.
    (last,) = torch.autograd.grad(3 * loss, s)
    for grad in (*three, last):
        torch.testing.assert_close(grad, 3 * one)


def test_a_weight_costs_no_memory() -> None:
    s, t = make(64, 100)
    s.requires_grad_()
    loss = 3 * kdfast.feature_loss(s, t, backend="fused")
    assert peak_bytes(lambda: torch.autograd.grad(loss, s)) < s.nbytes


def test_batched_upstream() -> None:
    s, t = make(64, 100)
    s.requires_grad_()
    loss = kdfast.feature_loss(s, t, backend="fused")
    (one,) = torch.autograd.grad(loss, s, retain_graph=True)
    weights = torch.tensor([1.0, 2.0, -3.0])
    (many,) = torch.autograd.grad(loss, s, weights, is_grads_batched=True)
    torch.testing.assert_close(many, weights[:, None, None] * one)


def test_half_gradients_survive_until_the_loss_scale() -> None:
    s, t = torch.full((4096, 64), 1e-3), torch.zeros(4096, 64)
    s = s.half().requires_grad_()
    loss = kdfast.feature_loss(s, t.half(), backend="fused")
    (grad,) = torch.autograd.grad(loss * 65536.0, s)
    assert grad.dtype == torch.float16
    assert grad[0, 0].item() == pytest.approx(65536 * 2e-3 / (4096 * 64), rel=1e-2)


def test_graph_keeps_the_gradient_only() -> None:
    s, t = make(64, 100)
    s.requires_grad_()
    kept = saved_bytes(lambda: kdfast.feature_loss(s, t, normalize="layer", backend="fused"))
    assert kept == s.nbytes
    with torch.no_grad():
        assert OP(s, t, "mse", "none", False)[1].shape == (0,)


def test_no_second_derivative() -> None:
    s, t = make(4, 9)
    s.requires_grad_()
    loss = kdfast.feature_loss(s, t, backend="fused")
    with pytest.raises(NotImplementedError, match="feature_loss: .* no second derivative"):
        torch.autograd.grad(loss, s, create_graph=True)


@pytest.mark.parametrize("normalize", ["none", "layer", "channel"])
@pytest.mark.parametrize("kind", KINDS)
def test_registration(kind: str, normalize: str) -> None:
    s, t = make(2, 3, 10)
    torch.library.opcheck(OP, (s.requires_grad_(), t, kind, normalize, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_compile(dtype: torch.dtype) -> None:
    def objective(s: Tensor, t: Tensor) -> Tensor:
        return 3 * kdfast.feature_loss(s * 2, t, normalize="layer", dim=1, backend="fused")

    s, t = (x.to(dtype) for x in make(2, 5, 3, 4))
    s.requires_grad_()
    got = torch.compile(objective, fullgraph=True, backend="aot_eager")(s, t)
    want = objective(s, t)
    assert torch.equal(got, want)
    grads = [torch.autograd.grad(x, s)[0] for x in (got, want)]
    assert torch.equal(*grads)
