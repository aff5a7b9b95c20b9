# SPDX-License-Identifier: Apache-2.0
"""attention_distill forward and backward: the attention output and the KL of the maps.

"eager" is what people write: both maps in the dtype of the inputs, kl_div of them, autograd.
"""

from functools import partial

import pytest
import torch
from torch import Tensor

import kdfast
from bench import session
from bench.compare import Compare

D = 64
FILLING = [(64, 16, 257), (8, 16, 1600)] if torch.cuda.is_available() else []
SHAPES = session.sized([*FILLING, (8, 8, 257), (8, 12, 197), (1, 8, 1600)], [(1, 1, 20)])
DTYPES = session.DTYPES


def eager(q: Tensor, k: Tensor, v: Tensor, tq: Tensor, tk: Tensor) -> tuple[Tensor, Tensor]:
    """Output and forward KL with both maps in memory."""
    scores = (q * D**-0.5) @ k.transpose(-1, -2)
    goal = ((tq * D**-0.5) @ tk.transpose(-1, -2)).float().log_softmax(-1)
    log_map = scores.float().log_softmax(-1)
    rows = torch.nn.functional.kl_div(log_map, goal, log_target=True, reduction="none").sum(-1)
    return log_map.exp().to(v.dtype) @ v, rows.mean()


@pytest.mark.candidates("kdfast", "eager", "compile", "attention only")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_kl(compare: Compare, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    inputs = [torch.randn(*shape, D).to(compare.device, dtype) for _ in range(5)]
    leaves = [x.requires_grad_() for x in inputs[:3]]
    weight = torch.randn(*shape, D).to(compare.device, dtype)
    compiled = session.compiled(eager)
    losses = {
        "kdfast": lambda: kdfast.attention_distill(*inputs, backend="fused"),
        "eager": lambda: eager(*inputs),
        "compile": lambda: compiled(*inputs),
    }
    attention = partial(kdfast.pruned_attention, *leaves, backend="fused")
    near = session.near(
        eager(*(x.detach().double() for x in inputs)), 2e-2 if dtype == torch.bfloat16 else 1e-4
    )
    compare(
        "attention_distill",
        "fwd+bwd KL {}x{}x{} {}".format(*shape, dtype),
        {name: session.gradients(x, leaves, [weight, None]) for name, x in losses.items()},
        check=lambda name, _: near(name, losses[name]),
        yardsticks={"attention only": session.gradients(attention, leaves, weight)},
        memory=True,
    )
