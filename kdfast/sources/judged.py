# SPDX-License-Identifier: Apache-2.0
"""Pictures that two models are compared on, with their classes where the folder has them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from kdfast.models.class_folders import folder_classes
from kdfast.sources.pictures import read_pictures, spread, transform_of

# Folders of a data set's held-out pictures.
HELD_OUT = ("val", "valid", "validation", "test")


@dataclass(frozen=True)
class JudgedPictures:
    """What a model is judged on.

    Attributes:
        batches: (B, 3, H, W), as the model needs them.
        labels: (N,) number of each picture's class; None: they have none that the model knows.
        origin: Where they come from, in words.
    """

    batches: list[Tensor]
    labels: Tensor | None
    origin: str


def judged_pictures(
    model: nn.Module,
    size: tuple[int, int],
    folder: Path,
    *,
    count: int,
    batch_size: int,
    classes: int,
    used: Iterable[Path],
    flag: str = "--data",
) -> JudgedPictures:
    """Pictures of a folder, those first that nothing was chosen or fitted on.

    Args:
        model: The model that will see them.
        size: (height, width) of the batches.
        folder: Pictures at any depth; of a folder with ``train`` and ``val`` (or ``test``) those of
            the latter.
        count: The largest number of pictures.
        batch_size: B; the last batch may be smaller.
        classes: Number of the model's classes; 0 without a classifier. Its folders may be these,
            see ``folder_classes``.
        used: Pictures that something was chosen or fitted on.
        flag: The option that names the folder, for messages.

    Raises:
        SourceError: The folder holds no pictures, or one that cannot be read.
    """
    held_out = next((folder / name for name in HELD_OUT if (folder / name).is_dir()), folder)
    everything = spread(held_out, 1 << 62, flag)
    known = set(used)
    fresh = [path for path in everything if path not in known]
    some = fresh or everything
    paths = some[:: max(1, len(some) // count)][:count]
    origin = f"{len(paths)} pictures of {held_out}"
    origin += (
        ", none of which it was chosen or fitted on"
        if fresh
        else ", which it was also chosen and fitted on: there are no others"
    )
    dtype = next(model.parameters()).dtype
    images = read_pictures(paths, transform_of(model, size), flag)
    batches = []
    while batch := list(islice(images, batch_size)):
        batches.append(torch.stack(batch).to(dtype))
    return JudgedPictures(batches, _labels(model, held_out, everything, paths, classes), origin)


def _labels(
    model: nn.Module, folder: Path, everything: list[Path], paths: list[Path], classes: int
) -> Tensor | None:
    """Classes of pictures by their folders; None unless these are the model's classes."""
    names = sorted({path.relative_to(folder).parts[0] for path in everything})
    inside = all(len(path.relative_to(folder).parts) > 1 for path in everything)
    numbers = folder_classes(model, names, classes) if inside and classes else None
    if numbers is None:
        return None
    number = dict(zip(names, numbers, strict=True))
    return torch.tensor([number[path.relative_to(folder).parts[0]] for path in paths])
