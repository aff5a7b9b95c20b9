# SPDX-License-Identifier: Apache-2.0
"""The batch of a link: the config's, or the largest one that fits into a given memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from kdfast.chain.links import Link, LinkModel, build_link, switch_checkpointing
from kdfast.configs.chain import per_link
from kdfast.configs.fields import ConfigError
from kdfast.memory import BatchPlan, plan_batch
from kdfast.trainer.logs import LOG

if TYPE_CHECKING:
    from kdfast.chain.stage import Stage

# Batches that the planner may choose.
PLANNED = tuple(2**i for i in range(11))


def batch_size(stage: Stage, student: LinkModel, device: torch.device) -> int:
    """Images per step of a link: the config's, or what ``kdfast.plan`` finds to fit."""
    value = per_link(stage.config.batch, stage.link.index)
    if value != "auto":
        return int(value)
    plan = planned_batch(stage, device)
    if plan.checkpointing and not stage.config.checkpointing:
        LOG.info("%s: fits with checkpointing only, which is switched on", stage.link.role)
        switch_checkpointing(student.net, stage.link.model)
    LOG.info("%s: batch %d planned\n%s", stage.link.role, plan.batch, plan.table)
    return plan.batch


def planned_batch(stage: Stage, device: torch.device) -> BatchPlan:
    """The largest power of two that fits into ``vram_gib``, or into the GPU.

    Raises:
        ConfigError: Nothing fits, or there is neither a limit nor a GPU.
    """
    config, classes = stage.config, len(stage.data.class_names)
    if config.vram_gib is not None:
        vram = int(config.vram_gib * 2**30)
    elif device.type == "cuda":
        vram = torch.cuda.get_device_properties(device).total_memory
    else:
        raise ConfigError(["vram_gib: batch auto needs it where there is no GPU"])
    images = min(config.data.limit or len(stage.data.train), len(stage.data.train))

    def maker(link: Link) -> Callable[[], LinkModel]:
        # What the weights are makes no difference to the plan.
        return lambda: build_link(replace(link, init="scratch"), classes)

    teacher = None if stage.teacher is None or config.cache else maker(stage.teacher)
    try:
        return plan_batch(
            maker(stage.link),
            teacher,
            image_size=config.data.size,
            vram=vram,
            optimizer=config.optim.opt,
            amp={"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision),
            candidates=[size for size in PLANNED if size <= images] or [1],
            checkpointing=config.checkpointing,
        )
    except ValueError as error:
        raise ConfigError([f"batch: {stage.link.role}: {error}"]) from error
