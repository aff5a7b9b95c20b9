# SPDX-License-Identifier: Apache-2.0
"""Infos of all frames as memory-mapped columns: what ``b2d_infos_*.pkl`` holds, opened at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdfast.data.files import CorruptDataError
from kdfast.data.orion.geometry import Floats
from kdfast.data.orion.names import CAMERAS
from kdfast.data.orion.table import open_table, write_table
from kdfast.data.orion.unpickle import load_pickle

KIND = "kdfast infos 1"

# Columns with one row a frame: key of the info -> shape of a row.
_FRAME = {
    "ego_yaw": (),
    "ego_translation": (3,),
    "ego_vel": (3,),
    "ego_accel": (3,),
    "ego_rotation_rate": (3,),
    "ego_size": (3,),
    "world2ego": (4, 4),
    "command_near_xy": (2,),
    "command_far_xy": (2,),
    "throttle": (),
    "steer": (),
    "brake": (),
}
_CAMERA = {"cam2ego": (4, 4), "intrinsic": (3, 3), "world2cam": (4, 4)}
_LIDAR = {"lidar2ego": (4, 4), "world2lidar": (4, 4)}
# Columns with one row a box; ``light`` is ours and may be missing.
_BOX: dict[str, tuple[tuple[int, ...], type]] = {
    "gt_ids": ((), np.int64),
    "gt_boxes": ((9,), np.float64),
    "num_points": ((), np.int64),
    "npc2world": ((4, 4), np.float64),
    "light": ((2,), np.int8),
}


@dataclass(frozen=True)
class Infos:
    """Infos of many frames; clips are consecutive and their frames ascend.

    Attributes:
        columns: Memory-mapped arrays, float64 as annotated; boxes lie one after another and
            those of frame i are rows ``box_start[i]`` to ``box_start[i + 1]``.
        clips: Folders of the clips (``v1/<clip>``).
        towns: Names of the towns.
        names: Blueprint names of the boxes.
        has_lights: Whether states of traffic lights are known.
    """

    columns: Mapping[str, NDArray[Any]]
    clips: tuple[str, ...]
    towns: tuple[str, ...]
    names: tuple[str, ...]
    has_lights: bool

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.columns["frame_idx"])

    def clip(self, frame: int) -> str:
        """Folder of a frame's clip."""
        return self.clips[int(self.columns["clip"][frame])]

    def town(self, frame: int) -> str:
        """Town of a frame."""
        return self.towns[int(self.columns["town"][frame])]

    def boxes(self, frame: int) -> slice:
        """Rows of a frame's boxes in the columns of boxes."""
        start = self.columns["box_start"]
        return slice(int(start[frame]), int(start[frame + 1]))

    def pictures(self, frame: int) -> list[str]:
        """Paths of the six pictures below the data root."""
        name = f"{int(self.columns['frame_idx'][frame]):05d}.jpg"
        return [f"{self.clip(frame)}/camera/{folder}/{name}" for folder in CAMERAS.values()]

    def pose(self, frame: int) -> Floats:
        """World to LiDAR (4, 4)."""
        return np.asarray(self.columns["world2lidar"][frame])

    def frame_of(self, clip: str, number: int) -> int | None:
        """Index of the frame with this number in a clip."""
        first, last = self.span(self.clips.index(clip))
        numbers = self.columns["frame_idx"][first:last]
        at = int(np.searchsorted(numbers, number))
        return first + at if at < len(numbers) and numbers[at] == number else None

    def span(self, clip: int) -> tuple[int, int]:
        """First frame of a clip and the frame after its last."""
        start = self.columns["clip_start"]
        return int(start[clip]), int(start[clip + 1])


@dataclass
class InfosBuilder:
    """Collects infos of frames, clip by clip."""

    clips: list[str] = field(default_factory=list)
    towns: dict[str, int] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    has_lights: bool = True
    _seen: set[str] = field(default_factory=set)
    _rows: dict[str, list[Any]] = field(default_factory=dict)
    _clip_start: list[int] = field(default_factory=list)
    _box_start: list[int] = field(default_factory=lambda: [0])
    _last: int = -1

    def add(self, info: Mapping[str, Any]) -> None:
        """Take the info of the next frame.

        Raises:
            CorruptDataError: A key is missing, a shape is wrong, numbers are not finite, or the
                frame is out of order.
        """
        where = f"info {len(self._box_start) - 1}"
        try:
            where = f"info of {info['folder']}, frame {info['frame_idx']}"
            row = self._row(info)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptDataError(
                f"{where}: a key is missing or has another form ({type(error).__name__}: {error})"
            ) from error
        for name, value in row.items():
            array = np.asarray(value)
            if array.dtype.kind == "f" and not np.isfinite(array).all() and name != "ego_yaw":
                raise CorruptDataError(f"{where}: {name} must be finite, got {array}")
        self._place(str(info["folder"]), int(info["frame_idx"]), where)
        for name, value in row.items():
            self._rows.setdefault(name, []).append(value)
        self._box_start.append(self._box_start[-1] + len(row["gt_ids"]))

    def _place(self, folder: str, frame: int, where: str) -> None:
        if not self.clips or self.clips[-1] != folder:
            if folder in self._seen:
                raise CorruptDataError(f"{where}: a clip must be in one piece, got it twice")
            self._seen.add(folder)
            self.clips.append(folder)
            self._clip_start.append(len(self._box_start) - 1)
            self._last = -1
        if frame <= self._last:
            raise CorruptDataError(f"{where}: frames must ascend, got {frame} after {self._last}")
        self._last = frame

    def _row(self, info: Mapping[str, Any]) -> dict[str, Any]:
        row: dict[str, Any] = {
            name: _shaped(info[name], shape, name) for name, shape in _FRAME.items()
        }
        row["frame_idx"] = int(info["frame_idx"])
        row["command_near"], row["command_far"] = (
            int(info["command_near"]),
            int(info["command_far"]),
        )
        row["town"] = self.towns.setdefault(str(info["town_name"]), len(self.towns))
        sensors = info["sensors"]
        for name, shape in _CAMERA.items():
            row[name] = np.stack([_shaped(sensors[cam][name], shape, name) for cam in CAMERAS])
        for name, shape in _LIDAR.items():
            row[name] = _shaped(sensors["LIDAR_TOP"][name], shape, name)
        count = len(info["gt_ids"])
        for name, (of_box, kind) in _BOX.items():
            if name == "light" and name not in info:
                row[name] = np.full((count, 2), -1, np.int8)
                continue
            row[name] = _shaped(info[name], (count, *of_box), name).astype(kind)
        if len(info["gt_names"]) != count:
            raise ValueError(f"{count} boxes need as many names, got {len(info['gt_names'])}")
        names = [self.names.setdefault(str(name), len(self.names)) for name in info["gt_names"]]
        row["gt_name"] = np.array(names, np.int32)
        self.has_lights &= "light" in info
        return row

    def write(self, folder: str | Path) -> Path:
        """Write the columns as a folder.

        Raises:
            ValueError: No frame was added.
        """
        if not self._rows:
            raise ValueError("infos: must hold a frame, got none")
        boxes = (*_BOX, "gt_name")
        arrays = {
            name: np.concatenate(rows) if name in boxes else np.array(rows)
            for name, rows in self._rows.items()
        }
        total = len(self._box_start) - 1
        arrays["box_start"] = np.array(self._box_start, np.int64)
        arrays["clip_start"] = np.array([*self._clip_start, total], np.int64)
        spans = np.diff(arrays["clip_start"])
        arrays["clip"] = np.repeat(np.arange(len(self.clips)), spans)
        facts = {
            "clips": self.clips,
            "towns": list(self.towns),
            "names": list(self.names),
            "has_lights": self.has_lights,
        }
        return write_table(folder, KIND, arrays, facts)


def _shaped(value: Any, shape: tuple[int, ...], name: str) -> Floats:
    array = np.asarray(value, dtype=np.float64)
    if array.size == 0 and 0 in shape:
        return array.reshape(shape)
    if array.shape != shape:
        raise ValueError(f"{name} must be {shape}, got {array.shape}")
    return array


def open_infos(folder: str | Path) -> Infos:
    """Open converted infos; nothing is read but a manifest.

    Raises:
        FileNotFoundError: There are none.
        ValueError: The folder is something else, or damaged.
    """
    columns, facts = open_table(folder, KIND)
    try:
        clips, towns, names = (tuple(map(str, facts[key])) for key in ("clips", "towns", "names"))
        infos = Infos(columns, clips, towns, names, bool(facts["has_lights"]))
        frames, boxes = len(columns["frame_idx"]), len(columns["gt_ids"])
        whole = columns["box_start"].shape == (frames + 1,) and columns["box_start"][-1] == boxes
        whole &= columns["clip_start"].shape == (len(clips) + 1,)
        if not whole or columns["clip_start"][-1] != frames:
            raise ValueError("the columns do not belong together")
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(
            f"{folder}: must hold whole infos, got {error!r}; make them again with "
            f"`kdfast data infos`"
        ) from error
    return infos


def read_pickled_infos(path: str | Path) -> Iterable[Mapping[str, Any]]:
    """Infos of a ``b2d_infos_*.pkl``, ordered by clip and frame.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The pickle asks for more than arrays, is damaged, or is no list of infos.
    """
    held = load_pickle(path)
    if not isinstance(held, list) or not all(isinstance(info, dict) for info in held):
        raise ValueError(f"{path}: must be a list of infos, got {type(held).__name__}")
    absent = [at for at, info in enumerate(held) if not {"folder", "frame_idx"} <= set(info)]
    if absent:
        raise ValueError(f"{path}: infos must have folder and frame_idx, got none in {absent[:5]}")
    order = {folder: at for at, folder in enumerate(dict.fromkeys(i["folder"] for i in held))}
    return sorted(held, key=lambda info: (order[info["folder"]], info["frame_idx"]))
