# SPDX-License-Identifier: Apache-2.0
"""The stages of the example: pruning in several ways, distillation, times."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kdfast
from examples.distil import Distiller
from examples.pictures import Pictures, normalised, training_feed
from examples.saliency import others
from examples.saliency.config import Config
from examples.saliency.data import Crops, Split, whole
from examples.saliency.model import MEAN, SIDE, STD, Saliency
from examples.saliency.quality import Answers, agreement, answers, correlation
from examples.training import train
from kdfast.machine.timing import interleave, summarize
from kdfast.trainer.watch import Row

# Held-out pictures that the log looks at after every epoch; no run chooses anything by them.
GLANCE = 5
BUDGET = "compensated, one budget"
ALL = f"{BUDGET}, all pictures"


@dataclass(frozen=True)
class Stages:
    """One run of the example.

    Attributes:
        config: All settings.
        model: The whole model.
        pictures: All pictures.
        folder: Checkpoints and logs go here.
    """

    config: Config
    model: Saliency
    pictures: Split
    folder: Path

    def batches(self, images: Tensor) -> list[Tensor]:
        """Squares as batches for the model."""
        return list(normalised(whole(images), MEAN, STD).split(self.config.batch))

    @cached_property
    def held(self) -> list[Tensor]:
        """What everything is measured on."""
        return self.batches(self.pictures.held)

    @cached_property
    def want(self) -> Answers:
        """What the whole model says of it."""
        return answers(self.model, self.held)

    def row(self, model: Saliency, **more: Any) -> dict[str, Any]:
        """What the result file says of a model."""
        cost = kdfast.pruning_report(model, keep=()).full
        size = {"parameters": cost.params, "macs": cost.flops // 2, "heads": cost.heads}
        return {**agreement(answers(model, self.held), self.want), **size, **more}

    def pruned(self) -> dict[str, Saliency]:
        """The model with half of every block's heads and units, in several ways, not trained."""
        model, keep = self.model, self.config.keep
        data = self.batches(self.pictures.calibrate)
        calibration, scores, units = self._scored(data)
        heads = kdfast.select_heads(scores, keep, "block", 0)
        mlp = kdfast.select_heads(units, keep, "block", 0)
        ways: dict[str, dict[str, Any]] = {
            "cut": {},
            "mean": {"mean_context": True, "data": data},
            "compensated at once": {"compensate": calibration},
            "compensated": {"compensate": calibration, "data": data, "sequential": True},
        }
        made = {
            name: kdfast.prune_heads(model, heads, mlp=mlp, **given) for name, given in ways.items()
        }
        for method in others.METHODS:
            made[f"Torch-Pruning, {method}"] = others.pruned(model, method, keep, data)
        return made

    def _scored(
        self, data: list[Tensor]
    ) -> tuple[kdfast.Calibration, kdfast.HeadScores, kdfast.HeadScores]:
        """A calibration on batches, and what every head and every unit is worth by it."""
        calibration = kdfast.calibrate(self.model, data)
        heads = kdfast.head_scores(self.model, "reconstruction", calibration)
        return calibration, heads, kdfast.mlp_scores(self.model, "reconstruction", calibration)

    def compensated(self, images: Tensor) -> tuple[Saliency, dict[str, Any]]:
        """The model with half of the blocks' MACs, in one budget for all, not trained; its row.

        Args:
            images: Squares to select and compensate with.
        """
        start, model, data = time.process_time(), self.model, self.batches(images)
        calibration, scores, units = self._scored(data)
        heads, mlp = kdfast.select_together(model, scores, units, self.config.keep)
        small = kdfast.prune_heads(
            model, heads, mlp=mlp, compensate=calibration, data=data, sequential=True
        )
        return small, self.row(small, cpu_s=time.process_time() - start, pictures=len(images))

    def distilled(
        self, name: str, start: Saliency, heads: Sequence[Sequence[int]] | None = None
    ) -> tuple[Saliency, dict[str, Any]]:
        """A pruned model after the distillation, and its row.

        Args:
            name: Of the folder.
            start: The pruned model; it stays as it is.
            heads: See ``Distiller``.
        """
        config = self.config
        student, teacher = copy.deepcopy(start), copy.deepcopy(self.model)
        for model in (student, teacher):
            # Under autocast to bf16 this is what makes it fast.
            kdfast.accelerate(model)
        # What was pruned is trained. The decoder, which is used to the original's tokens, and the
        # embeddings are whole; a step of Adam on pixels would move all tokens far.
        student.requires_grad_(False)
        student.backbone.blocks.requires_grad_(True)
        weights = asdict(config.distil)
        output = partial(map_loss, correlated=weights.pop("correlation"))
        module = Distiller(student, teacher, output, heads=heads, **weights)
        crops = Pictures(self.pictures.learn, None, Crops(config.seed, config.shortest))
        feed = training_feed(crops, config.recipe.batch, config.seed, MEAN, STD)
        meta = {"config": asdict(config), "pictures": len(self.pictures.learn), "name": name}
        some = self.batches(self.pictures.held[:GLANCE])
        want = answers(self.model, some)

        def evaluate() -> Row:
            found = agreement(answers(student, some), want)
            return {"pearson": found["pearson"], "cosine": found["cosine"]}

        path = self.folder / name
        cpu, wall = train(name, module, feed, config.recipe, path, meta, evaluate)
        return student, self.row(student, cpu_s=cpu, wall_s=wall, epochs=config.recipe.epochs)


def map_loss(mine: Tensor, goal: Tensor, _: Tensor | None, *, correlated: float) -> Tensor:
    """Mean over pixels of KL(teacher || student) of the importance as a probability, and more.

    The divergence hardly sees the shape of a flat map; the correlation does not see its height.

    Args:
        mine: (B, H, W) logits.
        goal: Those of the teacher.
        correlated: Weight of one minus the correlation of the maps, as in DIST
            (arXiv 2205.10536), mean over pictures.
    """
    own, other = (torch.stack([x, torch.zeros_like(x)], -1) for x in (mine, goal))
    loss, _, _ = kdfast.kd_loss(own, other, None, temperature=1.0, alpha=1.0)
    maps = (x.sigmoid().flatten(1) for x in (mine, goal))
    return loss + correlated * (1 - correlation(*maps).mean())


@torch.no_grad()
def times(models: dict[str, Saliency], rounds: int) -> dict[str, dict[str, Any]]:
    """Milliseconds of one picture, of every model as it is and accelerated, taken in turns."""
    image = torch.randn(1, 3, SIDE, SIDE)
    ways: dict[tuple[str, str], Saliency] = {}
    for name, model in models.items():
        fast = copy.deepcopy(model).eval()
        kdfast.accelerate(fast)
        ways |= {(name, "plain"): model.eval(), (name, "accelerated"): fast}
    calls = {f"{name}|{kind}": partial(model, image) for (name, kind), model in ways.items()}
    taken = {key: summarize(rows) for key, rows in interleave(calls, rounds=rounds).items()}
    found: dict[str, dict[str, Any]] = {name: {} for name in models}
    for name, kind in ways:
        found[name][kind] = taken[f"{name}|{kind}"]
    return found
