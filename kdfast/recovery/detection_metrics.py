# SPDX-License-Identifier: Apache-2.0
"""Detection in 3-D measured as nuScenes measures it, with the ranges of Bench2Drive.

A prediction hits an object of its class whose centre is near enough on the ground; average
precision is taken at four such distances, errors of position, size, heading and speed over the hits
at two metres. Definitions: Caesar et al., "nuScenes: A multimodal dataset for autonomous driving"
(arXiv 1903.11027), section 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]

DISTANCES = (0.5, 1.0, 2.0, 4.0)
HIT = 2.0
MIN_RECALL = MIN_PRECISION = 0.1
RECALLS = np.linspace(0, 1, 101)
ERRORS = ("translation", "scale", "orientation", "velocity")
# Half the side of the square around the car in which a class counts, metres.
RANGES = {
    "car": 50.0,
    "van": 50.0,
    "truck": 50.0,
    "bicycle": 40.0,
    "traffic_sign": 30.0,
    "traffic_cone": 30.0,
    "traffic_light": 30.0,
    "pedestrian": 40.0,
}


@dataclass(frozen=True)
class Detections:
    """Boxes of one frame.

    Attributes:
        boxes: (n, 9): x, y, z, w, l, h, yaw, vx, vy.
        labels: (n,) classes.
        scores: (n,), of predictions.
    """

    boxes: Floats
    labels: NDArray[np.int64]
    scores: Floats | None = None


@dataclass(frozen=True)
class DetectionScore:
    """Figures of a set of frames.

    Attributes:
        precision: Average precision by class and distance (metres); NaN for a class without
            objects.
        errors: Mean error of the hits by class: metres, one minus overlap, radians, metres a
            second; 1 where nothing was hit.
        objects: Number of objects by class.
    """

    precision: Mapping[str, Mapping[float, float]]
    errors: Mapping[str, Mapping[str, float]]
    objects: Mapping[str, int]

    @property
    def mean_precision(self) -> float:
        """mAP: over distances, then over the classes that have objects."""
        values = [np.mean([*by.values()]) for name, by in self.precision.items() if self._has(name)]
        return float(np.mean(values)) if values else float("nan")

    def mean_error(self, kind: str) -> float:
        """Mean of an error over the classes that have objects."""
        values = [by[kind] for name, by in self.errors.items() if self._has(name)]
        return float(np.mean(values)) if values else float("nan")

    def _has(self, name: str) -> bool:
        return self.objects[name] > 0


def score_detections(
    predictions: Sequence[Detections],
    truth: Sequence[Detections],
    classes: Sequence[str],
    ranges: Mapping[str, float] = RANGES,
) -> DetectionScore:
    """Measure predictions of the same frames as ``truth``.

    Args:
        predictions: One entry a frame, with scores.
        truth: One entry a frame.
        classes: Names of the labels; those without a range do not count.
        ranges: Half the side of the square in which a class counts.

    Raises:
        ValueError: The frames do not match, or predictions have no scores.
    """
    if len(predictions) != len(truth):
        raise ValueError(
            f"score_detections: need a prediction for each frame, got {len(predictions)} for "
            f"{len(truth)} frames"
        )
    if any(one.scores is None for one in predictions):
        raise ValueError("score_detections: predictions need scores, got None")
    precision: dict[str, dict[float, float]] = {}
    errors: dict[str, dict[str, float]] = {}
    objects: dict[str, int] = {}
    for label, name in enumerate(classes):
        if name not in ranges:
            continue
        found = _gathered(predictions, label, ranges[name])
        wanted = _gathered(truth, label, ranges[name])
        objects[name] = len(wanted.frame)
        hits = {far: _match(found, wanted, far) for far in (*DISTANCES, HIT)}
        precision[name] = {
            far: _average_precision(hits[far] >= 0, objects[name]) for far in DISTANCES
        }
        errors[name] = _errors(found, wanted, hits[HIT])
    return DetectionScore(precision, errors, objects)


@dataclass(frozen=True)
class _Boxes:
    frame: NDArray[np.int64]
    boxes: Floats


def _gathered(frames: Sequence[Detections], label: int, reach: float) -> _Boxes:
    """Boxes of one class within the range; those with scores from the surest down."""
    places, boxes, scores = [], [], []
    for at, one in enumerate(frames):
        kept = (one.labels == label) & (np.abs(one.boxes[:, :2]) <= reach).all(1)
        boxes.append(one.boxes[kept].astype(float))
        places.append(np.full(int(kept.sum()), at, np.int64))
        scores.append(np.zeros(len(places[-1])) if one.scores is None else one.scores[kept])
    every = np.concatenate([np.zeros((0, 9)), *boxes])
    order = np.argsort(-np.concatenate([np.zeros(0), *scores]), kind="stable")
    return _Boxes(np.concatenate([np.zeros(0, np.int64), *places])[order], every[order])


def _match(found: _Boxes, wanted: _Boxes, far: float) -> NDArray[np.int64]:
    """The object that each prediction hits, -1 for none; an object is hit once."""
    out = np.full(len(found.frame), -1, np.int64)
    free = np.ones(len(wanted.frame), bool)
    of_frame = {frame: np.flatnonzero(wanted.frame == frame) for frame in np.unique(wanted.frame)}
    for at, frame in enumerate(found.frame.tolist()):
        rows = of_frame.get(frame)
        rows = None if rows is None else rows[free[rows]]
        if rows is None or not len(rows):
            continue
        apart = np.linalg.norm(wanted.boxes[rows, :2] - found.boxes[at, :2], axis=1)
        best = int(np.argmin(apart))
        if apart[best] < far:
            out[at] = rows[best]
            free[rows[best]] = False
    return out


def _average_precision(hit: NDArray[np.bool_], objects: int) -> float:
    if not objects:
        return float("nan")
    if not hit.any():
        return 0.0
    right = np.cumsum(hit)
    precision = right / np.arange(1, len(hit) + 1)
    curve = np.interp(RECALLS, right / objects, precision, right=0)
    # Recalls and precisions below a tenth are noise and do not count.
    above = np.maximum(curve[int(100 * MIN_RECALL) + 1 :] - MIN_PRECISION, 0)
    return float(above.mean() / (1 - MIN_PRECISION))


def _errors(found: _Boxes, wanted: _Boxes, hit: NDArray[np.int64]) -> dict[str, float]:
    rows = np.flatnonzero(hit >= 0)
    a, b = found.boxes[rows], wanted.boxes[hit[rows]]
    if not len(rows):
        return dict.fromkeys(ERRORS, 1.0)
    common = np.minimum(a[:, 3:6], b[:, 3:6]).prod(1)
    overlap = common / (a[:, 3:6].prod(1) + b[:, 3:6].prod(1) - common)
    turned = np.abs((a[:, 6] - b[:, 6] + np.pi) % (2 * np.pi) - np.pi)
    each = {
        "translation": np.linalg.norm(a[:, :2] - b[:, :2], axis=1),
        "scale": 1 - overlap,
        "orientation": turned,
        "velocity": np.linalg.norm(a[:, 7:] - b[:, 7:], axis=1),
    }
    recall = np.cumsum(hit >= 0) / len(wanted.frame)
    return {name: _over_recall(values, recall[rows]) for name, values in each.items()}


def _over_recall(values: Floats, recall: Floats) -> float:
    """Mean over recalls above a tenth of the mean error of the surest hits up to that recall."""
    running = np.cumsum(values) / np.arange(1, len(values) + 1)
    first, last = int(100 * MIN_RECALL) + 1, int(np.floor(recall[-1] * 100 + 1e-9))
    if last < first:
        return 1.0
    return float(np.interp(RECALLS, recall, running)[first : last + 1].mean())
