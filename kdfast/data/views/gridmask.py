# SPDX-License-Identifier: Apache-2.0
"""GridMask (arXiv 2001.04086) as ORION applies it inside the model while training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdfast.data.rng import GRIDMASK, generator


def grid(
    size: tuple[int, int], period: int, start: tuple[int, int], ratio: float = 0.5
) -> NDArray[np.bool_]:
    """Pixels that mode 1 keeps: those on a stripe of either direction.

    Stripes are laid on a canvas of 1.5 times the size, ``canvas // period`` of them per
    direction from ``start``, and the middle of the canvas is cut out. A large period therefore
    leaves the end of the canvas without stripes and may blank most of the picture, as in ORION.

    Args:
        size: (height, width) of the picture.
        period: Distance of two stripes, at least 2.
        start: First row and column of the first stripes, below ``period``.
        ratio: Stripe width as a part of the period.

    Returns:
        (height, width), True is kept.
    """
    width = min(max(int(period * ratio + 0.5), 1), period - 1)
    lines = []
    for side, first in zip(size, start, strict=True):
        canvas = side * 3 // 2
        offset = np.arange(canvas) - first
        stripe = (offset >= 0) & (offset // period < canvas // period) & (offset % period < width)
        middle = (canvas - side) // 2
        lines.append(stripe[middle : middle + side])
    return lines[0][:, None] | lines[1][None, :]


@dataclass(frozen=True)
class GridMask:
    """Zero a grid of squares in a batch of normalised pictures; one mask for the whole batch.

    Attributes:
        seed: Seed of the run.
        rank: Rank of this process; ranks draw different masks.
        prob: Probability that a batch is masked.
        ratio: Stripe width as a part of the period.
    """

    seed: int
    rank: int = 0
    prob: float = 0.7
    ratio: float = 0.5

    def __post_init__(self) -> None:
        for name in ("prob", "ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"GridMask: {name} must be in [0, 1], got {getattr(self, name)}")

    def mask(self, size: tuple[int, int], epoch: int, step: int) -> NDArray[np.bool_] | None:
        """Kept pixels (height, width) of one step, or None when the batch stays as it is."""
        draw = generator(GRIDMASK, self.seed, epoch, step, self.rank)
        if draw.random() > self.prob:
            return None
        period = int(draw.integers(2, size[0]))
        start = draw.integers(period, size=2)
        return grid(size, period, (int(start[0]), int(start[1])), self.ratio)

    def __call__(self, images: Tensor, *, epoch: int, step: int) -> Tensor:
        """Mask one batch.

        Args:
            images: (..., H, W) floating, normalised; H at least 3; not changed in place.
            epoch: Epoch of the batch.
            step: Number of the batch in its epoch.

        Returns:
            Like ``images``; removed pixels are 0 (the mean colour).

        Raises:
            TypeError: ``images`` is not floating.
            ValueError: H is below 3.

        Gradients: images.
        """
        if not images.is_floating_point():
            raise TypeError(f"GridMask: images must be floating, got {images.dtype}")
        height, width = images.shape[-2:]
        if height < 3:
            raise ValueError(f"GridMask: images must have 3 rows or more, got {height}")
        kept = self.mask((height, width), epoch, step)
        if kept is None:
            return images
        return images * torch.from_numpy(kept).to(images)
