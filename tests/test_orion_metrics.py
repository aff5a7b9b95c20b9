# SPDX-License-Identifier: Apache-2.0
"""Average precision of boxes and lanes, on frames whose figures are known."""

from __future__ import annotations

import numpy as np
import pytest

from kdfast.recovery.detection_metrics import Detections, score_detections
from kdfast.recovery.map_metrics import Lines, chamfer, score_lines

CLASSES = ("car", "pedestrian", "others")


def boxes(*rows: tuple[float, ...]) -> np.ndarray:
    return np.array([(x, y, 0, 2, 4, 1.5, yaw, vx, 0) for x, y, yaw, vx in rows], float)


def frame(rows: np.ndarray, scores: list[float] | None = None, label: int = 0) -> Detections:
    held = None if scores is None else np.array(scores)
    return Detections(rows.reshape(-1, 9), np.full(len(rows), label), held)


def test_perfect_predictions_score_one_without_errors() -> None:
    truth = [frame(boxes((0, 5, 0.1, 3), (10, 5, 1, 0))), frame(boxes((1, 1, 2, 0)))]
    found = [frame(one.boxes, [0.9] * len(one.labels)) for one in truth]
    score = score_detections(found, truth, CLASSES)
    assert score.mean_precision == pytest.approx(1)
    assert all(score.mean_error(kind) == pytest.approx(0) for kind in score.errors["car"])
    assert score.objects == {"car": 3, "pedestrian": 0}
    assert np.isnan(score.precision["pedestrian"][2.0])


def test_distance_decides_what_is_a_hit() -> None:
    truth = [frame(boxes((0, 0, 0, 0)))]
    score = score_detections([frame(boxes((0, 1.5, 0, 0)), [0.5])], truth, CLASSES)
    precision = [score.precision["car"][far] for far in (0.5, 1.0, 2.0, 4.0)]
    assert precision == pytest.approx([0, 0, 1, 1])
    assert score.mean_precision == pytest.approx(0.5)
    assert score.errors["car"]["translation"] == pytest.approx(1.5)


def test_errors_of_the_hits() -> None:
    truth = [frame(boxes((0, 0, 3.1, 2)))]
    found = boxes((0.6, 0.8, -3.1, 5))
    found[0, 3:6] = 4, 4, 1.5
    score = score_detections([frame(found, [0.5])], truth, CLASSES)
    errors = score.errors["car"]
    assert errors["translation"] == pytest.approx(1)
    assert errors["scale"] == pytest.approx(0.5)
    assert errors["orientation"] == pytest.approx(2 * np.pi - 6.2)
    assert errors["velocity"] == pytest.approx(3)


def test_half_of_the_objects_found_and_a_wrong_one_between() -> None:
    truth = [frame(boxes((0, 0, 0, 0), (20, 0, 0, 0)))]
    found = [frame(boxes((40, 40, 0, 0), (0, 0, 0, 0)), [0.9, 0.8])]
    precision = score_detections(found, truth, CLASSES).precision["car"][2.0]
    # Precision rises to 1/2 at recall 1/2, and nothing is found beyond.
    recalls = np.linspace(0, 1, 101)[11:]
    curve = np.interp(recalls, [0, 0.5], [0, 0.5], right=0)
    assert precision == pytest.approx(np.maximum(curve - 0.1, 0).mean() / 0.9)


def test_an_object_is_hit_once_and_by_the_surest() -> None:
    truth = [frame(boxes((0, 0, 0, 0)))]
    twice = [frame(boxes((0.1, 0, 0, 0), (0, 0, 0, 0)), [0.9, 0.3])]
    score = score_detections(twice, truth, CLASSES)
    assert score.errors["car"]["translation"] == pytest.approx(0.1)
    # At full recall nuScenes reads the precision of the last, wrong box: one half at one of 90.
    assert score.precision["car"][2.0] == pytest.approx((89 + 4 / 9) / 90)
    # The wrong frame is no hit.
    empty = frame(np.zeros((0, 9)))
    moved = score_detections([frame(empty.boxes, []), twice[0]], [truth[0], empty], CLASSES)
    assert moved.mean_precision == 0 and moved.errors["car"]["scale"] == 1


def test_range_and_classes_without_one() -> None:
    truth = [frame(boxes((60, 0, 0, 0))), frame(boxes((0, 0, 0, 0)), label=2)]
    found = [frame(one.boxes, [0.5], int(one.labels[0])) for one in truth]
    score = score_detections(found, truth, CLASSES)
    assert score.objects == {"car": 0, "pedestrian": 0} and np.isnan(score.mean_precision)


def test_frames_and_scores_are_checked() -> None:
    one = frame(boxes((0, 0, 0, 0)))
    with pytest.raises(ValueError, match="each frame"):
        score_detections([], [one], CLASSES)
    with pytest.raises(ValueError, match="scores"):
        score_detections([one], [one], CLASSES)
    line = Lines(np.zeros((1, 2, 2)), np.zeros(1, int))
    with pytest.raises(ValueError, match="each frame"):
        score_lines([], [line], ["Solid"])
    with pytest.raises(ValueError, match="scores"):
        score_lines([line], [line], ["Solid"])


def test_chamfer_of_parallel_lines_is_their_distance() -> None:
    line = np.stack([np.linspace(0, 10, 50), np.zeros(50)], -1)
    np.testing.assert_allclose(chamfer(line[None], np.stack([line, line + (0, 2)])), [[0, 2]])


def straight(y: float) -> np.ndarray:
    return np.array([[0.0, y, 0], [10.0, y, 0]])


def test_lines_within_the_distance_are_hits() -> None:
    truth = [Lines(np.stack([straight(0), straight(5)]), np.array([0, 1]))]
    found = [Lines(np.stack([straight(0.8), straight(5)]), np.array([0, 1]), np.array([0.4, 0.9]))]
    score = score_lines(found, truth, ["Solid", "Broken", "Center"])
    assert [score.precision["Solid"][far] for far in (0.5, 1.0, 1.5)] == [0, 1, 1]
    assert score.precision["Broken"][0.5] == 1 and np.isnan(score.precision["Center"][0.5])
    assert score.mean_precision == pytest.approx((2 / 3 + 1) / 2)


def test_a_second_line_on_the_same_lane_is_wrong() -> None:
    truth = [Lines(np.stack([straight(0), straight(9)]), np.zeros(2, int))]
    lines = np.stack([straight(0), straight(0.1), straight(9)])
    found = [Lines(lines, np.zeros(3, int), np.array([0.9, 0.8, 0.7]))]
    score = score_lines(found, truth, ["Solid"])
    # Hits at ranks 1 and 3 of 2 lines: 1/2 * 1 + 1/2 * 2/3.
    assert score.precision["Solid"][1.0] == pytest.approx(1 / 2 + 1 / 3)


def test_frames_without_predictions_or_lines() -> None:
    none = Lines(np.zeros((0, 11, 3)), np.zeros(0, int), np.zeros(0))
    some = Lines(np.stack([straight(0)]), np.zeros(1, int), np.ones(1))
    assert score_lines([none, none], [some, none], ["Solid"]).mean_precision == 0
    score = score_lines([some, some], [none, some], ["Solid"])
    assert score.precision["Solid"][1.0] == pytest.approx(0.5)
