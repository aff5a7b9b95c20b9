# SPDX-License-Identifier: Apache-2.0
"""Offsets beyond 2^31 elements in the Triton kernels, in the interpreter, which wraps like a GPU.

The tensors take more address space than memory: only the pages that hold their elements exist.
"""

import mmap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kdfast import Rope
from kdfast.ops import attention_distill, feature_loss, kd_loss, pruned_attention, swiglu_norm
from kdfast.testing import interpreted_kernels

for name in ("attention_distill", "feature_loss", "kd_loss", "pruned_attention", "swiglu_norm"):
    interpreted_kernels(name)
pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(not hasattr(mmap, "MAP_ANONYMOUS"), reason="needs private mappings"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]
NO_RESERVE = 0x4000  # Linux: address space that no memory stands behind
STEP = 1 << 30  # elements; two of them are out of the reach of 32 bits
FRONT = 1 << 31  # zeros before the tensor, where an offset of 32 bits would lead to


def spread(x: Tensor, axis: int) -> Tensor:
    """A copy of x whose elements along ``axis`` are ``STEP`` apart."""
    assert x.shape[axis] >= 3
    strides = list(x.contiguous().stride())
    strides[axis] = STEP
    size = FRONT + STEP * x.shape[axis] + x.numel()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    try:
        memory = mmap.mmap(-1, size * x.element_size(), flags)
    except OSError as error:
        pytest.skip(f"no address space: {error}")
    flat = torch.frombuffer(memory, dtype=x.dtype)
    return flat.as_strided(x.shape, strides, FRONT).copy_(x)


def compare(call: Callable[..., Any], near: list[Tensor], axis: int) -> None:
    want = call(*near)
    got = call(*(spread(x, axis) for x in near))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def halves(count: int, *shape: int) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float16) for _ in range(count)]


def three(axis: int) -> tuple[int, int, int, int]:
    """(B, H, N, D) with three of ``axis`` and one of the others."""
    batch, heads, tokens = (3 if i == axis else 1 for i in range(3))
    return batch, heads, tokens, 16


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["images", "heads", "tokens"])
def test_attention(axis: int) -> None:
    shape = three(axis)
    table = torch.rand(shape[2], 16)
    heads = list(range(shape[1]))[::-1]
    args = (heads, *pruned_attention.geometry_args(Rope(table, table), None, 0.25))
    near = halves(4, *shape)
    out, lse = pruned_attention._cuda(*near[:3], *args, None)

    def step(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, out: Tensor) -> Any:
        grads = pruned_attention._cuda_bwd(grad, q, k, v, out, lse, *args, None, False)
        return *pruned_attention._cuda(q, k, v, *args, None), *grads

    compare(step, [*near, out], axis)


@pytest.mark.parametrize("axis", range(4), ids=["biases", "heads", "queries", "keys"])
def test_bias(axis: int) -> None:
    q, k, v = halves(3, 3, 3, 3, 16)
    args = ([2], *pruned_attention.geometry_args(None, None, 0.25))

    def step(bias: Tensor) -> Any:
        out, lse = pruned_attention._cuda(q, k, v, *args, bias)
        return out, *pruned_attention._cuda_bwd(out, q, k, v, out, lse, *args, bias, True)

    compare(step, halves(1, 3, 3, 3, 3), axis)


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["images", "heads", "tokens"])
def test_teacher(axis: int) -> None:
    shape = three(axis)
    q, k, v = halves(3, shape[0], 1, *shape[2:])
    side = pruned_attention.geometry_args(None, None, 0.25)
    options = (None, [shape[1] - 1], *side, *side[:5], 2.0, "kl")
    one = torch.ones(())

    def step(teacher_q: Tensor, teacher_k: Tensor) -> Any:
        args = (q, k, v, teacher_q, teacher_k, *options)
        out, loss, stats = attention_distill._cuda(*args)
        return out, loss, *attention_distill._cuda_bwd(out, one, out, stats, *args)

    compare(step, halves(2, *shape), axis)


@pytest.mark.parametrize("target", ["none", "hard", "soft"])
def test_kd_loss(target: str) -> None:
    goals = {"hard": torch.tensor([3, 0, 1]), "soft": torch.rand(3, 40).softmax(-1)}

    def step(s: Tensor, t: Tensor) -> Any:
        return kd_loss._cuda(s, t, goals.get(target), 4.0, 0.7, "batchmean", 0.1, -100, True)

    compare(step, halves(2, 3, 40), 0)


@pytest.mark.parametrize("normalize", feature_loss.NORMALIZATIONS)
def test_feature_loss(normalize: str) -> None:
    compare(lambda s, t: feature_loss._cuda(s, t, "mse", normalize, True), halves(2, 3, 40), 0)


def test_swiglu_norm() -> None:
    # Not its backward: there the row counts a loop, which the interpreter takes for a Python int.
    weight = torch.rand(40).half()
    gate, value = halves(2, 3, 40)
    compare(lambda g, v: swiglu_norm._cuda(g, v, weight, weight, 1e-6), [gate, value], 0)
