# SPDX-License-Identifier: Apache-2.0
"""Coordinate systems of CARLA's annotations and of ORION.

CARLA's world is left-handed: x ahead, y to the right, z up. Infos are right-handed: the world
and the ego with y to the left, the LiDAR with x to the right and y ahead, cameras with x to the
right, y down and z ahead. All matrices are (4, 4) and map column vectors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]

# Turns the y axis: from left- to right-handed world or ego coordinates, and back.
MIRROR = np.diag([1.0, -1.0, 1.0, 1.0])
# Camera axes (right, down, ahead) in CARLA's camera (ahead, right, up).
CAMERA_IN_CARLA = np.array([[0, 0, 1, 0], [1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]], float)
# LiDAR (right, ahead, up) from CARLA's sensor (ahead, right, up).
LIDAR_FROM_CARLA = np.array([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], float)
# Right-handed ego (ahead, left, up) from LiDAR (right, ahead, up).
EGO_FROM_LIDAR = np.array([[0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], float)

_CORNERS = np.array([[x, y, z] for x in (1, -1) for y in (1, -1) for z in (1, -1)], float)


def invert(pose: Floats) -> Floats:
    """Inverse of rigid motions (..., 4, 4)."""
    out = np.zeros_like(pose)
    out[..., :3, :3] = np.swapaxes(pose[..., :3, :3], -1, -2)
    out[..., :3, 3] = -np.einsum("...ij,...j->...i", out[..., :3, :3], pose[..., :3, 3])
    out[..., 3, 3] = 1
    return out


def turn(yaw: float) -> Floats:
    """Rotation (3, 3) by ``yaw`` radians from x towards y."""
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def move(motion: Floats, points: Floats) -> Floats:
    """Points (..., 3) moved by one motion (4, 4)."""
    return points @ motion[:3, :3].T + motion[:3, 3]


def box_corners(boxes: Floats) -> Floats:
    """Corners (n, 8, 3) of boxes (n, 7 or more): centre, w, l, h and ORION's yaw.

    ORION's yaw of a box is -direction - pi / 2, where the direction of its length is counted from
    the x axis of the LiDAR.
    """
    direction = -boxes[:, 6] - np.pi / 2
    half = boxes[:, [4, 3, 5]] / 2
    points = _CORNERS * half[:, None]
    c, s = np.cos(direction)[:, None], np.sin(direction)[:, None]
    x = points[..., 0] * c - points[..., 1] * s
    y = points[..., 0] * s + points[..., 1] * c
    return np.stack([x, y, points[..., 2]], -1) + boxes[:, None, :3]


def project(lidar2img: Floats, points: Floats) -> tuple[Floats, Floats]:
    """Pixels (..., 2) and depths (...) of LiDAR points (..., 3) by one matrix (4, 4)."""
    flat = points @ lidar2img[:3, :3].T + lidar2img[:3, 3]
    depth = flat[..., 2]
    safe = np.where(np.abs(depth) < 1e-6, 1e-6, depth)
    return flat[..., :2] / safe[..., None], depth
