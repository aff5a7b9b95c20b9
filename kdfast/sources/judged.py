# SPDX-License-Identifier: Apache-2.0
"""Pictures that two models are compared on, with their classes where the folder has them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from kdfast.models.class_folders import folder_classes
from kdfast.sources.pictures import read_pictures, transform_of
from kdfast.sources.shown import Member, Shown, shown


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
    data: Path | str,
    *,
    count: int,
    batch_size: int,
    classes: int,
    used: Iterable[Path | Member],
    flag: str = "--data",
) -> JudgedPictures:
    """Pictures, those first that nothing was chosen or fitted on.

    Args:
        model: The model that will see them.
        size: (height, width) of the batches.
        data: Folder with pictures at any depth, or tar shards; of folders or shards ``train`` and
            ``val`` (or ``test``) those of the latter.
        count: The largest number of pictures.
        batch_size: B; the last batch may be smaller.
        classes: Number of the model's classes; 0 without a classifier. Those of the data may
            be these, see ``folder_classes``.
        used: Pictures that something was chosen or fitted on.
        flag: The option that names it, for messages.

    Raises:
        SourceError: There are no pictures, or one cannot be read.
    """
    found = shown(data, flag, held_out=True)
    known = set(used)
    fresh = [n for n, picture in enumerate(found.pictures) if picture not in known]
    some = fresh or list(range(len(found.pictures)))
    chosen = some[:: max(1, len(some) // count)][:count]
    origin = f"{len(chosen)} pictures of {found.where}"
    origin += (
        ", none of which it was chosen or fitted on"
        if fresh
        else ", which it was also chosen and fitted on: there are no others"
    )
    dtype = next(model.parameters()).dtype
    pictures = [found.pictures[n] for n in chosen]
    images = read_pictures(pictures, transform_of(model, size), flag)
    batches = []
    while batch := list(islice(images, batch_size)):
        batches.append(torch.stack(batch).to(dtype))
    return JudgedPictures(batches, _labels(model, found, chosen, classes), origin)


def _labels(model: nn.Module, found: Shown, chosen: Sequence[int], classes: int) -> Tensor | None:
    """Classes of pictures by the names of theirs; None unless these are the model's classes."""
    numbers = folder_classes(model, found.names, classes) if found.names and classes else None
    if numbers is None:
        return None
    return torch.tensor([numbers[found.classes[n]] for n in chosen])
