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
        super().__init__(split=split, size=size, augment=augment, seed=seed)
        if not 0 < val_fraction <= 0.5:
            raise ValueError(f"val_fraction: must be in (0, 0.5], got {val_fraction}")
        self.photometric = photometric
        self.root = resolve_root("images", root, EXPECTED, OBTAIN)
        own_folders = all((self.root / name).is_dir() for name in ("train", "val"))
        if own_folders:
            self.root = self.root / split
        names = list_images(self.root)
        if not names:
            raise FileNotFoundError(
                f"root: must be a folder with {EXPECTED}, got no picture in {self.root}; {OBTAIN}"
            )
        if not own_folders:
            total, val = len(names), split == "val"
            names = [n for i, n in enumerate(names) if is_val(i, total, val_fraction) == val]
            if not names:
                raise ValueError(
                    f"split: {split!r} of {total} pictures is empty in {self.root}; "
                    f"add pictures, raise val_fraction, or make folders train and val"
                )
        self.names = names

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.names)

    def place(self, index: int) -> tuple[Path, int]:
        """See ``FileDataset``."""
        return self.root / self.names[index], index
