# SPDX-License-Identifier: Apache-2.0
"""Replayable augmentation of classification pictures, a batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdfast.data.rng import AUGMENT, uniforms

CROPS = ("auto", "pad", "resize", "none")
# Up to this size pictures are padded and cropped; enlarging 32 to 37 pixels would only blur them.
SMALL = 64


@dataclass(frozen=True)
class AugmentSpec:
    """What the training pictures go through; docs/use/classification_data.md has the order.

    Attributes:
        crop: "pad": zeros of 1/8 of the size on every side, then a random crop. "resize": short
            side at 8/7 of the size (256 for 224), then a random crop. "auto": "pad" up to 64
            pixels, "resize" above. "none": the middle.
        flip: Probability of a mirrored picture.
        brightness: Factor drawn from [1 - b, 1 + b], as torchvision's ColorJitter.
        contrast: Likewise.
        saturation: Likewise; without effect on grey pictures.
    """

    crop: str = "auto"
    flip: float = 0.5
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if self.crop not in CROPS:
            raise ValueError(f"AugmentSpec: crop must be one of {CROPS}, got {self.crop!r}")
        for name in ("flip", "brightness", "contrast", "saturation"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"AugmentSpec: {name} must be in [0, 1], got {value}")


def crop_mode(crop: str, size: int) -> str:
    """The crop that "auto" stands for; other names stay."""
    if crop != "auto":
        return crop
    return "pad" if size <= SMALL else "resize"


def short_side(crop: str, size: int) -> int:
    """Short side in pixels of the pictures that are cropped to ``size``, train and evaluation."""
    mode = crop_mode("auto" if crop == "none" else crop, size)
    return size if mode == "pad" else round(size * 8 / 7)


def finish(images: Sequence[Tensor], size: int) -> Tensor:
    """Middle crop of resized pictures.

    Args:
        images: B of (C, h, w) uint8 with one C, 1 or 3.
        size: Side of the result.

    Returns:
        (B, 3, size, size) float32 in [0, 1].
    """
    middle = np.full(len(images), 0.5)
    return _as_tensor(_cropped(images, size, 0, middle, middle, np.zeros(len(images), bool)))


def augmented(
    images: Sequence[Tensor],
    size: int,
    spec: AugmentSpec,
    *,
    seed: int,
    index: NDArray[np.int64],
    variant: NDArray[np.int64],
) -> Tensor:
    """One variant of each resized picture; no global random state is read or changed.

    A picture's result does not depend on the others, on threads or on the instruction set: every
    operation on a pixel is one rounding of IEEE arithmetic.

    Args:
        images: B of (C, h, w) uint8 with one C, 1 or 3, short side of ``short_side``.
        size: Side of the result.
        spec: The steps.
        seed: With ``index`` and ``variant`` it names every draw.
        index: (B,) of the pictures in their set.
        variant: (B,) which of their variants.

    Returns:
        (B, 3, size, size) float32 in [0, 1].
    """
    draws = uniforms(AUGMENT, seed, np.stack([index, variant], axis=1), 9)
    mode = crop_mode(spec.crop, size)
    top, left = draws[:, 0], draws[:, 1]
    if mode == "none":
        top = left = np.full(len(draws), 0.5)
    pad = size // 8 if mode == "pad" else 0
    values = _cropped(images, size, pad, top, left, draws[:, 2] < spec.flip)
    _jitter(values, spec, draws[:, 3:6], draws[:, 6:].argsort(axis=1))
    return _as_tensor(values)


def _cropped(
    images: Sequence[Tensor],
    size: int,
    pad: int,
    top: NDArray[np.float64],
    left: NDArray[np.float64],
    mirror: NDArray[np.bool_],
) -> NDArray[np.float32]:
    """(B, C, size, size) in [0, 1]: crops at parts of the way, zeros outside of the picture."""
    crops = np.zeros((len(images), images[0].shape[0], size, size), np.uint8)
    for row, image in enumerate(images):
        height, width = image.shape[1:]
        y = int(top[row] * (height - size + 2 * pad + 1)) - pad
        x = int(left[row] * (width - size + 2 * pad + 1)) - pad
        inside = image.numpy()[:, max(y, 0) : y + size, max(x, 0) : x + size]
        at_y, at_x = max(-y, 0), max(-x, 0)
        target = crops[row, :, :, ::-1] if mirror[row] else crops[row]
        target[:, at_y : at_y + inside.shape[1], at_x : at_x + inside.shape[2]] = inside
    return crops * np.float32(1 / 255)


def _jitter(
    values: NDArray[np.float32],
    spec: AugmentSpec,
    draws: NDArray[np.float64],
    order: NDArray[np.int64],
) -> None:
    # torchvision's functions take one picture, ten times slower, and round differently with the
    # number of threads; the tests hold these against them.
    amounts = (spec.brightness, spec.contrast, spec.saturation)
    factors = (1 + np.array(amounts) * (2 * draws - 1)).astype(np.float32)
    for place in range(3):
        for step, amount in enumerate(amounts):
            rows = np.flatnonzero(order[:, place] == step)
            if not amount or not len(rows) or (step == 2 and values.shape[1] == 1):
                continue
            factor = factors[rows, step, None, None, None]
            chosen = values[rows] * factor
            if step == 1:
                mean = _grey(values[rows]).mean(axis=(1, 2, 3), keepdims=True, dtype=np.float64)
                chosen += (1 - factor) * mean.astype(np.float32)
            elif step == 2:
                chosen += (1 - factor) * _grey(values[rows])
            values[rows] = chosen.clip(0, 1)


def _grey(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """(B, 1, h, w) of (B, C, h, w), with torchvision's weights of red, green and blue."""
    if values.shape[1] == 1:
        return values
    red, green, blue = np.float32(0.2989), np.float32(0.587), np.float32(0.114)
    return values[:, :1] * red + values[:, 1:2] * green + values[:, 2:] * blue


def _as_tensor(values: NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(values).expand(-1, 3, -1, -1)
