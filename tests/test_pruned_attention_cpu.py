# SPDX-License-Identifier: Apache-2.0
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import kdfast
from kdfast import Window
from kdfast.machine import memory
from kdfast.ops._library import EXTENSION
from kdfast.testing import SHAPES, assert_no_worse, run
from kdfast.testing import AttentionCase as Case

pytestmark = pytest.mark.usefixtures("compiled")
ISAS = EXTENSION.testable_isas() if EXTENSION else ["generic"]
LOW = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("out", "dq", "dk", "dv", "dpad")


CASES = {
    **{name: Case(shape) for name, shape in SHAPES.items()},
    # More images than in SHAPES: of 128 numbers, eager's own largest error is a matter of luck.
    "tiny": Case((32, 2, 4, 16)),
    "subset": Case((2, 4, 20, 64), heads=(3, 1), layout="interleaved", prefix=1),
    "half": Case((1, 2, 33, 80), layout="half"),
    "d72": Case((1, 2, 50, 72), layout="interleaved", scale=-0.3),
    "d88": Case((1, 1, 19, 88), layout="half", prefix=5),
    "d7": Case((1, 2, 18, 7)),
    "d256": Case((1, 1, 40, 256), layout="interleaved"),
    "long": Case((1, 1, 700, 32)),
    "windows": Case((2, 3, 35, 16), (2, 0), layout="interleaved", grid=(5, 7), size=3, padded=True),
    "cropped": Case((1, 2, 35, 24), layout="half", grid=(5, 7), size=4),
    "orion": Case((1, 2, 600, 64), (1,), layout="interleaved", grid=(20, 30), size=16, padded=True),
}


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_fused_is_no_worse(name: str, dtype: torch.dtype, isa: str) -> None:
    case = CASES[name]
    inputs = case.inputs(dtype)
    fused, eager = (run(case.call(b), inputs) for b in ("fused", "reference"))
    exact = run(case.call("reference"), [x.double() for x in inputs])
    for label, *triple in zip(NAMES, fused, exact, eager, strict=False):
        assert_no_worse(f"{name} {label} {dtype} {isa}", *triple)


@pytest.mark.skipif("avx2" not in ISAS, reason="needs AVX2, FMA and F16C")
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_kernels_with_fma_are_not_the_generic_one(dtype: torch.dtype) -> None:
    case, results = CASES["odd"], {}
    before = EXTENSION.cpu_isa()
    for name in ISAS:
        EXTENSION.set_cpu_isa(name)
        # The log-sum-exp is fp32 whatever the inputs are, so another order of sums shows in it.
        q, k, v = case.inputs(dtype)
        rest = (None, None, None, 0, True, 0.125, None, 0, None, None, 0)
        results[name] = torch.ops.kdfast.pruned_attention.default(q, k, v, *rest)[1]
    EXTENSION.set_cpu_isa(before)
    plain = results.pop("generic")
    assert not any(torch.equal(plain, lse) for lse in results.values())


@pytest.mark.parametrize("name", CASES)
def test_fused_is_exact_in_double(name: str) -> None:
    case = CASES[name]
    fused, eager = (run(case.call(b), case.inputs()) for b in ("fused", "reference"))
    for label, a, b in zip(NAMES, fused, eager, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11, msg=lambda m, n=label: f"{n}: {m}")


def test_gradcheck() -> None:
    case = Case((1, 2, 6, 4), (1,), layout="half", grid=(2, 3), size=2, padded=True)
    leaves = [x.requires_grad_() for x in case.inputs()]
    assert torch.autograd.gradcheck(case.call("fused"), leaves)
    assert torch.autograd.gradgradcheck(case.call("fused"), leaves)
    x, bias = (torch.randn(2, 3, 5, n, dtype=torch.float64, requires_grad=True) for n in (4, 5))
    # One tensor as all three, and a bias of two turns.
    assert torch.autograd.gradgradcheck(
        lambda x, bias: kdfast.pruned_attention(x, x, x, bias=bias, backend="fused"), (x, bias)
    )


class Cut(torch.autograd.Function):
    """Passes its input on and stops the gradient in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


def test_gradients_that_nobody_asks_for_are_not_made() -> None:
    case = CASES["odd"]
    leaves = [x.requires_grad_() for x in case.inputs(torch.float32)]
    out = case.call("fused")(*leaves)
    upstream = torch.ones_like(out)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        torch.autograd.grad(out, leaves, upstream)
    events = {(event.name, *map(tuple, event.input_shapes[:1])) for event in profiler.events()}
    assert ("kdfast::pruned_attention_bwd", case.shape) in events
    # The second result, the log-sum-exp, has no gradient: not even one of zeros.
    assert ("aten::zero_", case.shape[:3]) not in events
    cut = Cut.apply(case.call("fused")(*leaves)).sum()
    assert torch.autograd.grad(cut, leaves, allow_unused=True) == (None,) * 3


def gradients(case: Case, inputs: list[Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
    """Gradients with the strides of inputs and upstream as they are."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(case.call("fused")(*leaves), leaves, upstream)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_any_strides(dtype: torch.dtype, isa: str) -> None:
    case = Case((2, 3, 37, 24), layout="interleaved")
    plain = case.inputs(dtype)
    weight = torch.randn(case.shape).to(dtype)
    want = gradients(case, plain, weight)
    qkv = torch.stack([x.transpose(1, 2) for x in plain], 2)
    packed = [x.transpose(1, 2) for x in qkv.unbind(2)]
    sparse = [torch.stack((x, x + 1), -1).flatten(-2)[..., ::2] for x in plain]
    turned = [x.mT.contiguous().mT for x in plain]
    for views in (packed, sparse, turned):
        for a, b in zip(gradients(case, views, weight), want, strict=True):
            assert torch.equal(a, b)
    ones = torch.ones((), dtype=dtype).expand(case.shape)
    want = gradients(case, plain, ones.contiguous())
    for a, b in zip(gradients(case, plain, ones), want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["long", "windows", "odd"])
def test_threads_change_no_bit(name: str, dtype: torch.dtype, isa: str) -> None:
    case = CASES[name]
    results = []
    for threads in (1, 2, 16):
        torch.set_num_threads(threads)
        results.append(run(case.call("fused"), case.inputs(dtype)))
    for one, *others in zip(*results, strict=True):
        for other in others:
            assert torch.equal(one, other)


def test_other_heads_are_not_read(isa: str) -> None:
    case = CASES["orion"]
    inputs = case.inputs(torch.bfloat16)
    want = run(case.call("fused"), inputs)
    for x in inputs[:3]:
        x[:, 0] = torch.nan
    inputs[3][0] = torch.nan
    got = run(case.call("fused"), inputs)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    for grad in (*got[1:4], got[4][None]):
        assert not grad[:, 0].any()
        assert grad[:, 1].any()


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("level", [-1e4, 1e4])
def test_extreme_logits(level: float, dtype: torch.dtype, isa: str) -> None:
    q, k, v = Case((1, 2, 37, 16)).inputs(dtype)
    # One large channel: logits of about `level` that differ by more than exp can hold.
    q[..., 0], k[..., 0] = 100, (torch.arange(37) * 0.1 + 10) * level / 1e3
    call = Case((1, 2, 37, 16), scale=1.0)
    results = [run(call.call(b), [q, k, v]) for b in ("fused", "reference")]
    exact = run(call.call("reference"), [q.double(), k.double(), v.double()])
    for label, *triple in zip(NAMES, results[0], exact, results[1], strict=False):
        # bf16 products flush what is too small for a normal fp32; nobody needs that part.
        fused, right, eager = (x.where(x.abs() > 1e-30, 0) for x in triple)
        assert_no_worse(f"{label} {level} {dtype}", fused, right, eager)


def test_constant_rows(isa: str) -> None:
    q, k, v = (torch.zeros(1, 1, 5, 16) for _ in range(3))
    v[0, 0, :, 0] = torch.arange(5)
    out = kdfast.pruned_attention(q, k, v, backend="fused")
    torch.testing.assert_close(out[0, 0, :, 0], torch.full((5,), 2.0))
    window = Window((1, 5), 5, torch.full((1, 16), 10.0))
    out = kdfast.pruned_attention(q, k, v, window=window, backend="fused")
    # Five real tokens sum to 10, twenty pads of 10 to 200.
    torch.testing.assert_close(out[0, 0, :, 0], torch.full((5,), 210 / 25))


@pytest.mark.parametrize("shape", [(0, 2, 4, 16), (2, 0, 4, 16), (1, 2, 0, 16)])
def test_empty(shape: tuple[int, int, int, int]) -> None:
    out, *grads = run(Case(shape).call("fused"), Case(shape).inputs(torch.float32))
    assert out.shape == shape
    assert all(grad.shape == shape for grad in grads)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    rows=st.integers(1, 9),
    cols=st.integers(1, 23),
    half_dim=st.integers(1, 50),
    size=st.integers(0, 10),
    layout=st.sampled_from(["interleaved", "half", None]),
    padded=st.booleans(),
    dtype=st.sampled_from([torch.float64, *LOW]),
    seed=st.integers(0, 99),
)
def test_random_calls(
    batch: int,
    heads: int,
    rows: int,
    cols: int,
    half_dim: int,
    size: int,
    layout: str | None,
    padded: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    kept = tuple(torch.randperm(heads, generator=torch.Generator().manual_seed(seed)).tolist())
    case = Case(
        (batch, heads, rows * cols, 2 * half_dim),
        kept[: 1 + seed % heads],
        layout=layout,
        grid=(rows, cols) if size else None,
        size=size,
        padded=padded and size > 0,
    )
    inputs = case.inputs(dtype)
    fused = run(case.call("fused"), inputs)
    exact = run(case.call("reference"), [x.double() for x in inputs])
    # A wrong token, table row or pad is an error of order one, so rounding is not judged here: the
    # yardstick is the reference in bf16 for every dtype.
    eager = run(case.call("reference"), [x.bfloat16() for x in case.inputs()])
    # Judged together, for a gradient that is exactly zero has no size of its own.
    together = [torch.cat([x.flatten() for x in xs]) for xs in (fused, exact, eager)]
    assert_no_worse(str(case), *together)


def test_registration() -> None:
    case = Case((1, 2, 6, 4), grid=(2, 3), size=2, padded=True)
    q, k, v, pad = (x.requires_grad_() for x in case.inputs(torch.float32))
    table = torch.randn(4, 4)
    geometry = ([1], table, table, 0, True, 0.5, [2, 3], 2, pad, None)
    torch.library.opcheck(torch.ops.kdfast.pruned_attention.default, (q, k, v, *geometry, 0))
    plain = (None, None, None, 0, True, 0.5, None, 0, None, None)
    torch.library.opcheck(torch.ops.kdfast.pruned_attention.default, (q, k, v, *plain, 0))
    q, k, v, pad = (x.detach() for x in (q, k, v, pad))
    geometry = (*geometry[:-2], pad, None)
    out, lse = torch.ops.kdfast.pruned_attention.default(q, k, v, *geometry, 0)
    bwd = torch.ops.kdfast.pruned_attention_bwd.default
    torch.library.opcheck(bwd, (torch.randn_like(out), q, k, v, out, lse, *geometry, False, 0))


@pytest.mark.parametrize("autocast", [False, True])
def test_compile(autocast: bool) -> None:
    case = CASES["windows"]

    def step(*inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return case.call("fused")(*inputs)

    inputs = case.inputs(torch.float32)
    compiled = run(torch.compile(step, fullgraph=True, backend="aot_eager"), inputs)
    for a, b in zip(compiled, run(step, inputs), strict=True):
        assert torch.equal(a, b)
    assert compiled[0].dtype == (torch.bfloat16 if autocast else torch.float32)


def test_no_square_matrix_is_held(isa: str) -> None:
    leaves = [x.requires_grad_() for x in Case((1, 1, 2048, 16)).inputs(torch.float32)]
    square = 2048**2 * 4

    def step() -> None:
        kdfast.pruned_attention(*leaves, backend="fused").sum().backward()

    assert memory.peak_bytes(step) < square / 4
    saved = memory.saved_bytes(lambda: kdfast.pruned_attention(*leaves, backend="fused"))
    assert saved == 2048 * (4 * 16 + 1) * 4
