# SPDX-License-Identifier: Apache-2.0
"""linear_kd_loss forward and backward against the layer with its eager reference, and compiled.

The limit counts the three products of the student's layer and the one of the teacher's.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kdfast
from bench import gpu_rivals, session
from bench.compare import Compare
from kdfast.ops import linear_kd_loss as op

# Few rows of many classes: a sample of 2048 x 50257 takes seconds and shows the same.
SMALL, WIDE, WIDEST = (1024, 1000, 768), (512, 21841, 768), (512, 50257, 384)
FULL = [
    *((shape, dtype) for shape in (SMALL, WIDE) for dtype in (torch.float32, torch.bfloat16)),
    (WIDEST, torch.bfloat16),
]
CASES = session.sized(FULL, [((5, 20, 16), torch.float32)])
OPTIONS = op.Options(4.0, 0.7, "batchmean", 0.0, -100)
# The divergence alone, of a teacher whose logits are there.
GIVEN = session.sized([((4096, 32000, 1024), torch.bfloat16)], [((5, 20, 16), torch.float32)])
HAS_CUDA = torch.cuda.is_available()


def liger(temperature: float) -> Callable[..., Tensor]:
    """Liger's fused layer and divergence, on the scale of ``linear_kd_loss``."""
    module = gpu_rivals.module("liger_kernel.transformers.fused_linear_kl_div")
    loss = module.LigerFusedLinearKLDivLoss(temperature=temperature)

    def call(hidden: Tensor, weight: Tensor, teacher: Tensor) -> Tensor:
        goal = (teacher.float() / temperature).softmax(-1).to(hidden.dtype)
        result: Tensor = temperature**2 * loss(hidden, weight, goal)
        return result

    return call


@pytest.mark.skipif(not (HAS_CUDA or session.DRY_RUN), reason="sized for a GPU")
@pytest.mark.candidates("kdfast", "eager", "liger")
@pytest.mark.parametrize(("shape", "dtype"), GIVEN, ids=str)
def bench_divergence(compare: Compare, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    (rows, classes, dim), device, temperature = shape, compare.device, 2.0
    hidden = torch.randn(rows, dim).to(device, dtype).requires_grad_()
    weight = (0.1 * torch.randn(classes, dim)).to(device, dtype).requires_grad_()
    teacher = torch.randn(rows, classes).to(device, dtype)
    options: dict[str, Any] = {"temperature": temperature, "alpha": 1.0}
    losses: dict[str, Callable[[], Tensor]] = {
        name: lambda backend=backend: kdfast.linear_kd_loss(
            hidden, weight, teacher, backend=backend, **options
        )[0]
        for name, backend in (("kdfast", "fused"), ("eager", "reference"))
    }
    found, missing = gpu_rivals.usable(
        {"liger": lambda: liger(temperature)},
        lambda call: session.gradients(lambda: call(hidden, weight, teacher), [hidden, weight])(),
    )
    losses |= {
        name: lambda call=call: call(hidden, weight, teacher) for name, call in found.items()
    }
    steps = {name: session.gradients(loss, [hidden, weight]) for name, loss in losses.items()}
    compare(
        "linear_kd_loss",
        f"fwd+bwd KL {rows}x{classes}x{dim} {dtype}",
        steps,
        check=session.near(steps["eager"](), 2e-2),
        missing=missing,
        flops=3 * 2 * rows * classes * dim,
        dtype=dtype,
        memory=True,
    )


@pytest.mark.candidates("kdfast", "eager", "compile")
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def bench_forward_backward(
    compare: Compare, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    (rows, classes, dim), device = shape, compare.device
    hidden, teacher_hidden = (torch.randn(rows, dim).to(device, dtype) for _ in range(2))
    weight, teacher_weight = ((0.1 * torch.randn(classes, dim)).to(device, dtype) for _ in range(2))
    target = torch.randint(0, classes, (rows,)).to(device)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    layers = op.Layers(hidden, weight, None, None, teacher_hidden, teacher_weight, None, target)
    compiled = session.compiled(op.reference)
    teacher = {"teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight}
    losses = {
        "kdfast": lambda: kdfast.linear_kd_loss(
            hidden, weight, None, target, backend="fused", **teacher
        )[0],
        "eager": lambda: op.reference(layers, OPTIONS)[0],
        "compile": lambda: compiled(layers, OPTIONS)[0],
    }
    steps = {name: session.gradients(loss, leaves) for name, loss in losses.items()}
    compare(
        "linear_kd_loss",
        f"fwd+bwd {rows}x{classes}x{dim} {dtype}",
        steps,
        check=session.near(steps["eager"](), 2e-2),
        flops=4 * 2 * rows * classes * dim,
        dtype=dtype,
        memory=True,
    )
