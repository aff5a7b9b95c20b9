# SPDX-License-Identifier: Apache-2.0
"""linear against torch's own function and torch.compile of it, forward and with backward.

"kdfast, packed" is the layer in inference, on a weight in oneDNN's own layout.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdfast
from bench import session
from bench.compare import Compare

# Rows, C and P of ViT-S on one and on eight images, of ViT-B, and of EVA-ViT-L's MLP.
SHAPES = session.sized(
    [(197, 384, 1536), (197, 1536, 384), (1576, 384, 1152), (1576, 768, 3072), (1600, 1024, 2730)],
    [(6, 16, 24)],
)
DTYPES = session.DTYPES
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def prepare(
    device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype
) -> tuple[list[Tensor], dict[str, Callable[[], Any]]]:
    """x, weight and bias, and the candidates on them."""
    rows, inputs, outputs = shape
    sizes = ((rows, inputs), (outputs, inputs), (outputs,))
    tensors = [torch.randn(size).to(device, dtype).requires_grad_() for size in sizes]
    compiled = session.compiled(F.linear)
    return tensors, {
        "kdfast": lambda: kdfast.linear(*tensors),
        "eager": lambda: F.linear(*tensors),
        "compile": lambda: compiled(*tensors),
    }


@pytest.mark.candidates("kdfast", "eager", "compile", "kdfast, packed")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_forward(compare: Compare, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    (x, weight, bias), calls = prepare(compare.device, shape, dtype)
    layer = nn.Linear(shape[1], shape[2]).eval()
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    kdfast.accelerate(layer)
    steps = {name: session.inference(call) for name, call in calls.items()}
    compare(
        "linear",
        f"fwd {'x'.join(map(str, shape))} {dtype}",
        steps,
        check=session.near(steps["eager"](), TOLERANCE[dtype]),
        yardsticks={"kdfast, packed": session.inference(lambda: layer(x))},
        flops=2 * shape[0] * shape[1] * shape[2],
        dtype=dtype,
    )


@pytest.mark.candidates("kdfast", "eager", "compile")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_forward_backward(
    compare: Compare, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    tensors, calls = prepare(compare.device, shape, dtype)
    upstream = torch.randn(shape[0], shape[2]).to(compare.device, dtype)
    steps = {n: session.gradients(call, tensors, upstream) for n, call in calls.items()}
    compare(
        "linear",
        f"fwd+bwd {'x'.join(map(str, shape))} {dtype}",
        steps,
        check=session.near(steps["eager"](), TOLERANCE[dtype]),
        flops=6 * shape[0] * shape[1] * shape[2],
        dtype=dtype,
    )
