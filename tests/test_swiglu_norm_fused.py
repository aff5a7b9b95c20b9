# SPDX-License-Identifier: Apache-2.0
"""The compiled kernel of swiglu_norm against its reference."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kdfast
from kdfast.machine.memory import saved_bytes
from kdfast.testing import assert_no_worse, run

pytestmark = pytest.mark.usefixtures("compiled")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAMES = ["out", "d gate", "d value", "d weight", "d bias"]
OP = torch.ops.kdfast.swiglu_norm.default
FUSED = partial(kdfast.swiglu_norm, backend="fused")
REFERENCE = partial(kdfast.swiglu_norm, backend="reference")


def make(*shape: int, size: float = 1.0) -> list[Tensor]:
    gate, value = (size * (torch.randn(shape) + 0.3) for _ in range(2))
    return [gate, value, 1 + 0.5 * torch.randn(shape[-1]), torch.randn(shape[-1])]


def compare(inputs: list[Tensor], dtype: torch.dtype, parameters: torch.dtype) -> None:
    """The result and its gradients are no worse than the reference's in the same dtypes."""
    low = [x.to(d) for x, d in zip(inputs, [dtype] * 2 + [parameters] * 2, strict=True)]
    fused, eager = run(FUSED, low), run(REFERENCE, low)
    exact = run(REFERENCE, [x.double() for x in low])
    for name, one, best, other in zip(NAMES, fused, exact, eager, strict=True):
        assert one.dtype == other.dtype
        if dtype == torch.float64:  # its own reference
            torch.testing.assert_close(one, best, rtol=1e-11, atol=1e-11, msg=name)
        else:
            assert_no_worse(name, one, best, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_worse(dtype: torch.dtype, isa: str) -> None:
    # A row shorter than a vector, one with a rest, several blocks of rows, and the real width.
    for shape in ((5, 3), (2, 3, 37), (75, 48), (1100, 16), (20, 2730)):
        compare(make(*shape), dtype, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parameters_in_fp32(dtype: torch.dtype, isa: str) -> None:
    for shape in ((2, 3, 37), (20, 1000)):
        compare(make(*shape), dtype, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("size", [1e-2, 30.0])
def test_small_and_large_numbers(size: float, dtype: torch.dtype, isa: str) -> None:
    for shape in ((2, 37, 48), (1100, 16), (20, 2730)):
        compare(make(*shape, size=size), dtype, dtype)


@pytest.mark.parametrize("channels", [1, 37, 2730])
def test_rows_without_variance(channels: int, isa: str) -> None:
    """1 / sqrt(eps) = 1000 would show what rounding leaves of h - mean(h) = 0."""
    rows = 300 * torch.rand(9, 1) + 0.1
    gate, value = rows.expand(9, channels).contiguous(), torch.full((9, channels), 0.7)
    bias = torch.randn(channels)
    out = FUSED(gate, value, torch.ones(channels), bias)
    assert torch.equal(out, bias.expand(9, channels))
    grads = run(FUSED, [gate, value, torch.ones(channels), bias])[1:]
    assert grads[2].abs().max() == 0  # of the weight: x is 0
    if channels == 1:
        assert max(x.abs().max().item() for x in grads[:2]) < 1e-5


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 9), min_size=0, max_size=4),
    channels=st.integers(1, 300),
    padding=st.integers(0, 20),
    size=st.sampled_from([1e-2, 1.0, 30.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_any_shape_and_size(
    shape: list[int], channels: int, padding: int, size: float, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    gate, value, weight, bias = make(*shape, channels + padding, size=size)
    inputs = [x.to(dtype) for x in (gate, value, weight[:channels], bias[:channels])]
    fused, exact = run(FUSED, inputs), run(REFERENCE, [x.double() for x in inputs])
    # A wrong element is an error of order one, so rounding is not judged here: the yardstick is the
    # reference in bf16 for every dtype.
    eager = run(REFERENCE, [x.bfloat16() for x in inputs])
    for name, *triple in zip(NAMES, fused, exact, eager, strict=True):
        assert_no_worse(name, *triple)


@pytest.mark.parametrize("layout", ["packed", "transposed", "expanded", "columns", "strided rows"])
def test_layouts(layout: str) -> None:
    gate, value, weight, bias = make(6, 37)
    gate, value = {
        "packed": tuple(torch.randn(6, 74).chunk(2, -1)),
        "transposed": (torch.randn(37, 6).t(), value),
        "expanded": (gate, torch.randn(37).expand(6, 37)),
        "columns": (torch.randn(6, 74)[:, ::2], value),
        "strided rows": (torch.randn(12, 37)[::2], value),
    }[layout]
    leaves = [x.detach().requires_grad_() for x in (gate, value, weight, bias)]
    upstream = torch.randn(37, 6).t()
    results = []
    for call in (FUSED, REFERENCE):
        out = call(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, upstream)])
    torch.testing.assert_close(*results)


def test_the_halves_of_a_projection_are_not_copied() -> None:
    packed = torch.randn(64, 200)
    gate, value = (x.requires_grad_() for x in packed.chunk(2, -1))
    weight, bias = torch.ones(100), torch.zeros(100)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        FUSED(gate, value, weight, bias)
    addresses = [x.data_ptr() for x in kept]
    assert gate.data_ptr() in addresses and value.data_ptr() in addresses


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_threads_do_not_change_a_bit(dtype: torch.dtype) -> None:
    inputs = [x.to(dtype) for x in make(1025, 130)]
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run(FUSED, inputs))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("channels", [1024, 1001])
def test_results_larger_than_the_cache(channels: int) -> None:
    # They are written by other instructions, which depend on the address.
    inputs = make((9 << 20) // (4 * channels), channels)
    whole = run(FUSED, inputs)
    first = [x[:64] for x in inputs[:2]] + inputs[2:]
    torch.testing.assert_close(whole[0][:64], FUSED(*first), rtol=0, atol=0)
    for one, other in zip(whole, run(REFERENCE, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-4)


def test_graph_keeps_the_inputs_and_two_numbers_per_row() -> None:
    leaves = [x.requires_grad_() for x in make(64, 100)]
    kept = saved_bytes(lambda: FUSED(*leaves))
    assert kept == 4 * (2 * 64 * 100 + 2 * 100 + 2 * 64)
    assert kept < 0.51 * saved_bytes(lambda: REFERENCE(*leaves))


def test_a_kept_graph_can_be_used_again() -> None:
    leaves = [x.requires_grad_() for x in make(8, 20)]
    out = FUSED(*leaves)
    first = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    again = torch.autograd.grad(out.sum(), leaves)
    assert all(map(torch.equal, first, again))


def test_second_derivative() -> None:
    leaves = [x.double().requires_grad_() for x in make(4, 9)]
    assert torch.autograd.gradgradcheck(FUSED, leaves)


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=str)
def test_registration(parameters: torch.dtype) -> None:
    gate, value, weight, bias = make(2, 3, 10)
    leaves = [gate.bfloat16(), value.bfloat16(), weight.to(parameters), bias.to(parameters)]
    torch.library.opcheck(OP, (*(x.requires_grad_() for x in leaves), 1e-6))


def test_compile() -> None:
    def objective(*x: Tensor) -> Tensor:
        return FUSED(x[0] * 2, *x[1:]).square().sum()

    leaves = [x.requires_grad_() for x in make(5, 12)]
    got = torch.compile(objective, fullgraph=True, backend="aot_eager")(*leaves)
    want = objective(*leaves)
    assert torch.equal(got, want)
    grads = [torch.autograd.grad(x, leaves) for x in (got, want)]
    assert all(map(torch.equal, *grads))
