# SPDX-License-Identifier: Apache-2.0
"""What ORION's heads learn from one frame, and what they are told of cameras and car."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdfast.data.orion.geometry import Floats, invert, move
from kdfast.data.orion.infos import Infos
from kdfast.data.orion.maps import Town
from kdfast.data.orion.names import CAMERAS, TRAFFIC_LIGHT, detection_class
from kdfast.data.views.preprocess import CropDraw, crop_plan
from kdfast.models.orion.batch import STEPS, Lanes, Objects

# Annotations come ten times a second; the future is told in steps of half a second.
RATE, STRIDE = 10, 5
EXTENT = (51.2, 51.2)


def pixel_transform(
    source: tuple[int, int], size: tuple[int, int], draw: CropDraw | None
) -> Floats:
    """(4, 4) from pixels of the picture to pixels of what the backbone sees.

    Args:
        source: (height, width) of the picture.
        size: (height, width) of the network input.
        draw: Training draw; None is the evaluation crop.
    """
    plan = crop_plan(source, size, draw)
    left, top, right, bottom = plan.box
    across, down = size[1] / (right - left), size[0] / (bottom - top)
    out = np.eye(4)
    out[0, :3] = across * plan.ratio, 0, -across * left
    out[1, :3] = 0, down * plan.ratio, -down * top
    return out


@dataclass(frozen=True)
class Rig:
    """Cameras and car of one frame; fields as in ``models.orion.batch.Frame`` without batch."""

    lidar2img: Tensor
    ego_pose: Tensor
    ego_pose_inv: Tensor
    timestamp: float
    scene: int
    command: float
    can_bus: Tensor


def rig(infos: Infos, frame: int, transforms: Floats) -> Rig:
    """Cameras and car of a frame.

    Args:
        infos: All infos.
        frame: Which.
        transforms: (6, 4, 4) from pixels of the pictures to those of the network input.
    """
    columns = infos.columns
    intrinsic = np.tile(np.eye(4), (len(CAMERAS), 1, 1))
    intrinsic[:, :3, :3] = columns["intrinsic"][frame]
    lidar2cam = invert(np.asarray(columns["cam2ego"][frame])) @ columns["lidar2ego"][frame]
    pose = invert(infos.pose(frame))
    return Rig(
        lidar2img=_fp32(transforms @ intrinsic @ lidar2cam),
        ego_pose=_fp32(pose),
        ego_pose_inv=_fp32(invert(pose)),
        timestamp=int(columns["frame_idx"][frame]) / RATE,
        scene=int(columns["clip"][frame]),
        command=float(command(int(columns["command_near"][frame]))),
        can_bus=torch.from_numpy(_can_bus(infos, frame)),
    )


def command(raw: int) -> int:
    """The navigator's command, 0 to 5; a lane that is followed (4) where CARLA says none (-1).

    Raises:
        ValueError: It is none of CARLA's six.
    """
    number = 4 if raw < 0 else raw
    if not 1 <= number <= 6:
        raise ValueError(f"command: must be 1 to 6, or negative for none, got {raw}")
    return number - 1


def _can_bus(infos: Infos, frame: int) -> NDArray[np.float64]:
    columns = infos.columns
    yaw = float(np.nan_to_num(columns["ego_yaw"][frame], nan=np.pi / 2))
    positive = yaw + 2 * np.pi if yaw < 0 else yaw
    out = np.zeros(18)
    out[:3] = columns["ego_translation"][frame]
    out[3:7] = np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)
    out[7:10] = columns["ego_vel"][frame]
    out[10:13] = columns["ego_accel"][frame]
    out[13:16] = columns["ego_rotation_rate"][frame]
    out[16:] = positive, np.degrees(positive)
    return out


class Labels:
    """Objects and lanes of frames."""

    def __init__(self, infos: Infos, maps: dict[str, Town]) -> None:
        """Keep what labels come from; ``maps`` must have every town of the infos.

        Raises:
            ValueError: A town has no map.
        """
        absent = sorted(set(infos.towns) - set(maps))
        if absent:
            raise ValueError(f"maps: must have every town of the infos, got none for {absent}")
        self.infos, self.maps = infos, maps
        self._class = np.array([detection_class(name) for name in infos.names], np.int64)

    def objects(self, frame: int) -> Objects:
        """Objects that have a class, are hit by the LiDAR and lie within the range of the head."""
        columns, rows = self.infos.columns, self.infos.boxes(frame)
        boxes = np.array(columns["gt_boxes"][rows], np.float64)
        labels = self._class[columns["gt_name"][rows]]
        kept = (labels >= 0) & (columns["num_points"][rows] != 0)
        kept &= (np.abs(boxes[:, :2]) < EXTENT).all(1)
        boxes[:, 2] -= boxes[:, 5] / 2
        lights = np.array(columns["light"][rows], np.int64)
        lights[labels != TRAFFIC_LIGHT] = -1
        future, valid = self._future(frame, np.asarray(columns["gt_ids"][rows])[kept])
        return Objects(
            boxes=_fp32(boxes[kept]),
            labels=torch.from_numpy(labels[kept]),
            lights=torch.from_numpy(lights[kept]),
            future=_fp32(future),
            future_valid=_fp32(valid),
        )

    def lanes(self, frame: int) -> Lanes:
        """Lanes and trigger volumes around the car."""
        points, labels = self.maps[self.infos.town(frame)].around(self.infos.pose(frame), EXTENT)
        return Lanes(torch.from_numpy(points), torch.from_numpy(labels))

    def _future(self, frame: int, ids: NDArray[Any]) -> tuple[Floats, Floats]:
        # A step counts if the object is annotated at both of its ends.
        infos, count = self.infos, len(ids)
        place = np.zeros((count, STEPS + 1, 2))
        known = np.zeros((count, STEPS + 1), bool)
        clip = infos.clip(frame)
        now = int(infos.columns["frame_idx"][frame])
        for step in range(STEPS + 1):
            other = infos.frame_of(clip, now + step * STRIDE)
            if other is None:
                continue
            rows = infos.boxes(other)
            there = np.asarray(infos.columns["gt_ids"][rows])
            order = np.argsort(there, kind="stable")
            at = np.searchsorted(there[order], ids)
            at[at == len(there)] = 0
            hit = there[order][at] == ids if len(there) else np.zeros(count, bool)
            positions = np.asarray(infos.columns["npc2world"][rows])[:, :3, 3]
            local = move(infos.pose(frame), positions)[:, :2]
            place[hit, step] = local[order][at[hit]]
            known[:, step] = hit
        valid = known[:, 1:] & known[:, :-1]
        moves = np.where(valid[..., None], np.diff(place, axis=1), 0)
        return moves, valid.astype(np.float64)


def _fp32(array: Floats) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
