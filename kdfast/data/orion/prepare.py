# SPDX-License-Identifier: Apache-2.0
"""Makes infos and maps from a plain Bench2Drive download, or from the pickles of its tools.

Every clip becomes a part of its own first, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from kdfast.data.files import CorruptDataError
from kdfast.data.orion.annotation import Info, frame_info, light_of, read_annotation
from kdfast.data.orion.frames import INFOS, MAPS
from kdfast.data.orion.geometry import Floats
from kdfast.data.orion.infos import Infos, InfosBuilder, open_infos, read_pickled_infos
from kdfast.data.orion.maps import read_hd_maps, read_pickled_maps, write_maps
from kdfast.data.orion.names import CAMERAS, detection_class
from kdfast.data.orion.sample import SPLIT_FILE, SampleOptions, write_sample
from kdfast.data.views.bench2drive import read_val_clips

PARTS = ".kdfast_parts"


def clips_of(root: Path, split_file: Path) -> dict[str, list[str]]:
    """Clips on disk by split: those of the split file are "val", all others "train".

    Raises:
        FileNotFoundError: There is no clip with annotations, or no split file.
    """
    found = sorted(path.parent.name for path in root.glob("v1/*/anno"))
    if not found:
        raise FileNotFoundError(
            f"{root}: must hold v1/<clip>/anno/*.json.gz (Bench2Drive), got no clip"
        )
    val = set(read_val_clips(split_file))
    return {
        "train": [clip for clip in found if clip not in val],
        "val": [clip for clip in found if clip in val],
    }


def infos_from_download(
    root: Path, clips: Mapping[str, list[str]], *, workers: int = 1, use_depth: bool = True
) -> list[Path]:
    """Infos of the clips of every split, from their annotations.

    Args:
        root: Folder with ``v1``.
        clips: Clips by split; a split without clips is left out.
        workers: Processes.
        use_depth: Leave out boxes behind something else, where there are depth pictures.

    Returns:
        Folders of the infos that were written.

    Raises:
        CorruptDataError: An annotation is damaged.
    """
    written = []
    for split, names in clips.items():
        parts = root / PARTS / ("depth" if use_depth else "plain")
        todo = [clip for clip in names if not _whole(parts / clip)]
        make = partial(_make_part, root, parts, use_depth)
        with tqdm(total=len(names), initial=len(names) - len(todo), desc=f"{split} clips") as bar:
            for _ in _mapped(make, todo, workers):
                bar.update()
        builder = InfosBuilder()
        for clip in names:
            for info in infos_of(open_infos(parts / clip)):
                builder.add(info)
        if names:
            written.append(builder.write(root / INFOS.format(split=split)))
    shutil.rmtree(root / PARTS, ignore_errors=True)
    return written


def _mapped(make: Any, clips: list[str], workers: int) -> Iterator[None]:
    if workers == 1:
        yield from map(make, clips)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(make, clips)


def _whole(part: Path) -> bool:
    try:
        open_infos(part)
    except (FileNotFoundError, ValueError):
        return False
    return True


def _make_part(root: Path, parts: Path, use_depth: bool, clip: str) -> None:
    builder = InfosBuilder()
    before: dict[str, Floats] = {}
    files = sorted((root / "v1" / clip / "anno").glob("*.json.gz"))
    if not files:
        raise CorruptDataError(f"{root / 'v1' / clip / 'anno'}: must hold annotations, got none")
    for file in files:
        number = int(file.name.split(".")[0])
        depth = _depth(root / "v1" / clip, number) if use_depth else None
        info, before = frame_info(read_annotation(file), f"v1/{clip}", number, before, depth)
        builder.add(info)
    builder.write(parts / clip)


def _depth(clip: Path, number: int) -> dict[str, NDArray[np.generic]]:
    out: dict[str, NDArray[np.generic]] = {}
    for camera, folder in CAMERAS.items():
        file = clip / "camera" / folder.replace("rgb_", "depth_") / f"{number:05d}.png"
        picture = cv2.imread(str(file), cv2.IMREAD_UNCHANGED) if file.is_file() else None
        if picture is not None:
            out[camera] = picture if picture.ndim == 2 else picture[..., 0]
    return out


def infos_of(infos: Infos) -> Iterator[Info]:
    """Infos of all frames as dicts again."""
    columns = infos.columns
    for frame in range(len(infos)):
        rows = infos.boxes(frame)
        info: Info = {
            name: np.array(columns[name][frame])
            for name in columns
            if len(columns[name]) == len(infos) and name not in ("clip", "town")
        }
        for name in ("gt_ids", "gt_boxes", "num_points", "npc2world", "light"):
            info[name] = np.array(columns[name][rows])
        if not infos.has_lights:
            del info["light"]
        info["gt_names"] = np.array([infos.names[at] for at in columns["gt_name"][rows]])
        info["folder"], info["town_name"] = infos.clip(frame), infos.town(frame)
        lidar = {name: np.array(columns[name][frame]) for name in ("lidar2ego", "world2lidar")}
        info["sensors"] = {"LIDAR_TOP": lidar}
        for at, camera in enumerate(CAMERAS):
            info["sensors"][camera] = {
                name: np.array(columns[name][frame][at])
                for name in ("cam2ego", "intrinsic", "world2cam")
            }
        yield info


def infos_from_pickle(path: Path, root: Path, split: str) -> Path:
    """Infos of a ``b2d_infos_<split>.pkl``.

    States of traffic lights are no part of such a file; they are read from ``anno`` below the root
    where all annotations are there, and are unknown otherwise.

    Raises:
        CorruptDataError: An info or an annotation is damaged.
        FileNotFoundError: There is no such file.
        ValueError: The pickle asks for more than arrays, or is no list of infos.
    """
    builder = InfosBuilder()
    held = list(read_pickled_infos(path))
    lights = all(_annotation(root, info).is_file() for info in held[:: max(1, len(held) // 100)])
    for info in tqdm(held, desc=f"{split} frames"):
        if not lights:
            builder.add({name: value for name, value in info.items() if name != "light"})
            continue
        states = light_of(read_annotation(_annotation(root, info)))
        rows = [states.get(int(number), (-1, -1)) for number in info["gt_ids"]]
        builder.add({**info, "light": np.array(rows, np.int8).reshape(-1, 2)})
    return builder.write(root / INFOS.format(split=split))


def _annotation(root: Path, info: Mapping[str, Any]) -> Path:
    return root / str(info["folder"]) / "anno" / f"{int(info['frame_idx']):05d}.json.gz"


def maps_from(source: Path, root: Path) -> Path:
    """Maps of a ``b2d_map_infos.pkl``, or of a folder of ``Town##_HD_map.npz``.

    Raises:
        CorruptDataError: A town lacks something.
        FileNotFoundError: There is no such file.
        ValueError: A file asks for more than arrays, or is damaged.
    """
    towns = read_hd_maps(source) if source.is_dir() else read_pickled_maps(source)
    return write_maps(root / MAPS, towns)


def unknown_types(folders: Iterable[Path]) -> list[str]:
    """Blueprints of boxes that ORION has no class for."""
    names = {name for folder in folders for name in open_infos(folder).names}
    return sorted(name for name in names if detection_class(name) < 0)


def new_sample(root: Path, options: SampleOptions) -> None:
    """Write a synthetic set with its infos and maps; ``root`` appears when all of it is there.

    Raises:
        FileExistsError: ``root`` is taken.
    """
    if root.exists():
        raise FileExistsError(f"{root}: must be free")
    root.parent.mkdir(parents=True, exist_ok=True)
    aside = root.with_name(f".{root.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    write_sample(aside, options)
    infos_from_download(aside, clips_of(aside, aside / "splits" / SPLIT_FILE))
    maps_from(aside / "maps", aside)
    aside.rename(root)
