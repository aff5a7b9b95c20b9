# SPDX-License-Identifier: Apache-2.0
"""A small synthetic dataset in the formats of Bench2Drive and Chat-B2D, with true calibrations."""

from __future__ import annotations

import gzip
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from kdfast.data.orion.draw import camera_of, draw
from kdfast.data.orion.geometry import Floats, turn
from kdfast.data.orion.names import CAMERAS, LIGHT_STATES
from kdfast.data.orion.town import Clip, Thing, draw_clip
from kdfast.data.rng import SENSOR, WORLD, generator

RATE = 10
QUALITY = 90
# Heading to the right in degrees, field of view in degrees, place in CARLA's ego.
RIG: dict[str, tuple[float, float, tuple[float, float, float]]] = {
    "CAM_FRONT": (0.0, 70.0, (0.8, 0.0, 1.6)),
    "CAM_FRONT_LEFT": (-55.0, 70.0, (0.27, -0.55, 1.6)),
    "CAM_FRONT_RIGHT": (55.0, 70.0, (0.27, 0.55, 1.6)),
    "CAM_BACK": (180.0, 110.0, (-2.0, 0.0, 1.6)),
    "CAM_BACK_LEFT": (-110.0, 70.0, (-0.32, -0.55, 1.6)),
    "CAM_BACK_RIGHT": (110.0, 70.0, (-0.32, 0.55, 1.6)),
}
LIDAR = (-0.39, 0.0, 1.84)
OPTIONS = "sample.json"
SPLIT_FILE = "bench2drive_base_train_val_split.json"
_WORLD_KEY = {"vehicle": "world2vehicle", "walker": "world2ped", "traffic_sign": "world2sign"}


@dataclass(frozen=True)
class SampleOptions:
    """What a synthetic dataset is like.

    Attributes:
        clips: Clips, each in a town of its own.
        val_clips: How many of them are for validation.
        frames: Frames of a clip, ten a second.
        size: (height, width) of the pictures.
        seed: Seed of everything.
    """

    clips: int = 4
    val_clips: int = 1
    frames: int = 30
    size: tuple[int, int] = (450, 800)
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise if there is nothing to write.

        Raises:
            ValueError: A number is out of range.
        """
        if self.clips < 1 or not 0 <= self.val_clips < self.clips or self.clips > 99:
            raise ValueError(
                f"sample: need 1 to 99 clips and fewer for validation, got {self.clips} and "
                f"{self.val_clips}"
            )
        if self.frames < 1 or min(self.size) < 16:
            raise ValueError(
                f"sample: need a frame and pictures of 16 pixels or more, got {self.frames} frames "
                f"of {self.size}"
            )


def write_sample(out: Path, options: SampleOptions) -> Path:
    """Write a dataset; its root is ``out``.

    Raises:
        FileExistsError: ``out`` holds something.
        ValueError: An option is out of range.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out}: must be free or an empty folder")
    val = []
    with tqdm(total=options.clips * options.frames, desc="frames") as bar:
        for number in range(options.clips):
            town = f"Town{number + 1:02d}"
            name = f"KeepLane_{town}_Route{number}_Weather{number % 4}"
            held_out = number >= options.clips - options.val_clips
            if held_out:
                val.append(f"v1/{name}")
            clip = draw_clip(generator(WORLD, options.seed, number), options.frames / RATE)
            _write_map(out / "maps" / f"{town}_HD_map.npz", clip)
            chat = out / "chat-B2D" / ("val" if held_out else "train") / name
            for frame in range(options.frames):
                rng = generator(SENSOR, options.seed, number, frame)
                _write_frame(out / "v1" / name, chat, clip, frame, options.size, rng)
                bar.update()
    (out / "splits").mkdir()
    (out / "splits" / SPLIT_FILE).write_text(json.dumps({"val": val}, indent=1), encoding="utf-8")
    (out / OPTIONS).write_text(json.dumps(asdict(options), indent=1), encoding="utf-8")
    return out


def is_sample(root: Path) -> bool:
    """Whether ``write_sample`` made a root, and came to its end."""
    return (root / OPTIONS).is_file()


def intrinsics(view: str, size: tuple[int, int]) -> Floats:
    """Camera matrix (3, 3) of a view for pictures of (height, width)."""
    focal = size[1] / 2 / np.tan(np.radians(RIG[view][1]) / 2)
    return np.array([[focal, 0, size[1] / 2], [0, focal, size[0] / 2], [0, 0, 1]])


def _placed(place: tuple[float, float, float], degrees: float = 0.0) -> Floats:
    out = np.eye(4)
    out[:3, :3], out[:3, 3] = turn(np.radians(degrees)), place
    return out


def _write_frame(
    folder: Path,
    chat: Path,
    clip: Clip,
    frame: int,
    size: tuple[int, int],
    rng: np.random.Generator,
) -> None:
    time = frame / RATE
    ego = clip.ego(time)
    sensors: dict[str, Any] = {}
    for view, pictures in CAMERAS.items():
        degrees, field, place = RIG[view]
        cam2ego = _placed(place, degrees)
        matrix = intrinsics(view, size)
        sensors[view] = {
            "cam2ego": cam2ego.tolist(),
            "world2cam": np.linalg.inv(ego @ cam2ego).tolist(),
            "intrinsic": matrix.tolist(),
            "fov": field,
            "image_size_x": size[1],
            "image_size_y": size[0],
        }
        path = folder / "camera" / pictures / f"{frame:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = draw(clip, time, camera_of(ego @ cam2ego, matrix), size, rng)
        data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1]
        path.write_bytes(data.tobytes())
    lidar2ego = _placed(LIDAR)
    sensors["LIDAR_TOP"] = {
        "lidar2ego": lidar2ego.tolist(),
        "world2lidar": np.linalg.inv(ego @ lidar2ego).tolist(),
    }
    path = folder / "anno" / f"{frame:05d}.json.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    anno = _annotation(clip, time, ego, sensors)
    # Without a time in the header the same seed writes the same bytes.
    path.write_bytes(gzip.compress(json.dumps(anno).encode(), mtime=0))
    chat.mkdir(parents=True, exist_ok=True)
    rounds = _rounds(clip, time, ego)
    (chat / f"{frame:05d}.json").write_text(json.dumps(rounds, indent=1), encoding="utf-8")


def _annotation(clip: Clip, time: float, ego: Floats, sensors: dict[str, Any]) -> dict[str, Any]:
    yaw = float(np.arctan2(ego[1, 0], ego[0, 0]))
    ahead, _ = clip.at(clip.ego_speed * time + 20, 1.75)
    boxes = [
        {
            "class": "ego_vehicle",
            "id": "1",
            "type_id": "vehicle.lincoln.mkz_2020",
            "location": ego[:3, 3].tolist(),
            "rotation": [0.0, 0.0, float(np.degrees(yaw))],
            "center": (ego[:3, 3] + (0, 0, 0.75)).tolist(),
            "extent": [2.45, 0.92, 0.75],
            "speed": clip.ego_speed,
            "world2ego": np.linalg.inv(ego).tolist(),
        }
    ]
    boxes += [_box(thing, time, ego) for thing in clip.things]
    anno: dict[str, Any] = {
        "x": float(ego[0, 3]),
        "y": float(ego[1, 3]),
        "theta": yaw + np.pi / 2,
        "speed": clip.ego_speed,
        "throttle": 0.5,
        "steer": 0.0,
        "brake": 0.0,
        "acceleration": [0.0, 0.0, 9.8],
        "angular_velocity": [0.0, 0.0, clip.bend * clip.ego_speed],
        "bounding_boxes": boxes,
        "sensors": sensors,
    }
    for which in ("near", "far"):
        anno[f"command_{which}"] = 4
        anno[f"x_command_{which}"], anno[f"y_command_{which}"] = float(ahead[0]), float(ahead[1])
    return anno


def _box(thing: Thing, time: float, ego: Floats) -> dict[str, Any]:
    pose = thing.pose(time)
    length, width, height = thing.size
    distance = float(np.linalg.norm(pose[:3, 3] - ego[:3, 3]))
    out: dict[str, Any] = {
        "class": thing.role,
        "id": str(thing.number),
        "type_id": thing.name,
        "location": pose[:3, 3].tolist(),
        "rotation": [0.0, 0.0, float(np.degrees(thing.yaw))],
        "center": (pose[:3, 3] + (0, 0, height / 2)).tolist(),
        "extent": [length / 2, width / 2, height / 2],
        "distance": distance,
        # CARLA says that walkers stand still.
        "speed": 0.0 if thing.role == "walker" else thing.speed,
    }
    if thing.role in ("vehicle", "walker"):
        out["num_points"] = int(4000 * length * height / max(distance, 2.0) ** 2)
    if thing.role == "traffic_light":
        out["state"], out["affects_ego"] = thing.light(time), distance < 40
    else:
        out[_WORLD_KEY[thing.role]] = np.linalg.inv(pose).tolist()
    return out


def _rounds(clip: Clip, time: float, ego: Floats) -> list[list[dict[str, str]]]:
    light = next(thing for thing in clip.things if thing.role == "traffic_light")
    near = [np.linalg.norm(thing.pose(time)[:3, 3] - ego[:3, 3]) for thing in clip.things]
    said = {
        "What does the traffic light ahead show?": LIGHT_STATES[light.light(time)],
        "How far away is the nearest object?": f"{min(near):.1f} metres",
    }
    return [
        [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        for question, answer in said.items()
    ]


def _write_map(path: Path, clip: Clip) -> None:
    road: dict[Any, Any] = {}
    for lane, line in enumerate(clip.lines):
        points = [(tuple(point), (0.0, 0.0, 0.0)) for point in line.points.tolist()]
        road[lane] = [{"Points": points, "Type": line.kind, "Color": "White", "Topology": []}]
    road["Trigger_Volumes"] = [
        {"Points": volume.points.tolist(), "Type": volume.kind, "ParentActor_Location": (0, 0, 0)}
        for volume in clip.volumes
    ]
    roads = np.empty((1, 2), dtype=object)
    roads[0, 0], roads[0, 1] = 0, road
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, arr=roads)
