# SPDX-License-Identifier: Apache-2.0
"""Predictions of a model on held-out images, during a link's training and after it."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn

from kdfast.chain.link_run import LinkRun
from kdfast.chain.metrics import Meter
from kdfast.chain.objective import task_loss
from kdfast.data.labelled import LabelledImages
from kdfast.machine.signals import check
from kdfast.trainer.class_feed import class_feed
from kdfast.trainer.feed import Feed


class ClassEvaluator:
    """Runs models of a link on held-out images and collects what they predict.

    Attributes:
        accelerator: Autocast.
        task: Kind of classification, as in ``Classification.task``.
        classes: Number of classes.
    """

    def __init__(self, accelerator: Accelerator, task: str, classes: int) -> None:
        self.accelerator, self.task, self.classes = accelerator, task, classes

    @torch.no_grad()
    def __call__(self, model: nn.Module, feed: Feed[LabelledImages]) -> Meter:
        """Predictions on all images of a feed; the model is left in eval mode.

        Args:
            model: Gives logits (B, C) of images (B, 3, H, W).
            feed: Held-out images with targets.
        """
        meter = Meter(self.task, self.classes, scores=True)
        model.eval()
        for batch in feed.batches(0):
            if self.accelerator.num_processes == 1:
                check()
            assert batch.labels is not None
            with self.accelerator.autocast():
                logits = model(batch.images)
            meter.add(logits, batch.labels, task_loss(logits, batch.labels, self.task))
        return meter


def held_out_feed(
    run: LinkRun, dataset: LabelledImages, device: torch.device
) -> Feed[LabelledImages]:
    """All items of a held-out set once, in their order.

    Args:
        run: Names the batch size and the loader processes.
        dataset: Validation or test images.
        device: Where the batches go.
    """
    return class_feed(
        dataset,
        batch_size=run.config.eval_batch,
        device=device,
        workers=run.config.data.workers,
        train=False,
    )
