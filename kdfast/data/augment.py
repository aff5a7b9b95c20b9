# SPDX-License-Identifier: Apache-2.0
"""Replayable augmentation of classification pictures: own draws, torchvision's operations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from kdfast.data.rng import AUGMENT, generator

CROPS = ("auto", "pad", "resize", "none")
# Up to this size pictures are padded and cropped; enlarging 32 to 37 pixels would only blur them.
SMALL = 64


@dataclass(frozen=True)
class AugmentSpec:
    """What the training pictures go through; docs/classification_data.md has the order.

    Attributes:
        crop: "pad": zeros of 1/8 of the size on every side, then a random crop. "resize": short
            side at 8/7 of the size (256 for 224), then a random crop. "auto": "pad" up to 64
            pixels, "resize" above. "none": the middle.
        flip: Probability of a mirrored picture.
        brightness: Factor drawn from [1 - b, 1 + b], as torchvision's ColorJitter.
        contrast: Likewise.
        saturation: Likewise; without effect on grey pictures.
        hue: Shift drawn from [-h, h], a part of the colour circle; likewise.
    """

    crop: str = "auto"
    flip: float = 0.5
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    hue: float = 0.0

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if self.crop not in CROPS:
            raise ValueError(f"AugmentSpec: crop must be one of {CROPS}, got {self.crop!r}")
        for name, high in (("flip", 1.0), ("brightness", 1.0), ("contrast", 1.0)):
            _check(name, getattr(self, name), high)
        _check("saturation", self.saturation, 1.0)
        _check("hue", self.hue, 0.5)


def _check(name: str, value: float, high: float) -> None:
    if not 0 <= value <= high:
        raise ValueError(f"AugmentSpec: {name} must be in [0, {high}], got {value}")


def crop_mode(crop: str, size: int) -> str:
    """The crop that "auto" stands for; other names stay."""
    if crop != "auto":
        return crop
    return "pad" if size <= SMALL else "resize"


def short_side(crop: str, size: int) -> int:
    """Short side in pixels of the pictures that are cropped to ``size``, train and evaluation."""
    mode = crop_mode("auto" if crop == "none" else crop, size)
    return size if mode == "pad" else round(size * 8 / 7)


def finish(image: Tensor, size: int) -> Tensor:
    """Middle crop of a resized picture.

    Args:
        image: (1 or 3, h, w) uint8.
        size: Side of the result.

    Returns:
        (3, size, size) float32 in [0, 1].
    """
    return _colour(F.to_dtype(F.center_crop(image, [size, size]), torch.float32, scale=True))


def augmented(
    image: Tensor, size: int, spec: AugmentSpec, *, seed: int, index: int, variant: int
) -> Tensor:
    """One variant of a resized picture; no global random state is read or changed.

    Args:
        image: (1 or 3, h, w) uint8, short side of ``short_side``.
        size: Side of the result.
        spec: The steps.
        seed: With ``index`` and ``variant`` it names every draw.
        index: Of the picture in its set.
        variant: Which of its variants.

    Returns:
        (3, size, size) float32 in [0, 1].
    """
    draws = generator(AUGMENT, seed, index, variant)
    top, left, mirror, *factors = draws.random(7).tolist()
    order = draws.permutation(4).tolist()
    image = _crop(image, size, crop_mode(spec.crop, size), top, left)
    if mirror < spec.flip:
        image = F.horizontal_flip(image)
    image = F.to_dtype(image, torch.float32, scale=True)
    return _colour(_jitter(image, spec, factors, order))


def _crop(image: Tensor, size: int, mode: str, top: float, left: float) -> Tensor:
    if mode == "none":
        return F.center_crop(image, [size, size])
    pad = size // 8 if mode == "pad" else 0
    height, width = image.shape[-2:]
    # torchvision fills what lies outside of the picture with zeros.
    y = int(top * (height - size + 2 * pad + 1)) - pad
    x = int(left * (width - size + 2 * pad + 1)) - pad
    return F.crop(image, y, x, size, size)


def _jitter(image: Tensor, spec: AugmentSpec, draws: list[float], order: list[int]) -> Tensor:
    grey = image.shape[0] == 1
    for step in order:
        draw = 2 * draws[step] - 1
        if step == 0 and spec.brightness:
            image = F.adjust_brightness(image, 1 + spec.brightness * draw)
        elif step == 1 and spec.contrast:
            image = F.adjust_contrast(image, 1 + spec.contrast * draw)
        elif step == 2 and spec.saturation and not grey:
            image = F.adjust_saturation(image, 1 + spec.saturation * draw)
        elif step == 3 and spec.hue and not grey:
            image = F.adjust_hue(image, spec.hue * draw)
    return image


def _colour(image: Tensor) -> Tensor:
    return image.expand(3, -1, -1).contiguous() if image.shape[0] == 1 else image
