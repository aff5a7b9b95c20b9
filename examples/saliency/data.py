# SPDX-License-Identifier: Apache-2.0
"""Unlabelled pictures from folders or .tar files, as squares in memory, and random crops of them.

B batch, S side of the squares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms
from tqdm.auto import tqdm

from examples.saliency.model import SIDE
from kdfast.data.labelled.classfolder import FileSource, list_folder, list_tar
from kdfast.data.rng import AUGMENT, uniforms

# S: crops of a part of the picture are not blurred by it.
SQUARE = 288


@dataclass(frozen=True)
class Split:
    """Pictures (N, 3, S, S) uint8 by their use.

    Attributes:
        held: To measure on.
        calibrate: To compensate with.
        learn: To distil on; ``calibrate`` is part of them.
    """

    held: Tensor
    calibrate: Tensor
    learn: Tensor


def load(roots: Sequence[Path], held: int, calibrate: int, seed: int) -> Split:
    """The pictures of all roots; those to measure on and to calibrate with come from the first.

    Raises:
        ValueError: The first root holds too few pictures.
    """
    first, *others = (squares(root) for root in roots)
    if len(first) < held + calibrate:
        raise ValueError(
            f"--pictures: {roots[0]} must hold {held} pictures to measure on and {calibrate} to "
            f"calibrate with, got {len(first)}"
        )
    order = torch.randperm(len(first), generator=torch.Generator().manual_seed(seed))
    first = first[order]
    return Split(first[:held], first[held:][:calibrate], torch.cat([first[held:], *others]))


def squares(root: Path) -> Tensor:
    """The middle squares of all pictures of a folder or .tar, (N, 3, S, S) uint8."""
    entries, _ = list_tar(root) if root.is_file() else list_folder(root)
    if not entries:
        raise ValueError(f"--pictures: {root} must hold pictures, got none")
    source = FileSource(root, entries)
    rows = []
    for row in tqdm(range(len(entries)), desc=root.name, disable=None):
        (image,) = source.read([row])
        if isinstance(image, str):
            raise ValueError(f"--pictures: {source.where(row)} {image}")
        middle = transforms.center_crop(image, [min(image.shape[1:])] * 2)
        rows.append(transforms.resize(middle, [SQUARE, SQUARE], antialias=True))
    return torch.stack(rows)


def whole(images: Tensor) -> Tensor:
    """The squares as the model takes them, (B, 3, 224, 224) uint8."""
    resized: Tensor = transforms.resize(images, [SIDE, SIDE], antialias=True)
    return resized


class Crops:
    """Random square crops, mirrored or not, replayable by seed, picture and epoch."""

    def __init__(self, seed: int, shortest: float) -> None:
        self.seed, self.shortest = seed, shortest

    def __call__(self, images: Tensor, index: NDArray[np.int64], epoch: int) -> Tensor:
        """Pictures (B, 3, 224, 224) in [0, 1] of squares (B, 3, S, S) uint8."""
        variant = np.full(len(index), epoch, np.int64)
        draws = uniforms(AUGMENT, self.seed, np.stack([index, variant], 1), 4)
        side, left, top, flip = torch.from_numpy(draws).float().unbind(1)
        side = self.shortest + (1 - self.shortest) * side
        mirror = torch.where(flip < 0.5, -1.0, 1.0)
        # Of the crop's coordinates in [-1, 1] to those of the square.
        theta = torch.zeros(len(index), 2, 3)
        theta[:, 0, 0], theta[:, 1, 1] = side * mirror, side
        theta[:, 0, 2], theta[:, 1, 2] = ((1 - side) * (2 * x - 1) for x in (left, top))
        shape = [len(index), 3, SIDE, SIDE]
        grid = F.affine_grid(theta, shape, align_corners=False)
        values = images.float() / 255
        return F.grid_sample(values, grid, padding_mode="border", align_corners=False)
