# SPDX-License-Identifier: Apache-2.0
"""Lanes measured by average precision under the Chamfer distance.

A predicted line hits one of its class if the mean distance between their points, both ways, is
small enough. Definitions: Li et al., "HDMapNet" (arXiv 2107.06307), and Liao et al., "MapTR"
(arXiv 2208.14437), section 4.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdfast.data.orion.maps import resample

Floats = NDArray[np.floating[Any]]

DISTANCES = (0.5, 1.0, 1.5)
POINTS = 100


@dataclass(frozen=True)
class Lines:
    """Lines of one frame.

    Attributes:
        points: (n, p, 2 or 3); only x and y count.
        labels: (n,) classes.
        scores: (n,), of predictions.
    """

    points: Floats
    labels: NDArray[np.int64]
    scores: Floats | None = None


@dataclass(frozen=True)
class MapScore:
    """Figures of a set of frames.

    Attributes:
        precision: Average precision by class and distance (metres); NaN for a class without lines.
        lines: Number of lines by class.
    """

    precision: Mapping[str, Mapping[float, float]]
    lines: Mapping[str, int]

    @property
    def mean_precision(self) -> float:
        """mAP: over distances, then over the classes that have lines."""
        values = [
            np.mean([*by.values()]) for name, by in self.precision.items() if self.lines[name]
        ]
        return float(np.mean(values)) if values else float("nan")


def chamfer(a: Floats, b: Floats) -> Floats:
    """Distances (n, m) between lines (n, p, 2) and (m, q, 2): mean of both ways' means."""
    out = np.empty((len(a), len(b)))
    for row, line in enumerate(a):
        apart = np.linalg.norm(line[None, :, None] - b[:, None], axis=-1)
        out[row] = (apart.min(2).mean(1) + apart.min(1).mean(1)) / 2
    return out


def score_lines(
    predictions: Sequence[Lines],
    truth: Sequence[Lines],
    classes: Sequence[str],
    distances: Sequence[float] = DISTANCES,
) -> MapScore:
    """Measure predicted lines of the same frames as ``truth``.

    Raises:
        ValueError: The frames do not match, or predictions have no scores.
    """
    if len(predictions) != len(truth):
        raise ValueError(
            f"score_lines: need a prediction for each frame, got {len(predictions)} for "
            f"{len(truth)} frames"
        )
    if any(one.scores is None for one in predictions):
        raise ValueError("score_lines: predictions need scores, got None")
    precision: dict[str, dict[float, float]] = {}
    count: dict[str, int] = {}
    for label, name in enumerate(classes):
        apart, scores = [], []
        count[name] = 0
        for found, wanted in zip(predictions, truth, strict=True):
            assert found.scores is not None
            mine, theirs = found.labels == label, wanted.labels == label
            order = np.argsort(-found.scores[mine], kind="stable")
            apart.append(chamfer(_dense(found.points[mine][order]), _dense(wanted.points[theirs])))
            scores.append(found.scores[mine][order])
            count[name] += int(theirs.sum())
        precision[name] = {
            far: _average_precision(apart, scores, far, count[name]) for far in distances
        }
    return MapScore(precision, count)


def _dense(lines: Floats) -> Floats:
    every = [resample(line[:, :2].astype(float), POINTS) for line in lines]
    return np.array(every).reshape(-1, POINTS, 2)


def _average_precision(
    apart: Sequence[Floats], scores: Sequence[Floats], far: float, lines: int
) -> float:
    if not lines:
        return float("nan")
    # Every prediction names the line that is nearest; the surest one that names it hits it.
    right = []
    for distances in apart:
        hit, taken = np.zeros(len(distances), bool), set()
        for row in range(len(distances) if distances.shape[1] else 0):
            best = int(np.argmin(distances[row]))
            if distances[row, best] <= far and best not in taken:
                taken.add(best)
                hit[row] = True
        right.append(hit)
    every = np.concatenate(right)[np.argsort(-np.concatenate(list(scores)), kind="stable")]
    if not every.any():
        return 0.0
    hits = np.cumsum(every)
    recall = np.concatenate([[0.0], hits / lines, [1.0]])
    precision = np.concatenate([[0.0], hits / np.arange(1, len(every) + 1), [0.0]])
    # The area under the curve that no later point exceeds.
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    steps = np.flatnonzero(np.diff(recall))
    return float(np.sum(np.diff(recall)[steps] * envelope[steps + 1]))
