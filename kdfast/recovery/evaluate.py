# SPDX-License-Identifier: Apache-2.0
"""Held-out quality of a backbone: mean IoU where there are labels, else likeness to the teacher.

B batch, C channels, L classes, (H, W) pixels, (h, w) grid of patches.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from kdfast.recovery.data import Views
from kdfast.trainer.feed import Batch
from kdfast.trainer.held_out import evaluated, ranks_of, same_buffers
from kdfast.trainer.logs import LOG
from kdfast.trainer.sharding import gathered
from kdfast.trainer.watch import Row, Watch


def confusion(logits: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Counts (L, L) of pixels by label (row) and prediction (column).

    Args:
        logits: (B, L, H, W).
        labels: (B, H, W) int64; pixels outside [0, L) are left out.
        classes: L.
    """
    known = (labels >= 0) & (labels < classes)
    pairs = labels[known] * classes + logits.argmax(1)[known]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def mean_iou(counts: Tensor) -> float:
    """Mean over the classes that occur, in labels or predictions, of intersection over union."""
    hits = counts.diagonal().double()
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    present = union > 0
    if not present.any():
        raise ValueError("mean_iou: counts must hold a pixel, got none")
    return float((hits[present] / union[present]).mean())


def similarity(features: Tensor, teacher: Tensor) -> Tensor:
    """Sum over images and positions of the correlation of two feature vectors.

    Args:
        features: (B, C, h, w).
        teacher: Like ``features``.

    Returns:
        Scalar in fp64; 1 per position where both are equal up to shift and scale of the channels.
    """
    a, b = (x.double() - x.double().mean(1, keepdim=True) for x in (features, teacher))
    return F.cosine_similarity(a, b, dim=1).sum()


class Evaluator:
    """Measures backbones on the same held-out images.

    Attributes:
        name: "mIoU" with a head, else "similarity" (mean correlation with the teacher's features).
    """

    def __init__(
        self,
        accelerator: Accelerator,
        feed: Views,
        head: nn.Module | None,
        teacher: nn.Module | None,
        limit: int | None,
    ) -> None:
        """Choose the metric.

        Args:
            accelerator: Autocast.
            feed: Held-out data, this process's share.
            head: Gives logits from the features.
            teacher: What features are compared with where there is no head.
            limit: Images to use over all processes; None: all.

        Raises:
            ValueError: Neither head nor teacher.
        """
        if head is None and teacher is None:
            raise ValueError("Evaluator: head or teacher must be given, got neither")
        self.accelerator, self.feed, self.head, self.teacher = accelerator, feed, head, teacher
        self.limit = limit
        self.name = "similarity" if head is None else "mIoU"

    @torch.no_grad()
    def __call__(self, backbone: nn.Module) -> float:
        """The metric of a backbone; it is left in eval mode.

        Raises:
            ValueError: No held-out image could be read.
        """
        with gathered(backbone, self.teacher):
            return self._measured(backbone)

    def _measured(self, backbone: nn.Module) -> float:
        backbone.eval()
        classes = len(self.feed.dataset.classes)
        size = 2 if self.head is None else classes**2
        same_buffers(ranks_of(self.feed), backbone)
        sums = torch.zeros(size, dtype=torch.float64)
        # In the order of the batches: sums are the same for any number of processes.
        for found in evaluated(self.feed, partial(self._batch, backbone), limit=self.limit):
            sums += found
        if self.head is not None:
            return mean_iou(sums.view(classes, classes).long())
        if sums[1] == 0:
            raise ValueError("similarity: held-out images must be readable, got none")
        return float(sums[0] / sums[1])

    def _batch(self, backbone: nn.Module, batch: Batch, number: int) -> Tensor | float:
        """What a batch adds to the sums, on the CPU."""
        if not batch.weight:
            return 0.0
        with self.accelerator.autocast():
            features = backbone(batch.images)
            logits = None if self.head is None else self.head(features)
            goal = features if self.teacher is None else self.teacher(batch.images)
        if logits is not None and batch.labels is not None:
            counts = confusion(logits, batch.labels, len(self.feed.dataset.classes))
            return counts.flatten().cpu()
        count = features.shape[0] * features[0, 0].numel()
        return torch.stack([similarity(features, goal).cpu(), torch.tensor(count).double()])


class Measure(Protocol):
    """Measures a backbone by one number, which has a name."""

    name: str

    def __call__(self, backbone: nn.Module) -> float:
        """The number."""


class EvaluateEpochs(Watch):
    """Measures a backbone after every epoch of a training."""

    def __init__(self, title: str, evaluate: Measure, backbone: nn.Module) -> None:
        """Set up.

        Args:
            title: Title of the training, for the log.
            evaluate: What measures.
            backbone: What is trained.
        """
        self.title, self.evaluate, self.backbone = title, evaluate, backbone

    def on_epoch(self, epoch: int, step: int, lr: float) -> Row:
        """See ``Watch``; the row holds the metric."""
        name, value = self.evaluate.name, self.evaluate(self.backbone)
        LOG.info("%s epoch %d  %s %.4f", self.title, epoch + 1, name, value)
        return {"step": step, "epoch": epoch + 1, name: value}
