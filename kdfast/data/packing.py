# SPDX-License-Identifier: Apache-2.0
"""What of a folder goes into which tar shard: class folders, pictures without labels, Bench2Drive.

The order is that in which the readers of the folder list it, so shards give the same items.
"""

from __future__ import annotations

import os
import posixpath
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import cast

from kdfast.data.files import list_images
from kdfast.data.labelled.classfolder import SPLITS, FileSource, common_folders, read_classfolder
from kdfast.data.labelled.pictures import Part
from kdfast.data.shards.names import key_of, member_of
from kdfast.data.shards.write import Limits, Member, Plan, Sample, cut
from kdfast.data.views.bench2drive import CAMERAS, Bench2Drive
from kdfast.data.views.unlabelled import EXPECTED, OBTAIN, has_splits

KINDS = ("imagefolder", "images", "bench2drive")
ALL = Limits()
Cut = Callable[[str, Sequence[Sample]], dict[str, list[Sample]]]


def plan_shards(source: Path, kind: str | None = None, limits: Limits = ALL) -> Plan:
    """The shards of a folder.

    Args:
        source: Folder; a .tar of class folders as well.
        kind: One of ``KINDS``; None: ``bench2drive`` with a folder v1 of clips, ``imagefolder``
            where every picture is in a class folder, else ``images``.
        limits: Of a shard; a frame of six views is one sample.

    Raises:
        FileNotFoundError: There is no picture.
        ValueError: The pictures are not those of the kind.
    """
    path = source.expanduser()
    if not path.exists():
        raise FileNotFoundError(f"SOURCE: there is no folder or .tar {source}")
    pieces = partial(cut, limits=limits)
    if kind == "bench2drive" or (kind is None and any(path.glob("v1/*/camera"))):
        return _bench2drive(path, pieces)
    if kind == "imagefolder" or (kind is None and (path.is_file() or _in_classes(path))):
        return _imagefolder(path, pieces)
    return _images(path, pieces)


def _in_classes(path: Path) -> bool:
    """Whether every picture lies in a folder below the root, or below its splits."""
    parts = [name.split("/") for name in list_images(path)]
    if not parts:
        return False
    strip = common_folders(parts)
    own_splits = {p[strip] for p in parts if len(p) > strip + 1} <= set(SPLITS)
    return all(len(p) >= strip + own_splits + 2 for p in parts)


def _imagefolder(path: Path, pieces: Cut) -> Plan:
    raw = read_classfolder(path)
    parts = {"train": raw.train, "val": raw.val, "test": raw.test}
    alone = raw.val is None and raw.test is None
    shards: dict[str, list[Sample]] = {}
    for split, part in parts.items():
        if part is not None:
            shards |= pieces("all" if alone else split, _labelled(part))
    return Plan("imagefolder", shards, raw.classes)


def _labelled(part: Part) -> list[Sample]:
    source = cast(FileSource, part.source)
    names = [source.entries[row].name for row in part.rows.tolist()]
    taken = _taken(names)
    samples: list[Sample] = []
    for row, name, label in zip(part.rows.tolist(), names, part.targets.tolist(), strict=True):
        entry = source.entries[row]
        member = member_of(name, taken(name))
        picture = Member(member, entry.size, partial(source.content, row), str(entry.time))
        text = str(label).encode()
        folder, base = posixpath.split(member)
        key = posixpath.join(folder, base.partition(".")[0])
        samples.append([picture, Member(f"{key}.cls", len(text), text, str(label))])
    return samples


def _images(path: Path, pieces: Cut) -> Plan:
    if not path.is_dir():
        raise ValueError(f"SOURCE: kind 'images' must be a folder with {EXPECTED}, got {path}")
    names = list_images(path)
    if not names:
        raise FileNotFoundError(f"SOURCE: must hold {EXPECTED}, got none in {path}; {OBTAIN}")
    if not has_splits(path):
        return Plan("images", pieces("all", _unlabelled(path, names)))
    shards: dict[str, list[Sample]] = {}
    for split in ("train", "val"):
        mine = [name for name in names if name.startswith(f"{split}/")]
        shards |= pieces(split, _unlabelled(path, mine))
    return Plan("images", shards)


def _unlabelled(path: Path, names: Sequence[str]) -> list[Sample]:
    taken = _taken(names)
    return [[_file(path / name, member_of(name, taken(name)))] for name in names]


def _bench2drive(path: Path, pieces: Cut) -> Plan:
    views = Bench2Drive(path, split="train", size=(2, 2))
    samples = []
    for number, (clip, frame) in enumerate(views.frames):
        key = key_of(f"v1/{clip}/{frame}")
        first = number * views.views
        places = [views.place(first + camera) for camera in range(views.views)]
        samples.append(
            [
                _file(place, f"{key}.{camera}.jpg")
                for place, camera in zip(places, CAMERAS, strict=True)
            ]
        )
    return Plan("bench2drive", pieces("all", samples))


def _file(path: Path, member: str) -> Member:
    state = os.stat(path)
    return Member(member, state.st_size, path.read_bytes, str(state.st_mtime_ns))


def _taken(names: Sequence[str]) -> Callable[[str], bool]:
    """Whether another picture has the same path but for its suffix."""
    stems = Counter(posixpath.splitext(name)[0] for name in names)
    return lambda name: stems[posixpath.splitext(name)[0]] > 1
