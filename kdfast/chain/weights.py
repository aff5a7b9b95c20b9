# SPDX-License-Identifier: Apache-2.0
"""Weights of the task's loss, as the config says or as the labels balance. C classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.configs.chain import ChainDistillConfig


class TaskWeights(NamedTuple):
    """(C,) fp32 factors of the task's loss; None where there are none.

    Attributes:
        classes: Of every class.
        positives: Of the positive part of every label, for several labels per image.
    """

    classes: Tensor | None = None
    positives: Tensor | None = None


def planned_weights(config: ChainDistillConfig, task: str, classes: int) -> TaskWeights:
    """Ones where the config says weights: what counts for memory."""
    given = (config.class_weights != "none", config.pos_weights != "none" and task == "multilabel")
    return TaskWeights(*(torch.ones(classes) if some else None for some in given))


def task_weights(
    config: ChainDistillConfig, task: str, targets: Tensor, names: Sequence[str]
) -> TaskWeights:
    """The weights of a link.

    Args:
        config: ``class_weights``, ``pos_weights``, ``focal_alpha`` and ``focal_gamma``.
        task: Kind of classification, as in ``Classification.task``.
        targets: Those of the training images: (N,) class numbers, or (N, C) ones and zeros.
        names: Names of the classes.

    Raises:
        ValueError: An option belongs to the other kind of task, the numbers are not one per class,
            or a class without an image is to be balanced.
    """
    several = task == "multilabel"
    if not several and (config.pos_weights != "none" or config.focal_alpha is not None):
        key = "focal_alpha" if config.pos_weights == "none" else "pos_weights"
        raise ValueError(f"distill.{key}: is for several labels per image, got data of {task!r}")
    if several and config.class_weights == "balanced":
        raise ValueError(
            "distill.class_weights: balanced is for one label per image; for several, set "
            "distill.pos_weights to balanced"
        )
    counts = targets.double().sum(0) if several else torch.bincount(targets, minlength=len(names))
    counts = counts.double()
    classes = _given("class_weights", config.class_weights, counts, names, len(counts))
    if classes is None and config.class_weights == "balanced":
        # Their mean over the images is 1.
        classes = counts.sum() / (len(names) * counts)
    positives = _given("pos_weights", config.pos_weights, counts, names, len(counts))
    if positives is None and config.pos_weights == "balanced":
        positives = (len(targets) - counts) / counts
    return TaskWeights(*(None if x is None else x.float() for x in (classes, positives)))


def described(config: ChainDistillConfig, weights: TaskWeights, names: Sequence[str]) -> str:
    """What changes the task's loss, for the log; empty where nothing does."""
    words: list[str] = []
    for title, values in (("class weights", weights.classes), ("pos weights", weights.positives)):
        if values is not None:
            low, high = int(values.argmin()), int(values.argmax())
            words.append(
                f"{title} {values[low]:.4g} ({names[low]}) to {values[high]:.4g} ({names[high]})"
            )
    if config.focal_gamma:
        more = "" if config.focal_alpha is None else f", alpha {config.focal_alpha:g}"
        words.append(f"focal gamma {config.focal_gamma:g}{more}")
    return "; ".join(words)


def _given(
    key: str, value: str | tuple[float, ...], counts: Tensor, names: Sequence[str], classes: int
) -> Tensor | None:
    """The config's numbers, or None where they follow from the labels or are not there."""
    if value == "balanced":
        empty = [name for name, count in zip(names, counts.tolist(), strict=True) if not count]
        if empty:
            raise ValueError(
                f"distill.{key}: balanced needs a training image of every class, "
                f"{', '.join(empty)} has none"
            )
    if isinstance(value, str):
        return None
    if len(value) != classes:
        raise ValueError(
            f"distill.{key}: must have one number for each of the {classes} classes "
            f"({', '.join(names[:3])}, ...), got {len(value)}"
        )
    return torch.tensor(value, dtype=torch.float64)
