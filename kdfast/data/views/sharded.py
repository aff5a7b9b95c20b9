# SPDX-License-Identifier: Apache-2.0
"""Views whose pictures lie in tar shards: kind `webdataset`, and `bench2drive` in shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdfast.data.corrupt import Corrupt, Unreadable
from kdfast.data.files import decode_bgr
from kdfast.data.shards.description import describe
from kdfast.data.shards.hub import HubPictures, opened
from kdfast.data.shards.names import divided, name_of
from kdfast.data.shards.places import (
    find_shards,
    is_part,
    split_of,
)
from kdfast.data.shards.stored import Stored
from kdfast.data.shards.tar_index import grouped, read_indexes
from kdfast.data.shards.tars import Rows, TarPictures, open_tars
from kdfast.data.views.base import LOG, EncodedDataset, Item
from kdfast.data.views.bench2drive import CAMERAS, EXPECTED, clips_of_split
from kdfast.data.views.unlabelled import share


class StoredViews(EncodedDataset):
    """Views by the rows of a store.

    Attributes:
        store: Where the pictures are.
        rows: (N,) row of every item.
    """

    store: Stored
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        """Number of views."""
        return len(self.rows)

    def where(self, index: int) -> str:
        """See ``EncodedDataset``."""
        return self.store.where(int(self.rows[index]))

    def read(self, index: int) -> NDArray[np.uint8] | str:
        """See ``EncodedDataset``."""
        return self._read([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Item | Corrupt]:
        """The items of many indices at once, which is how ``DataLoader`` asks for a batch."""
        if outside := [index for index in indices if not 0 <= index < len(self)]:
            raise IndexError(f"index: must be in [0, {len(self)}), got {outside[0]}")
        self.in_one_thread()
        images = self._read(indices)
        return [self.made(index, image) for index, image in zip(indices, images, strict=True)]

    def _read(self, indices: Sequence[int]) -> Sequence[NDArray[np.uint8] | str]:
        try:
            found = self.store.fetch([int(self.rows[index]) for index in indices])
        except OSError as error:
            if len(indices) > 1:
                return [self.read(index) for index in indices]
            return [f"cannot be opened: {error.strerror or error}"]
        return [str(one) if isinstance(one, Unreadable) else decode_bgr(one) for one in found]


class ShardedImages(StoredViews):
    """Pictures of tar shards as webdataset and ``kdfast data shard`` write them.

    With shards named train* and val* these are the splits; otherwise every tenth run of pictures
    (``val_fraction``) is the validation part.
    """

    def __init__(
        self,
        root: str | Path | None,
        *,
        val_fraction: float = 0.1,
        image_key: str | None = None,
        **options: Any,
    ) -> None:
        """Read the indexes of the shards; shards without one are listed first.

        Args:
            root: Folder, pattern or URL of the shards.
            val_fraction: Part of the pictures that is held out where shards name no splits.
            image_key: Field of the picture; None: the only one of its type.
            options: Of ``EncodedDataset``.

        Raises:
            FileNotFoundError: There is no shard, or no picture in any.
            ImportError: The package for the address is missing.
            ValueError: A shard is damaged, a field is missing, or the split is empty.
        """
        super().__init__(**options)
        self.store = open_tars("webdataset", root, image_key=image_key).pictures
        self.rows = rows_of_split(self.store, self.split, val_fraction, root)


class HubImages(StoredViews):
    """Pictures of a Hugging Face dataset.

    With splits train and validation these are the splits; otherwise every tenth run of the
    training pictures (``val_fraction``) is the validation part.
    """

    def __init__(
        self,
        root: str | Path | None,
        *,
        val_fraction: float = 0.1,
        image_key: str | None = None,
        **options: Any,
    ) -> None:
        """Open the dataset.

        Args:
            root: Folder, pattern, URL or name of the dataset.
            val_fraction: Part of the pictures that is held out where there are no such splits.
            image_key: Column of the picture; None: the only one of its type.
            options: Of ``EncodedDataset``.

        Raises:
            FileNotFoundError: There is no such dataset.
            ImportError: The package ``datasets`` is missing.
            ValueError: It has no column of pictures, or the split is empty.
        """
        super().__init__(**options)
        splits, columns = opened(root, image_key=image_key, labelled=False)
        name = self.split if "val" in splits else "train"
        self.store = HubPictures(splits[name], columns.image, name)
        total = len(self.store)
        own = range(total) if "val" in splits else share(total, self.split, val_fraction, root)
        self.rows = np.array(own, np.int64)


def rows_of_split(
    store: TarPictures, split: str, val_fraction: float, root: object
) -> NDArray[np.int64]:
    """Rows of a split by the names of the shards, or by runs of rows where they name none."""
    splits = np.array([split_of(shard, store.folder) for shard in store.shards])
    if not {"train", "val"} <= set(splits.tolist()):
        return np.array(share(len(store), split, val_fraction, root), np.int64)
    return np.flatnonzero(splits[store.piece] == split)


class ShardedBench2Drive(StoredViews):
    """The views of ``Bench2Drive`` from shards of ``kdfast data shard``: the same items.

    Attributes:
        frames: (clip, frame name) of every frame, in the order of the shards.
    """

    views = len(CAMERAS)

    def __init__(
        self,
        root: str | Path | None,
        *,
        split_file: str | Path | None = None,
        **options: Any,
    ) -> None:
        """Read the indexes of the shards.

        Args:
            root: Folder, pattern or URL of the shards.
            split_file: As ``Bench2Drive`` takes it.
            options: Of ``EncodedDataset``.

        Raises:
            FileNotFoundError: There is no shard, or the split file is missing.
            ValueError: A shard holds no frames of six views, or the split is empty.
        """
        super().__init__(**options)
        shards = find_shards("bench2drive", root, ".tar")
        describe(shards, all_of_them=root is not None and not is_part(root))
        rows, frames = [], []
        for shard, index in zip(shards, read_indexes(shards), strict=True):
            samples = grouped(index, shard.path)
            fields = [f"{camera}.jpg" for camera in CAMERAS]
            for sample in samples:
                if not set(fields) <= set(sample):
                    raise ValueError(
                        f"root: every sample must have {', '.join(fields)}, got "
                        f"{', '.join(sample)} in {shard.path}; make shards of {EXPECTED} with "
                        f"`kdfast data shard`"
                    )
                frames.append(_frame(index.names[sample[fields[0]]]))
            rows.append(Rows.of(index, [sample[name] for sample in samples for name in fields]))
        self.store = TarPictures(shards, rows)
        found = sorted({clip for clip, _ in frames})
        clips = set(clips_of_split(found, self.split, split_file, root))
        chosen = [number for number, (clip, _) in enumerate(frames) if clip in clips]
        self.frames = [frames[number] for number in chosen]
        first = np.array(chosen, np.int64)[:, None] * self.views
        self.rows = (first + np.arange(self.views)).reshape(-1)
        LOG.info("%d frames of %s in %d shards", len(chosen), self.split, len(shards))


def _frame(member: str) -> tuple[str, str]:
    """Clip and frame of the member v1/<clip>/<frame>.<camera>.jpg."""
    parts = divided(member)
    if parts is None or len(parts[0].split("/")) != 3:
        raise ValueError(f"root: members must be v1/<clip>/<frame>.<camera>.jpg, got {member}")
    _, clip, frame = name_of(f"{parts[0]}.jpg").removesuffix(".jpg").split("/")
    return clip, frame
