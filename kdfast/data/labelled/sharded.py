# SPDX-License-Identifier: Apache-2.0
"""Kind `webdataset`: labelled pictures in tar shards, read in place by their positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdfast.data.labelled.pictures import EncodedSource, Part
from kdfast.data.labelled.raw import Raw
from kdfast.data.shards.places import common_folder, split_of
from kdfast.data.shards.stored import Stored
from kdfast.data.shards.tars import open_tars


class StoredSource(EncodedSource):
    """Pictures of a store."""

    def __init__(self, store: Stored) -> None:
        super().__init__(store.names)
        self.store = store

    def fetch(self, row: int) -> bytes:
        """See ``EncodedSource``."""
        return self.store.fetch(row)

    def where(self, row: int) -> str:
        """See ``Source``."""
        return self.store.where(row)

    def stamp(self, row: int) -> str:
        """See ``Source``."""
        return self.store.stamp(row)


def read_webdataset(
    root: str | Path | None, *, image_key: str | None = None, label_key: str | None = None
) -> Raw:
    """Read the indexes of tar shards; the split is the first word of a shard's name.

    Args:
        root: Folder, file, pattern or URL of fsspec.
        image_key: Field with the picture; None: the only one of its type.
        label_key: Field with the label, or ``json:KEY``.

    Raises:
        FileNotFoundError: There is no shard, or one that is described is missing.
        ImportError: The package for the address is missing.
        ValueError: A shard is damaged, a field is missing, or there is nothing to train on.
    """
    samples = open_tars("webdataset", root, image_key=image_key, label_key=label_key, labelled=True)
    store = samples.pictures
    labels, classes = _numbered(samples.labels or [], samples.described)
    folder = common_folder(store.shards)
    splits = np.array([split_of(shard, folder) for shard in store.shards])[store.piece]
    if "train" not in splits:
        raise ValueError(f"root: must hold shards named train*, got {sorted(set(splits.tolist()))}")
    whole = Part.whole(StoredSource(store), labels)
    found = {name: whole.take(np.flatnonzero(splits == name)) for name in set(splits.tolist())}
    return Raw("webdataset", found["train"], found.get("val"), found.get("test"), classes)


def _numbered(labels: list[str], described: dict[str, Any]) -> tuple[NDArray[np.int64], list[str]]:
    """Numbers of the classes and their names: numbers are themselves, names are sorted."""
    if all(label.isdecimal() and label.isascii() for label in labels):
        numbers = np.array([int(label) for label in labels], np.int64)
        names: list[str] = described.get("classes") or []
        highest = int(numbers.max())
        if names and highest >= len(names):
            raise ValueError(f"labels: must be in [0, {len(names)}), got {highest}")
        return numbers, names or [str(number) for number in range(highest + 1)]
    names = sorted(set(labels))
    order = {name: number for number, name in enumerate(names)}
    return np.array([order[label] for label in labels], np.int64), names
