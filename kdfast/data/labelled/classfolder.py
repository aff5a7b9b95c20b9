# SPDX-License-Identifier: Apache-2.0
"""Kind `imagefolder`: <split>/<class>/<picture> or <class>/<picture>, in a folder or a .tar."""

from __future__ import annotations

import os
import tarfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from kdfast.data.corrupt import Unreadable
from kdfast.data.files import SUFFIXES, list_images
from kdfast.data.labelled.pictures import EncodedSource, Part
from kdfast.data.labelled.raw import Raw, resolve

EXPECTED = (
    "<class>/<picture>, or train/, val/ and test/ with <class>/<picture> each "
    f"({', '.join(SUFFIXES)}), or a .tar file of that"
)
OBTAIN = "any labelled pictures, one folder a class, will do"
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class Entry:
    """One picture file.

    Attributes:
        name: Path below the root, with "/".
        size: Size in bytes.
        time: Time of the last change, in nanoseconds or, from an archive, in seconds.
        offset: Position of its first byte in the archive; 0 outside of one.
    """

    name: str
    size: int
    time: int
    offset: int = 0


class FileSource(EncodedSource):
    """Pictures below a folder, or in an uncompressed .tar that is read in place."""

    def __init__(self, root: Path, entries: Sequence[Entry]) -> None:
        super().__init__([entry.name for entry in entries])
        self.root = root
        self.entries = entries

    def fetch(self, rows: Sequence[int]) -> list[bytes | Unreadable]:
        """See ``EncodedSource``."""
        return [self.content(row) for row in rows]

    def content(self, row: int) -> bytes:
        """The bytes of a file."""
        entry = self.entries[row]
        path = self.root if entry.offset else self.root / entry.name
        # Opened every time: a handle that forked workers share would share its position.
        with path.open("rb") as file:
            file.seek(entry.offset)
            return file.read(entry.size if entry.offset else -1)

    def stamp(self, row: int) -> str:
        """See ``Source``."""
        entry = self.entries[row]
        return f"{entry.name}\0{entry.size}\0{entry.time}\n"


def read_classfolder(root: str | Path | None) -> Raw:
    """List the pictures; class names are folder names, sorted.

    Raises:
        FileNotFoundError: The folder, or every picture in it, is missing.
        ValueError: Pictures lie outside of class folders, a class folder is empty, splits have
            different classes, or the archive is compressed or broken.

    Warns:
        UserWarning: A class has no picture in a split beside train.
    """
    path = resolve("imagefolder", root, EXPECTED, OBTAIN)
    entries, folders = list_tar(path) if path.is_file() else list_folder(path)
    if not entries:
        raise FileNotFoundError(f"root: must hold {EXPECTED}, got no picture in {path}; {OBTAIN}")
    parts = [entry.name.split("/") for entry in entries]
    strip = common_folders(parts)
    own_splits = {p[strip] for p in parts if len(p) > strip + 1} <= set(SPLITS)
    depth = strip + own_splits
    for entry, names in zip(entries, parts, strict=True):
        if len(names) < depth + 2:
            raise ValueError(f"root: must hold {EXPECTED}, got {entry.name} in {path}")
    _check_empty(path, folders, parts, strip, own_splits)
    classes = sorted({names[depth] for names in parts})
    numbers = {name: number for number, name in enumerate(classes)}
    labels = np.array([numbers[names[depth]] for names in parts], np.int64)
    everything = Part.whole(FileSource(path, entries), labels)
    if not own_splits:
        return Raw("imagefolder", everything, None, None, classes)
    split = np.array([SPLITS[names[strip]] for names in parts])
    found = {
        name: everything.take(np.flatnonzero(split == name))
        for name in ("train", "val", "test")
        if (split == name).any()
    }
    _check_splits(found, classes, path)
    return Raw("imagefolder", found["train"], found.get("val"), found.get("test"), classes)


def _check_empty(
    path: Path, folders: set[str], parts: list[list[str]], strip: int, own_splits: bool
) -> None:
    """Names the class folders without a picture, which would shift the numbers of the others.

    Args:
        path: Of the set, for messages.
        folders: Of all folders the path below it.
        parts: The same of all pictures, split at "/".
        strip: Folders around the splits or classes.
        own_splits: Whether there are splits.
    """
    depth = strip + own_splits
    around, used = parts[0][:strip], {tuple(names[: depth + 1]) for names in parts}
    empty = []
    for folder in sorted(folders):
        names = folder.split("/")
        below = len(names) == depth + 1 and names[:strip] == around
        if below and tuple(names) not in used and (not own_splits or names[strip] in SPLITS):
            empty.append(names)
    bad = [names for names in empty if not own_splits or SPLITS[names[strip]] == "train"]
    said = "; ".join(
        f"{names[-1]} in {path / '/'.join(names[:-1])}" for names in (bad or empty)[:5]
    )
    if bad:
        raise ValueError(
            f"root: every class folder must hold pictures ({', '.join(SUFFIXES)}), got none for "
            f"{said}; add some, or remove the folder"
        )
    if empty:
        text = f"classes without a picture in a split, which its figures leave out: {said}"
        warnings.warn(text, UserWarning, stacklevel=4)


def _check_splits(found: dict[str, Part], classes: list[str], path: Path) -> None:
    if "train" not in found:
        raise ValueError(f"root: must have a folder train beside {sorted(found)}, got {path}")
    absent = set(range(len(classes))) - set(found["train"].targets.tolist())
    if absent:
        names = ", ".join(classes[number] for number in sorted(absent)[:5])
        raise ValueError(f"root: every class must have pictures in train, got none for {names}")


def common_folders(parts: Sequence[Sequence[str]]) -> int:
    """How many leading folders all paths share that hold nothing but one folder.

    An archive of ``cifar10/train/...`` has one. The folder of a single class is none, as a set of
    one class is told from a wrapped one by the splits only.
    """
    depth = 0
    while all(len(p) > depth + 2 for p in parts) and len({p[depth] for p in parts}) == 1:
        if parts[0][depth] in SPLITS:
            break
        depth += 1
    return depth


def list_folder(root: Path) -> tuple[list[Entry], set[str]]:
    """Pictures below a folder, in one order on every machine, and the folders that hold none."""
    entries = []
    for name in list_images(root):
        state = os.stat(root / name)
        entries.append(Entry(name, state.st_size, state.st_mtime_ns))
    return entries, _folders(root, {entry.name for entry in entries})


def _folders(root: Path, pictures: set[str]) -> set[str]:
    """Folders below one, without those in folders that hold no picture."""
    used = {str(above) for name in pictures for above in PurePosixPath(name).parents}
    found: set[str] = set()
    for name in used:
        inside = (entry for entry in os.scandir(root / name) if entry.is_dir())
        found |= {
            (PurePosixPath(name) / entry.name).as_posix()
            for entry in inside
            if not entry.name.startswith(".")
        }
    return found


def list_tar(path: Path) -> tuple[list[Entry], set[str]]:
    """Pictures in an uncompressed archive, sorted by name, and its folders.

    Raises:
        ValueError: It is compressed or no whole archive.
    """
    entries, folders = {}, set()
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                if any(part.startswith(".") for part in name.split("/")):
                    continue
                folders |= {str(above) for above in PurePosixPath(name).parents}
                if member.isdir():
                    folders.add(name)
                if member.isreg() and name.lower().endswith(SUFFIXES):
                    entries[name] = Entry(name, member.size, int(member.mtime), member.offset_data)
    except tarfile.TarError as error:
        raise ValueError(
            f"root: must be a folder or an uncompressed .tar, got {path}: {error}"
        ) from error
    return [entries[name] for name in sorted(entries)], folders - {"."}
