# SPDX-License-Identifier: Apache-2.0
"""What a recovery run needs: checkpoint, data, memory and disk."""

from __future__ import annotations

from pathlib import Path

import torch

from kdfast import data
from kdfast.configs import Config, plain
from kdfast.data.orion.frames import OrionFrames
from kdfast.machine.needs import NO_FIT, Need, disk_need
from kdfast.memory.ledger import PARAMETERS
from kdfast.memory.steps import before_need, device_of, memory_need
from kdfast.models.eva import EVAViT
from kdfast.models.orion.checkpoint import load_orion_heads
from kdfast.recovery.planning import recovery_step
from kdfast.resolve.backbone import load_eva


def recovery_needs(config: Config) -> list[Need]:
    """Checkpoint, data, memory of a training step, and disk of a run of ``config``."""
    try:
        model, checkpoint = _teacher(config)
    except (OSError, ValueError) as error:
        fix = "--set teacher.checkpoint=FILE; docs/use/eva.md says what fits"
        return [Need("checkpoint", str(error), fix, NO_FIT), _data(config)]
    device = device_of(config.run.device)
    step = recovery_step(config, model.config)
    plan = step.configured_plan(device)
    fix = "--set run.batch_size=1 --set run.checkpointing=true"
    # The student is written twice more: as it is before the training, and as the result.
    students = 2 * plan.categories[PARAMETERS]
    return [
        checkpoint,
        _data(config),
        *([] if step.before is None else [before_need(step.before, device)]),
        memory_need([plan], fix),
        disk_need(config.output, plan.checkpoint_bytes, students),
    ]


def _teacher(config: Config) -> tuple[EVAViT, Need]:
    path = config.teacher.checkpoint
    if path is not None:
        model = load_eva(Path(path).expanduser(), "teacher.checkpoint", **config.teacher.shape())
        found = f"{path}: {len(model.heads)} blocks of {max(map(len, model.heads))} heads"
        if config.data.kind == "frames":
            load_orion_heads(Path(path).expanduser())
            found += ", with the heads for boxes and lanes"
        return model, Need("checkpoint", found)
    if config.teacher.fit is None:
        raise ValueError("neither teacher.checkpoint nor teacher.fit is set")
    with torch.device("meta"):
        model = EVAViT(**plain(config.teacher.fit.model))
    return model, Need("checkpoint", "none: a small teacher is trained first, and kept")


def _data(config: Config) -> Need:
    spec = config.data
    if spec.kind == "scenes":
        return Need("data", f"scenes, rendered here: {spec.frames} frames of six views")
    if spec.kind == "frames":
        return _frames(config)
    try:
        images = data.build(kind=spec.kind, root=spec.root, split="train", size=spec.size)
    except (OSError, ValueError) as error:
        return Need("data", str(error), "--set data.root=FOLDER")
    return Need("data", f"{spec.kind} in {spec.root}: {len(images):,} items to train on")


def _frames(config: Config) -> Need:
    root = Path(str(config.data.root)).expanduser()
    if config.data.sample and not root.exists():
        return Need("data", f"a synthetic set, written to {root} first")
    try:
        frames = {split: len(OrionFrames(root, split=split)) for split in ("train", "val")}
    except (OSError, ValueError) as error:
        return Need("data", str(error), f"kdfast data check --root {root}")
    counts = " and ".join(f"{count:,} {split}" for split, count in frames.items())
    return Need("data", f"frames in {root}: {counts}, six images each")
