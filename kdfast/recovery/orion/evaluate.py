# SPDX-License-Identifier: Apache-2.0
"""Held-out quality of a backbone through ORION's heads: boxes, lanes, and the features themselves.

B batch, C channels, V views, (H, W) pixels, (h, w) grid of patches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kdfast.data.orion.clips import ClipSampler
from kdfast.machine.turns import in_turns
from kdfast.models.eva import EVAViT
from kdfast.models.orion import Batch, HeadsMemory, OrionHeads
from kdfast.models.orion.boxes import Detections as Found
from kdfast.models.orion.boxes import FoundLanes
from kdfast.models.orion.config import CLASSES, LANE_CLASSES
from kdfast.recovery.detection_metrics import Detections, DetectionScore, score_detections
from kdfast.recovery.map_metrics import Lines, MapScore, score_lines
from kdfast.recovery.orion.feed import Frames
from kdfast.trainer.held_out import ranks_of, same_buffers
from kdfast.trainer.sharding import gathered


@dataclass(frozen=True)
class FrameResult:
    """What the heads found in one frame.

    Attributes:
        index: The frame's index in its dataset.
        objects: Boxes, on the ground.
        lanes: Lanes.
    """

    index: int
    objects: Found
    lanes: FoundLanes


# Of one frame: boxes found and true, lanes found and true.
Row = tuple[Detections, Detections, Lines, Lines]


@dataclass(frozen=True)
class FrameScores:
    """Figures of one backbone.

    Attributes:
        detection: Boxes.
        map: Lanes.
        frames: Frames that were measured.
    """

    detection: DetectionScore
    map: MapScore
    frames: int

    def figures(self) -> dict[str, float]:
        """The figures of a table: mAP of both, and the mean errors of the hits."""
        errors = ("translation", "scale", "orientation", "velocity")
        means = {kind: self.detection.mean_error(kind) for kind in errors}
        return {
            "mAP": self.detection.mean_precision,
            "map mAP": self.map.mean_precision,
            **means,
        }


class FrameEvaluator:
    """Measures backbones through the same heads on the same held-out frames.

    Attributes:
        name: "mAP": mean of the boxes' and the lanes' average precision.
    """

    name = "mAP"

    def __init__(
        self, accelerator: Accelerator, feed: Frames, heads: OrionHeads, limit: int | None
    ) -> None:
        """Set up.

        Args:
            accelerator: Autocast.
            feed: Held-out frames, shared among processes or all of them in this one.
            heads: What turns features into boxes and lanes.
            limit: Images to use over all processes, six a frame; None: all.
        """
        self.accelerator, self.feed, self.heads = accelerator, feed, heads
        self.limit = None if limit is None else max(1, limit // feed.dataset.views)

    def __call__(self, backbone: nn.Module) -> float:
        """The mean of both mAPs, without those that have nothing to find."""
        with gathered(backbone):
            figures = self.scores(backbone).figures()
        known = [v for v in (figures["mAP"], figures["map mAP"]) if not np.isnan(v)]
        return float(np.mean(known)) if known else 0.0

    def scores(self, backbone: nn.Module) -> FrameScores:
        """All figures of a backbone; it and the heads are left in eval mode."""
        rows = self.rows(backbone)
        boxes = score_detections([r[0] for r in rows], [r[1] for r in rows], CLASSES)
        lines = score_lines([r[2] for r in rows], [r[3] for r in rows], LANE_CLASSES)
        return FrameScores(boxes, lines, len(rows))

    def rows(self, backbone: nn.Module) -> list[Row]:
        """Boxes and lanes of all frames, as one process finds them, in their order."""
        ranks = ranks_of(self.feed)
        same_buffers(ranks, backbone, self.heads)
        found = list(in_turns(ranks, self.results(backbone), self._row))
        return [row for _, row in sorted(found, key=itemgetter(0))]

    def _row(self, found: tuple[FrameResult, Batch], number: int) -> tuple[int, Row]:
        """Place of a frame among all, and what it shows."""
        result, batch = found
        truth, lanes = batch.objects[0], batch.lanes[0]
        return self._clips.places[result.index], (
            _boxes(result.objects),
            Detections(truth.boxes.cpu().numpy(), truth.labels.cpu().numpy()),
            _lines(result.lanes),
            Lines(lanes.points.cpu().numpy(), lanes.labels.cpu().numpy()),
        )

    @property
    def _clips(self) -> ClipSampler:
        sampler = self.feed.sampler
        assert isinstance(sampler, ClipSampler)
        return sampler

    def first_clip(self) -> int:
        """Frames of the first clip that are measured."""
        length = len(self._clips.clips[0])
        return length if self.limit is None else min(length, self.limit)

    @torch.no_grad()
    def results(self, backbone: nn.Module) -> Iterator[tuple[FrameResult, Batch]]:
        """What the heads find in the frames of this process, in order, with their memory."""
        backbone.eval()
        self.heads.eval()
        memory: HeadsMemory | None = None
        for batch in self.feed.batches(0):
            if self.limit is not None and self._clips.places[batch.index[0]] >= self.limit:
                return
            labels: Any = batch.labels
            with self.accelerator.autocast():
                features = backbone(batch.images)
            output, memory = self.heads(features, labels.frame, memory, tokens=False)
            objects = output.detection.decode()[0].on_the_ground()
            yield FrameResult(batch.index[0], objects, output.map.decode()[0]), labels


def _boxes(found: Found) -> Detections:
    arrays = (found.boxes, found.labels, found.scores)
    boxes, labels, scores = (x.float().cpu().numpy() for x in arrays)
    return Detections(boxes, labels.astype(np.int64), scores)


def _lines(found: FoundLanes) -> Lines:
    arrays = (found.points, found.labels, found.scores)
    points, labels, scores = (x.float().cpu().numpy() for x in arrays)
    return Lines(points, labels.astype(np.int64), scores)


@torch.no_grad()
def fidelity(student: EVAViT, teacher: EVAViT, images: Tensor) -> list[tuple[int, float, float]]:
    """Likeness of the residual streams: block, cosine, squared error over the teacher's square.

    Args:
        student: Any backbone with the teacher's blocks.
        teacher: What it is compared with.
        images: (B, 3, H, W).
    """
    blocks = list(range(len(teacher.blocks) - 1))
    ours = student.eval().trace(images, features=blocks)
    theirs = teacher.eval().trace(images, features=blocks)
    rows = [(at, ours.features[at], theirs.features[at]) for at in blocks]
    rows.append((len(blocks), ours.output.movedim(1, -1), theirs.output.movedim(1, -1)))
    out = []
    for at, a, b in rows:
        a, b = a.double().flatten(0, -2), b.double().flatten(0, -2)
        cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1).mean()
        out.append((at, float(cosine), float((a - b).square().sum() / b.square().sum())))
    return out
