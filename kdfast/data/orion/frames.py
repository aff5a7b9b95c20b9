# SPDX-License-Identifier: Apache-2.0
"""Frames of Bench2Drive with six pictures, calibrations and labels, for training with the heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kdfast.data.corrupt import Corrupt
from kdfast.data.files import read_bgr
from kdfast.data.orion.chat import Round, conversation
from kdfast.data.orion.infos import Infos, open_infos
from kdfast.data.orion.maps import open_maps
from kdfast.data.orion.names import CAMERAS
from kdfast.data.orion.targets import Labels, Rig, pixel_transform, rig
from kdfast.data.rng import CROP, PHOTOMETRIC, generator
from kdfast.data.views.base import Epochs
from kdfast.data.views.preprocess import CropDraw, draw_crop, draw_photometric, preprocess
from kdfast.models.orion.batch import Batch, Frame, Lanes, Objects

# Where `kdfast.data infos` puts what it converts, below the data root.
INFOS, MAPS = "kdfast_infos_{split}", "kdfast_maps"


@dataclass(frozen=True)
class Sample:
    """One frame.

    Attributes:
        index: Its index in the dataset.
        images: (6, 3, H, W) float32, normalised.
        rig: Cameras and car.
        objects: What the detection head learns.
        lanes: What the map head learns.
        rounds: The conversation of Chat-B2D about it; empty without one.
        corrupt: Pictures that could not be read. Their images are zero, and the frame has no
            labels: nothing is learned from what nobody saw.
    """

    index: int
    images: Tensor
    rig: Rig
    objects: Objects
    lanes: Lanes
    rounds: tuple[Round, ...] = ()
    corrupt: tuple[Corrupt, ...] = ()


@dataclass(frozen=True)
class FrameBatch:
    """Frames of B streams.

    Attributes:
        index: (B,) int64 indices in the dataset.
        images: (B, 6, 3, H, W) float32.
        batch: What the heads need beside features.
        rounds: B conversations.
        corrupt: Pictures that could not be read.
    """

    index: Tensor
    images: Tensor
    batch: Batch
    rounds: tuple[tuple[Round, ...], ...]
    corrupt: tuple[Corrupt, ...]

    def to(self, device: torch.device | str) -> FrameBatch:
        """The same batch on another device."""
        images = self.images.to(device, non_blocking=True)
        return FrameBatch(self.index, images, self.batch.to(device), self.rounds, self.corrupt)


class OrionFrames(Epochs, Dataset[Sample]):
    """Map-style dataset of whole frames.

    An item depends on the arguments, the epoch and the index alone.

    Attributes:
        infos: Infos of the split.
        size: (height, width) of the images.
    """

    views = len(CAMERAS)

    def __init__(
        self,
        root: str | Path,
        *,
        split: str = "train",
        size: tuple[int, int] = (640, 640),
        augment: bool = False,
        photometric: bool = False,
        seed: int = 0,
        chat: str | Path | None = None,
    ) -> None:
        """Open a data root that `kdfast.data infos` has prepared.

        Args:
            root: Folder with ``v1``, converted infos and maps.
            split: "train" or "val".
            size: (height, width) of the network input; the height even.
            augment: Random crop, alike for the six views of a frame.
            photometric: Distort colours as ORION does in training; needs ``augment``.
            seed: Seed of every random draw.
            chat: Folder of Chat-B2D (holds ``train`` and ``val``); None leaves it out.

        Raises:
            FileNotFoundError: Infos, maps or the chat folder are missing.
            ValueError: An argument is out of range, or a town has no map.
        """
        super().__init__()
        if min(size) < 2 or size[0] % 2:
            raise ValueError(f"size: must be positive with an even height, got {size}")
        if photometric and not augment:
            raise ValueError("photometric: needs augment=True, got augment=False")
        self.root = Path(root).expanduser()
        self.infos: Infos = open_infos(self.root / INFOS.format(split=split))
        self._labels = Labels(self.infos, open_maps(self.root / MAPS))
        self.chat = None if chat is None else Path(chat).expanduser() / split
        if self.chat is not None and not self.chat.is_dir():
            raise FileNotFoundError(f"chat: must be a folder with train and val, got {self.chat}")
        self.split, self.size, self.seed = split, size, seed
        self.augment, self.photometric = augment, photometric

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.infos)

    def __getitem__(self, index: int) -> Sample:
        """The frame at ``index``."""
        if not 0 <= index < len(self):
            raise IndexError(f"index: must be in [0, {len(self)}), got {index}")
        self.in_one_thread()
        crop = draw_crop(generator(CROP, self.seed, self.epoch, index)) if self.augment else None
        images, transforms, corrupt = self._images(index, crop)
        rounds: tuple[Round, ...] = ()
        if self.chat is not None:
            clip = self.infos.clip(index).rsplit("/", 1)[-1]
            number = int(self.infos.columns["frame_idx"][index])
            rounds = conversation(self.chat / clip / f"{number:05d}.json")
        return Sample(
            index,
            images,
            rig(self.infos, index, transforms),
            Objects.none() if corrupt else self._labels.objects(index),
            Lanes.none() if corrupt else self._labels.lanes(index),
            rounds,
            corrupt,
        )

    def _images(
        self, index: int, crop: CropDraw | None
    ) -> tuple[Tensor, np.ndarray, tuple[Corrupt, ...]]:
        images = torch.zeros(self.views, 3, *self.size)
        transforms = np.empty((self.views, 4, 4))
        corrupt = []
        for view, name in enumerate(self.infos.pictures(index)):
            path = self.root / name
            picture = read_bgr(path)
            if isinstance(picture, str):
                corrupt.append(Corrupt(index, str(path), picture))
                # The calibration is that of the picture that belongs there.
                centre = self.infos.columns["intrinsic"][index][view][:2, 2]
                width, height = (2 * centre).round().astype(int).tolist()
                transforms[view] = pixel_transform((height, width), self.size, crop)
                continue
            draw = None
            if self.photometric:
                rng = generator(PHOTOMETRIC, self.seed, self.epoch, index * self.views + view)
                draw = draw_photometric(rng)
            images[view] = preprocess(picture, self.size, crop=crop, photometric=draw)
            source = (picture.shape[0], picture.shape[1])
            transforms[view] = pixel_transform(source, self.size, crop)
        return images, transforms, tuple(corrupt)


def collate_frames(samples: Sequence[Sample]) -> FrameBatch:
    """Stack frames of B streams."""
    rigs = [sample.rig for sample in samples]

    def stack(name: str) -> Tensor:
        return torch.stack([getattr(one, name) for one in rigs])

    frame = Frame(
        lidar2img=stack("lidar2img"),
        ego_pose=stack("ego_pose"),
        ego_pose_inv=stack("ego_pose_inv"),
        timestamp=torch.tensor([one.timestamp for one in rigs], dtype=torch.float64),
        scene=torch.tensor([one.scene for one in rigs], dtype=torch.int64),
        command=torch.tensor([one.command for one in rigs], dtype=torch.float32),
        can_bus=stack("can_bus"),
    )
    return FrameBatch(
        torch.tensor([sample.index for sample in samples], dtype=torch.int64),
        torch.stack([sample.images for sample in samples]),
        Batch(frame, [one.objects for one in samples], [one.lanes for one in samples]),
        tuple(sample.rounds for sample in samples),
        tuple(item for sample in samples for item in sample.corrupt),
    )
