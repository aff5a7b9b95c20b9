# SPDX-License-Identifier: Apache-2.0
"""Looks at a data root: what training with the heads needs, what is there, how to get the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdfast.data.orion.annotation import read_annotation
from kdfast.data.orion.frames import INFOS, MAPS
from kdfast.data.orion.infos import Infos, open_infos
from kdfast.data.orion.maps import open_maps
from kdfast.data.orion.names import detection_class
from kdfast.data.orion.sample import is_sample
from kdfast.data.views.bench2drive import list_frames, read_val_clips

# Bench2Drive base has 1,000 clips, of which ORION keeps 50 for validation.
BASE_CLIPS = 1000
SPOTS = 200


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: Its name.
        state: "ok", "partial" or "missing".
        found: What is there.
        remedy: How to get what is not; empty if nothing is needed.
        needed: Whether training cannot do without it.
    """

    what: str
    state: str
    found: str
    remedy: str = ""
    needed: bool = True


def check_root(
    root: Path, split_file: Path | None = None, chat: Path | None = None
) -> list[Finding]:
    """Findings about a data root; files are listed, and some of them opened.

    Args:
        root: Folder that should hold ``v1``.
        split_file: List of validation clips; None looks below the root and beside it.
        chat: Folder of Chat-B2D; None looks below the root.

    Raises:
        FileNotFoundError: There is no such folder.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"root: must be a folder that holds v1, got {root}")
    split = split_file or find_split(root)
    return [
        _clips(root),
        _pictures(root),
        _annotations(root),
        _split(root, split),
        _infos(root, "train"),
        _infos(root, "val"),
        _maps(root),
        _types(root),
        _chat(chat or root / "chat-B2D"),
    ]


def find_split(root: Path) -> Path | None:
    """The split file below a root or beside it, as ORION lays its data out."""
    name = "bench2drive_base_train_val_split.json"
    places = (root / "splits" / name, root.parent / "splits" / name)
    return next((place for place in places if place.is_file()), None)


def _clips(root: Path) -> Finding:
    count = sum(1 for path in root.glob("v1/*/camera"))
    get = "download Bench2Drive base (Hugging Face: rethinklab/Bench2Drive) and unpack it into v1"
    if not count:
        return Finding("clips", "missing", "none in v1", get)
    if is_sample(root):
        return Finding("clips", "ok", f"{count} of the synthetic sample", needed=False)
    state = "ok" if count >= BASE_CLIPS else "partial"
    found = f"{count} of the base set's {BASE_CLIPS}"
    return Finding("clips", state, found, "" if state == "ok" else get, needed=False)


def _pictures(root: Path) -> Finding:
    whole, broken = 0, []
    for clip in sorted(root.glob("v1/*")):
        complete, incomplete = list_frames(clip)
        whole += len(complete)
        broken += [f"{clip.name}/{name}" for name in incomplete]
    state = "missing" if not whole else "partial" if broken else "ok"
    found = f"{whole} frames with six pictures"
    if broken:
        found += f", {len(broken)} without, first {broken[0]}"
    return Finding("pictures", state, found, "unpack those clips again" if state != "ok" else "")


def _annotations(root: Path) -> Finding:
    files = sorted(root.glob("v1/*/anno/*.json.gz"))
    if not files:
        remedy = "unpack the clips with their folder anno"
        return Finding("annotations", "missing", "none", remedy)
    bad = []
    for file in files[:: max(1, len(files) // SPOTS)]:
        try:
            read_annotation(file)
        except RuntimeError as error:
            bad.append(str(error))
    found = f"{len(files)} files, {min(len(files), SPOTS)} opened"
    if bad:
        return Finding("annotations", "partial", f"{found}; {bad[0]}", "unpack those clips again")
    return Finding("annotations", "ok", found)


def _split(root: Path, file: Path | None) -> Finding:
    if file is None:
        return Finding(
            "split file",
            "missing",
            "none in splits",
            "copy data/splits/bench2drive_base_train_val_split.json of ORION into splits",
        )
    try:
        val = read_val_clips(file)
    except (FileNotFoundError, ValueError) as error:
        return Finding("split file", "missing", str(error), "copy ORION's again")
    here = sum((root / "v1" / clip).is_dir() for clip in val)
    state = "ok" if here == len(val) else "partial"
    remedy = "" if state == "ok" else "download the other validation clips"
    return Finding("split file", state, f"{here} of {len(val)} validation clips", remedy, False)


def _infos(root: Path, split: str) -> Finding:
    def look() -> str:
        infos = open_infos(root / INFOS.format(split=split))
        absent = _absent_pictures(root, infos)
        if absent:
            raise ValueError(f"{len(absent)} of the pictures looked for are not there: {absent[0]}")
        lights = "with" if infos.has_lights else "without"
        return f"{len(infos)} frames of {len(infos.clips)} clips, {lights} states of traffic lights"

    return _opened(f"infos {split}", look, f"kdfast data infos --root {root}")


def _absent_pictures(root: Path, infos: Infos) -> list[str]:
    spots = np.unique(np.linspace(0, len(infos) - 1, SPOTS).astype(int))
    wanted = [name for frame in spots.tolist() for name in infos.pictures(frame)]
    return [name for name in wanted if not (root / name).is_file()]


def _maps(root: Path) -> Finding:
    def look() -> str:
        maps = open_maps(root / MAPS)
        towns: set[str] = set()
        for split in ("train", "val"):
            folder = root / INFOS.format(split=split)
            towns |= set(open_infos(folder).towns) if folder.is_dir() else set()
        absent = sorted(towns - set(maps))
        if absent:
            raise ValueError(f"no map of {', '.join(absent)}")
        return f"{len(maps)} towns, {sum(len(town.label) for town in maps.values())} lines"

    remedy = (
        f"download the maps (Hugging Face: rethinklab/Bench2Drive-Map) into {root / 'maps'}, then "
        f"kdfast data infos --root {root}"
    )
    return _opened("maps", look, remedy)


def _opened(what: str, look: Callable[[], str], remedy: str) -> Finding:
    try:
        return Finding(what, "ok", look())
    except FileNotFoundError:
        return Finding(what, "missing", "none", remedy)
    except ValueError as error:
        return Finding(what, "partial", str(error), remedy)


def _types(root: Path) -> Finding:
    names: set[str] = set()
    for split in ("train", "val"):
        folder = root / INFOS.format(split=split)
        names |= set(open_infos(folder).names) if (folder / "manifest.json").is_file() else set()
    without = sorted(name for name in names if detection_class(name) < 0)
    found = f"{len(names) - len(without)} of {len(names)} kinds of objects have a class"
    if without:
        found += f"; background: {', '.join(without[:5])}"
    return Finding("classes", "ok", found, needed=False)


def _chat(folder: Path) -> Finding:
    count = {split: sum(1 for _ in folder.glob(f"{split}/*")) for split in ("train", "val")}
    if not any(count.values()):
        remedy = "optional: Hugging Face, poleyzdk/Chat-B2D"
        return Finding("Chat-B2D", "missing", "none", remedy, needed=False)
    return Finding(
        "Chat-B2D", "ok", f"{count['train']} training, {count['val']} validation clips", "", False
    )
