# SPDX-License-Identifier: Apache-2.0
"""feature_loss forward and backward against its eager reference and torch.compile of it.

The limit counts one read of both features and one write of the gradient.
"""

import pytest
import torch

import kdfast
from bench import session
from bench.compare import Compare
from kdfast.machine.timing import Candidate
from kdfast.ops import feature_loss as op

CASES = [("mse", None), ("cosine", None), ("smooth_l1", None), ("mse", "layer"), ("mse", "channel")]
SHAPE = session.sized((64 * 257, 1024), (6, 40))
DTYPES = session.DTYPES


@pytest.mark.candidates("kdfast", "eager", "compile", "kdfast, weight")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "normalize"), CASES)
def bench_forward_backward(
    compare: Compare, kind: str, normalize: str | None, dtype: torch.dtype
) -> None:
    student, teacher = (torch.randn(SHAPE).to(compare.device, dtype) for _ in range(2))
    student.requires_grad_()
    options = {"kind": kind, "normalize": normalize}
    compiled = session.compiled(op.reference)
    norm = normalize or "none"
    losses = {
        "kdfast": lambda: kdfast.feature_loss(student, teacher, backend="fused", **options),
        "eager": lambda: op.reference(student, teacher, kind, norm),
        "compile": lambda: compiled(student, teacher, kind, norm),
    }
    # Not 1, as in a sum of losses: the backward pass has to scale the gradient.
    weighted = session.gradients(lambda: 0.5 * losses["kdfast"](), [student])
    steps = {name: session.gradients(loss, [student]) for name, loss in losses.items()}
    want = steps["eager"]()
    size = want[0].abs().max().item()

    def check(name: str, step: Candidate) -> None:
        torch.testing.assert_close(step(), want, rtol=2e-2, atol=1e-3 * size)

    compare(
        "feature_loss",
        f"fwd+bwd {SHAPE[0]}x{SHAPE[1]} {kind} {norm} {dtype}",
        steps,
        check=check,
        yardsticks={"kdfast, weight": weighted},
        nbytes=3 * student.nbytes,
        memory=True,
    )
