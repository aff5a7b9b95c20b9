# SPDX-License-Identifier: Apache-2.0
"""Which heads a student keeps: scores on training images, and the choice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from kdfast.configs.recovery import PruneConfig
from kdfast.data.views.base import Item
from kdfast.models.eva import EVAViT
from kdfast.pruning import HeadScores, head_scores, select_heads
from kdfast.recovery.data import Views


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


def choose_heads(config: PruneConfig, scores: HeadScores) -> list[list[int]]:
    """Kept heads of every block, the same on all processes."""
    chosen = [select_heads(scores, config.keep, config.scope)]
    broadcast_object_list(chosen)
    return chosen[0]
