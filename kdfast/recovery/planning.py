# SPDX-License-Identifier: Apache-2.0
"""The distillation step of a recovery run, for the memory planner."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.configs import Config, plain
from kdfast.data.orion.names import CAMERAS, TRAIN_FRAMES
from kdfast.data.scenes import CLASSES
from kdfast.memory.measure import Step
from kdfast.memory.steps import PRECISION, Before, PlannedStep
from kdfast.models.dense_head import DenseHead
from kdfast.models.eva import EVAViT, eva_vit_l_orion
from kdfast.pruning.select import kept_counts
from kdfast.recovery.heads import heads_of_file
from kdfast.recovery.objective import Distiller
from kdfast.recovery.optim import adamw, param_groups


def recovery_step(config: Config, teacher: Mapping[str, Any] | None = None) -> PlannedStep:
    """The step that distils the teacher into the pruned student.

    Args:
        config: Its files need not exist.
        teacher: Arguments of the teacher's ``EVAViT``; None: those of ``teacher.fit``, or of EVA-L
            where the config names a checkpoint.
    """

    def build(recompute: bool) -> Step:
        original = _teacher(config, teacher)
        student = _student(config, original, recompute)
        head = _head(config)
        distiller = Distiller(student, original, head, config.distill)

        def loss(images: Tensor, _: Tensor) -> Tensor:
            labels = None
            if head is not None:
                labels = torch.zeros((len(images), *images.shape[2:]), dtype=torch.int64)
            total: Tensor = distiller(images, labels, 0)["total"]
            return total

        def optimizer(module: nn.Module) -> torch.optim.Optimizer:
            return adamw(param_groups(module, config.optim, len(student.blocks)), config.optim)

        frozen: list[nn.Module] = [original] if head is None else [original, head]
        return Step(distiller, loss, frozen, optimizer)

    keep = _kept(config)
    frames = config.data.kind == "frames"
    # The heads' own share depends on what they match, and is small beside the backbone's.
    note = ", six images a stream, without the frozen heads" if frames else ""
    return PlannedStep(
        f"{config.name}: distil into {keep}{note}",
        build,
        config.run.batch_size * (len(CAMERAS) if frames else 1),
        config.data.size,
        PRECISION[config.run.precision],
        config.run.checkpointing,
        _compensation(config, teacher),
        epochs=config.run.epochs,
        images=_images(config),
        shard=config.run.shard,
    )


def _kept(config: Config) -> str:
    """What stays of the heads, in words."""
    keep = config.prune.keep
    if config.prune.heads is not None:
        return f"the heads of {config.prune.heads}"
    if isinstance(keep, float):
        return f"{keep:.0%} of the heads"
    return f"{keep} heads a block" if isinstance(keep, int) else "heads by block"


def _images(config: Config) -> int | None:
    """Training images of an epoch as far as the config tells: those of the whole Bench2Drive."""
    data = config.data
    if data.kind == "scenes":
        return data.frames * len(CAMERAS)
    if data.kind == "images" or data.sample:
        return None
    return TRAIN_FRAMES // data.stride * len(CAMERAS)


def _compensation(config: Config, shape: Mapping[str, Any] | None) -> Before | None:
    """The compensation: both models, moments, and the images with two streams of each."""
    prune = config.prune
    if not prune.compensate:
        return None
    with torch.device("meta"):
        teacher = _teacher(config, shape)
        student = _student(config, teacher, False)
    weights = sum(p.nbytes for model in (teacher, student) for p in model.parameters())
    moments = 8 * len(teacher.blocks) * teacher.config["embed_dim"] ** 2
    if prune.mlp_keep is not None:
        moments += 8 * sum(width**2 for width in teacher.mlp_hidden)
    height, width = config.data.size
    patch = teacher.config["patch_size"]
    image = 4 * 3 * height * width
    streams = 2 * 4 * (height // patch) * (width // patch) * teacher.config["embed_dim"]
    views = -(-prune.calibration_views // prune.batch_size) * prune.batch_size
    kept = views if prune.sequential else prune.batch_size
    size = weights + moments + kept * (image + streams)
    fix = "set fewer prune.calibration_views, or prune.sequential to false"
    return Before("the compensation", size, fix)


def _teacher(config: Config, shape: Mapping[str, Any] | None) -> EVAViT:
    fit = config.teacher.fit
    if shape is not None:
        return EVAViT(**{**shape, "with_cp": False})
    if config.teacher.checkpoint is not None or fit is None:
        return eva_vit_l_orion(with_cp=False)
    return EVAViT(**plain(fit.model), with_cp=False)


def _student(config: Config, teacher: EVAViT, recompute: bool) -> EVAViT:
    sizes, prune = [len(heads) for heads in teacher.heads], config.prune
    # A plan may be made before the file is there.
    absent = prune.heads is not None and not Path(prune.heads).expanduser().is_file()
    kept = None if absent else heads_of_file(prune, teacher)
    if kept is None:
        counts = kept_counts("prune.keep", prune.keep, sizes)
    else:
        counts = [len(row) for row in kept]
    # Which heads stay has no influence on memory.
    heads = [held[:count] for held, count in zip(teacher.heads, counts, strict=True)]
    changes: dict[str, Any] = {"heads": heads, "drop_path_rate": config.distill.drop_path}
    if prune.mlp_keep is not None:
        changes["mlp_hidden"] = kept_counts("prune.mlp_keep", prune.mlp_keep, teacher.mlp_hidden)
    return EVAViT(**{**teacher.config, **changes, "with_cp": recompute})


def _head(config: Config) -> DenseHead | None:
    """The dense head, which exists only where the teacher is trained here."""
    fit = config.teacher.fit
    if fit is None or config.teacher.checkpoint is not None:
        return None
    return DenseHead(fit.model.embed_dim, fit.head_dim, len(CLASSES), fit.model.patch_size)
