# SPDX-License-Identifier: Apache-2.0
"""Denoising: in training, noised copies of the ground truth are queries that must find it again.

B streams, S the most boxes of a stream, G groups of noised copies, P = G S queries, n boxes of all
streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdfast.models.orion.batch import Objects
from kdfast.models.orion.boxes import middle
from kdfast.models.orion.encodings import normalised

SPLIT = 0.75  # a copy that is moved by more, in half sizes of its box, is background


@dataclass(frozen=True)
class Noised:
    """G noised copies of every box; copies of a stream that has fewer than S boxes stay unused.

    Attributes:
        centres: (B, P, 3), shares of the range.
        groups: G.
        stream: (G n,) the stream of each copy, all boxes of the first group first.
        query: (G n,) its place among the P.
        labels: (G n,) int64, its class, or the number of classes for background.
        boxes: (G n, 9) what it is a copy of, z of the middle.
        lights: (G n, 2) as in ``Objects``.
    """

    centres: Tensor
    groups: int
    stream: Tensor
    query: Tensor
    labels: Tensor
    boxes: Tensor
    lights: Tensor


def copies(objects: Sequence[Objects], groups: int) -> int:
    """G n, how many copies ``noised_boxes`` makes."""
    return groups * sum(len(one.labels) for one in objects)


def noised_boxes(
    objects: Sequence[Objects], draws: Tensor, *, groups: int, classes: int, bounds: Tensor
) -> Noised | None:
    """Moves the centres of all boxes by up to half of their sizes; None without any box.

    Sizes are added along x, y and z as they stand, whatever the yaw, as in ORION.

    Args:
        objects: B entries, on the device of ``bounds``.
        draws: (G n, 3) uniform in [0, 1).
        groups: G.
        classes: The label of background.
        bounds: (6,) range of the heads.
    """
    counts = [len(one.labels) for one in objects]
    most, device = max(counts), bounds.device
    if most == 0:
        return None
    boxes = middle(torch.cat([one.boxes for one in objects])).repeat(groups, 1)
    labels = torch.cat([one.labels for one in objects]).repeat(groups)
    moves = 2 * draws - 1
    centres = boxes[:, :3] + moves * boxes[:, 3:6] / 2
    stream = torch.cat([torch.full((n,), b, device=device) for b, n in enumerate(counts)])
    stream = stream.repeat(groups)
    place = torch.cat([torch.arange(n, device=device) for n in counts]).repeat(groups)
    group = torch.arange(groups, device=device).repeat_interleave(sum(counts))
    query = group * most + place
    queries = torch.zeros(len(objects), groups * most, 3, device=device)
    queries[stream, query] = normalised(centres, bounds).clamp(0, 1)
    return Noised(
        queries,
        groups,
        stream,
        query,
        labels.masked_fill(moves.norm(dim=1) > SPLIT, classes),
        boxes,
        torch.cat([one.lights for one in objects]).repeat(groups, 1),
    )


def block_denoising(blocked: Tensor, copies: int, groups: int) -> None:
    """Hide the noised copies: a group sees only itself, all other queries see none of them.

    Args:
        blocked: (N, M) bool, True where a query must not see a key; the first ``copies`` queries
            and keys are the copies. Changed in place.
        copies: P.
        groups: G.
    """
    blocked[:, :copies] = True
    size = copies // groups
    for group in range(groups):
        own = slice(group * size, (group + 1) * size)
        blocked[own, own] = False
