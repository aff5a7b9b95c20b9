# SPDX-License-Identifier: Apache-2.0
"""swiglu_norm against its eager reference and torch.compile of it, forward and with backward.

The limit counts what has to move: gate, value and the result; in the backward gate, value, the
upstream gradient and both gradients.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import kdfast
from bench import session
from bench.compare import Compare
from bench.session import Check
from kdfast.ops import swiglu_norm as op

# ORION's MLP on one image, and a ViT-L's with 2048 hidden channels on eight.
SHAPES = session.sized([(1600, 2730), (8 * 257, 2048)], [(6, 40)])
DTYPES = session.DTYPES
Calls = dict[str, Callable[[], Tensor]]


def prepare(
    device: torch.device, shape: tuple[int, int], dtype: torch.dtype
) -> tuple[list[Tensor], Calls]:
    """Gate, value, weight, bias, and the candidates on them."""
    shapes = (shape, shape, shape[1:], shape[1:])
    inputs = [torch.randn(s).to(device, dtype).requires_grad_() for s in shapes]
    compiled = session.compiled(op.reference)
    calls: Calls = {
        "kdfast": lambda: kdfast.swiglu_norm(*inputs, backend="fused"),
        "eager": lambda: op.reference(*inputs, 1e-6),
        "compile": lambda: compiled(*inputs, 1e-6),
    }
    return inputs, calls


def checking(steps: dict[str, Callable[[], Any]], exact: Tensor | Sequence[Tensor]) -> Check:
    """Nobody is further from fp64 than eager code, whose bf16 sums over rows are 4 % off."""

    def errors(name: str) -> list[float]:
        pairs = zip(session.tensors(steps[name]()), session.tensors(exact), strict=True)
        return [((x.double() - y).norm() / y.norm()).item() for x, y in pairs]

    limits = errors("eager")

    def check(name: str, _: object) -> None:
        for error, limit in zip(errors(name), limits, strict=True):
            assert error <= 1.1 * limit + 1e-6, f"{name}: {error:.2e}, eager {limit:.2e}"

    return check


@pytest.mark.candidates("kdfast", "eager", "compile")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_forward(compare: Compare, shape: tuple[int, int], dtype: torch.dtype) -> None:
    inputs, calls = prepare(compare.device, shape, dtype)
    steps = {name: session.inference(call) for name, call in calls.items()}
    with torch.no_grad():
        check = checking(steps, op.reference(*(x.double() for x in inputs), 1e-6))
    case = f"fwd {shape[0]}x{shape[1]} {dtype}"
    compare("swiglu_norm", case, steps, check=check, nbytes=3 * inputs[0].nbytes)


@pytest.mark.candidates("kdfast", "eager", "compile")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_forward_backward(compare: Compare, shape: tuple[int, int], dtype: torch.dtype) -> None:
    inputs, calls = prepare(compare.device, shape, dtype)
    upstream = torch.randn(shape).to(compare.device, dtype)
    steps = {n: session.gradients(call, inputs, upstream) for n, call in calls.items()}
    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact = torch.autograd.grad(op.reference(*wide, 1e-6), wide, upstream.double())
    compare(
        "swiglu_norm",
        f"fwd+bwd {shape[0]}x{shape[1]} {dtype}",
        steps,
        check=checking(steps, exact),
        nbytes=8 * inputs[0].nbytes,
        memory=True,
    )
