# SPDX-License-Identifier: Apache-2.0
"""The stages of the example: training, pruning in several ways, and winning the loss back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.task import LogitDistillationTask
from torch import Tensor, nn

import kdfast
from examples.cifar10.config import Config
from examples.cifar10.data import Crops, Split
from examples.cifar10.model import MEAN, STD, build
from examples.distil import Distiller
from examples.pictures import Pictures, normalised, training_feed
from examples.training import Supervised, train
from kdfast.trainer.feed import Feed
from kdfast.trainer.watch import Row

# Test pictures that the log looks at after every epoch; nothing is chosen by them.
GLANCE = 1000
# Of an evaluation.
BATCH = 250


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """Share of pictures whose class is right; the model is left in eval mode."""
    model.eval()
    right = 0
    for images, labels in zip(split.images.split(BATCH), split.labels.split(BATCH), strict=True):
        right += int((model(normalised(images, MEAN, STD)).argmax(1) == labels).sum())
    return right / len(split.labels)


@dataclass(frozen=True)
class Stages:
    """One seed of the example.

    Attributes:
        config: All settings.
        learn: Pictures to train on.
        test: Pictures to report on.
        folder: Checkpoints and logs go here.
        seed: Of weights, order and crops.
    """

    config: Config
    learn: Split
    test: Split
    folder: Path
    seed: int

    def feed(self, batch: int) -> Feed[Pictures]:
        """The training pictures."""
        pictures = Pictures(self.learn.images, self.learn.labels, Crops(self.seed))
        return training_feed(pictures, batch, self.seed, MEAN, STD)

    def glance(self, model: nn.Module) -> Callable[[], Row]:
        """What the log of a training says of its model."""
        step = max(1, len(self.test.labels) // GLANCE)
        some = Split(self.test.images[::step], self.test.labels[::step])
        return lambda: {"accuracy": accuracy(model, some)}

    def dense(self) -> tuple[VisionTransformer, dict[str, Any]]:
        """The model after its first training, and its row."""
        config = self.config
        model = build(config.model, self.seed)
        # Under autocast to bf16 a step is then 2.3 times as fast.
        kdfast.accelerate(model)
        first = {"smoothing": config.smoothing, "cutmix": config.cutmix, **asdict(config.train)}
        meta = {"model": asdict(config.model), "train": first, "seed": self.seed}
        cpu, wall = train(
            "dense",
            Supervised(model, config.smoothing, config.cutmix, classes=model.num_classes),
            self.feed(config.train.batch),
            config.train,
            self.folder / "dense",
            meta,
            self.glance(model),
        )
        kdfast.restore(model)
        return model.eval(), self.row(model, cpu_s=cpu, wall_s=wall, epochs=config.train.epochs)

    def row(self, model: nn.Module, **more: Any) -> dict[str, Any]:
        """What the result file says of a model."""
        cost = kdfast.pruning_report(model, keep=()).full
        size = {"parameters": cost.params, "macs": cost.flops // 2, "heads": cost.heads}
        return {"accuracy": accuracy(model, self.test), **size, **more}

    def pruned(self, model: nn.Module) -> dict[str, nn.Module]:
        """Half of the heads and half of the hidden units removed, in several ways."""
        config = self.config.prune
        order = torch.randperm(
            len(self.learn.labels), generator=torch.Generator().manual_seed(self.seed)
        )
        images = normalised(self.learn.images[order[: config.pictures]], MEAN, STD)
        data = list(images.split(config.batch))
        calibration = kdfast.calibrate(model, data)
        scores = kdfast.head_scores(model, "reconstruction", calibration)
        units = kdfast.mlp_scores(model, "reconstruction", calibration)
        heads = kdfast.select_heads(scores, config.keep, "global", 0)
        mlp = kdfast.select_heads(units, config.keep, "global", 0)
        ways: dict[str, dict[str, Any]] = {
            "cut": {},
            "mean": {"mean_context": True, "data": data},
            "compensated": {"compensate": calibration},
            "compensated in sequence": {
                "compensate": calibration,
                "data": data,
                "sequential": True,
            },
        }
        made = {
            name: kdfast.prune_heads(model, heads, mlp=mlp, **given) for name, given in ways.items()
        }
        together = kdfast.select_together(model, scores, units, config.keep)
        made["compensated in sequence, one budget"] = kdfast.prune_heads(
            model, together[0], mlp=together[1], **ways["compensated in sequence"]
        )
        return made

    def recovered(
        self, name: str, start: nn.Module, teacher: nn.Module
    ) -> tuple[nn.Module, dict[str, Any]]:
        """A copy of a pruned model after a short training, and its row.

        Args:
            name: "fine-tuned", "timm" or "distilled".
            start: The pruned model.
            teacher: The model before it was pruned.
        """
        config = self.config
        student = kdfast.prune_heads(start, None)  # a copy
        teacher = kdfast.prune_heads(teacher, None)
        for model in (student, teacher):
            kdfast.accelerate(model)
        module = _objective(name, student, teacher, config)
        meta = {"config": asdict(config), "seed": self.seed, "name": name}
        cpu, wall = train(
            name,
            module,
            self.feed(config.recover.batch),
            config.recover,
            self.folder / name,
            meta,
            self.glance(student),
        )
        row = self.row(student, cpu_s=cpu, wall_s=wall, epochs=config.recover.epochs)
        return student.eval(), row


def _objective(name: str, student: nn.Module, teacher: nn.Module, config: Config) -> nn.Module:
    if name == "fine-tuned":
        return Supervised(student, 0.0)
    if name == "timm":
        return Timm(student, teacher, config)
    distil = config.distil

    def output(mine: Tensor, goal: Tensor, labels: Tensor | None) -> Tensor:
        loss, _, _ = kdfast.kd_loss(
            mine, goal, labels, temperature=distil.temperature, alpha=distil.logits
        )
        return loss

    return Distiller(student, teacher, output, feature=distil.feature, attention=distil.attention)


class Timm(nn.Module):
    """timm's distillation of logits, with the weights and the temperature of ours."""

    def __init__(self, student: nn.Module, teacher: nn.Module, config: Config) -> None:
        super().__init__()
        distil = config.distil
        self.task = LogitDistillationTask(
            student,
            teacher.requires_grad_(False),
            criterion=nn.CrossEntropyLoss(),
            distill_loss_weight=distil.logits,
            task_loss_weight=1 - distil.logits,
            temperature=distil.temperature,
            device=torch.device("cpu"),
            verbose=False,
        )

    def forward(self, images: Tensor, labels: Tensor, epoch: int) -> dict[str, Tensor]:
        """The losses of a batch."""
        found = self.task(images, labels)
        return {
            "total": found["loss"].float(),
            "task": found["task_loss"].detach().float(),
            "output": found["kd_loss"].detach().float(),
        }
