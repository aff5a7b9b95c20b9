# SPDX-License-Identifier: Apache-2.0
"""linear_kd_loss forward and backward against the layer with its eager reference, and compiled.

The limit counts the three products of the student's layer and the one of the teacher's.
"""

import pytest
import torch

import kdfast
from bench import session
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
