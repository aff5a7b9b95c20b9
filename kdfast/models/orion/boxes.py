# SPDX-License-Identifier: Apache-2.0
"""Boxes, the ten numbers that the detection head predicts of one, and what it finds in a frame.

B streams, Q queries, C classes, L layers, m results of a frame.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdfast.models.orion.config import POSITION_RANGE


@dataclass(frozen=True)
class Detections:
    """The objects found in one frame, best first.

    Attributes:
        boxes: (m, 9): x, y, z, w, l, h, yaw, vx, vy; z of the box's middle, see ``on_the_ground``.
        scores: (m,) in [0, 1].
        labels: (m,) int64.
        futures: (m, 6, 6, 2), for each of six ways to go on the moves (dx, dy) in six steps.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    futures: Tensor

    def on_the_ground(self) -> Detections:
        """The same with z of the bottom's centre, and ordered by class, best first in each.

        This is the form of ORION's own results.
        """
        order = self.labels.argsort(stable=True)
        boxes = self.boxes.clone()
        boxes[:, 2] -= boxes[:, 5] / 2
        return Detections(boxes[order], self.scores[order], self.labels[order], self.futures[order])


@dataclass(frozen=True)
class FoundLanes:
    """The lanes found in one frame, best first.

    Attributes:
        points: (m, 11, 3) in metres.
        scores: (m,) in [0, 1].
        labels: (m,) int64.
    """

    points: Tensor
    scores: Tensor
    labels: Tensor

    def by_class(self) -> FoundLanes:
        """The same ordered by class, best first in each: the form of ORION's own results."""
        order = self.labels.argsort(stable=True)
        return replace(
            self, points=self.points[order], scores=self.scores[order], labels=self.labels[order]
        )


def middle(boxes: Tensor) -> Tensor:
    """Boxes (n, 9) with z of the bottom's centre as boxes with z of the middle."""
    lifted = boxes.clone()
    lifted[:, 2] += boxes[:, 5] / 2
    return lifted


def box_codes(boxes: Tensor) -> Tensor:
    """(n, 10) of boxes (n, 9), z of the middle: x, y, log w, log l, z, log h, sin, cos, vx, vy.

    A box without size has codes of -inf.
    """
    x, y, z, w, length, h, yaw, vx, vy = boxes.unbind(-1)
    codes = (x, y, w.log(), length.log(), z, h.log(), yaw.sin(), yaw.cos(), vx, vy)
    return torch.stack(codes, -1)


def codes_to_boxes(codes: Tensor) -> Tensor:
    """What ``box_codes`` undoes, (..., 9)."""
    x, y, w, length, z, h, sin, cos, vx, vy = codes.unbind(-1)
    return torch.stack((x, y, z, w.exp(), length.exp(), h.exp(), sin.atan2(cos), vx, vy), -1)


def best(scores: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The highest scores of one frame: (m,) sigmoids, classes and queries.

    Args:
        scores: (Q, C) logits; a query may be found in several classes.
        count: m at most.
    """
    flat = scores.sigmoid().flatten()
    values, index = flat.topk(min(count, flat.shape[0]))
    classes = scores.shape[1]
    return values, index % classes, index // classes


def find_objects(scores: Tensor, codes: Tensor, futures: Tensor, count: int) -> list[Detections]:
    """The objects of each stream, without those that lie outside of ``POSITION_RANGE``.

    Args:
        scores: (B, Q, C) logits.
        codes: (B, Q, 10).
        futures: (B, Q, 6, 12).
        count: Objects per stream at most.
    """
    low, high = torch.tensor(POSITION_RANGE, device=codes.device).chunk(2)
    found = []
    for logits, code, future in zip(scores, codes, futures, strict=True):
        values, labels, query = best(logits, count)
        boxes = codes_to_boxes(code[query])
        inside = ((boxes[:, :3] >= low) & (boxes[:, :3] <= high)).all(1)
        moves = future[query].unflatten(-1, (-1, 2))
        found.append(Detections(boxes[inside], values[inside], labels[inside], moves[inside]))
    return found


def find_lanes(scores: Tensor, points: Tensor, count: int) -> list[FoundLanes]:
    """The lanes of each stream.

    Args:
        scores: (B, Q, C) logits.
        points: (B, Q, 11, 3).
        count: Lanes per stream at most.
    """
    found = []
    for logits, lines in zip(scores, points, strict=True):
        values, labels, query = best(logits, count)
        found.append(FoundLanes(lines[query], values, labels))
    return found
