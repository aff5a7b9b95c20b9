# SPDX-License-Identifier: Apache-2.0
"""feature_loss forward and backward against its eager reference and torch.compile of it.

The limit counts one read of both features and one write of the gradient.
"""

import pytest
import torch

import kdfast
from bench import session
from kdfast.ops import feature_loss as op

CASES = [("mse", None), ("cosine", None), ("smooth_l1", None), ("mse", "layer"), ("mse", "channel")]
SHAPE = session.sized((64 * 257, 1024), (6, 40))
DTYPES = session.sized([torch.float32, torch.bfloat16], [torch.float32])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "normalize"), CASES)
def bench_forward_backward(  # type: ignore[no-untyped-def]
    compare, device: torch.device, kind: str, normalize: str | None, dtype: torch.dtype
) -> None:
    student, teacher = (torch.randn(SHAPE).to(device, dtype) for _ in range(2))
    student.requires_grad_()
    options = {"kind": kind, "normalize": normalize}
    compiled = session.compiled(op.reference)
    norm = normalize or "none"
    losses = {
        "kdfast": lambda: kdfast.feature_loss(student, teacher, backend="fused", **options),
        "eager": lambda: op.reference(student, teacher, kind, norm),
        "compile": lambda: compiled(student, teacher, kind, norm),
    }
    # A weight other than 1, as in a sum of losses: the backward pass has to scale the gradient.
    losses["kdfast, weight"] = lambda: 0.5 * losses["kdfast"]()

    def step(name: str) -> torch.Tensor:
        return torch.autograd.grad(losses[name](), student)[0]

    want = step("eager")
    size = want.abs().max().item()
    for name in ("kdfast", "compile"):
        torch.testing.assert_close(step(name), want, rtol=2e-2, atol=1e-3 * size, msg=name)
    candidates = {name: lambda name=name: step(name) for name in losses}
    case = f"fwd+bwd {SHAPE[0]}x{SHAPE[1]} {kind} {norm} {dtype}"
    compare("feature_loss", case, candidates, nbytes=3 * want.nbytes, memory=True)
