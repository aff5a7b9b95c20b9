# SPDX-License-Identifier: Apache-2.0
"""pruned_attention over the number of tokens, with memory, and what the rotation inside costs."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import kdfast
from bench import session
from bench.bench_pruned_attention import Attention, D, eager, packed, with_backward
from bench.compare import Compare
from kdfast import Rope

HEADS = session.sized(8, 2)
TOKENS = session.sized([64, 197, 400, 784, 1600, 3136], [16])
DTYPES = session.DTYPES


@pytest.mark.candidates("kdfast", "eager", "sdpa")
@pytest.mark.parametrize("tokens", TOKENS)
def bench_lengths(compare: Compare, tokens: int) -> None:
    dtype, device = DTYPES[-1], compare.device
    inputs = packed(1, HEADS, tokens, dtype, device)
    calls: dict[str, Attention] = {
        "kdfast": lambda q, k, v: kdfast.pruned_attention(q, k, v, backend="fused"),
        "eager": eager,
        "sdpa": F.scaled_dot_product_attention,
    }
    weight = torch.randn(1, HEADS, tokens, D).to(device, dtype)
    candidates = {name: with_backward(call, inputs, weight) for name, call in calls.items()}
    case = f"fwd+bwd 1x{HEADS}x{tokens} {dtype}"
    check = session.near(candidates["eager"](), 3e-2)
    compare("lengths", case, candidates, check=check, memory=True)


@pytest.mark.candidates("kdfast", "kdfast, no rope", "eager", "sdpa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def bench_rope(compare: Compare, dtype: torch.dtype) -> None:
    """The rotation inside the kernel, against none and against tensor ops."""
    (batch, tokens), device = session.sized((8, 257), (1, 20)), compare.device
    inputs = packed(batch, HEADS, tokens, dtype, device)
    angle = torch.randn(tokens, D // 2).repeat_interleave(2, -1).to(device)
    cos, sin = angle.cos(), angle.sin()
    rope = Rope(cos, sin)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        return (x * cos + turned * sin).to(x.dtype)

    calls: dict[str, Attention] = {
        "kdfast": lambda q, k, v: kdfast.pruned_attention(q, k, v, rope=rope, backend="fused"),
        "eager": lambda q, k, v: eager(rotate(q), rotate(k), v),
        "sdpa": lambda q, k, v: F.scaled_dot_product_attention(rotate(q), rotate(k), v),
    }
    weight = torch.randn(batch, HEADS, tokens, D).to(device, dtype)
    candidates = {name: with_backward(call, inputs, weight) for name, call in calls.items()}
    plain = with_backward(partial(kdfast.pruned_attention, backend="fused"), inputs, weight)

    compare(
        "pruned_attention",
        f"fwd+bwd RoPE {batch}x{HEADS}x{tokens} {dtype}",
        candidates,
        check=session.near(candidates["eager"](), 3e-2),
        yardsticks={"kdfast, no rope": plain},
    )
