# SPDX-License-Identifier: Apache-2.0
"""Which query answers for which object or lane: the cheapest one-to-one assignment.

B streams, L layers, Q queries, n objects or lanes of one stream, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

EPS = 1e-12
# What a cost that is no number, or infinite, counts as.
UNKNOWN, TOO_HIGH, TOO_LOW = 100.0, 100.0, -100.0


def focal_cost(scores: Tensor, labels: Tensor) -> Tensor:
    """(..., Q, n): what it would add to the focal loss to give a query (..., Q, C) a label (n,)."""
    p = scores.sigmoid()
    yes = -(p + EPS).log() * 0.25 * (1 - p) ** 2
    no = -(1 - p + EPS).log() * 0.75 * p**2
    return (yes - no)[..., labels]


def matching_cost(
    scores: Tensor, labels: Tensor, codes: Tensor, targets: Tensor, weights: tuple[float, float]
) -> Tensor:
    """Costs (L, Q, n) of one stream, all finite.

    Args:
        scores: (L, Q, C) logits.
        labels: (n,) int64.
        codes: (L, Q, K).
        targets: (n, K).
        weights: Of the focal cost and of the L1 distance of the codes.
    """
    far = torch.cdist(codes, targets.expand(codes.shape[0], -1, -1), p=1)
    cost = weights[0] * focal_cost(scores, labels) + weights[1] * far
    return cost.nan_to_num(UNKNOWN, TOO_HIGH, TOO_LOW)


def assigned(costs: Sequence[Tensor]) -> Tensor:
    """(L, B, Q) int64: what each query is matched with in its stream, -1 for background.

    Args:
        costs: B entries (L, Q, n), on one device; they go to the CPU in one piece.
    """
    layers, queries, _ = costs[0].shape
    flat = torch.cat([cost.flatten() for cost in costs]).cpu()
    parts = flat.split([cost.numel() for cost in costs])
    table = torch.full((layers, len(costs), queries), -1)
    for stream, (part, cost) in enumerate(zip(parts, costs, strict=True)):
        for layer, square in enumerate(part.view(cost.shape).numpy()):
            query, target = linear_sum_assignment(square)
            table[layer, stream, query] = torch.from_numpy(target)
    return table.to(costs[0].device)
