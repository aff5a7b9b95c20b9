# SPDX-License-Identifier: Apache-2.0
"""Kind `images`: every picture below a folder, without labels."""

from __future__ import annotations

from pathlib import Path

from kdfast.data.files import SUFFIXES, list_images
from kdfast.data.views.base import FileDataset, resolve_root

EXPECTED = f"pictures ({', '.join(SUFFIXES)}) at any depth"
OBTAIN = "copy any photographs there, labels are not needed"

# Neighbouring files of a recording look alike: the split keeps runs of up to this many together.
RUN = 16


def is_val(position: int, total: int, fraction: float) -> bool:
    """Whether the file at a position of the sorted list belongs to the validation part."""
    period = max(2, round(1 / fraction))
    run = max(1, min(RUN, total // period))
    return position // run % period == period - 1


def has_splits(root: Path) -> bool:
    """Whether a folder has its own splits."""
    return all((root / name).is_dir() for name in ("train", "val"))


def share(total: int, split: str, fraction: float, where: object) -> list[int]:
    """Positions of a split in a list of ``total`` pictures that has none of its own.

    Raises:
        ValueError: ``fraction`` is not in (0, 0.5], or the split is empty.
    """
    if not 0 < fraction <= 0.5:
        raise ValueError(f"val_fraction: must be in (0, 0.5], got {fraction}")
    val = split == "val"
    found = [i for i in range(total) if is_val(i, total, fraction) == val]
    if not found:
        raise ValueError(
            f"split: {split!r} of {total} pictures is empty in {where}; "
            f"add pictures, raise val_fraction, or make folders train and val"
        )
    return found


class UnlabelledImages(FileDataset):
    """Pictures of a folder tree in ORION's preprocessing.

    With folders ``train`` and ``val`` directly below the root these are the splits; otherwise
    every tenth run of files (``val_fraction``) is the validation part.
    """

    def __init__(
        self,
        root: str | Path | None,
        *,
        split: str,
        size: tuple[int, int],
        augment: bool = False,
        seed: int = 0,
        photometric: bool = False,
        val_fraction: float = 0.1,
    ) -> None:
        """List the pictures.

        Raises:
            FileNotFoundError: The folder is missing or holds no picture.
            ValueError: ``val_fraction`` is not in (0, 0.5], or the split is empty.
        """
        super().__init__(
            split=split, size=size, augment=augment, seed=seed, photometric=photometric
        )
        if not 0 < val_fraction <= 0.5:
            raise ValueError(f"val_fraction: must be in (0, 0.5], got {val_fraction}")
        self.root = resolve_root("images", root, EXPECTED, OBTAIN)
        own_folders = has_splits(self.root)
        if own_folders:
            self.root = self.root / split
        names = list_images(self.root)
        if not names:
            raise FileNotFoundError(
                f"root: must be a folder with {EXPECTED}, got no picture in {self.root}; {OBTAIN}"
            )
        if not own_folders:
            chosen = share(len(names), split, val_fraction, self.root)
            names = [names[n] for n in chosen]
        self.names = names

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.names)

    def place(self, index: int) -> Path:
        """See ``FileDataset``."""
        return self.root / self.names[index]
