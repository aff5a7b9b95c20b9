# SPDX-License-Identifier: Apache-2.0
"""The pictures that ``--data`` names: files of a folder, or members of tar shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from kdfast.resolve.error import SourceError

if TYPE_CHECKING:
    from kdfast.data.shards.tars import Samples

# Folders, or first words of shards, of a data set's held-out pictures.
HELD_OUT = ("val", "valid", "validation", "test")


@dataclass(frozen=True)
class Member:
    """A picture in a tar shard.

    Attributes:
        name: Shard and member.
        samples: Where it is.
        row: Its number there.
    """

    name: str
    samples: Samples = field(compare=False, repr=False)
    row: int = field(compare=False)

    def __str__(self) -> str:
        return self.name

    def opened(self) -> BytesIO:
        """Its bytes.

        Raises:
            OSError: The shard cannot be opened.
            Unreadable: The bytes are not those of the picture.
        """
        (data,) = self.samples.pictures.fetch([self.row])
        if isinstance(data, Exception):
            raise data
        return BytesIO(data)


@dataclass(frozen=True)
class Shown:
    """Pictures, not yet read.

    Attributes:
        where: The folder or shards.
        pictures: In the order of their names.
        names: Of the classes, in their order; empty where the pictures have none.
        classes: Number of every picture's class; empty likewise.
    """

    where: str
    pictures: Sequence[Path | Member]
    names: Sequence[str] = ()
    classes: Sequence[int] = ()


def is_place(data: Path | str) -> bool:
    """Whether an option names a folder, a .tar, a pattern or a URL; no file is looked for."""
    text = str(data)
    return "://" in text or any(mark in text for mark in "*?{") or Path(data).exists()


def shown(data: Path | str, flag: str, *, held_out: bool = False) -> Shown:
    """The pictures of a folder or of tar shards.

    Args:
        data: Folder with pictures at any depth; or a folder, pattern or URL of tar shards.
        flag: The option that names it, for messages.
        held_out: Only those of its validation or test part, where it has such.

    Raises:
        SourceError: There are no pictures, or shards cannot be read.
    """
    from kdfast.data.shards.places import holds_shards

    found = _of_shards(data, flag, held_out) if holds_shards(data) else None
    return found or _of_folder(Path(data), flag, held_out)


def _of_folder(folder: Path, flag: str, held_out: bool) -> Shown:
    from kdfast.data.files import SUFFIXES, list_images

    if held_out:
        folder = next((folder / name for name in HELD_OUT if (folder / name).is_dir()), folder)
    names = list_images(folder)
    if not names:
        raise SourceError(f"{flag}: {folder} must hold pictures ({', '.join(SUFFIXES)}), got none")
    paths = [folder / name for name in names]
    if not all("/" in name for name in names):
        return Shown(str(folder), paths)
    above = [name.partition("/")[0] for name in names]
    classes = sorted(set(above))
    numbers = {name: number for number, name in enumerate(classes)}
    return Shown(str(folder), paths, classes, [numbers[name] for name in above])


def _of_shards(data: Path | str, flag: str, held_out: bool) -> Shown:
    from kdfast.data.shards.places import split_of
    from kdfast.data.shards.tars import open_tars

    try:
        samples = open_tars("webdataset", data, labelled=None, every=True)
        names, numbers = samples.classes()
    except (OSError, ValueError, ImportError) as error:
        raise SourceError(f"{flag}: {str(error).removeprefix('root: ')}") from error
    store = samples.pictures
    splits = [split_of(shard, store.folder) for shard in store.shards]
    split = next((name for name in HELD_OUT if held_out and name in splits), None)
    rows = [n for n in range(len(store)) if split in (None, splits[store.piece[n]])]
    where = f"{split} of {data}" if split else str(data)
    members = [Member(store.where(n), samples, n) for n in rows]
    return Shown(where, members, names, [numbers[n] for n in rows] if numbers else ())
