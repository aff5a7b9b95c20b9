# SPDX-License-Identifier: Apache-2.0
"""Runs a pruning with ORION's heads: their loss in training, boxes and lanes in the report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich import box
from rich.table import Table
from torch import Tensor

from kdfast.configs.fields import as_config_error
from kdfast.configs.recovery import Config
from kdfast.models.eva import EVAViT
from kdfast.models.orion import Batch, OrionHeads
from kdfast.recovery.orion.evaluate import FrameEvaluator, FrameResult, fidelity
from kdfast.recovery.orion.feed import FrameData, build_frames, frame_feed
from kdfast.recovery.orion.objective import TaskDistiller
from kdfast.recovery.orion.pictures import draw_frame
from kdfast.recovery.orion.teacher import get_frame_teacher
from kdfast.recovery.run import Run, started
from kdfast.trainer.logs import LOG
from kdfast.trainer.state import seed_everything
from kdfast.trainer.tables import plain_text


def run_frames(config: Config, accelerator: Accelerator, *, resume: bool) -> int:
    """Prune ORION's backbone and win the loss back through its frozen heads.

    Args:
        config: The run; its data are frames.
        accelerator: Device, precision and processes.
        resume: Go on with the newest run of ``config.output``.

    Raises:
        ConfigError: The config, the data or a checkpoint cannot be used.
        Interrupted: A signal came; the state was saved.
        NonFiniteLoss: A training broke; the state before was saved.
    """
    folder = started(config, accelerator, resume=resume)
    with as_config_error():
        data = build_frames(config, accelerator)
        seed_everything(config.seed)
        teacher, heads = get_frame_teacher(
            config, accelerator, data, folder / "teacher", resume=resume
        )
    FrameRun(config, accelerator, folder, data, teacher, None, resume, heads).train()
    accelerator.wait_for_everyone()
    return 0


@dataclass(frozen=True)
class FrameRun(Run):
    """A pruning run whose task is ORION's.

    Attributes:
        data: The frames.
        task: The frozen heads.
    """

    data: FrameData  # type: ignore[assignment]
    task: OrionHeads

    def distiller(self, student: EVAViT) -> TaskDistiller:
        """See ``Run``."""
        config, streams = self.config.distill, self.data.streams
        return TaskDistiller(student, self.teacher, self.task, config, streams)

    def evaluator(self) -> FrameEvaluator:  # type: ignore[override]
        """Measures backbones by the boxes and lanes that the heads find."""
        limit = self.config.run.eval_images
        return FrameEvaluator(self.accelerator, self.data.held_out, self.task, limit)

    def alone(self) -> FrameEvaluator:
        """Measures all held-out frames in this process, while the others wait for the report."""
        dataset, device = self.data.held_out.dataset, self.accelerator.device
        feed = frame_feed(self.config, dataset, None, device)
        return FrameEvaluator(self.accelerator, feed, self.task, self.config.run.eval_images)

    def finish(self, models: dict[str, EVAViT], quality: dict[str, float]) -> None:
        """See ``Run``; tells boxes, lanes and features apart as well."""
        super().finish(models, quality)
        text = report_frames(self.folder, models, self.alone(), self.teacher)
        LOG.info("\n%s\n", text)
        LOG.info("%-12s %s", "frames", self.folder / "frames.json")

    def shown(self) -> tuple[Tensor, None]:
        """The six images of the first held-out frame."""
        return first_images(self.alone()), None

    def picture(self, models: dict[str, EVAViT], path: Path) -> Path:
        """Boxes and lanes of the truth and of every model, in the last frame of a clip."""
        return draw_results(path, models, self.alone())


# Columns of the table, by nuScenes' names, and the figures that they show.
COLUMNS = {
    "mAP": "mAP",
    "mATE": "translation",
    "mASE": "scale",
    "mAOE": "orientation",
    "mAVE": "velocity",
    "map mAP": "map mAP",
}
MEANING = """boxes and lanes of {frames} held-out frames (docs/use/orion.md); mATE, mASE, mAOE,
mAVE: mean errors of place, size, heading and speed of found boxes; cosine and
squared error: features of the last block, to the teacher's"""


def first_images(evaluate: FrameEvaluator) -> Tensor:
    """Images (V, 3, H, W) of the first frame that is measured."""
    return next(iter(evaluate.feed.batches(0, limit=1))).images


def draw_results(path: Path, models: dict[str, EVAViT], evaluate: FrameEvaluator) -> Path:
    """Picture of the last frame of the first held-out clip, where the memory is full."""
    last = evaluate.first_clip() - 1
    rows: dict[str, dict[str, Any]] = {}
    dataset, matrices = evaluate.feed.dataset, None
    for name, model in models.items():
        result, batch = next(islice(evaluate.results(model), last, None))
        if matrices is None:
            images, matrices = dataset[result.index].images, batch.frame.lidar2img[0]
            rows["truth"] = _truth(batch)
        rows[name] = _found(result)
    assert matrices is not None
    return draw_frame(path, images, matrices, rows)


def _truth(batch: Batch) -> dict[str, Any]:
    objects, lanes = batch.objects[0], batch.lanes[0]
    return {
        "boxes": objects.boxes,
        "labels": objects.labels,
        "lanes": lanes.points,
        "lane_labels": lanes.labels,
    }


def _found(result: FrameResult) -> dict[str, Any]:
    return {
        "boxes": result.objects.boxes,
        "labels": result.objects.labels,
        "scores": result.objects.scores,
        "lanes": result.lanes.points,
        "lane_labels": result.lanes.labels,
        "lane_scores": result.lanes.scores,
    }


def report_frames(
    folder: Path,
    models: dict[str, EVAViT],
    evaluate: FrameEvaluator,
    teacher: EVAViT,
) -> str:
    """Write ``frames.json``: boxes, lanes and features of every model; returns tables as text."""
    content: dict[str, Any] = {}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("model", *COLUMNS, "cosine", "sq. error"):
        table.add_column(head, justify="left" if head == "model" else "right")
    frames, images = 0, first_images(evaluate)
    for name, model in models.items():
        scores = evaluate.scores(model)
        frames = scores.frames
        blocks = fidelity(model, teacher, images)
        figures = scores.figures()
        content[name] = {
            **figures,
            "average precision": scores.detection.precision,
            "errors": scores.detection.errors,
            "lanes": scores.map.precision,
            "blocks": [
                {"block": at, "cosine": cosine, "squared error": error}
                for at, cosine, error in blocks
            ],
        }
        _, cosine, error = blocks[-1]
        words = [f"{figures[column]:.3f}" for column in COLUMNS.values()]
        table.add_row(name, *words, f"{cosine:.4f}", f"{error:.4f}")
    path = folder / "frames.json"
    held = {"frames": frames, "models": content}
    path.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    return f"{plain_text(table)}\n\n{MEANING.format(frames=frames)}"
