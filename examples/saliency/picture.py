# SPDX-License-Identifier: Apache-2.0
"""A picture of pictures beside the maps that several models make of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from examples.pictures import normalised
from examples.saliency.data import SQUARE, whole
from examples.saliency.model import MEAN, STD, Saliency
from examples.saliency.quality import agreement, answers


def samples() -> Tensor:
    """Photos that scikit-learn and matplotlib bring along, (3, 3, S, S) uint8.

    None of them is among the pictures of the run.
    """
    from matplotlib.cbook import get_sample_data
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photo: Any = get_sample_data("grace_hopper.jpg")
    with photo as file:
        person = np.asarray(Image.open(file).convert("RGB"))
    arrays: Sequence[NDArray[np.uint8]] = [*load_sample_images().images, person]
    return torch.stack([_square(array) for array in arrays])


def _square(array: NDArray[np.uint8]) -> Tensor:
    from torchvision.transforms.v2 import functional as transforms

    image = torch.from_numpy(array.copy()).permute(2, 0, 1)
    middle = transforms.center_crop(image, [min(image.shape[1:])] * 2)
    square: Tensor = transforms.resize(middle, [SQUARE, SQUARE], antialias=True)
    return square


def draw(path: Path, models: Mapping[str, Saliency], squares: Tensor) -> None:
    """Writes a PNG: a row for each picture, a column for each model, the first being the whole one.

    Args:
        path: File to write.
        models: By the titles of their columns.
        squares: (B, 3, S, S) uint8.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = whole(squares)
    images = [normalised(shown, MEAN, STD)]
    found = {name: answers(model, images) for name, model in models.items()}
    want = next(iter(found.values()))
    columns = 1 + len(models)
    figure = Figure(figsize=(1.7 * columns, 1.7 * len(shown) + 0.45))
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(shown), columns, squeeze=False)
    for row, picture in enumerate(shown):
        axes[row][0].imshow(picture.permute(1, 2, 0).numpy())
        for column, got in enumerate(found.values(), 1):
            axes[row][column].imshow(got.maps[row].numpy(), vmin=0, vmax=1, cmap="magma")
    for axis, name in zip(axes[0], ("picture", *models), strict=True):
        pearson = ""
        if name in models:
            pearson = f"\nPearson {agreement(found[name], want)['pearson']:.3f}"
        axis.set_title(f"{name}{pearson}", fontsize=8)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.subplots_adjust(0.01, 0.01, 0.99, 1 - 0.42 / figure.get_figheight(), 0.03, 0.03)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=85)
