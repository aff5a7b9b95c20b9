# SPDX-License-Identifier: Apache-2.0
"""What all view datasets share: items, the epoch, batches, and pictures that cannot be read."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, get_worker_info

from kdfast.data.corrupt import Corrupt
from kdfast.data.files import read_bgr
from kdfast.data.rng import CROP, PHOTOMETRIC, generator
from kdfast.data.views.preprocess import draw_crop, draw_photometric, preprocess

LOG = logging.getLogger("kdfast.data")
SPLITS = ("train", "val")

Item = dict[str, Any]


class Epochs:
    """The epoch whose augmentation a dataset shows, also in running workers."""

    def __init__(self) -> None:
        # Shared memory: workers that outlive an epoch must see the next one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._alone = False

    @property
    def epoch(self) -> int:
        """Epoch whose augmentation the items show."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, also in running workers; call it before the loader is iterated."""
        if epoch < 0:
            raise ValueError(f"set_epoch: epoch must be >= 0, got {epoch}")
        self._epoch.fill_(epoch)

    def in_one_thread(self) -> None:
        """Called for every item: workers are the parallelism.

        OpenCV's thread pool does not survive a fork either.
        """
        if not self._alone and get_worker_info() is not None:
            cv2.setNumThreads(0)
            self._alone = True


class ViewDataset(Epochs, Dataset["Item | Corrupt"]):
    """Map-style dataset of single camera views.

    An item is ``{"image": (3, H, W) float32 normalised, "label": (H, W) int64 where the kind has
    labels, "index": int, "path": str}``, or ``Corrupt``. It depends on the dataset's arguments,
    the epoch and the index alone: not on workers, on other items, or on where a run resumed.

    Attributes:
        size: (height, width) of every item.
        views: Consecutive items that belong to one frame: 6 for cameras, 1 for pictures.
        classes: Names of the label values; empty without labels.
    """

    views: int = 1
    classes: tuple[str, ...] = ()

    def __init__(
        self, *, split: str, size: tuple[int, int], augment: bool = False, seed: int = 0
    ) -> None:
        super().__init__()
        if split not in SPLITS:
            raise ValueError(f"split: must be one of {SPLITS}, got {split!r}")
        self.split = split
        self.size = size
        self.augment = augment
        self.seed = seed

    @abstractmethod
    def __len__(self) -> int:
        """Number of items."""

    @abstractmethod
    def load(self, index: int) -> Item | Corrupt:
        """The item at 0 <= index < len(self)."""

    def __getitem__(self, index: int) -> Item | Corrupt:
        """The item at ``index``; IndexError outside of the dataset."""
        if not 0 <= index < len(self):
            raise IndexError(f"index: must be in [0, {len(self)}), got {index}")
        self.in_one_thread()
        return self.load(index)


class EncodedDataset(ViewDataset):
    """Views that are encoded pictures, without labels.

    Attributes:
        photometric: Whether ``augment`` also distorts colours.
    """

    def __init__(self, *, photometric: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.photometric = photometric

    @abstractmethod
    def where(self, index: int) -> str:
        """Where the picture of an item is, for messages."""

    @abstractmethod
    def read(self, index: int) -> NDArray[np.uint8] | str:
        """(H, W, 3) BGR, or why the picture cannot be read."""

    def load(self, index: int) -> Item | Corrupt:
        """One view; see ``ViewDataset``. The views of a frame are cropped alike."""
        return self.made(index, self.read(index))

    def made(self, index: int, image: NDArray[np.uint8] | str) -> Item | Corrupt:
        """The item of a picture that was read."""
        where = self.where(index)
        if isinstance(image, str):
            return Corrupt(index, where, image)
        crop = photometric = None
        if self.augment:
            frame = index // self.views
            crop = draw_crop(generator(CROP, self.seed, self.epoch, frame))
            if self.photometric:
                photometric = draw_photometric(generator(PHOTOMETRIC, self.seed, self.epoch, index))
        tensor = preprocess(image, self.size, crop=crop, photometric=photometric)
        return {"image": tensor, "index": index, "path": where}


class FileDataset(EncodedDataset):
    """Views that are files."""

    @abstractmethod
    def place(self, index: int) -> Path:
        """The file of an item."""

    def where(self, index: int) -> str:
        """See ``EncodedDataset``."""
        return str(self.place(index))

    def read(self, index: int) -> NDArray[np.uint8] | str:
        """See ``EncodedDataset``."""
        return read_bgr(self.place(index))


def collate(items: Sequence[Item | Corrupt]) -> Item:
    """Make one batch; items that could not be read are left out and reported.

    Args:
        items: Items of one dataset.

    Returns:
        ``image`` (B, 3, H, W), ``label`` (B, H, W) where present, ``index`` (B,) int64,
        ``path`` list of B, ``corrupt`` list of ``Corrupt``. Without any readable item B is 0 and
        ``image`` is (0, 3, 0, 0).
    """
    good = [item for item in items if not isinstance(item, Corrupt)]
    batch: Item = {
        "image": torch.stack([item["image"] for item in good]) if good else torch.empty(0, 3, 0, 0),
        "index": torch.tensor([item["index"] for item in good], dtype=torch.int64),
        "path": [item["path"] for item in good],
        "corrupt": [item for item in items if isinstance(item, Corrupt)],
    }
    if good and "label" in good[0]:
        batch["label"] = torch.stack([item["label"] for item in good])
    return batch


def resolve_root(kind: str, root: str | Path | None, expected: str, obtain: str) -> Path:
    """Check that a data folder exists.

    Raises:
        FileNotFoundError: It does not; the message says what belongs there and how to get it.
        ValueError: No folder was given.
    """
    if root is None:
        raise ValueError(f"root: kind {kind!r} needs a folder with {expected}; {obtain}")
    path = Path(root).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"root: must be a folder with {expected}, got {path}; {obtain}")
    return path
