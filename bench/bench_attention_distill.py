# SPDX-License-Identifier: Apache-2.0
"""attention_distill forward and backward: the attention output and the KL of the maps.

"eager" is what people write: both maps in the dtype of the inputs, kl_div of them, autograd.
"""

import pytest
import torch
from torch import Tensor

import kdfast
from bench import session

D = 64
SHAPES = session.sized([(8, 8, 257), (8, 12, 197), (1, 8, 1600)], [(1, 1, 20)])
DTYPES = session.sized([torch.float32, torch.bfloat16], [torch.float32])


def eager(q: Tensor, k: Tensor, v: Tensor, tq: Tensor, tk: Tensor) -> tuple[Tensor, Tensor]:
    """Output and forward KL with both maps in memory."""
    scores = (q * D**-0.5) @ k.transpose(-1, -2)
    goal = ((tq * D**-0.5) @ tk.transpose(-1, -2)).float().log_softmax(-1)
    log_map = scores.float().log_softmax(-1)
    rows = torch.nn.functional.kl_div(log_map, goal, log_target=True, reduction="none").sum(-1)
    return log_map.exp().to(v.dtype) @ v, rows.mean()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_kl(  # type: ignore[no-untyped-def]
    compare, device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    inputs = [torch.randn(*shape, D).to(device, dtype) for _ in range(5)]
    leaves = [x.requires_grad_() for x in inputs[:3]]
    weight = torch.randn(*shape, D).to(device, dtype)
    compiled = session.compiled(eager)
    candidates = {
        "kdfast": lambda: kdfast.attention_distill(*inputs, backend="fused"),
        "eager": lambda: eager(*inputs),
        "compile": lambda: compiled(*inputs),
        "attention only": lambda: (kdfast.pruned_attention(*leaves, backend="fused"), None),
    }
    want = eager(*(x.detach().double() for x in inputs))
    for name in ("kdfast", "eager", "compile"):
        for got, exact in zip(candidates[name](), want, strict=True):
            error = (got.detach().double() - exact).norm() / exact.norm()
            assert error < (2e-2 if dtype == torch.bfloat16 else 1e-4), f"{name}: {error:.2e}"

    def step(name: str) -> object:
        out, loss = candidates[name]()
        outputs, grads = ([out], [weight]) if loss is None else ([out, loss], [weight, None])
        return torch.autograd.grad(outputs, leaves, grads)

    calls = {name: lambda name=name: step(name) for name in candidates}
    case = "fwd+bwd KL {}x{}x{} {}".format(*shape, dtype)
    compare("attention_distill", case, calls, memory=True)
