# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10 from a folder or .tar of pictures by split and class, and its training crops."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from examples.cifar10.model import SIDE
from kdfast.data.labelled.augment import AugmentSpec, augmented
from kdfast.data.labelled.classfolder import read_classfolder
from kdfast.data.labelled.pictures import Part

# Crops of pictures padded by four pixels, mirrored or not; colours stay.
CROPS = AugmentSpec("pad", brightness=0.0, contrast=0.0, saturation=0.0)


@dataclass(frozen=True)
class Split:
    """Pictures (N, 3, 32, 32) uint8 and labels (N,) int64."""

    images: Tensor
    labels: Tensor


def load(root: Path) -> tuple[Split, Split]:
    """Training and test pictures; the folders ``val`` or ``test`` are the test pictures.

    Raises:
        FileNotFoundError: There are no pictures.
        ValueError: There is no split to test on, or a picture has another size.
    """
    raw = read_classfolder(root)
    held = raw.test or raw.val
    if held is None:
        raise ValueError(f"--data: {root} must hold train/ and test/ or val/, got one split")
    return _read(raw.train, "training pictures"), _read(held, "test pictures")


def _read(part: Part, name: str) -> Split:
    images = torch.empty(len(part), 3, SIDE, SIDE, dtype=torch.uint8)
    for number, row in enumerate(tqdm(part.rows.tolist(), desc=name, disable=None)):
        (image,) = part.source.read([row])
        if isinstance(image, str):
            raise ValueError(f"--data: {part.source.where(row)} {image}")
        if image.shape != images.shape[1:]:
            raise ValueError(
                f"--data: pictures must be {tuple(images.shape[1:])}, got {tuple(image.shape)}"
            )
        images[number] = image
    return Split(images, part.targets)


class Crops:
    """Random crops and mirrored pictures, replayable by seed, picture and epoch."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, images: Tensor, index: NDArray[np.int64], epoch: int) -> Tensor:
        """Pictures (B, 3, 32, 32) in [0, 1] of uint8 ones."""
        options: dict[str, Any] = {"seed": self.seed, "index": index}
        variant = np.full(len(index), epoch, np.int64)
        return augmented(list(images), SIDE, CROPS, variant=variant, **options)
