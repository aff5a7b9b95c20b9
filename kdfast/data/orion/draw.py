# SPDX-License-Identifier: Apache-2.0
"""Pictures of a synthetic clip: what the true calibrations show of its boxes and lanes."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from kdfast.data.orion.geometry import CAMERA_IN_CARLA, Floats
from kdfast.data.orion.town import LANE, Clip, Line, Thing, street
from kdfast.data.scenes.camera import Camera, quads

_LIGHTS = ((40, 40, 230), (40, 200, 230), (60, 220, 60))
# Corners of the faces of a box, as signs of (length, width) and 0 or 1 of the height.
_FACES = np.array(
    [
        [(1, -1, 0), (1, 1, 0), (1, 1, 1), (1, -1, 1)],
        [(-1, 1, 0), (-1, -1, 0), (-1, -1, 1), (-1, 1, 1)],
        [(1, 1, 0), (-1, 1, 0), (-1, 1, 1), (1, 1, 1)],
        [(-1, -1, 0), (1, -1, 0), (1, -1, 1), (-1, -1, 1)],
        [(1, -1, 1), (1, 1, 1), (-1, 1, 1), (-1, -1, 1)],
    ],
    float,
)
_SHADES = (1.0, 0.7, 0.85, 0.85, 1.15)
_MARKS = {"Solid": (235, 235, 235), "SolidSolid": (60, 200, 230), "Broken": (215, 215, 215)}


def camera_of(cam2world: Floats, intrinsic: Floats) -> Camera:
    """A camera in CARLA's world from its pose, in CARLA's axes, and its intrinsics."""
    rotation = (cam2world @ CAMERA_IN_CARLA)[:3, :3].T
    return Camera(
        cam2world[:3, 3].astype(np.float32),
        rotation.astype(np.float32),
        (float(intrinsic[0, 0]), float(intrinsic[1, 1])),
        (float(intrinsic[0, 2]), float(intrinsic[1, 2])),
    )


def draw(
    clip: Clip, time: float, camera: Camera, size: tuple[int, int], rng: np.random.Generator
) -> NDArray[np.uint8]:
    """One picture (H, W, 3) BGR: ground, lane markings, and boxes from far to near."""
    picture = np.empty((*size, 3), np.uint8)
    picture[:] = np.array(clip.sky) * clip.sun
    _fill(picture, camera, _ground(camera), [(70, 110, 90)], clip.sun)
    road = _ribbon(clip, -clip.lanes * LANE - 0.5, clip.lanes * LANE + 0.5)
    _fill(picture, camera, road, [(95, 92, 90)] * len(road), clip.sun)
    for line in clip.lines:
        if line.kind in _MARKS:
            marks = _marking(line)
            _fill(picture, camera, marks, [_MARKS[line.kind]] * len(marks), clip.sun)
    distance = [np.linalg.norm(thing.pose(time)[:3, 3] - camera.place) for thing in clip.things]
    for at in np.argsort(distance)[::-1]:
        thing = clip.things[at]
        faces = faces_of(thing, time)
        colour = np.array(colour_of(thing, time))
        order = np.argsort(np.linalg.norm(faces.mean(1) - camera.place, axis=1))[::-1]
        shades = [np.clip(colour * _SHADES[face], 0, 255) for face in order]
        _fill(picture, camera, faces[order], shades, clip.sun)
    noise = rng.normal(0, 4, picture.shape).astype(np.float32)
    return np.clip(picture + noise, 0, 255).astype(np.uint8)


def colour_of(thing: Thing, time: float) -> tuple[int, int, int]:
    """BGR of a thing; a traffic light shows its state."""
    return _LIGHTS[thing.light(time)] if thing.role == "traffic_light" else thing.colour


def faces_of(thing: Thing, time: float) -> Floats:
    """Visible faces (5, 4, 3) of a thing's box in the world."""
    half = np.array([thing.size[0] / 2, thing.size[1] / 2, thing.size[2]])
    pose = thing.pose(time)
    return _FACES * half @ pose[:3, :3].T + pose[:3, 3]


def _ground(camera: Camera) -> Floats:
    # Small tiles: a quad that reaches behind the camera is cut, and a large one coarsely.
    steps = np.linspace(-400, 400, 9)
    tiles = [
        [(x0, y0, 0.0), (x1, y0, 0.0), (x1, y1, 0.0), (x0, y1, 0.0)]
        for x0, x1 in zip(steps, steps[1:], strict=False)
        for y0, y1 in zip(steps, steps[1:], strict=False)
    ]
    return np.array(tiles) + (camera.place[0], camera.place[1], 0.0)


def _ribbon(clip: Clip, left: float, right: float) -> Floats:
    along = np.arange(-60, len(clip.lines[0].points) - 60, 2.0)
    edges = [[street(clip.bend, s, side)[0] for side in (left, right)] for s in along]
    return np.array([[a[0], a[1], b[1], b[0]] for a, b in zip(edges, edges[1:], strict=False)])


def _marking(line: Line) -> Floats:
    points = line.points
    ahead = np.diff(points, axis=0)
    side = np.stack([-ahead[:, 1], ahead[:, 0], np.zeros(len(ahead))], -1)
    side *= 0.1 / np.maximum(np.linalg.norm(side, axis=1, keepdims=True), 1e-6)
    every = np.stack([points[:-1] - side, points[:-1] + side, points[1:] + side, points[1:] - side])
    tiles = every.transpose(1, 0, 2)
    return tiles[np.arange(len(tiles)) % 6 < 3] if line.kind == "Broken" else tiles


def _fill(
    picture: NDArray[np.uint8],
    camera: Camera,
    faces: Floats,
    colours: Sequence[Sequence[float] | Floats],
    sun: float,
) -> None:
    size = (picture.shape[0], picture.shape[1])
    outlines, rows = quads(faces.astype(np.float32), camera, size)
    for outline, row in zip(outlines, rows.tolist(), strict=True):
        colour = colours[row] if len(colours) > 1 else colours[0]
        cv2.fillConvexPoly(picture, outline, [float(c) * sun for c in colour], 8, 4)
