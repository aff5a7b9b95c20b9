# SPDX-License-Identifier: Apache-2.0
"""Predictions of a model on held-out images, during a link's training and after it."""

from __future__ import annotations

from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kdfast.chain.link_run import LinkRun
from kdfast.chain.metrics import Meter
from kdfast.chain.objective import task_loss
from kdfast.data.labelled import LabelledImages
from kdfast.machine.ranks import Ranks
from kdfast.trainer.class_feed import class_feed
from kdfast.trainer.feed import Batch, Feed
from kdfast.trainer.held_out import evaluated, ranks_of, same_buffers


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
            feed: Held-out images with targets; processes that share them all get the whole.
        """
        meter = Meter(self.task, self.classes, scores=True)
        model.eval()
        same_buffers(ranks_of(feed), model)
        for found in evaluated(feed, partial(self._batch, model, ranks_of(feed))):
            meter.add(*(part.to(self.accelerator.device) for part in found))
        return meter

    def _batch(
        self, model: nn.Module, ranks: Ranks, batch: Batch, number: int
    ) -> tuple[Tensor, ...]:
        """Logits, targets and loss of a batch, on their way to the other processes if any."""
        assert batch.labels is not None
        with self.accelerator.autocast():
            logits = model(batch.images)
        found = logits, batch.labels, task_loss(logits, batch.labels, self.task)
        return found if ranks.world == 1 else tuple(part.cpu() for part in found)


def held_out_feed(
    run: LinkRun, dataset: LabelledImages, accelerator: Accelerator
) -> Feed[LabelledImages]:
    """This process's share of the items of a held-out set, once, in their order.

    Args:
        run: Names the batch size and the loader processes.
        dataset: Validation or test images.
        accelerator: Where the batches go, and which process this is.
    """
    return class_feed(
        dataset,
        batch_size=run.config.eval_batch,
        device=accelerator.device,
        workers=run.config.data.workers,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        train=False,
    )
