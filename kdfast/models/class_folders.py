# SPDX-License-Identifier: Apache-2.0
"""Which of a model's classes folders of pictures are. C classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.data.imagenet_info import ImageNetInfo
from torch import nn


def folder_classes(net: nn.Module, names: Sequence[str], classes: int) -> list[int] | None:
    """The model's number of each class folder; None where they are not its classes.

    Folders have the names that the model's configuration, or ImageNet's list, gives to classes; or
    they are the model's classes in order where there are as many.

    Args:
        net: The model.
        names: Of the folders, sorted.
        classes: C, that it tells apart.
    """
    for known in _known_names(net, classes):
        if all(name in known for name in names):
            return [known[name] for name in names]
    return list(range(classes)) if len(names) == classes else None


def _known_names(net: nn.Module, classes: int) -> list[dict[str, int]]:
    config: Any = getattr(net, "config", None)
    found: list[dict[str, int]] = []
    given: Any = getattr(config, "label2id", None)
    if isinstance(given, dict):
        found.append({str(name): int(number) for name, number in given.items()})
    if classes == 1000:
        listed = ImageNetInfo().label_names()
        found.append({name: number for number, name in enumerate(listed)})
    return found
