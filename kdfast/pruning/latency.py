# SPDX-License-Identifier: Apache-2.0
"""Forward passes of a model before and after pruning, timed; how long leave-one-out will take."""

import copy
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdfast.machine.timing import interleave, summarize
from kdfast.nn import accelerate


class Latency(NamedTuple):
    """Median milliseconds of one forward pass, and the quartiles' distance."""

    ms: float
    iqr: float


def latencies(
    model: nn.Module, pruned: nn.Module, images: Tensor, rounds: int
) -> dict[str, Latency]:
    """Forward passes, in alternating rounds.

    Args:
        model: The whole model.
        pruned: The pruned model; a copy on the same tensors is accelerated.
        images: (B, 3, H, W), of the models' type.
        rounds: Samples of each.

    Returns:
        Times of "before", "before, fused" (missing where nothing of the model runs fused) and
        "pruned, fused".
    """
    return together(model, {"pruned, fused": pruned}, images, rounds)


@torch.no_grad()
def together(
    model: nn.Module, pruned: Mapping[str, nn.Module], images: Tensor, rounds: int
) -> dict[str, Latency]:
    """The same for several pruned models, all in the same rounds, so that they can be compared.

    Args:
        model: The whole model.
        pruned: By the names of the results.
        images: As in ``latencies``.
        rounds: As in ``latencies``.
    """
    fused = on_same_tensors(model)
    candidates = {"before": model, "before, fused": fused}
    candidates |= {name: on_same_tensors(small) for name, small in pruned.items()}
    if not accelerate(fused).replaced:
        del candidates["before, fused"]
    for name in pruned:
        accelerate(candidates[name])
    calls = {name: (lambda m=m: m(images)) for name, m in candidates.items()}
    samples = {name: summarize(rows) for name, rows in interleave(calls, rounds=rounds).items()}
    return {name: Latency(row["ms"], row["iqr"]) for name, row in samples.items()}


def on_same_tensors(model: nn.Module) -> nn.Module:
    """A copy of the modules with the parameters and buffers themselves."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


@torch.no_grad()
def leave_one_out_seconds(model: nn.Module, heads: int, batches: Sequence[Tensor]) -> float:
    """Estimate from the time of one pass: half of one for every head and batch."""
    model(batches[0][:1])  # warms up
    start = time.perf_counter()
    model(batches[0])
    return (time.perf_counter() - start) * len(batches) * (1 + heads / 2)
