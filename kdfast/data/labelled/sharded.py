# SPDX-License-Identifier: Apache-2.0
"""Kind `webdataset`: labelled pictures in tar shards, read in place by their positions."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kdfast.data.labelled.pictures import EncodedSource, Part
from kdfast.data.labelled.raw import Raw
from kdfast.data.shards.places import split_of
from kdfast.data.shards.stored import Stored
from kdfast.data.shards.tars import Samples, open_tars


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
