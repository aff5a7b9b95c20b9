# SPDX-License-Identifier: Apache-2.0
"""The pictures of a distillation: any folder or .tar of them, of classes or without labels.

C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdfast.configs.distil import DistilConfig
from kdfast.data.files import SUFFIXES
from kdfast.data.labelled import LabelledImages
from kdfast.data.labelled.augment import AugmentSpec, short_side
from kdfast.data.labelled.classfolder import (
    SPLITS,
    FileSource,
    common_folders,
    list_folder,
    list_tar,
    read_classfolder,
)
from kdfast.data.labelled.pictures import Part, Store
from kdfast.data.labelled.raw import Raw, split
from kdfast.data.labelled.sharded import read_webdataset, unlabelled_shards
from kdfast.data.shards.places import holds_shards
from kdfast.models.class_folders import folder_classes
from kdfast.trainer.class_feed import even_part

INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


@dataclass(frozen=True)
class Listed:
    """Picture files, not yet read.

    Attributes:
        train: To train on.
        held: To measure on.
        classes: Names of the classes, in the order of their folders; None without labels.
    """

    train: Part
    held: Part
    classes: list[str] | None


@dataclass(frozen=True)
class Pictures:
    """Pictures (3, S, S) in [0, 1], read and resized.

    Attributes:
        train: To train on, augmented.
        held: To measure on, preprocessed as the models' own evaluation does it.
        digest: Differs where the pictures do.
    """

    train: LabelledImages
    held: LabelledImages
    digest: str


def list_pictures(data: Path | str, config: DistilConfig) -> Listed:
    """The picture files of a folder, an uncompressed .tar or tar shards, at any depth.

    Folders or shards named train, val and test are its splits: what is measured on is val, or
    else test. Without them a part of the pictures is held out, of every class in proportion.

    Args:
        data: Folder or file; or a folder, pattern or URL of tar shards.
        config: Labels or not, the part to hold out, the limit and the seed.

    Raises:
        FileNotFoundError: There is no such folder, or no picture in it.
        ValueError: It is no such archive, has no class folders, or too few pictures.
    """
    try:
        raw = _read(data, config.labels)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"data: {str(error).removeprefix('root: ')}") from error
    held = raw.val or raw.test
    if held is None:
        # The picture of a test set is only there so that none is cut off.
        whole = replace(raw, val=None, test=raw.train)
        try:
            train, held, _ = split(whole, seed=config.seed, val=config.val_fraction, test=0.0)
        except ValueError as error:
            raise ValueError(
                f"data: {data} must hold pictures to train on and to measure on, got "
                f"{len(raw.train)} and val_fraction {config.val_fraction}"
            ) from error
    else:
        train = raw.train
    chosen = even_part(train.targets, config.limit, config.seed)
    if chosen is not None:
        train = train.take(np.asarray(chosen, np.int64))
    return Listed(train, held, raw.classes if config.labels else None)


def _read(data: Path | str, labels: bool) -> Raw:
    path = Path(data).expanduser()
    # One .tar is an archive of folders, several are shards.
    if holds_shards(data) and not path.is_file():
        return read_webdataset(data) if labels else unlabelled_shards(data)
    if not path.exists():
        raise FileNotFoundError(f"there is no folder or .tar {path}")
    return read_classfolder(path) if labels else _unlabelled(path)


def _unlabelled(path: Path) -> Raw:
    """All pictures, each of class 0."""
    entries, _ = list_tar(path) if path.is_file() else list_folder(path)
    if not entries:
        raise FileNotFoundError(f"{path} must hold pictures ({', '.join(SUFFIXES)})")
    zeros = torch.zeros(len(entries), dtype=torch.int64)
    every = Part.whole(FileSource(path, entries), zeros)
    names = [entry.name.split("/") for entry in entries]
    strip = common_folders(names)
    splits = np.array([SPLITS.get(name[strip], "") if name[strip:-1] else "" for name in names])
    if "" in splits or "train" not in splits:
        return Raw(path.name, every, None, None, [""])
    found = {name: every.take(np.flatnonzero(splits == name)) for name in set(splits.tolist())}
    return Raw(path.name, found["train"], found.get("val"), found.get("test"), [""])


def class_numbers(net: nn.Module, names: Sequence[str], classes: int) -> list[int]:
    """``folder_classes`` of a student.

    Raises:
        ValueError: The folders are not its classes.
    """
    found = folder_classes(net, names, classes)
    if found is not None:
        return found
    raise ValueError(
        f"labels: folders must be the {classes} classes of the student, or have the names that it "
        f"gives them, got {len(names)}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
    )


def build_pictures(
    listed: Listed, config: DistilConfig, size: int, inputs: dict[str, Any], numbers: list[int]
) -> Pictures:
    """Reads and resizes the pictures, once where they fit into memory.

    Args:
        listed: The files.
        config: Augmentation, epochs, seed and memory.
        size: S.
        inputs: Of ``input_config``: how the model's own evaluation crops and resizes.
        numbers: The model's number of each class.

    Raises:
        CorruptDataError: Many pictures cannot be read.
    """
    budget = int(config.memory * 2**30)
    how = inputs.get("interpolation", "bilinear")
    how = how if how in INTERPOLATIONS else "bilinear"
    whole = math.floor(size / (inputs.get("crop_pct") or 1.0))
    spec = AugmentSpec() if config.augment else None
    short = short_side("auto", size) if config.augment else whole
    stores = [
        Store(part, side, budget, how)
        for part, side in ((listed.train, short), (listed.held, whole))
    ]
    targets = [_numbered(part.targets, numbers) for part in (listed.train, listed.held)]
    varied = config.epochs if config.augment else 1
    train = LabelledImages(
        stores[0], targets[0], size, spec=spec, seed=config.seed, variants=varied
    )
    held = LabelledImages(stores[1], targets[1], size)
    return Pictures(train, held, f"{stores[0].digest} {stores[1].digest}")


def _numbered(targets: Tensor, numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)[targets]
