# SPDX-License-Identifier: Apache-2.0
"""Lanes and trigger volumes of the towns, and those around a vehicle as ORION's map head sees them.

``b2d_map_infos.pkl`` and ``Town##_HD_map.npz`` (Bench2Drive-Map) both become one table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdfast.data.files import CorruptDataError
from kdfast.data.orion.geometry import Floats, move
from kdfast.data.orion.table import open_table, write_table
from kdfast.data.orion.unpickle import load_object_npz, load_pickle
from kdfast.models.orion.config import LANE_CLASSES

KIND = "kdfast maps 1"
# Lanes with a sample point nearer than this are looked at; every 50th point of a lane is one.
REACH, STRIDE = 50.0, 50
LANE_POINTS = 11


@dataclass(frozen=True)
class Town:
    """Polylines of one town in right-handed world coordinates.

    Attributes:
        points: (P, 3) points of all polylines, one after another.
        start: (n + 1,) first point of each, and P.
        label: (n,) index into ``LANE_CLASSES``.
        closed: (n,) whether it is the outline of a trigger volume.
        samples: (S, 2) points that decide whether a polyline is near.
        sample_start: (n + 1,) first sample of each, and S.
    """

    points: Floats
    start: NDArray[np.int64]
    label: NDArray[np.int8]
    closed: NDArray[np.bool_]
    samples: Floats
    sample_start: NDArray[np.int64]

    def around(
        self, world2lidar: Floats, extent: tuple[float, float] = (51.2, 51.2)
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Lanes (n, 11, 3) in LiDAR coordinates and their classes (n,).

        Points of a lane outside of ``extent`` are left out, the rest becomes eleven points of
        equal distance with z = 0; a trigger volume counts only if all of it is inside.

        Args:
            world2lidar: (4, 4).
            extent: Half the width (x) and half the length (y) of what the head looks at, metres.
        """
        ego = np.linalg.inv(world2lidar)[:2, 3]
        lanes, labels = [], []
        for row in self._near(ego):
            points = move(world2lidar, self.points[self.start[row] : self.start[row + 1]])[:, :2]
            inside = (np.abs(points) < extent).all(1)
            if self.closed[row]:
                points = np.concatenate([points, points[:1]]) if inside.all() else points[:0]
            else:
                points = points[inside]
            if len(points) > 1:
                lanes.append(resample(points, LANE_POINTS))
                labels.append(int(self.label[row]))
        flat = np.zeros((len(lanes), LANE_POINTS, 3), np.float32)
        if lanes:
            flat[..., :2] = np.clip(np.stack(lanes), np.negative(extent), extent)
        return flat, np.array(labels, np.int64)

    def _near(self, ego: Floats) -> NDArray[np.int64]:
        # Trigger volumes are few, and inside or not; only lanes are chosen by distance.
        near = self.closed.copy()
        if len(self.samples):
            far = np.linalg.norm(self.samples - ego, axis=1)
            has = np.flatnonzero(np.diff(self.sample_start))
            least = np.minimum.reduceat(far, self.sample_start[has])
            near[has] |= least < REACH
        return np.flatnonzero(near)


def resample(points: Floats, count: int) -> Floats:
    """``count`` points (count, d) at equal distances along a polyline (n, d)."""
    steps = np.linalg.norm(np.diff(points, axis=0), axis=1)
    along = np.concatenate([[0.0], np.cumsum(steps)])
    wanted = np.linspace(0.0, along[-1], count)
    return np.stack([np.interp(wanted, along, axis) for axis in points.T], -1)


def _town_arrays(town: Mapping[str, Any], where: str) -> dict[str, NDArray[Any]]:
    try:
        lanes = [np.asarray(points, float)[:, :3] for points in town["lane_points"]]
        samples = [np.asarray(points, float)[:, :2] for points in town["lane_sample_points"]]
        volumes = [np.asarray(points, float)[:, :3] for points in town["trigger_volumes_points"]]
        types = [*map(str, town["lane_types"]), *map(str, town["trigger_volumes_types"])]
        if len(lanes) != len(samples) or len(types) != len(lanes) + len(volumes):
            raise ValueError("points, sample points and types must be as many")
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CorruptDataError(
            f"{where}: a key is missing or has another form ({type(error).__name__}: {error})"
        ) from error
    # Types that ORION has no class for ("NONE", "Other") are left out here, once.
    kept = [row for row, name in enumerate(types) if name in LANE_CLASSES]
    lines = [*lanes, *volumes]
    empty = np.zeros((0, 2))
    near = [*samples, *[empty] * len(volumes)]
    return {
        "points": np.concatenate([np.zeros((0, 3)), *(lines[row] for row in kept)]),
        "start": np.cumsum([0, *(len(lines[row]) for row in kept)], dtype=np.int64),
        "label": np.array([LANE_CLASSES.index(types[row]) for row in kept], np.int8),
        "closed": np.array([row >= len(lanes) for row in kept], bool),
        "samples": np.concatenate([empty, *(near[row] for row in kept)]),
        "sample_start": np.cumsum([0, *(len(near[row]) for row in kept)], dtype=np.int64),
    }


def read_pickled_maps(path: str | Path) -> dict[str, Mapping[str, Any]]:
    """Towns of a ``b2d_map_infos.pkl``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The pickle asks for more than arrays, is damaged, or holds no towns.
    """
    held = load_pickle(path)
    if not isinstance(held, dict) or not all(isinstance(town, dict) for town in held.values()):
        raise ValueError(f"{path}: must be a dict of towns, got {type(held).__name__}")
    return held


def read_hd_maps(folder: str | Path) -> dict[str, Mapping[str, Any]]:
    """Towns of the files ``Town##_HD_map.npz`` of a folder.

    Raises:
        FileNotFoundError: There is none.
        ValueError: A file is damaged or asks for more than arrays.
    """
    files = sorted(Path(folder).expanduser().glob("Town*_HD_map.npz"))
    if not files:
        raise FileNotFoundError(
            f"{folder}: must hold Town##_HD_map.npz, got none; they are at Hugging Face, "
            f"rethinklab/Bench2Drive-Map"
        )
    return {file.name.split("_")[0]: _hd_map(load_object_npz(file), file) for file in files}


def _hd_map(roads: Any, file: Path) -> dict[str, Any]:
    lanes: list[Floats] = []
    volumes: list[Floats] = []
    lane_types: list[str] = []
    volume_types: list[str] = []
    try:
        if isinstance(roads, np.ndarray):
            roads = dict(roads.tolist())
        for road in roads.values():
            for name, parts in road.items():
                for part in parts:
                    if name == "Trigger_Volumes":
                        volumes.append(np.array(part["Points"], float) * (1, -1, 1))
                        volume_types.append(str(part["Type"]))
                    else:
                        points = [point[0] for point in part["Points"]]
                        lanes.append(np.array(points, float) * (1, -1, 1))
                        lane_types.append(str(part["Type"]))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CorruptDataError(
            f"{file}: a road has another form ({type(error).__name__}: {error})"
        ) from error
    return {
        "lane_points": lanes,
        "lane_sample_points": [
            points[sorted({*range(0, len(points), STRIDE), len(points) - 1})] for points in lanes
        ],
        "lane_types": lane_types,
        "trigger_volumes_points": volumes,
        "trigger_volumes_types": volume_types,
    }


def write_maps(folder: str | Path, towns: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write towns, as read from either source, as one table.

    Raises:
        CorruptDataError: A town lacks something.
        ValueError: There is no town.
    """
    if not towns:
        raise ValueError("maps: must hold a town, got none")
    arrays = {
        f"{at}.{name}": array
        for at, (town, content) in enumerate(towns.items())
        for name, array in _town_arrays(content, town).items()
    }
    return write_table(folder, KIND, arrays, {"towns": list(towns)})


def open_maps(folder: str | Path) -> dict[str, Town]:
    """Open converted maps; nothing is read but a manifest.

    Raises:
        FileNotFoundError: There are none.
        ValueError: The folder is something else, or damaged.
    """
    arrays, facts = open_table(folder, KIND)
    try:
        return {
            str(town): Town(**{name: arrays[f"{at}.{name}"] for name in Town.__dataclass_fields__})
            for at, town in enumerate(facts["towns"])
        }
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder}: must hold whole maps, got {error!r}") from error
