# SPDX-License-Identifier: Apache-2.0
"""Kind `scenes`: synthetic driving scenes with labels, drawn from a seed; see docs/use/data.md."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from kdfast.data.corrupt import Corrupt
from kdfast.data.rng import FLIP, SENSOR, WORLD, generator
from kdfast.data.scenes.camera import VIEWS
from kdfast.data.scenes.layout import CLASSES, draw_layout, draw_light
from kdfast.data.scenes.objects import fences, houses, plants
from kdfast.data.scenes.render import render
from kdfast.data.scenes.traffic import people, poles, vehicles
from kdfast.data.scenes.world import Builder, World
from kdfast.data.views.base import SPLITS, Item, ViewDataset
from kdfast.data.views.preprocess import normalise

FRAMES = {"train": 2000, "val": 200}


def draw_world(seed: int, split: str, frame: int) -> World:
    """The scene of one frame; splits never share a scene."""
    rng = generator(WORLD, seed, SPLITS.index(split), frame)
    build = Builder(rng, draw_layout(rng), draw_light(rng))
    walls = houses(build)
    fences(build)
    plants(build)
    vehicles(build, walls)
    people(build, walls)
    poles(build, walls)
    return build.world()


def view(
    world: World, seed: int, split: str, frame: int, camera: int, size: tuple[int, int]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """RGB picture (H, W, 3) and labels (H, W) of one camera of a frame's scene."""
    rng = generator(SENSOR, seed, SPLITS.index(split), frame, camera)
    return render(world, camera, size, rng)


class Scenes(ViewDataset):
    """Views of synthetic scenes; six consecutive items are one frame.

    Augmentation mirrors whole frames (picture and labels) with probability one half.
    """

    views = len(VIEWS)
    classes = CLASSES

    def __init__(
        self,
        *,
        split: str,
        size: tuple[int, int],
        augment: bool = False,
        seed: int = 0,
        frames: int | None = None,
    ) -> None:
        """Set up ``frames`` frames (2000 for train, 200 for val if None).

        Raises:
            ValueError: ``frames`` is not positive or ``size`` is below 16.
        """
        super().__init__(split=split, size=size, augment=augment, seed=seed)
        self.frames = FRAMES[split] if frames is None else frames
        if self.frames < 1:
            raise ValueError(f"frames: must be positive, got {frames}")
        if min(size) < 16:
            raise ValueError(f"size: both sides must be 16 or more, got {size}")
        # Frames are mostly read in order, six views each.
        self._last: tuple[int, World] | None = None

    def __len__(self) -> int:
        """Number of views."""
        return self.frames * self.views

    def world(self, frame: int) -> World:
        """The scene of one frame."""
        if self._last is None or self._last[0] != frame:
            self._last = (frame, draw_world(self.seed, self.split, frame))
        return self._last[1]

    def load(self, index: int) -> Item | Corrupt:
        """One view; see ``ViewDataset``."""
        frame, camera = divmod(index, self.views)
        image, label = view(self.world(frame), self.seed, self.split, frame, camera, self.size)
        if self.augment and generator(FLIP, self.seed, self.epoch, frame).random() < 0.5:
            image, label = image[:, ::-1], label[:, ::-1]
        return {
            "image": normalise(image),
            "label": torch.from_numpy(label.astype(np.int64)),
            "index": index,
            "path": f"scenes/{self.split}/{self.seed}/{frame:06d}/{VIEWS[camera][0]}",
        }
