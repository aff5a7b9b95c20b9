# SPDX-License-Identifier: Apache-2.0
"""ORION's image preprocessing: distort, resize, crop, stretch, normalise; see docs/use/data.md."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)

# ORION resizes 1600x900 by U(0.37, 0.45) in training and by 0.4 in evaluation.
RATIO = (0.37, 0.45)
EVAL_RATIO = 0.4


@dataclass(frozen=True)
class CropDraw:
    """Random part of the resize and crop, independent of the size of the source.

    Attributes:
        ratio: Resize ratio for a 1600x900 source and a 640x640 result.
        left: Position of the crop in the free width, in [0, 1).
    """

    ratio: float
    left: float


@dataclass(frozen=True)
class CropPlan:
    """One resize and crop.

    Attributes:
        ratio: Resize ratio applied to both sides of the source.
        resized: (width, height) after the resize.
        box: (left, top, right, bottom) of the crop; what lies outside is filled with black.
    """

    ratio: float
    resized: tuple[int, int]
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Photometric:
    """Random part of the photometric distortion; None leaves a step out.

    Attributes:
        brightness: Added to every value.
        contrast: Factor of every value.
        contrast_first: Contrast comes before the HSV steps, not after them.
        saturation: Factor of the HSV saturation.
        hue: Degrees added to the HSV hue.
        channels: Order of the channels after the distortion.
    """

    brightness: float | None = None
    contrast: float | None = None
    contrast_first: bool = False
    saturation: float | None = None
    hue: float | None = None
    channels: tuple[int, int, int] | None = None


def draw_crop(generator: np.random.Generator) -> CropDraw:
    """Draw the resize ratio and the horizontal position of one training crop."""
    return CropDraw(ratio=float(generator.uniform(*RATIO)), left=float(generator.random()))


def draw_photometric(generator: np.random.Generator) -> Photometric:
    """Draw one photometric distortion: every step with probability one half."""
    use = generator.random(5) < 0.5
    first = bool(generator.random() < 0.5)
    order = generator.permutation(3)
    delta, contrast, saturation, hue = generator.uniform(
        (-32.0, 0.5, 0.5, -18.0), (32.0, 1.5, 1.5, 18.0)
    ).tolist()
    return Photometric(
        brightness=delta if use[0] else None,
        contrast=contrast if use[1] else None,
        contrast_first=first,
        saturation=saturation if use[2] else None,
        hue=hue if use[3] else None,
        channels=(int(order[0]), int(order[1]), int(order[2])) if use[4] else None,
    )


def crop_plan(
    source: tuple[int, int], size: tuple[int, int], draw: CropDraw | None = None
) -> CropPlan:
    """Resize and crop of one picture: ORION's rule with the height and width of the source.

    Args:
        source: (height, width) of the picture.
        size: (height, width) of the network input; the crop is (height / 2, width).
        draw: Training draw; None is the evaluation crop (centred, bottom kept).

    Raises:
        ValueError: A side is not positive, or the height of ``size`` is odd.
    """
    (height, width), (crop_h, crop_w) = source, (size[0] // 2, size[1])
    if min(source) < 1 or min(size) < 1 or size[0] % 2:
        raise ValueError(
            f"crop_plan: sides must be positive and the input height even, got {source}, {size}"
        )
    fit = max(crop_h / height, crop_w / width)
    if draw is None:
        # The small term undoes a rounded-down quotient, as in int(49 * (640 / 49)) == 639.
        ratio, new_w, new_h = fit, int(width * fit + 1e-6), int(height * fit + 1e-6)
        left = max(0, new_w - crop_w) // 2
    else:
        ratio = draw.ratio * (fit / EVAL_RATIO)
        new_w, new_h = max(int(width * ratio), 1), max(int(height * ratio), 1)
        left = int(draw.left * max(0, new_w - crop_w))
    top = new_h - crop_h
    return CropPlan(ratio, (new_w, new_h), (left, top, left + crop_w, top + crop_h))


def distort(image: NDArray[np.float32], draw: Photometric) -> NDArray[np.float32]:
    """Apply a photometric distortion; nothing is clipped.

    Args:
        image: (H, W, 3) BGR in 0..255, left unchanged.
        draw: The distortion.

    Returns:
        (H, W, 3) float32, possibly outside 0..255.
    """
    out = image.copy()
    if draw.brightness is not None:
        out += np.float32(draw.brightness)
    if draw.contrast is not None and draw.contrast_first:
        out *= np.float32(draw.contrast)
    out = _shift_hsv(out, draw.saturation, draw.hue)
    if draw.contrast is not None and not draw.contrast_first:
        out *= np.float32(draw.contrast)
    return out if draw.channels is None else out[..., draw.channels]


def wrap_uint8(image: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Cast towards zero and modulo 256: what ORION's uint8 cast does on x86, made portable."""
    return image.astype(np.int32).astype(np.uint8)


def resize_crop(image: NDArray[np.uint8], plan: CropPlan) -> NDArray[np.uint8]:
    """Antialiased bicubic resize, then the crop; black outside of the resized picture.

    Args:
        image: (H, W, 3) in any channel order.
        plan: Result of ``crop_plan`` for the size of this picture.

    Returns:
        (h, w, 3), the size of the plan's box.
    """
    resized = Image.fromarray(image).resize(plan.resized, Image.Resampling.BICUBIC)
    return np.asarray(resized.crop(plan.box))


def stretch(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.float32]:
    """Bilinear resize to (height, width) in float32, ratio not kept."""
    return cv2.resize(
        image.astype(np.float32), (size[1], size[0]), interpolation=cv2.INTER_LINEAR
    ).astype(np.float32, copy=False)


def normalise(image: NDArray[np.float32] | NDArray[np.uint8]) -> Tensor:
    """Normalise an RGB picture.

    Args:
        image: (H, W, 3) RGB in 0..255.

    Returns:
        (3, H, W) float32, contiguous.
    """
    mean, std = np.array(MEAN, np.float32), np.array(STD, np.float32)
    scaled = (image.astype(np.float32, copy=False) - mean) / std
    return torch.from_numpy(np.ascontiguousarray(scaled.transpose(2, 0, 1)))


def preprocess(
    image: NDArray[np.uint8],
    size: tuple[int, int],
    *,
    crop: CropDraw | None = None,
    photometric: Photometric | None = None,
) -> Tensor:
    """Whole preprocessing of one picture.

    Args:
        image: (H, W, 3) BGR as read by cv2.
        size: (height, width) of the result, height even.
        crop: Training draw, shared by the six views of a frame; None for evaluation.
        photometric: Distortion of this view; None for evaluation.

    Returns:
        (3, height, width) float32, RGB, normalised.

    Raises:
        TypeError: The picture is not uint8.
        ValueError: The picture is not (H, W, 3), or ``size`` is not possible.
    """
    if image.dtype != np.uint8:
        raise TypeError(f"preprocess: image must be uint8, got {image.dtype}")
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"preprocess: image must be (H, W, 3), got {image.shape}")
    plan = crop_plan((image.shape[0], image.shape[1]), size, crop)
    if photometric is not None:
        image = wrap_uint8(distort(image.astype(np.float32), photometric))
    return normalise(stretch(resize_crop(image, plan), size)[..., ::-1])


def _shift_hsv(
    image: NDArray[np.float32], saturation: float | None, hue: float | None
) -> NDArray[np.float32]:
    # ORION goes to HSV and back even when neither value changes.
    hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
    if saturation is not None:
        hsv[..., 1] = hsv[..., 1] * np.float32(saturation)
    if hue is not None:
        # The way back takes any angle.
        hsv[..., 0] = hsv[..., 0] + np.float32(hue)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR).astype(np.float32, copy=False)
