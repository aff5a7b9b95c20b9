# SPDX-License-Identifier: Apache-2.0
"""Kind `bench2drive`: the camera pictures of Bench2Drive, six views a frame, without labels."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from kdfast.data.views.base import LOG, FileDataset, resolve_root

# ORION's camera order.
CAMERAS = (
    "rgb_front",
    "rgb_front_left",
    "rgb_front_right",
    "rgb_back",
    "rgb_back_left",
    "rgb_back_right",
)
EXPECTED = "v1/<clip>/camera/rgb_*/*.jpg (Bench2Drive, six cameras)"
OBTAIN = "unpack Bench2Drive base (Hugging Face: rethinklab/Bench2Drive) into v1"


def read_val_clips(path: str | Path) -> list[str]:
    """Clip names of a split file ``{"val": ["v1/<clip>", ...]}``, without ``v1/``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not of that form.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"split_file: must be a JSON file with a list 'val', got {file}; ORION has it as "
            f"data/splits/bench2drive_base_train_val_split.json"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"split_file: must be JSON, got {file}: {error}") from error
    clips = content.get("val") if isinstance(content, dict) else None
    if not isinstance(clips, list) or not all(isinstance(clip, str) for clip in clips):
        raise ValueError(f"split_file: must hold a list of clip names 'val', got {file}")
    return sorted({clip.rstrip("/").rsplit("/", 1)[-1] for clip in clips})


def list_frames(clip: Path) -> tuple[list[str], list[str]]:
    """Frame names of one clip folder: those that all six cameras have, and the incomplete ones."""
    seen: list[set[str]] = []
    for camera in CAMERAS:
        folder = clip / "camera" / camera
        names = os.listdir(folder) if folder.is_dir() else []
        seen.append({name[:-4] for name in names if name.endswith(".jpg")})
    complete = set.intersection(*seen)
    return sorted(complete), sorted(set.union(*seen) - complete)


def clips_of_split(
    found: Sequence[str], split: str, split_file: str | Path | None, root: object
) -> list[str]:
    """The clips of a split among those that were found.

    Raises:
        FileNotFoundError: The split file is missing.
        ValueError: The split needs a split file or is empty.
    """
    if split_file is None:
        if split == "val":
            raise ValueError("split: 'val' of bench2drive needs split_file, got none")
        return list(found)
    val = read_val_clips(split_file)
    absent = sorted(set(val) - set(found))
    if absent and split == "val":
        LOG.warning(
            "%d of %d validation clips are not in %s, first %s",
            len(absent),
            len(val),
            root,
            ", ".join(absent[:5]),
        )
    wanted = sorted(set(found) & set(val) if split == "val" else set(found) - set(val))
    if not wanted:
        raise ValueError(
            f"split: {split!r} must hold a clip, got none of {len(found)} in {root} "
            f"with {split_file}"
        )
    return wanted


class Bench2Drive(FileDataset):
    """Single views in ORION's preprocessing; six consecutive items are one frame.

    The six views of a frame share the crop draw; each has its own photometric draw.

    Attributes:
        frames: (clip, frame name) of every complete frame, sorted.
        incomplete: ``clip/frame`` of the frames that were left out because a view is missing.
    """

    views = len(CAMERAS)

    def __init__(
        self,
        root: str | Path | None,
        *,
        split: str,
        size: tuple[int, int],
        augment: bool = False,
        seed: int = 0,
        photometric: bool = False,
        split_file: str | Path | None = None,
    ) -> None:
        """List the frames.

        Args:
            root: Folder that holds ``v1``.
            split: "val" are the clips of the split file, "train" all others; without a split
                file "train" is everything and "val" an error.
            size: (height, width) of the items.
            augment: Random crop, and the distortion if ``photometric``.
            seed: Seed of the augmentation.
            photometric: Distort colours as ORION does in training; needs ``augment``.
            split_file: JSON file with the list of validation clips.

        Raises:
            FileNotFoundError: The folder, the split file, or every complete frame is missing.
            ValueError: The split needs a split file or is empty.
        """
        super().__init__(
            split=split, size=size, augment=augment, seed=seed, photometric=photometric
        )
        self.root = resolve_root("bench2drive", root, EXPECTED, OBTAIN)
        found = sorted(path.parent.name for path in self.root.glob("v1/*/camera"))
        if not found:
            raise FileNotFoundError(
                f"root: must be a folder with {EXPECTED}, got no clip in {self.root}; {OBTAIN}"
            )
        clips = clips_of_split(found, split, split_file, self.root)
        self.frames: list[tuple[str, str]] = []
        self.incomplete: list[str] = []
        for clip in clips:
            complete, incomplete = list_frames(self.root / "v1" / clip)
            self.frames += [(clip, name) for name in complete]
            self.incomplete += [f"{clip}/{name}" for name in incomplete]
        if self.incomplete:
            LOG.warning(
                "left out %d of %d frames without all six views, first %s",
                len(self.incomplete),
                len(self.incomplete) + len(self.frames),
                ", ".join(self.incomplete[:5]),
            )
        if not self.frames:
            raise FileNotFoundError(
                f"root: must be a folder with {EXPECTED}, got no complete frame of "
                f"{len(clips)} {split} clips in {self.root}; {OBTAIN}"
            )

    def __len__(self) -> int:
        """Number of views."""
        return self.views * len(self.frames)

    def place(self, index: int) -> Path:
        """See ``FileDataset``."""
        frame, camera = divmod(index, self.views)
        clip, name = self.frames[frame]
        return self.root / "v1" / clip / "camera" / CAMERAS[camera] / f"{name}.jpg"
