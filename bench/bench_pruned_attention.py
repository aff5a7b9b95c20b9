# SPDX-License-Identifier: Apache-2.0
"""pruned_attention against eager, SDPA and torch.compile, at ViT shapes with head dim 64.

The limit counts the matrix products (4 N^2 D a head forward, 14 N^2 D forward and backward, scores
recomputed) at the rate of a large matmul of the same dtype in the same session; exponentials and
memory come on top.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast
from kdfast import Rope, Window

D = 64
SHAPES = [
    (8, 12, 197),
    (8, 3, 197),
    (8, 8, 257),
    (9, 8, 256),
    (4, 8, 577),
    (1, 8, 1600),
    (1, 16, 1600),
    (1, 3, 197),
]
DTYPES = [torch.float32, torch.bfloat16]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What people write without a fused kernel, in the dtype of the inputs."""
    return ((q * D**-0.5) @ k.transpose(-1, -2)).softmax(-1) @ v


def packed(batch: int, heads: int, tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v as views of one projection (B, N, 3, H, D), as most ViTs make them."""
    qkv = torch.randn(batch, tokens, 3, heads, D).to(dtype).requires_grad_()
    return list(qkv.permute(2, 0, 3, 1, 4).unbind(0))


def with_backward(call: Attention, inputs: list[Tensor], weight: Tensor) -> Callable[[], object]:
    """``call`` and its gradients for all three inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    return lambda: torch.autograd.grad(call(*leaves), leaves, weight)


def forward(call: Attention, inputs: list[Tensor]) -> Callable[[], Tensor]:
    """``call`` without a graph."""
    leaves = [x.detach() for x in inputs]

    def run() -> Tensor:
        with torch.no_grad():
            return call(*leaves)

    return run


def check(candidates: dict[str, Attention], inputs: list[Tensor], exact: Tensor) -> None:
    """Nothing is timed on a wrong result."""
    tolerance = 2e-2 if inputs[0].dtype == torch.bfloat16 else 1e-4
    for name, call in candidates.items():
        error = (forward(call, inputs)().double() - exact).norm() / exact.norm()
        assert error < tolerance, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("phase", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_attention(  # type: ignore[no-untyped-def]
    compare, shape: tuple[int, int, int], dtype: torch.dtype, phase: str
) -> None:
    batch, heads, tokens = shape
    inputs = packed(*shape, dtype)
    candidates: dict[str, Attention] = {
        "kdfast": lambda q, k, v: kdfast.pruned_attention(q, k, v, backend="fused"),
        "eager": eager,
        "sdpa": F.scaled_dot_product_attention,
        "compile": torch.compile(eager, dynamic=False),
    }
    check(candidates, inputs, eager(*(x.detach().double() for x in inputs)))
    weight = torch.randn(batch, heads, tokens, D).to(dtype)
    calls = {
        name: forward(call, inputs) if phase == "fwd" else with_backward(call, inputs, weight)
        for name, call in candidates.items()
    }
    products = 4 if phase == "fwd" else 14
    flops = products * batch * heads * tokens**2 * D
    case = f"{phase} {batch}x{heads}x{tokens} {dtype}"
    compare("pruned_attention", case, calls, flops=flops, dtype=dtype, memory=phase != "fwd")


@pytest.mark.parametrize("phase", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def bench_orion_windows(compare, dtype: torch.dtype, phase: str) -> None:  # type: ignore[no-untyped-def]
    """16 x 16 windows with zero-padded keys and RoPE on a 40 x 40 grid, 16 heads."""
    inputs = packed(1, 16, 1600, dtype)
    cos, sin = torch.randn(256, D), torch.randn(256, D)
    pad = torch.randn(16, D).to(dtype)
    rope, window = Rope(cos, sin), Window((40, 40), 16, pad)

    def partition(x: Tensor, value: Tensor | None) -> Tensor:
        x = x.view(1, 16, 40, 40, D)
        if value is None:
            x = F.pad(x, (0, 0, 0, 8, 0, 8))
        else:
            full = value.view(1, 16, 1, 1, D).expand(1, 16, 48, 48, D).clone()
            full[:, :, :40, :40] = x
            x = full
        x = x.view(16, 3, 16, 3, 16, D).permute(1, 3, 0, 2, 4, 5)
        return x.reshape(9, 16, 256, D)

    def rotate(x: Tensor) -> Tensor:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        return (x * cos + turned * sin).to(x.dtype)

    def by_tensor_ops(attention: Attention) -> Attention:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.reshape(1, 16, 40, 40, D) for x in (q, k, v))
            out = attention(
                rotate(partition(q, None)), rotate(partition(k, None)), partition(v, pad)
            )
            out = out.view(3, 3, 16, 16, 16, D).permute(2, 0, 3, 1, 4, 5)
            return out.reshape(1, 16, 48, 48, D)[:, :, :40, :40].reshape(1, 16, 1600, D)

        return run

    candidates: dict[str, Attention] = {
        "kdfast": lambda q, k, v: kdfast.pruned_attention(
            q, k, v, rope=rope, window=window, backend="fused"
        ),
        "eager": by_tensor_ops(eager),
        "sdpa": by_tensor_ops(F.scaled_dot_product_attention),
    }
    exact = kdfast.pruned_attention(
        *(x.detach().double() for x in inputs),
        rope=Rope(cos.double(), sin.double()),
        window=Window((40, 40), 16, pad.double()),
        backend="reference",
    )
    check(candidates, inputs, exact)
    weight = torch.randn(1, 16, 1600, D).to(dtype)
    calls = {
        name: forward(call, inputs) if phase == "fwd" else with_backward(call, inputs, weight)
        for name, call in candidates.items()
    }
    compare("pruned_attention", f"{phase} ORION windows {dtype}", calls, memory=phase != "fwd")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def bench_kept_heads(compare, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    """8 of 16 heads by index against 8 heads that are alone, and against all 16."""
    wide, narrow = packed(8, 16, 257, dtype), packed(8, 8, 257, dtype)
    kept = list(range(0, 16, 2))
    calls = {
        "kdfast": forward(
            lambda q, k, v: kdfast.pruned_attention(q, k, v, heads=kept, backend="fused"), wide
        ),
        "native 8": forward(
            lambda q, k, v: kdfast.pruned_attention(q, k, v, backend="fused"), narrow
        ),
        "all 16": forward(lambda q, k, v: kdfast.pruned_attention(q, k, v, backend="fused"), wide),
    }
    compare("pruned_attention", f"fwd 8 of 16 heads {dtype}", calls)
