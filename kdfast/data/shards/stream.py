# SPDX-License-Identifier: Apache-2.0
"""Writes a stream whose length is not known into tar shards; a writer that was killed goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kdfast.data.corrupt import Unreadable
from kdfast.data.shards.hub import Columns, encoded, opened, streamed
from kdfast.data.shards.labels import numbered
from kdfast.data.shards.tar_index import BLOCK, grouped
from kdfast.data.shards.write import Limits, Member, Sample, Writing
from kdfast.machine.signals import check

KIND = "huggingface"
# First bytes of pictures and the field that they get.
_FIELDS = {b"\xff\xd8": "jpg", b"\x89PNG": "png", b"RIFF": "webp", b"BM": "bmp"}
_FIELDS |= {b"II": "tif", b"MM": "tif"}


@dataclass(frozen=True)
class Source:
    """A Hugging Face dataset.

    Attributes:
        root: As ``kdfast.data.shards.hub.opened`` takes it.
        image_key: Column of the pictures; None: the only one.
        label_key: Column of the labels; None: one of the usual names, or no labels.
    """

    root: str | Path
    image_key: str | None = None
    label_key: str | None = None


def write_stream(
    source: Source, out: Path | str, limits: Limits, told: Callable[[str, int, bool], None]
) -> str:
    """Write the shards of a dataset that are not there yet, and the description of the set.

    The dataset is read once from the front, without a copy on this machine; one shard is held in
    memory. After a kill it is read from the first row that is not in a whole shard.

    Args:
        source: The dataset, which must not have changed since the writer was killed.
        out: Folder or its URL; absent, empty, or of the same dataset and limits.
        limits: Of a shard.
        told: Called after every shard with its name, its bytes, and whether it was there already.

    Returns:
        Where the description of the set is.

    Raises:
        FileExistsError: The folder holds something else.
        OSError: The dataset cannot be read, or there is no room.
        ValueError: A column is missing, or a row has no picture, or no class.
    """
    splits, columns = opened(
        source.root,
        image_key=source.image_key,
        label_key=source.label_key,
        labelled=None if source.label_key is None else True,
        stream=True,
    )
    facts = [KIND, str(source.root), columns.image, columns.label, columns.classes, sorted(splits)]
    digest = hashlib.sha256(json.dumps([*facts, limits.count, limits.size]).encode()).hexdigest()
    writing = Writing(out, KIND, digest, columns.classes, told)
    for split, rows in splits.items():
        number = start = 0
        while index := writing.finished(name := f"{split}-{number:06d}.tar"):
            start += len(grouped(index, writing.target.where(name)))
            number += 1
        for shard in _cut(_samples(rows, columns, split, start), limits):
            check()
            writing.write(f"{split}-{number:06d}.tar", shard)
            number += 1
    return writing.end()


def _samples(rows: object, columns: Columns, split: str, start: int) -> Iterator[Sample]:
    for number, (cell, label) in enumerate(streamed(rows, columns, start), start):
        data = encoded(cell)
        if isinstance(data, Unreadable):
            raise ValueError(f"SOURCE: {split} row {number}: {data}")
        try:
            text = "" if columns.label is None else _label(label, columns)
        except ValueError as error:
            raise ValueError(f"SOURCE: {split} row {number}: {error}") from error
        # What is no picture is packed as it is, and counted where it is read.
        suffix = next((name for first, name in _FIELDS.items() if data.startswith(first)), "jpg")
        key = f"{number:09d}"
        sample = [Member(f"{key}.{suffix}", len(data), data)]
        if columns.label is not None:
            sample.append(Member(f"{key}.cls", len(text.encode()), text.encode()))
        yield sample


def _label(label: object, columns: Columns) -> str:
    """Numbers are checked where the names of the classes are known."""
    value = label if isinstance(label, int) else None if label is None else str(label)
    if columns.classes or value is None:
        numbered([value], columns.classes)
    return str(value)


def _cut(samples: Iterator[Sample], limits: Limits) -> Iterator[list[Sample]]:
    shard: list[Sample] = []
    used = 0
    for sample in samples:
        need = sum(2 * BLOCK + member.size for member in sample)
        if shard and limits.full(len(shard), used + need):
            yield shard
            shard, used = [], 0
        shard.append(sample)
        used += need
    if shard:
        yield shard
