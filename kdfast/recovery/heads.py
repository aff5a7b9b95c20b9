# SPDX-License-Identifier: Apache-2.0
"""Which heads a student keeps: scores on training images, and the choice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from kdfast.configs.recovery import PruneConfig
from kdfast.data.views.base import Item
from kdfast.models.eva import EVAViT
from kdfast.pruning import Calibration, HeadScores, head_scores, mlp_scores, select_heads
from kdfast.pruning.keep import read_heads
from kdfast.recovery.data import Views


@dataclass(frozen=True)
class Kept:
    """What a student keeps of its teacher.

    Attributes:
        heads: Heads of every block.
        units: Hidden units of every block's MLP; None: all.
    """

    heads: list[list[int]]
    units: list[list[int]] | None = None

    def meta(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"heads": self.heads} | ({} if self.units is None else {"units": self.units})


def score_heads(
    teacher: EVAViT,
    head: nn.Module | None,
    images: Views,
    config: PruneConfig,
    accelerator: Accelerator,
    *,
    seed: int,
) -> HeadScores:
    """Importance of the teacher's heads on training images, by a method that needs no calibration.

    With a head the loss of "taylor" and "gradient" is the cross-entropy of the labels, without one
    a random projection of the features.

    Args:
        teacher: The whole model.
        head: Gives logits from the teacher's features; None: there are no labels.
        images: What the scores are computed on.
        config: Method and number of batches.
        accelerator: Autocast, and which process shows progress.
        seed: Seed of the random projection.
    """

    def task(output: Tensor, batch: Item) -> Tensor:
        if head is None:
            raise ValueError("score_heads: the task loss needs a head, got none")
        return F.cross_entropy(head(output).float(), batch["label"])

    def batches() -> Iterator[Item]:
        for batch in images.batches(0):
            if batch.weight:
                yield {"image": batch.images, "label": batch.labels}

    if config.method == "magnitude":
        return head_scores(teacher, config.method)
    graded = head is not None and config.method in ("taylor", "gradient")
    # Gradients of a mean over pixels are below what fp16 can hold, and no loss scale helps here.
    half = accelerator.mixed_precision == "fp16"
    with nullcontext() if half else accelerator.autocast():
        return head_scores(
            teacher,
            config.method,
            batches(),
            loss=task if graded else None,
            batches=config.batches,
            seed=seed,
            progress=accelerator.is_main_process,
        )


def heads_of_file(config: PruneConfig, teacher: EVAViT) -> list[list[int]] | None:
    """Kept heads of every block as ``prune.heads`` names them; None where it names no file.

    Raises:
        ValueError: There is no such file, or it does not fit the teacher.
    """
    if config.heads is None:
        return None
    sizes = [len(held) for held in teacher.heads]
    return read_heads(Path(config.heads).expanduser(), sizes, "prune.heads")


def choose_heads(config: PruneConfig, scores: HeadScores) -> list[list[int]]:
    """Kept heads of every block, the same on all processes."""
    return _chosen(scores, config.keep, config.scope)


def choose_units(
    teacher: EVAViT, config: PruneConfig, calibration: Calibration | None, *, progress: bool
) -> list[list[int]] | None:
    """Kept hidden units of every block, the same on all processes; None where all are kept.

    Args:
        teacher: The whole model.
        config: How many.
        calibration: Of the teacher with its MLPs; None: the smallest weights go.
        progress: Whether to show a bar.
    """
    if config.mlp_keep is None:
        return None
    method = "magnitude" if calibration is None else "reconstruction"
    scores = mlp_scores(teacher, method, calibration, progress=progress)
    return _chosen(scores, config.mlp_keep, config.scope)


def _chosen(scores: HeadScores, keep: int | float | Sequence[int], scope: str) -> list[list[int]]:
    chosen = [select_heads(scores, keep, scope)]
    broadcast_object_list(chosen)
    return chosen[0]
