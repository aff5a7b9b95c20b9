# SPDX-License-Identifier: Apache-2.0
"""Kinds `webdataset` and `huggingface`: labelled pictures that stay where they are, by number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kdfast.data.corrupt import Unreadable
from kdfast.data.labelled.pictures import EncodedSource, Part
from kdfast.data.labelled.raw import Raw
from kdfast.data.shards.hub import HubPictures, opened
from kdfast.data.shards.labels import numbered
from kdfast.data.shards.places import split_of
from kdfast.data.shards.stored import Stored
from kdfast.data.shards.tars import Samples, open_tars


class StoredSource(EncodedSource):
    """Pictures of a store."""

    def __init__(self, store: Stored) -> None:
        super().__init__(store.names)
        self.store = store

    def fetch(self, rows: Sequence[int]) -> list[bytes | Unreadable]:
        """See ``EncodedSource``."""
        return self.store.fetch(rows)

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
    classes, labels = samples.classes()
    return _raw(samples, labels, classes)


def unlabelled_shards(root: str | Path) -> Raw:
    """All pictures of tar shards, each of class 0; raises what ``read_webdataset`` does."""
    samples = open_tars("webdataset", root, every=True)
    return _raw(samples, [0] * len(samples.pictures), [""])


def _raw(samples: Samples, labels: list[int], classes: list[str]) -> Raw:
    store = samples.pictures
    splits = np.array([split_of(shard, store.folder) for shard in store.shards])[store.piece]
    if "train" not in splits:
        raise ValueError(f"root: must hold shards named train*, got {sorted(set(splits.tolist()))}")
    whole = Part.whole(StoredSource(store), np.array(labels, np.int64))
    found = {name: whole.take(np.flatnonzero(splits == name)) for name in set(splits.tolist())}
    return Raw("webdataset", found["train"], found.get("val"), found.get("test"), classes)


def read_huggingface(
    root: str | Path | None, *, image_key: str | None = None, label_key: str | None = None
) -> Raw:
    """Open a Hugging Face dataset; no picture is read.

    Args:
        root: As ``kdfast.data.shards.hub.opened`` takes it.
        image_key: Column with the picture; None: the only one.
        label_key: Column with the class, a whole number or a name.

    Raises:
        FileNotFoundError: There is no such dataset.
        ImportError: The package ``datasets`` is missing.
        ValueError: A column is missing, or a row has no class.
    """
    splits, columns = opened(root, image_key=image_key, label_key=label_key, labelled=True)
    labels = {name: rows.data.column(columns.label).to_pylist() for name, rows in splits.items()}
    classes, numbers = numbered([one for part in labels.values() for one in part], columns.classes)
    parts, start = {}, 0
    for name, rows in splits.items():
        mine = numbers[start : start + len(rows)]
        start += len(rows)
        store = HubPictures(rows, columns.image, name)
        parts[name] = Part.whole(StoredSource(store), np.array(mine, np.int64))
    return Raw("huggingface", parts["train"], parts.get("val"), parts.get("test"), classes)
