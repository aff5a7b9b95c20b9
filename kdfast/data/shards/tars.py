# SPDX-License-Identifier: Apache-2.0
"""Pictures of tar shards by number: one read of one range each."""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdfast.data.corrupt import Unreadable
from kdfast.data.shards.description import describe
from kdfast.data.shards.labels import numbered
from kdfast.data.shards.names import Names, divided
from kdfast.data.shards.places import Shard, common_folder, find_shards, is_part, read_ranges
from kdfast.data.shards.tar_index import BLOCK, Index, grouped, read_indexes

# Fields that are taken for pictures; those of OpenCV's files that webdataset has names for too.
PICTURES = ("jpg", "jpeg", "png", "bmp", "webp", "tif", "tiff")
LABELS = ("cls", "cls.txt", "json")
JSON_LABELS = ("label", "cls", "class", "target")


class TarPictures:
    """Some members of tar shards.

    Attributes:
        names: Of the members, in the order of the rows.
        piece: (N,) number of the shard of a row.
    """

    def __init__(self, shards: Sequence[Shard], rows: Sequence[Rows]) -> None:
        """Join the rows of every shard."""
        self.shards = list(shards)
        self.names = Names(name for part in rows for name in part.names)
        counts = [len(part.names) for part in rows]
        self.piece = np.repeat(np.arange(len(rows), dtype=np.int32), counts)
        self._offsets = _joined([part.offsets for part in rows])
        self._sizes = _joined([part.sizes for part in rows])
        self._crcs = _joined([part.crcs for part in rows])

    def __len__(self) -> int:
        return len(self.names)

    @property
    def folder(self) -> str:
        """The folder that all shards are in."""
        return common_folder(self.shards)

    def where(self, row: int) -> str:
        """Shard and member of a row, for messages."""
        return f"{self.shards[int(self.piece[row])].path}: {self.names[row]}"

    def stamp(self, row: int) -> str:
        """Text that differs where the picture of a row does, as far as the index knows."""
        return f"{self.names[row]}\0{self._sizes[row]}\0{self._crcs[row]}\n"

    def fetch(self, rows: Sequence[int]) -> list[bytes | Unreadable]:
        """See ``Stored``: one range for each, its header and its bytes."""
        ranges = []
        for row in rows:
            start = int(self._offsets[row])
            shard = self.shards[int(self.piece[row])]
            ranges.append((shard, start - BLOCK, start + int(self._sizes[row])))
        found = read_ranges(ranges)
        return [self._checked(row, data) for row, data in zip(rows, found, strict=True)]

    def _checked(self, row: int, found: bytes) -> bytes | Unreadable:
        """The bytes of a picture behind its header, if they are what the index speaks of."""
        size, expected = int(self._sizes[row]), int(self._crcs[row])
        if len(found) < BLOCK + size:
            return Unreadable(f"the shard ends after {len(found)} of {BLOCK + size} bytes of it")
        if problem := _header_problem(found[:BLOCK], size):
            return Unreadable(problem)
        data = found[BLOCK:]
        if expected >= 0 and zlib.crc32(data) != expected:
            return Unreadable("its checksum is not that of the index")
        return data


@dataclass
class Rows:
    """What is taken of one shard, by row.

    Attributes:
        names: Of the members.
        offsets: Of their first bytes.
        sizes: Their bytes.
        crcs: CRC-32; -1 where it is not known.
    """

    names: list[str]
    offsets: list[int]
    sizes: list[int]
    crcs: list[int]

    @classmethod
    def of(cls, index: Index, members: Sequence[int]) -> Rows:
        """These members of an index."""
        return cls(
            [index.names[n] for n in members],
            [index.offsets[n] for n in members],
            [index.sizes[n] for n in members],
            [index.crcs[n] if index.crcs else -1 for n in members],
        )


def _joined(parts: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    return np.concatenate([np.asarray(part, np.int64) for part in parts])


def _header_problem(block: bytes, size: int) -> str | None:
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        return f"no header of a member is before it ({error})"
    return None if header.size == size else f"its header says {header.size} bytes, not {size}"


@dataclass(frozen=True)
class Samples:
    """The samples of tar shards, a picture each.

    Attributes:
        pictures: One of every sample, or all.
        labels: Label of every picture as text; None where they were not asked for.
        described: What ``kdfast data shard`` says of the set; empty for shards of others.
    """

    pictures: TarPictures
    labels: list[str] | None
    described: dict[str, Any]

    def classes(self) -> tuple[list[str], list[int]]:
        """Names of the classes and every picture's number; empty without labels.

        Raises:
            ValueError: A number is not below that of the classes.
        """
        if self.labels is None:
            return [], []
        return numbered(self.labels, self.described.get("classes") or [])


def open_tars(
    kind: str,
    root: str | Path | None,
    *,
    image_key: str | None = None,
    label_key: str | None = None,
    labelled: bool | None = False,
    every: bool = False,
) -> Samples:
    """Samples of tar shards in the order of the shards' names.

    Args:
        kind: For messages.
        root: As ``find_shards`` takes it.
        image_key: Field with the picture; None: the only one of a picture's type.
        label_key: Field with the label, ``FIELD`` or ``FIELD:KEY`` for one of JSON; None: ``cls``,
            or ``label`` of ``json``.
        labelled: Whether labels are wanted; None: if the first sample has one.
        every: Take all pictures of a sample, not one.

    Raises:
        FileNotFoundError: There is no shard, or one that is described is missing.
        ValueError: A field is missing; the message lists those that exist.
    """
    shards = find_shards(kind, root, ".tar")
    described = describe(shards, all_of_them=not is_part(str(root)))
    rows: list[Rows] = []
    labels: list[str] = []
    for shard, index in zip(shards, read_indexes(shards), strict=True):
        samples = grouped(index, shard.path)
        if labelled is None and samples:
            labelled = any(name in samples[0] for name in LABELS)
        members = []
        for sample in samples:
            fields = _fields(sample) if every else [_image(shard, index, sample, image_key)]
            members += [sample[name] for name in fields]
            if labelled:
                labels += [_label(shard, index, sample, label_key)] * len(fields)
        rows.append(Rows.of(index, members))
    pictures = TarPictures(shards, rows)
    if not len(pictures):
        raise FileNotFoundError(f"root: must hold samples with a picture, got none in {root}")
    return Samples(pictures, labels if labelled else None, described)


def _fields(sample: dict[str, int]) -> list[str]:
    """The fields of a sample that are pictures by their names."""
    return [name for name in sample if name.rsplit(".", 1)[-1] in PICTURES]


def _image(shard: Shard, index: Index, sample: dict[str, int], key: str | None) -> str:
    if key is not None:
        if key.lower() in sample:
            return key.lower()
        found: list[str] = []
    else:
        found = _fields(sample)
    if len(found) == 1:
        return found[0]
    what = f"a field {key}" if key is not None else f"one picture ({', '.join(PICTURES)})"
    remedy = _apart(index, sample) or ("; name one of them" if found else "")
    raise ValueError(
        f"data.image_key: every sample must have {what}, got {_fields_of(shard, index, sample)}"
        f"{remedy}"
    )


def _key(index: Index, sample: dict[str, int]) -> str:
    parts = divided(index.names[next(iter(sample.values()))])
    return parts[0] if parts else ""


def _fields_of(shard: Shard, index: Index, sample: dict[str, int]) -> str:
    return f"{', '.join(sample)} in sample {_key(index, sample)} of {shard.path}"


def _apart(index: Index, sample: dict[str, int]) -> str:
    """What to do where a shard has members of a sample that do not follow each other."""
    key = _key(index, sample)
    members = sum(parts is not None and parts[0] == key for parts in map(divided, index.names))
    if members == len(sample):
        return ""
    return "; its other files are elsewhere in the shard: pack with `tar --sort=name`"


def _label(shard: Shard, index: Index, sample: dict[str, int], key: str | None) -> str:
    name, _, inner = (key or "").partition(":")
    names = [name] if name else [one for one in LABELS if one in sample]
    member = sample.get(names[0].lower()) if names else None
    if member is None:
        raise ValueError(
            f"data.label_key: every sample must have a field {name or ' or '.join(LABELS)}, got "
            f"{_fields_of(shard, index, sample)}{_apart(index, sample)}"
        )
    text = index.texts.get(index.names[member])
    if text is None:
        start = index.offsets[member]
        (data,) = read_ranges([(shard, start, start + index.sizes[member])])
        text = data.decode("utf-8", "replace")
    where = f"{shard.path}: {index.names[member]}"
    if inner or names[0].endswith("json"):
        return _of_json(text, inner, where)
    if not text.strip():
        raise ValueError(f"data.label_key: {where} must hold a class, got nothing")
    return text.strip()


def _of_json(text: str, key: str, where: str) -> str:
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"data.label_key: {where} must be JSON, got {error}") from error
    known = list(found) if isinstance(found, dict) else []
    for name in [key] if key else JSON_LABELS:
        if name in known and isinstance(found[name], int | str):
            return str(found[name])
    raise ValueError(
        f"data.label_key: {where} must have a number or a name under "
        f"{key or ' or '.join(JSON_LABELS)}, got {', '.join(known) or 'no keys'}; name it as "
        f"json:KEY"
    )
