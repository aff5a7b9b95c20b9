# SPDX-License-Identifier: Apache-2.0
"""How well a model does what its teacher does, on held-out pictures. B batch, C channels."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from kdfast.data.labelled import LabelledImages
from kdfast.models.prepared import PreparedModel
from kdfast.pruning.observe import main_output
from kdfast.trainer.feed import Batch, Feed
from kdfast.trainer.held_out import evaluated, ranks_of, same_buffers
from kdfast.trainer.logs import LOG
from kdfast.trainer.sharding import gathered
from kdfast.trainer.watch import Row, Watch

Quality = dict[str, float]
# What each number of a quality is, for tables and pictures.
MEANING = {
    "cosine": "cosine of the output to the teacher's, of logits without their mean",
    "agreement": "share of pictures with the teacher's first class",
    "accuracy": "share of pictures with the right first class",
}


class Evaluator:
    """Measures models against one teacher on the same pictures.

    Attributes:
        names: Of the numbers that it gives, those of ``MEANING`` that make sense here.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        feed: Feed[LabelledImages],
        teacher: PreparedModel,
        *,
        comparable: bool,
        logits: bool,
        labels: bool,
    ) -> None:
        """Choose the numbers.

        Args:
            accelerator: Autocast.
            feed: Held-out pictures, this process's share.
            teacher: In eval mode.
            comparable: Whether outputs are of the teacher's shape.
            logits: Whether both are logits of the same classes.
            labels: Whether targets are classes of the models.
        """
        self.accelerator, self.feed, self.teacher = accelerator, feed, teacher
        wanted = {"cosine": comparable, "agreement": logits, "accuracy": labels}
        self.names = [name for name, holds in wanted.items() if holds]
        self.logits = logits
        self._goals: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self, model: PreparedModel) -> Quality:
        """The numbers of a model, which is left in eval mode."""
        with gathered(model, self.teacher):
            return self._measured(model)

    def _measured(self, model: PreparedModel) -> Quality:
        model.eval()
        same_buffers(ranks_of(self.feed), model, self.teacher)
        sums = torch.zeros(len(self.names) + 1, dtype=torch.float64)
        # In the order of the batches: sums are the same for any number of processes.
        for found in evaluated(self.feed, partial(self._batch, model)):
            sums += found
        return {name: float(sums[i] / sums[-1]) for i, name in enumerate(self.names)}

    def _batch(self, model: PreparedModel, batch: Batch, number: int) -> Tensor:
        """What a batch adds to the sums, on the CPU."""
        with self.accelerator.autocast():
            made = self._centred(main_output(model(batch.images)).float())
        goal = made if model is self.teacher else self._goal(number, batch.images)
        found = [_sum(name, made, goal, batch.labels) for name in self.names]
        return torch.stack([*found, made.new_tensor(len(made), dtype=torch.float64)]).cpu()

    def _centred(self, output: Tensor) -> Tensor:
        """Logits without their mean over the classes, which means nothing; embeddings as is."""
        return output - output.mean(1, keepdim=True) if self.logits else output

    def _goal(self, number: int, images: Tensor) -> Tensor:
        """The teacher's output for a batch, computed once where it is small."""
        if number in self._goals:
            return self._goals[number].to(images.device)
        with self.accelerator.autocast():
            goal = self._centred(main_output(self.teacher(images)).float())
        if goal.dim() == 2:
            self._goals[number] = goal.cpu()
        return goal


def _sum(name: str, made: Tensor, goal: Tensor, labels: Tensor) -> Tensor:
    """Sum of a number over the pictures of a batch, in fp64."""
    if name == "accuracy":
        return (made.argmax(1) == labels).double().sum()
    if name == "agreement":
        return (made.argmax(1) == goal.argmax(1)).double().sum()
    cosine = F.cosine_similarity(made.double(), goal.double(), dim=1)
    return cosine.flatten(1).mean(1).sum() if cosine.dim() > 1 else cosine.sum()


class DistilWatch(Watch):
    """Measures the student after every epoch.

    Attributes:
        before: Quality of the models before the training: "teacher" and "student".
        rows: Quality of the student after each epoch.
    """

    def __init__(self, title: str, evaluate: Evaluator, student: PreparedModel) -> None:
        self.title, self.evaluate, self.student = title, evaluate, student
        self.before: dict[str, Quality] = {}
        self.rows: list[Row] = []

    def on_epoch(self, epoch: int, step: int, lr: float) -> Row:
        """See ``Watch``; the row holds the numbers."""
        found = self.evaluate(self.student)
        LOG.info("%s epoch %d  %s", self.title, epoch + 1, in_words(found))
        row: Row = {"step": step, "epoch": epoch + 1, **found}
        self.rows.append(row)
        return row

    def newest(self) -> Quality:
        """Quality of the student after the last epoch."""
        return {name: float(self.rows[-1][name]) for name in self.evaluate.names}

    def state_dict(self) -> dict[str, Any]:
        """See ``Watch``."""
        return {"distil": {"before": self.before, "rows": self.rows}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``Watch``."""
        self.before, self.rows = state["distil"]["before"], state["distil"]["rows"]


def in_words(quality: Quality) -> str:
    """Numbers and their names, in one line."""
    return "  ".join(f"{name} {value:.4f}" for name, value in quality.items())
