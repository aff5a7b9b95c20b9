# SPDX-License-Identifier: Apache-2.0
"""What every reader of a classification set returns, and how missing splits are cut off."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdfast.data.labelled.pictures import Part
from kdfast.data.rng import SPLIT, generator


@dataclass(frozen=True)
class Raw:
    """A set as it was read.

    Attributes:
        name: Name of the set.
        train: Pictures to train on; splits that the set lacks are cut off them.
        val: Pictures to choose a model by; None if the set has none.
        test: Pictures for the final result; None if the set has none.
        classes: Names of the classes, in the order of their numbers.
        task: "multiclass", "binary", "multilabel" or "ordinal".
        mirrored: Whether a mirrored picture still shows its class.
        test_fraction: Part of ``train`` that becomes the test set by default where there is none.
    """

    name: str
    train: Part
    val: Part | None
    test: Part | None
    classes: list[str]
    task: str = "multiclass"
    mirrored: bool = True
    test_fraction: float | None = None


def resolve(kind: str, root: str | Path | None, expected: str, obtain: str) -> Path:
    """Check that a folder or file with the data exists.

    Raises:
        FileNotFoundError: It does not; the message says what belongs there and how to get it.
        ValueError: None was given.
    """
    if root is None:
        raise ValueError(f"root: kind {kind!r} needs {expected}; to get it: {obtain}")
    path = Path(root).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"root: kind {kind!r} needs {expected}, got no {path}; to get it: {obtain}"
        )
    return path


def split(raw: Raw, *, seed: int, val: float, test: float) -> tuple[Part, Part, Part]:
    """Train, val and test; those that the set lacks are cut off train, each class in proportion.

    Args:
        raw: The set.
        seed: Seed of the cut; a set that has all three splits does not depend on it.
        val: Part of train that becomes val.
        test: Part of train that becomes test.

    Raises:
        ValueError: A split would be empty, or the parts are too large.
    """
    if val + test >= 1:
        raise ValueError(
            f"val_fraction and test_fraction: must leave some for train, got {val} and {test}"
        )
    draws = generator(SPLIT, seed)
    labels = raw.train.targets
    # Several labels have no classes to keep in proportion.
    group = labels.numpy() if labels.dim() == 1 else np.zeros(len(labels), np.int64)
    chosen: dict[str, list[np.ndarray[tuple[int], np.dtype[np.int64]]]] = {
        "train": [],
        "val": [],
        "test": [],
    }
    for number in np.unique(group):
        order = draws.permutation(np.flatnonzero(group == number))
        first = round(len(order) * val) if raw.val is None else 0
        second = first + (round(len(order) * test) if raw.test is None else 0)
        for name, piece in zip(
            ("val", "test", "train"), np.split(order, [first, second]), strict=True
        ):
            chosen[name].append(piece)
    cut = {name: raw.train.take(np.sort(np.concatenate(rows))) for name, rows in chosen.items()}
    parts = (
        cut["train"],
        cut["val"] if raw.val is None else raw.val,
        cut["test"] if raw.test is None else raw.test,
    )
    for name, part in zip(("train", "val", "test"), parts, strict=True):
        if not len(part):
            raise ValueError(
                f"{raw.name}: {name} must have pictures, got none of {len(raw.train)}; add "
                f"pictures or change val_fraction {val} or test_fraction {test}"
            )
    return parts
