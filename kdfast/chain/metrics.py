# SPDX-License-Identifier: Apache-2.0
"""Classification metrics of an epoch, all of torchmetrics, always over all classes, in percent.

N images, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional import classification as tm

TOP = 5


class Meter:
    """Collects the predictions of an epoch on the device; no step waits for it.

    Attributes:
        count: Images so far.
    """

    def __init__(self, task: str, classes: int, *, scores: bool) -> None:
        """Start empty.

        Args:
            task: Kind of classification, as in ``Classification.task``.
            classes: Number of classes, C.
            scores: Keep the logits too, for the AUC and plots; otherwise predictions only.
        """
        self.task, self.classes, self.scores = task, classes, scores
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.count = 0
        self._kept: dict[str, list[Tensor]] = {
            name: [] for name in ("logits", "pred", "top", "target", "loss")
        }

    def add(self, logits: Tensor, target: Tensor, loss: Tensor) -> None:
        """Add a batch.

        Args:
            logits: (B, C).
            target: (B,) int64, or (B, C) ones and zeros of "multilabel".
            loss: Scalar, the mean over the batch.
        """
        logits = logits.detach()
        if self.scores:
            self._kept["logits"].append(logits.float())
        if self.task == "multilabel":
            self._kept["pred"].append(logits > 0)
            self._kept["target"].append(target > 0.5)
        else:
            self._kept["pred"].append(logits.argmax(1))
            best = logits.topk(min(TOP, self.classes), 1).indices
            self._kept["top"].append((best == target[:, None]).any(1))
            self._kept["target"].append(target)
        self._kept["loss"].append(loss.detach().double() * len(logits))
        self.count += len(logits)

    def state_dict(self) -> dict[str, Any]:
        """Everything collected, for a checkpoint."""
        kept = {name: torch.cat(x).cpu() for name, x in self._kept.items() if x and name != "loss"}
        if self._kept["loss"]:
            kept["loss"] = torch.stack(self._kept["loss"]).cpu()
        return {"count": self.count, "kept": kept}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go back to a state of ``state_dict``."""
        self.reset()
        self.count = state["count"]
        for name, value in state["kept"].items():
            value = value.to(device)
            self._kept[name] = list(value) if name == "loss" else [value]

    def gathered(self) -> dict[str, Tensor]:
        """Logits (N, C), predictions, and targets of all batches, on the CPU."""
        names = ("logits", "pred", "target")
        return {name: torch.cat(self._kept[name]).cpu() for name in names if self._kept[name]}

    def compute(self) -> dict[str, float]:
        """``loss``, ``accuracy``, ``top5_accuracy``, ``precision``, ``recall``, ``f1_score`` (means
        over all C classes; a class that neither occurs nor is predicted counts 0), the same three
        weighted by support, and ``auc`` if the logits were kept. NaN where undefined."""
        kept = {name: torch.cat(x) for name, x in self._kept.items() if x and name != "loss"}
        loss = torch.stack(self._kept["loss"]).sum() / self.count
        values = {"loss": float(loss)}
        values |= {name: 100 * x for name, x in self._quality(kept["pred"], kept["target"]).items()}
        top = float(kept["top"].double().mean()) if "top" in kept and self.classes >= TOP else None
        values["top5_accuracy"] = float("nan") if top is None else 100 * top
        values["auc"] = 100 * self._auc(kept) if self.scores else float("nan")
        return values

    def _quality(self, pred: Tensor, target: Tensor) -> dict[str, float]:
        per_class = self.per_class(pred, target)
        values = {name: float(x.double().mean()) for name, x in per_class.items()}
        support = target.sum(0) if self.task == "multilabel" else _counts(target, self.classes)
        share = support.double().cpu() / max(1, int(support.sum()))
        for name, x in per_class.items():
            values[f"weighted_{name}"] = float((x.double() * share).sum())
        hits = (pred == target).double().mean()
        return {"accuracy": float(hits), **values}

    def per_class(self, pred: Tensor, target: Tensor) -> dict[str, Tensor]:
        """``precision``, ``recall`` and ``f1_score`` of each class, (C,) in [0, 1], on the CPU."""
        options: dict[str, Any] = {"average": None, "zero_division": 0, "validate_args": False}
        if self.task == "multilabel":
            options["num_labels"] = self.classes
            calls: Any = (tm.multilabel_precision, tm.multilabel_recall, tm.multilabel_f1_score)
        else:
            options["num_classes"] = self.classes
            calls = (tm.multiclass_precision, tm.multiclass_recall, tm.multiclass_f1_score)
        names = ("precision", "recall", "f1_score")
        return {
            name: call(pred.long(), target.long(), **options).cpu()
            for name, call in zip(names, calls, strict=True)
        }

    def confusion(self, pred: Tensor, target: Tensor) -> Tensor:
        """Counts (C, C) by true class (row) and prediction; (C, 2, 2) for "multilabel"."""
        if self.task == "multilabel":
            counts: Tensor = tm.multilabel_confusion_matrix(
                pred.long(), target.long(), self.classes
            )
        else:
            counts = tm.multiclass_confusion_matrix(pred, target, self.classes)
        return counts.cpu()

    def _auc(self, kept: dict[str, Tensor]) -> float:
        """Mean over the classes that have both kinds of images of one class against the rest."""
        logits, target = kept["logits"], kept["target"]
        if self.task == "multilabel":
            scores, truth = logits.sigmoid(), target.bool()
        else:
            scores = logits.softmax(1)
            truth = target[:, None] == torch.arange(self.classes, device=target.device)
        both = truth.any(0) & ~truth.all(0)
        if not both.any():
            return float("nan")
        areas = [
            tm.binary_auroc(scores[:, i], truth[:, i].long()) for i in both.nonzero().flatten()
        ]
        return float(torch.stack(areas).double().mean())


def _counts(target: Tensor, classes: int) -> Tensor:
    return torch.bincount(target, minlength=classes)
