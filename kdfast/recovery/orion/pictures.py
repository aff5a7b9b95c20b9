# SPDX-License-Identifier: Apache-2.0
"""Pictures of what the heads see: boxes on the six images, boxes and lanes from above."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from kdfast.data.orion.geometry import box_corners, project
from kdfast.data.views.preprocess import MEAN, STD
from kdfast.models.orion.config import LANE_CLASSES

Pixels = NDArray[np.uint8]
# Metres to each side of the view from above, and its pixels.
REACH, SIDE = 51.2, 768
TILE = (512, 384)
# Pixels of a title, and its letters.
TITLE, FONT = 24, 18
# The order in which people look at cameras, by their number.
ROWS = ((1, 0, 2), (4, 3, 5))
SURE = 0.2
# RGB by detection class, and by map class.
BOX_COLOURS = (
    *((230, 120, 30), (200, 160, 40), (160, 60, 30), (60, 160, 220), (120, 120, 120)),
    *((240, 80, 160), (210, 190, 0), (40, 140, 60), (150, 100, 200)),
)
LINE_COLOURS = (
    *((150, 150, 150), (40, 40, 40), (220, 160, 0), (170, 200, 230), (200, 40, 40), (220, 80, 200)),
)
_EDGES = (
    (0, 1),
    (1, 3),
    (3, 2),
    (2, 0),
    (4, 5),
    (5, 7),
    (7, 6),
    (6, 4),
    (0, 4),
    (1, 5),
    (2, 6),
    (3, 7),
)


def draw_frame(
    path: Path, images: Tensor, lidar2img: Tensor, columns: Mapping[str, Mapping[str, Any]]
) -> Path:
    """Write a picture with a row for the truth and for every model.

    Args:
        path: PNG file.
        images: (6, 3, H, W) normalised.
        lidar2img: (6, 4, 4).
        columns: By name ``boxes`` (n, 9) on the ground, ``labels`` (n,), ``lanes`` (m, 11, 3),
            ``lane_labels`` (m,), and for predictions ``scores`` (n,) and ``lane_scores`` (m,).
    """
    width = 3 * TILE[0] + SIDE
    height = max(2 * TILE[1], SIDE) + TITLE
    sheet = Image.new("RGB", (width, height * len(columns)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(FONT)
    pictures = _pictures(images)
    matrices = lidar2img.double().cpu().numpy()
    for row, (name, content) in enumerate(columns.items()):
        found = {key: _array(value) for key, value in content.items()}
        boxes, labels = _sure(found, "boxes", "labels", "scores")
        lanes, lane_labels = _sure(found, "lanes", "lane_labels", "lane_scores")
        top = row * height
        text = f"{name}: {len(boxes)} boxes, {len(lanes)} lines"
        if "scores" in found:
            text += f" surer than {SURE:.0%}"
        draw.text((4, top + 2), text, fill="black", font=font)
        for line, views in enumerate(ROWS):
            for column, view in enumerate(views):
                tile = _with_boxes(pictures[view], matrices[view], boxes, labels)
                scaled = Image.fromarray(tile).resize(TILE, Image.Resampling.BILINEAR)
                sheet.paste(scaled, (column * TILE[0], top + TITLE + line * TILE[1]))
        above = Image.fromarray(_from_above(boxes, labels, lanes, lane_labels))
        sheet.paste(above, (3 * TILE[0], top + TITLE))
    sheet.save(path)
    return path


def _array(value: Any) -> NDArray[Any]:
    return value.float().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def _sure(found: Mapping[str, NDArray[Any]], *names: str) -> tuple[NDArray[Any], NDArray[Any]]:
    things, labels, scores = names
    kept = np.ones(len(found[things]), bool) if scores not in found else found[scores] > SURE
    return found[things][kept].astype(float), found[labels][kept].astype(int)


def _pictures(images: Tensor) -> list[Pixels]:
    pixels = images.float().cpu().numpy().transpose(0, 2, 3, 1) * STD + MEAN
    return list(np.ascontiguousarray(pixels.clip(0, 255).astype(np.uint8)))


def _with_boxes(
    picture: Pixels, matrix: NDArray[Any], boxes: NDArray[Any], labels: NDArray[Any]
) -> Pixels:
    out = picture.copy()
    if not len(boxes):
        return out
    raised = boxes.copy()
    raised[:, 2] += raised[:, 5] / 2
    pixels, depth = project(matrix, box_corners(raised))
    for corners, far, label in zip(pixels.clip(-1e4, 1e4), depth, labels, strict=True):
        if (far > 0.3).all():
            _lines(out, corners, _EDGES, BOX_COLOURS[label])
    return out


def _lines(
    picture: Pixels, points: NDArray[Any], pairs: Sequence[tuple[int, int]], colour: Any
) -> None:
    for a, b in pairs:
        ends = [(int(points[at, 0]), int(points[at, 1])) for at in (a, b)]
        cv2.line(picture, ends[0], ends[1], colour, 2, cv2.LINE_AA)


def _from_above(
    boxes: NDArray[Any], labels: NDArray[Any], lanes: NDArray[Any], lane_labels: NDArray[Any]
) -> Pixels:
    out = np.full((SIDE, SIDE, 3), 250, np.uint8)

    def pixel(points: NDArray[Any]) -> NDArray[Any]:
        return (points[..., :2] * (1, -1) + REACH) * (SIDE / (2 * REACH))

    for line, label in zip(lanes, lane_labels, strict=True):
        flat = pixel(line)
        _lines(out, flat, [(i, i + 1) for i in range(len(flat) - 1)], LINE_COLOURS[label])
    if len(boxes):
        feet = pixel(box_corners(boxes)[:, [0, 2, 6, 4]])
        for corners, label in zip(feet, labels, strict=True):
            _lines(out, corners, ((0, 1), (1, 2), (2, 3), (3, 0)), BOX_COLOURS[label])
    car = pixel(np.array([[-0.9, -2.2], [-0.9, 2.2], [0.9, 2.2], [0.9, -2.2]]))
    cv2.fillConvexPoly(out, car.astype(np.int32), (40, 90, 200))
    for at, name in enumerate(LANE_CLASSES):
        cv2.putText(out, name, (8, 24 + 20 * at), 0, 0.6, LINE_COLOURS[at], 1, cv2.LINE_AA)
    return out
