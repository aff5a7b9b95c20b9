# SPDX-License-Identifier: Apache-2.0
"""What a link does beside its steps: metrics, averaged weights, the best epoch, and patience."""

from __future__ import annotations

import time
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from kdfast.chain.evaluate import ClassEvaluator
from kdfast.chain.link_run import LinkRun
from kdfast.chain.links import LinkModel
from kdfast.chain.metrics import Meter
from kdfast.chain.step import LinkStep
from kdfast.configs.fields import as_config_error
from kdfast.data.labelled import LabelledImages
from kdfast.machine.memory import peak_mib, reset_peak
from kdfast.trainer.commits import BEST, step_of
from kdfast.trainer.feed import Feed
from kdfast.trainer.logs import LOG
from kdfast.trainer.sharding import gathered
from kdfast.trainer.step import StepResult
from kdfast.trainer.watch import Row, Watch

METRICS = ("loss", "accuracy", "precision", "recall", "f1_score")
WEIGHTED = ("weighted_precision", "weighted_recall", "weighted_f1_score")
# Values whose best epoch is kept for the report.
RECORDS = ("val_accuracy", "val_f1_score", "train_accuracy")


class LinkWatch(Watch):
    """Follows the training of a link and says when it ends.

    Attributes:
        headline: See ``Watch``; the epoch with the highest one is the best.
        best: Row of the best epoch so far, as in the CSV.
        records: The best value of each of ``RECORDS`` and its epoch.
    """

    headline: str

    def __init__(
        self,
        run: LinkRun,
        student: LinkModel,
        step: LinkStep,
        val: Feed[LabelledImages],
        evaluate: ClassEvaluator,
        batch: int,
    ) -> None:
        """Set up.

        Args:
            run: What is trained.
            student: The model that is trained.
            step: Takes the steps; its number of pieces is logged, and saved with the watch.
            val: Held-out images.
            evaluate: What measures.
            batch: Images per step, saved with the watch.
        """
        self.run, self.student, self.step, self.val = run, student, step, val
        self.headline = "val_auc" if run.data.task == "multilabel" else "val_accuracy"
        self.batch = batch
        self.evaluate = evaluate
        self.accelerator: Accelerator = evaluate.accelerator
        decay = run.config.optim.ema
        self.ema = None if decay is None else ModelEmaV3(student, decay=decay)
        self.meter = Meter(run.data.task, len(run.data.class_names), scores=False)
        self.best: Row = {}
        self.records: dict[str, list[float]] = {}
        self.new_best, self.waited = False, 0
        self.elapsed, self.began = 0.0, time.monotonic()

    @property
    def model(self) -> nn.Module:
        """The model that is evaluated and passed on: the averaged one where there is such."""
        return self.student if self.ema is None else self.ema.module

    def on_start(self) -> None:
        """See ``Watch``; the peak of memory is measured from here on."""
        reset_peak(self.accelerator.device)
        self.began = time.monotonic()

    def on_step(self, step: int, result: StepResult) -> None:
        """See ``Watch``."""
        if self.ema is not None:
            self.ema.update(self.student, step=step)
        self.meter.add(*result.outputs)

    def on_epoch(self, epoch: int, step: int, lr: float) -> Row:
        """See ``Watch``; the row holds the metrics on training and held-out images."""
        row = self._row(epoch, step, lr)
        self._judge(row)
        LOG.info(
            "%s epoch %d/%d  loss %.3f val %.3f  acc %.2f val %.2f%s",
            *(self.run.link.role, epoch + 1, self.run.link.epochs),
            *(row["train_loss"], row["val_loss"], row["train_accuracy"], row["val_accuracy"]),
            " *" if self.new_best else "",
        )
        self.meter.reset()
        self.elapsed, self.began = 0.0, time.monotonic()
        return row

    def _row(self, epoch: int, step: int, lr: float) -> Row:
        train = self.meter.compute()
        seconds = self._seconds()
        count = self.meter.count * self.accelerator.num_processes
        with gathered(self.model):
            found = [self.evaluate(self.model, self.val).compute()]
        # All have to stop at the same epoch, whatever the last bits of a sum on their device.
        broadcast_object_list(found)
        val = found[0]
        peaks = peak_mib(self.accelerator.device)
        row: Row = {"epoch": epoch + 1}
        row |= {f"train_{name}": train[name] for name in METRICS}
        row |= {f"val_{name}": val[name] for name in METRICS}
        row["learning_rate"] = lr
        row["epoch_time_sec"] = self._seconds()
        row["gpu_memory_mb"] = peaks["gpu"]
        row["step"] = step
        row["train_top5_accuracy"] = train["top5_accuracy"]
        row |= {f"val_{name}": val[name] for name in ("top5_accuracy", *WEIGHTED, "auc")}
        row["images_per_s"] = count / max(seconds, 1e-9)
        row["gpu_reserved_mb"], row["host_memory_mb"] = peaks["gpu_reserved"], peaks["host"]
        row["parts"] = self.step.parts
        return row

    def _seconds(self) -> float:
        """Time of the epoch so far, in all parts of the run."""
        return self.elapsed + time.monotonic() - self.began

    def _judge(self, row: Row) -> None:
        """Note the best epoch, or that one more was not better."""
        for name in RECORDS:
            if name not in self.records or row[name] > self.records[name][0]:
                self.records[name] = [float(row[name]), int(row["epoch"])]
        self.new_best = not self.best or self._score(row) > self._score(self.best)
        if self.new_best:
            self.best, self.waited = dict(row), 0
            return
        self.waited += 1
        if self.finished():
            role = self.run.link.role
            LOG.info("%s: no better epoch for %d, stopping early", role, self.waited)

    def _score(self, row: Row) -> tuple[float, float]:
        """Accuracy (AUC for several labels per image), then the loss; higher is better."""
        return row[self.headline], -row["val_loss"]

    def finished(self) -> bool:
        """See ``Watch``: whether ``patience`` is over."""
        patience = self.run.config.patience
        return patience is not None and self.waited >= patience

    def is_best(self) -> bool:
        """See ``Watch``."""
        best, self.new_best = self.new_best, False
        return best

    def state_dict(self) -> dict[str, Any]:
        """See ``Watch``."""
        return {
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "chain": {
                "batch": self.batch,
                "parts": self.step.parts,
                "meter": self.meter.state_dict(),
                "best": self.best,
                "records": self.records,
                "waited": self.waited,
                "elapsed": self._seconds(),
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``Watch``."""
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        chain = state["chain"]
        self.step.parts, self.best, self.waited = chain["parts"], chain["best"], chain["waited"]
        self.records, self.elapsed = chain["records"], chain["elapsed"]
        self.meter.load_state_dict(chain["meter"], self.accelerator.device)
        self._find_best()

    def _find_best(self) -> None:
        """Hold the record of the best epoch against the file; without its weights it is void.

        That is so where ``previous.pt`` or ``best.pt`` was used or removed by hand.

        Raises:
            ConfigError: The file is damaged.
        """
        path = self.run.checkpoints / BEST
        with as_config_error():
            step = step_of(path) if path.is_file() else None
        if self.best and self.best["step"] != step:
            text = "%s: the weights of the best epoch, %d, are gone; the best of the others counts"
            LOG.warning(text, self.run.link.role, self.best["epoch"])
            self.best, self.waited = {}, 0
