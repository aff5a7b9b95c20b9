# SPDX-License-Identifier: Apache-2.0
"""kd_loss forward and backward against its eager reference and torch.compile of it.

The limit counts one read of both logits and one write of the gradient. quack has no such loss: its
cross-entropy, which reads the student's logits alone, is timed beside it where it is installed.
"""

import pytest
import torch

import kdfast
from bench import gpu_rivals, session
from bench.compare import Compare
from kdfast.machine.timing import Candidate
from kdfast.ops import kd_loss as op

SHAPES = session.sized([(1024, 1000), (4096, 1000), (256, 21841)], [(6, 40)])
DTYPES = session.DTYPES
OPTIONS = (4.0, 0.7, "batchmean", 0.0, -100)


QUACK = "quack cross_entropy"
LIBRARIES = (QUACK,) if torch.cuda.is_available() or session.DRY_RUN else ()


@pytest.mark.candidates("kdfast", "eager", "compile", "kdfast, weight", *LIBRARIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_forward_backward(compare: Compare, shape: tuple[int, int], dtype: torch.dtype) -> None:
    student, teacher = ((3 * torch.randn(shape)).to(compare.device, dtype) for _ in range(2))
    target = torch.randint(0, shape[1], shape[:1]).to(compare.device)
    student.requires_grad_()
    compiled = session.compiled(op.reference)
    losses = {
        "kdfast": lambda: kdfast.kd_loss(student, teacher, target, backend="fused")[0],
        "eager": lambda: op.reference(student, teacher, target, *OPTIONS)[0],
        "compile": lambda: compiled(student, teacher, target, *OPTIONS)[0],
    }
    # Not 1, as in a sum of losses: the backward pass has to scale the gradient.
    weighted = session.gradients(lambda: 0.5 * losses["kdfast"](), [student])
    yardsticks, missing = {"kdfast, weight": weighted}, {}
    if LIBRARIES:

        def quack() -> Candidate:
            loss = gpu_rivals.module("quack.cross_entropy").cross_entropy
            return session.gradients(lambda: loss(student, target), [student])

        found, missing = gpu_rivals.usable({QUACK: quack}, lambda call: call())
        yardsticks |= found
    steps = {name: session.gradients(loss, [student]) for name, loss in losses.items()}
    compare(
        "kd_loss",
        f"fwd+bwd {shape} {dtype}",
        steps,
        check=session.near(steps["eager"](), 2e-2),
        yardsticks=yardsticks,
        missing=missing,
        nbytes=3 * student.nbytes,
        memory=True,
    )
