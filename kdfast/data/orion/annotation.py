# SPDX-License-Identifier: Apache-2.0
"""One annotation of Bench2Drive (``anno/%05d.json.gz``) as the info of a frame.

The schema is docs/anno.md of Thinklab-SJTU/Bench2Drive; the values and filters are those of
Bench2DriveZoo's ``prepare_B2D.py``, so that infos from either agree. Differences: throttle, steer
and brake are the recorded ones, not the expert's; a speed that is not recorded is taken from the
frame before and from no older one.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdfast.data.files import CorruptDataError
from kdfast.data.orion.geometry import (
    CAMERA_IN_CARLA,
    EGO_FROM_LIDAR,
    LIDAR_FROM_CARLA,
    MIRROR,
    Floats,
    box_corners,
    invert,
    turn,
)
from kdfast.data.orion.names import CAMERAS, light_state

Info = dict[str, Any]

MAX_DISTANCE, MAX_HEIGHT = 75.0, 10.0
# A box counts if a camera sees two of its corners and has fewer than seven outside.
MIN_SEEN, MAX_OUTSIDE = 2, 6
# An unpacked annotation has some 100 KB; more than this is no annotation.
MAX_BYTES = 64 << 20
_TO_WORLD = ("world2vehicle", "world2ego", "world2sign", "world2ped")


def read_annotation(path: Path) -> dict[str, Any]:
    """Content of one annotation.

    Raises:
        FileNotFoundError: There is no such file.
        CorruptDataError: It is damaged, too large or no annotation.
    """
    try:
        with gzip.open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"unpacks to more than {MAX_BYTES >> 20} MiB")
        anno = json.loads(content)
    except FileNotFoundError:
        raise
    except (OSError, EOFError, ValueError, zlib.error, RecursionError) as error:
        raise CorruptDataError(f"{path}: must be a gzipped JSON annotation, got {error}") from error
    missing = {"bounding_boxes", "sensors", "x", "y"} - set(anno if isinstance(anno, dict) else ())
    if missing or not anno["bounding_boxes"]:
        raise CorruptDataError(f"{path}: must be an annotation, got none of {sorted(missing)}")
    return anno


def frame_info(
    anno: Mapping[str, Any],
    folder: str,
    frame: int,
    before: Mapping[str, Floats] | None = None,
    depth: Mapping[str, NDArray[np.generic]] | None = None,
) -> tuple[Info, dict[str, Floats]]:
    """The info of one frame, keys and values as in ``b2d_infos_*.pkl``.

    Args:
        anno: Content of the annotation.
        folder: ``v1/<clip>``.
        frame: Number of the frame.
        before: Centres of the objects of the frame before by id, for speeds.
        depth: Depth pictures (H, W) in metres by sensor; without them a box behind something
            else counts as seen.

    Returns:
        The info, which has ``light`` (n, 2) besides, and the centres of its objects by id.

    Raises:
        CorruptDataError: A value is missing or has another form.
    """
    try:
        return _frame_info(anno, folder, frame, before or {}, depth or {})
    except (KeyError, TypeError, ValueError, IndexError, np.linalg.LinAlgError) as error:
        raise CorruptDataError(
            f"annotation {frame:05d} of {folder}: a value is missing or has another form "
            f"({type(error).__name__}: {error})"
        ) from error


def _frame_info(
    anno: Mapping[str, Any],
    folder: str,
    frame: int,
    before: Mapping[str, Floats],
    depth: Mapping[str, NDArray[np.generic]],
) -> tuple[Info, dict[str, Floats]]:
    ego = anno["bounding_boxes"][0]
    theta = np.pi if anno["theta"] is None else np.nan_to_num(anno["theta"], nan=np.pi)
    info: Info = {
        "folder": folder,
        "town_name": town_of(folder),
        "frame_idx": frame,
        "ego_yaw": float(np.pi / 2 - theta),
        "ego_translation": np.array([anno["x"], -anno["y"], 0.0]),
        "ego_vel": np.array([_number(anno["speed"]), 0.0, 0.0]),
        "ego_accel": np.array(anno["acceleration"], float).reshape(3) * (1, -1, 1),
        "ego_rotation_rate": -np.array(anno["angular_velocity"], float).reshape(3),
        "ego_size": 2 * np.array(ego["extent"], float)[[1, 0, 2]],
        "world2ego": MIRROR @ np.array(ego["world2ego"], float) @ MIRROR,
        "sensors": _sensors(anno["sensors"], folder, frame),
    }
    for which in ("near", "far"):
        info[f"command_{which}"] = int(anno[f"command_{which}"])
        xy = (anno[f"x_command_{which}"], -anno[f"y_command_{which}"])
        info[f"command_{which}_xy"] = np.array(xy, float)
    for name in ("throttle", "steer", "brake"):
        info[name] = float(anno[name])
    centres: dict[str, Floats] = {}
    rows = []
    for thing in anno["bounding_boxes"][1:]:
        if thing["class"] == "ego_vehicle" or thing["distance"] > MAX_DISTANCE:
            continue
        if abs(thing["location"][2] - ego["location"][2]) > MAX_HEIGHT:
            continue
        centre = np.array(thing["center"], float) * (1, -1, 1)
        centres[str(thing["id"])] = centre
        row = _thing(thing, centre, info, before.get(str(thing["id"])))
        if _seen(row["box"], info["sensors"], depth):
            rows.append(row)
    info["gt_ids"] = np.array([row["id"] for row in rows], np.int64)
    info["gt_names"] = np.array([row["name"] for row in rows], dtype=str)
    info["gt_boxes"] = np.array([row["box"] for row in rows], float).reshape(-1, 9)
    info["num_points"] = np.array([row["points"] for row in rows], np.int64)
    info["npc2world"] = np.array([row["pose"] for row in rows], float).reshape(-1, 4, 4)
    info["light"] = np.array([row["light"] for row in rows], np.int64).reshape(-1, 2)
    return info, centres


def light_of(anno: Mapping[str, Any]) -> dict[int, tuple[int, int]]:
    """State of every traffic light by id, and whether it holds for the ego."""
    return {
        int(thing["id"]): _light(thing)
        for thing in anno["bounding_boxes"]
        if thing["class"] == "traffic_light"
    }


def _light(thing: Mapping[str, Any]) -> tuple[int, int]:
    if thing["class"] != "traffic_light":
        return (-1, -1)
    return (light_state(thing["state"]), int(bool(thing["affects_ego"])))


def town_of(folder: str) -> str:
    """Name of the town in ``<Scenario>_Town##_Route##_Weather##``.

    Raises:
        CorruptDataError: The name has no town.
    """
    parts = folder.rstrip("/").rsplit("/", 1)[-1].split("_")
    town = next((part for part in parts if part.startswith("Town")), None)
    if town is None:
        raise CorruptDataError(
            f"{folder}: must be named <Scenario>_Town##_Route##_Weather##, got no town"
        )
    return town


def _number(value: object) -> float:
    # The speedometer now and then says nothing.
    return 0.0 if value is None else float(value)  # type: ignore[arg-type]


def _sensors(sensors: Mapping[str, Any], folder: str, frame: int) -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    for camera, pictures in CAMERAS.items():
        raw = sensors[camera]
        out[camera] = {
            "cam2ego": MIRROR @ np.array(raw["cam2ego"], float) @ CAMERA_IN_CARLA,
            "intrinsic": np.array(raw["intrinsic"], float).reshape(3, 3),
            "world2cam": CAMERA_IN_CARLA.T @ np.array(raw["world2cam"], float) @ MIRROR,
            "data_path": f"{folder}/camera/{pictures}/{frame:05d}.jpg",
        }
    lidar = sensors["LIDAR_TOP"]
    out["LIDAR_TOP"] = {
        "lidar2ego": MIRROR @ np.array(lidar["lidar2ego"], float) @ MIRROR @ EGO_FROM_LIDAR,
        "world2lidar": LIDAR_FROM_CARLA @ np.array(lidar["world2lidar"], float) @ MIRROR,
    }
    return out


def _thing(
    thing: Mapping[str, Any], centre: Floats, info: Info, last: Floats | None
) -> dict[str, Any]:
    world2lidar = info["sensors"]["LIDAR_TOP"]["world2lidar"]
    if "world2vehicle" in thing:
        world2thing = MIRROR @ np.array(thing["world2vehicle"], float) @ MIRROR
        there = world2lidar @ np.linalg.inv(world2thing)
        yaw = float(np.arctan2(there[1, 0], there[0, 0]))
    else:
        yaw = -np.radians(thing["rotation"][-1]) - info["ego_yaw"] + np.pi / 2
    speed = 0.0
    if "speed" in thing and "vehicle" in thing["class"]:
        speed = _number(thing["speed"])
    elif "speed" in thing and last is not None:
        # CARLA says that every pedestrian stands still; frames are a tenth of a second apart.
        speed = float(np.linalg.norm((centre - last)[:2]) * 10)
    size = 2 * np.array(thing["extent"], float)[[1, 0, 2]]
    local = world2lidar[:3, :3] @ centre + world2lidar[:3, 3]
    motion = (speed * np.cos(yaw), speed * np.sin(yaw))
    return {
        "id": int(thing["id"]),
        "name": str(thing["type_id"]),
        "box": np.array([*local, *size, -yaw - np.pi / 2, *motion]),
        "points": int(thing.get("num_points", -1)),
        "pose": _pose(thing),
        "light": _light(thing),
    }


def _pose(thing: Mapping[str, Any]) -> Floats:
    # The annotated yaw is right where CARLA's matrix has another one.
    yaw = float(np.radians(thing["rotation"][-1]))
    key = next((name for name in _TO_WORLD if name in thing), None)
    pose = np.eye(4)
    if key is not None:
        pose = np.linalg.inv(np.array(thing[key], float))
    else:
        pose[:3, 3] = thing["location"]
    if key is None or abs(yaw - np.arctan2(pose[1, 0], pose[0, 0])) > 0.01:
        pose[:3, :3] = turn(yaw)
    return MIRROR @ pose @ MIRROR


def _seen(box: Floats, sensors: Mapping[str, Any], depth: Mapping[str, Any]) -> bool:
    corners = box_corners(box[None])[0]
    lidar2ego = sensors["LIDAR_TOP"]["lidar2ego"]
    for camera in CAMERAS:
        sensor = sensors[camera]
        lidar2cam = invert(sensor["cam2ego"]) @ lidar2ego
        points = corners @ lidar2cam[:3, :3].T + lidar2cam[:3, 3]
        points = points[points[:, 2] > 0]
        flat = points @ sensor["intrinsic"].T
        pixels = flat[:, :2] / flat[:, 2:]
        picture = depth.get(camera)
        # The pictures are as wide and high as twice their centre.
        width, height = (2 * sensor["intrinsic"][:2, 2]).round()
        inside = (pixels >= 0).all(1) & (pixels < (width, height)).all(1)
        inside &= points[:, 2] < MAX_DISTANCE
        hidden = 0
        if picture is not None:
            pairs = zip(pixels[inside], points[inside, 2], strict=True)
            hidden = sum(_hidden(pixel, z, picture) for pixel, z in pairs)
        if inside.sum() - hidden >= MIN_SEEN and (~inside).sum() <= MAX_OUTSIDE:
            return True
    return False


def _hidden(pixel: Floats, depth: float, picture: NDArray[np.generic]) -> bool:
    # Hidden if all the diagonal neighbours in the picture are nearer.
    x, y = int(pixel[0]), int(pixel[1])
    near = [
        picture[y + dy, x + dx] < depth
        for dy in (1, -1)
        for dx in (1, -1)
        if 0 <= y + dy < picture.shape[0] and 0 <= x + dx < picture.shape[1]
    ]
    return bool(all(near))
