# SPDX-License-Identifier: Apache-2.0
"""The pictures that a command line names, preprocessed for a model.

``kdfast.data`` is imported inside of functions: it needs OpenCV, of the extra [train], which
pictures for most models do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn

from kdfast.machine.limits import MAX_PIXELS
from kdfast.models.eva import EVAViT
from kdfast.models.prepared import input_config
from kdfast.resolve.error import SourceError
from kdfast.sources.shown import Member, shown

Transform = Callable[[Image.Image], Tensor]


def transform_of(model: nn.Module, size: tuple[int, int] | None = None) -> Transform:
    """The model's own evaluation preprocessing, from a picture to (3, H, W).

    Args:
        model: EVAViT, or a model of timm, torchvision or Hugging Face.
        size: (height, width) of the result; None: what the model was built for.
    """
    if isinstance(model, EVAViT):
        return _orion(size or picture_size(model))
    config = input_config(model)
    if size is not None:
        config = {**config, "input_size": (3, *size)}
    transform: Transform = create_transform(**config, is_training=False)
    return transform


def _orion(size: tuple[int, int]) -> Transform:
    from kdfast.data.views.preprocess import preprocess

    def transform(picture: Image.Image) -> Tensor:
        return preprocess(np.ascontiguousarray(np.asarray(picture)[..., ::-1]), size)

    return transform


def load_images(paths: Sequence[str | Path], transform: Transform, flag: str = "--image") -> Tensor:
    """The pictures of a list of files, (B, 3, H, W), preprocessed.

    Args:
        paths: Files.
        transform: Result of ``transform_of``.
        flag: The option that names the files, for messages.

    Raises:
        SourceError: A file is missing or is no picture.
    """
    return torch.stack(list(read_pictures(paths, transform, flag)))


def read_pictures(
    paths: Iterable[str | Path | Member], transform: Transform, flag: str
) -> Iterator[Tensor]:
    """Pictures one by one, preprocessed; a SourceError names the option and the file."""
    for path in paths:
        try:
            with Image.open(path.opened() if isinstance(path, Member) else path) as file:
                if file.width * file.height > MAX_PIXELS():
                    raise SourceError(
                        f"{flag}: {path} must have at most {MAX_PIXELS():,} pixels "
                        f"({MAX_PIXELS.name} changes that), got {file.width} x {file.height}"
                    )
                picture = file.convert("RGB")
        except FileNotFoundError as error:
            raise SourceError(f"{flag}: there is no file {path}") from error
        except SourceError:
            raise
        except Exception as error:  # on damaged bytes PIL's readers stumble over whatever comes
            raise SourceError(f"{flag}: {path} cannot be read as a picture: {error}") from error
        yield transform(picture)


def image_batches(
    model: nn.Module,
    size: tuple[int, int],
    data: Path | str | None,
    *,
    count: int,
    batch_size: int,
    flag: str = "--data",
) -> Iterator[Tensor]:
    """Batches (B, 3, H, W) of pictures in the model's dtype, preprocessed as it needs them.

    Args:
        model: The model that will see them.
        size: (height, width) of the batches.
        data: Folder with pictures at any depth; or a folder, pattern or URL of tar shards. Where
            there are more than ``count``, they are taken from all over it. None: rendered driving
            scenes.
        count: The largest number of pictures.
        batch_size: B; the last batch may be smaller.
        flag: The option that names it, for messages.

    Raises:
        SourceError: There are no pictures, or one cannot be read.
    """
    images: Iterator[Tensor]
    if data is None:
        mean, std = _normalisation(model)
        images = ((scene - mean) / std for scene in scenes(size, count))
    else:
        images = read_pictures(spread(data, count, flag), transform_of(model, size), flag)
    dtype = next(model.parameters()).dtype
    while some := list(islice(images, batch_size)):
        yield torch.stack(some).to(dtype)


def spread(data: Path | str, count: int, flag: str) -> Sequence[Path | Member]:
    """Up to ``count`` pictures at equal distances in the sorted list of all."""
    found = shown(data, flag).pictures
    step = max(1, len(found) // count)
    return found[::step][:count]


def scenes(size: tuple[int, int], count: int) -> Iterator[Tensor]:
    """Rendered driving scenes, (3, H, W) in [0, 1]."""
    from kdfast.data import MEAN, STD, build

    height, width = (side + side % 2 for side in size)
    # Six views, so six pictures, a frame.
    dataset = build(kind="scenes", size=(height, width), frames=-(-count // 6))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    for index in range(count):
        item: Any = dataset[index]
        yield ((item["image"] * std + mean) / 255)[:, : size[0], : size[1]]


def crops_of(model: nn.Module, images: Tensor) -> Tensor:
    """What ``load_images`` cut out of its files, (B, 3, H, W) in [0, 1], before normalisation."""
    mean, std = _normalisation(model)
    return images * std + mean


def _normalisation(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Mean and deviation, (3, 1, 1), of the pictures in [0, 1] that a model was trained with."""
    config = input_config(model)
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    return mean, std


def picture_size(model: nn.Module) -> tuple[int, int]:
    """(height, width) of the pictures that a model was built for."""
    height, width = input_config(model)["input_size"][1:]
    return height, width


def noise(model: nn.Module, size: tuple[int, int]) -> Tensor:
    """One image (1, 3, H, W), as good as any where only time is measured."""
    return torch.randn(1, 3, *size).to(next(model.parameters()).dtype)
