# SPDX-License-Identifier: Apache-2.0
"""The six cameras of the synthetic scenes, and the painting of surfaces as row numbers."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from kdfast.data.scenes.layout import Floats
from kdfast.data.scenes.world import CORNERS, NORMAL, PLANE_D, World

# Name, direction in degrees to the left of ahead, focal length as a part of the width, place.
# The focal lengths are ORION's 70 and 110 degree cameras.
VIEWS: tuple[tuple[str, float, float, tuple[float, float, float]], ...] = (
    ("front", 0.0, 0.714, (0.8, 0.0, 1.6)),
    ("front_left", 55.0, 0.714, (0.3, 0.55, 1.6)),
    ("front_right", -55.0, 0.714, (0.3, -0.55, 1.6)),
    ("back", 180.0, 0.350, (-2.0, 0.0, 1.6)),
    ("back_left", 110.0, 0.714, (-0.3, 0.55, 1.6)),
    ("back_right", -110.0, 0.714, (-0.3, -0.55, 1.6)),
)
# ORION crops 640x360 to 640x320 from below and doubles the height.
STRETCH, HORIZON = 2.0, 0.4375
NEAR = 0.3
# Painted numbers below are not surfaces: 0 is sky, 1 ground.
FIRST = 2


@dataclass(frozen=True)
class Camera:
    """A view: ``rotation`` (3, 3) has rows right, down, ahead."""

    place: Floats
    rotation: Floats
    focal: tuple[float, float]
    middle: tuple[float, float]

    @classmethod
    def of(cls, view: int, size: tuple[int, int], pitch: float, roll: float) -> Camera:
        """Camera of one of ``VIEWS`` for a (height, width), tilted by radians."""
        _, degrees, focal, place = VIEWS[view]
        yaw = np.radians(degrees)
        ahead = np.array([np.cos(yaw) * np.cos(pitch), np.sin(yaw) * np.cos(pitch), np.sin(pitch)])
        level = np.array([np.sin(yaw), -np.cos(yaw), 0.0])
        right = level * np.cos(roll) + np.cross(ahead, level) * np.sin(roll)
        height, width = size
        return cls(
            np.array(place, np.float32),
            np.stack([right, np.cross(ahead, right), ahead]).astype(np.float32),
            (focal * width, focal * width * STRETCH * height / width),
            (width / 2, HORIZON * height),
        )

    def rays(self, size: tuple[int, int]) -> Floats:
        """World directions (3, height * width) of the pixel centres, one metre ahead each."""
        across = (np.arange(size[1], dtype=np.float32) + 0.5 - self.middle[0]) / self.focal[0]
        below = (np.arange(size[0], dtype=np.float32) + 0.5 - self.middle[1]) / self.focal[1]
        out = np.empty((3, *size), np.float32)
        for axis in range(3):
            right, down, ahead = self.rotation[:, axis]
            np.add(across * right, (below * down + ahead)[:, None], out=out[axis])
        return out.reshape(3, -1)

    def pixels(self, points: Floats) -> Floats:
        """Image positions (..., 2) of camera-frame points (..., 3); pixel centres are integers."""
        flat = points[..., :2] / points[..., 2:]
        scale, shift = np.array([self.focal, self.middle], np.float32)
        return flat * scale + (shift - np.float32(0.5))


def _clip(points: Floats) -> Floats:
    # Quads (M, 4, 3) cut at the near plane, as pentagons (M, 5, 3) with repeated last corners.
    after = points[:, [1, 2, 3, 0]]
    deep = points[..., 2] > NEAR
    crossed = deep != deep[:, [1, 2, 3, 0]]
    step = np.where(crossed, after[..., 2] - points[..., 2], 1)
    part = np.where(crossed, (NEAR - points[..., 2]) / step, 0)
    slots = np.stack([points, points + part[..., None] * (after - points)], 2).reshape(-1, 8, 3)
    used = np.stack([deep, crossed], 2).reshape(-1, 8)
    order = np.argsort(~used, axis=1, kind="stable")
    last = used.sum(1, keepdims=True) - 1
    chosen = np.take_along_axis(order, np.minimum(np.arange(5), last), 1)
    return slots[np.arange(len(slots))[:, None], chosen]


def quads(
    corners: Floats, camera: Camera, size: tuple[int, int]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Outlines (n, 5, 2) of the visible ones among quads (M, 4, 3) in space, and their rows."""
    points = (corners - camera.place) @ camera.rotation.T
    deep = points[..., 2] > NEAR
    rows = np.flatnonzero(deep.any(1))
    points, whole = points[rows], deep[rows].all(1)
    full = np.concatenate([points, points[:, 3:]], 1)
    full[~whole] = _clip(points[~whole])
    return _visible(camera.pixels(full), rows, size)


def _visible(
    flat: Floats, rows: NDArray[np.int64], size: tuple[int, int]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    # Outlines in sixteenths of a pixel without those outside of the picture or too small to see.
    low, high = flat.min(1), flat.max(1)
    kept = (high > -0.5).all(1) & (low[:, 0] < size[1] - 0.5) & (low[:, 1] < size[0] - 0.5)
    kept &= (high - low).max(1) > 0.7
    return np.rint(np.clip(flat[kept], -1e6, 1e6) * 16).astype(np.int32), rows[kept]


def outlines(
    world: World, camera: Camera, table: Floats, size: tuple[int, int]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Outlines (n, CORNERS, 2) of the visible surfaces from far to near, and their numbers.

    Outlines are in sixteenths of a pixel; ``table`` is (COLUMNS, M).
    """
    facing = camera.place @ table[NORMAL] > table[PLANE_D]
    faces = np.flatnonzero(facing & ~world.board)
    flat, rows = quads(world.corners[faces], camera, size)
    foot = (world.corners[:, 0] - camera.place) @ camera.rotation.T
    boards = np.flatnonzero(world.board & (foot[:, 2] > 1.5))
    figure = world.figure[boards]
    points = foot[boards, None] + figure[..., 1:] * camera.rotation[:, 2]
    points[..., 0] += figure[..., 0]
    shapes, shape_rows = _visible(camera.pixels(points), boards, size)
    padded = flat[:, np.minimum(np.arange(CORNERS), 4)]
    every = np.concatenate([faces[rows], shape_rows])
    order = np.argsort(every, kind="stable")
    return np.concatenate([padded, shapes])[order], every[order] + FIRST


def paint(
    picture: NDArray[np.uint8] | NDArray[np.uint16],
    outlines: NDArray[np.int32],
    values: NDArray[np.int64],
) -> None:
    """Fill outlines with their numbers, later ones over earlier ones."""
    for outline, value in zip(outlines, values.tolist(), strict=True):
        cv2.fillConvexPoly(picture, outline, value, 8, 4)
