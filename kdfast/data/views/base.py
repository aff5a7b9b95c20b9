# SPDX-License-Identifier: Apache-2.0
"""What all view datasets share: items, the epoch, batches, and pictures that cannot be read."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import torch
from torch.utils.data import Dataset, get_worker_info

from kdfast.data.files import CorruptDataError, read_bgr
from kdfast.data.rng import CROP, PHOTOMETRIC, generator
from kdfast.data.views.preprocess import draw_crop, draw_photometric, preprocess

LOG = logging.getLogger("kdfast.data")
SPLITS = ("train", "val")

Item = dict[str, Any]


@dataclass(frozen=True)
class Corrupt:
    """Stands for an item whose picture could not be read.

    Attributes:
        index: Index of the item in its dataset.
        path: The file.
        reason: Why it could not be read.
    """

    index: int
    path: str
    reason: str


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

    def __init__(self, *, split: str, size: tuple[int, int], augment: bool, seed: int) -> None:
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


class FileDataset(ViewDataset):
    """Views that are files, without labels.

    Attributes:
        photometric: Whether ``augment`` also distorts colours.
    """

    photometric: bool = False

    @abstractmethod
    def place(self, index: int) -> tuple[Path, int]:
        """The file of an item, and the number of its frame, whose views are cropped alike."""

    def load(self, index: int) -> Item | Corrupt:
        """One view; see ``ViewDataset``."""
        path, frame = self.place(index)
        image = read_bgr(path)
        if isinstance(image, str):
            return Corrupt(index, str(path), image)
        crop = photometric = None
        if self.augment:
            crop = draw_crop(generator(CROP, self.seed, self.epoch, frame))
            if self.photometric:
                photometric = draw_photometric(generator(PHOTOMETRIC, self.seed, self.epoch, index))
        tensor = preprocess(image, self.size, crop=crop, photometric=photometric)
        return {"image": tensor, "index": index, "path": str(path)}


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


class CorruptCounter:
    """Counts unreadable pictures of a run and stops it when there are too many.

    The run stops when more than one file is bad and the bad reads exceed ``limit`` of the reads,
    where a run counts as at least ``min(files, 1000)`` reads: one bad file among few is only
    reported, and bad luck in the first batches of a large set does not stop it.

    Attributes:
        seen: Items read, good or bad.
        bad: Items that could not be read.
        paths: Files that could not be read, with the reason.
    """

    FLOOR = 1000

    def __init__(self, files: int, *, limit: float = 0.01) -> None:
        """Start at zero for a dataset of ``files`` items; ``limit`` is the part that may be bad."""
        if files < 1:
            raise ValueError(f"files: must be positive, got {files}")
        if not 0 <= limit < 1:
            raise ValueError(f"limit: must be in [0, 1), got {limit}")
        self.files = files
        self.limit = limit
        self.seen = 0
        self.bad = 0
        self.paths: dict[str, str] = {}

    def update(self, batch: Item) -> None:
        """Count one batch made by ``collate``; log every bad file once.

        Raises:
            CorruptDataError: Too many items were bad.
        """
        corrupt: list[Corrupt] = batch["corrupt"]
        self.seen += len(batch["path"]) + len(corrupt)
        self.bad += len(corrupt)
        for item in corrupt:
            if item.path not in self.paths:
                self.paths[item.path] = item.reason
                LOG.warning("skipped %s: %s", item.path, item.reason)
        reads = max(self.seen, min(self.files, self.FLOOR))
        if len(self.paths) > 1 and self.bad > self.limit * reads:
            names = ", ".join(list(self.paths)[:5])
            raise CorruptDataError(
                f"pictures: at most {self.limit:.1%} may be unreadable, got {self.bad} of "
                f"{self.seen} read ({len(self.paths)} files, first {names})"
            )

    def state_dict(self) -> dict[str, Any]:
        """State to save in a checkpoint."""
        return {"seen": self.seen, "bad": self.bad, "paths": dict(self.paths)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.seen, self.bad = int(state["seen"]), int(state["bad"])
        self.paths = dict(state["paths"])

    def merged(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One state for what several processes have counted."""
        return {
            "seen": sum(int(state["seen"]) for state in states),
            "bad": sum(int(state["bad"]) for state in states),
            "paths": {path: why for state in states for path, why in state["paths"].items()},
        }


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
