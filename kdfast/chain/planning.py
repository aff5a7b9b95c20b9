# SPDX-License-Identifier: Apache-2.0
"""The training steps of a chain for the memory planner, and the batch that it chooses for one."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdfast.chain.link_run import LinkRun
from kdfast.chain.links import Link, LinkModel, build_link, links_of, switch_checkpointing
from kdfast.chain.objective import Objective
from kdfast.chain.weights import planned_weights
from kdfast.configs.chain import ChainConfig, per_link, stages
from kdfast.configs.fields import ConfigError, as_config_error
from kdfast.memory.measure import Step, optimizer_of
from kdfast.memory.search import BatchPlan, largest
from kdfast.memory.steps import PRECISION, PlannedStep
from kdfast.nn import accelerate
from kdfast.resolve import SourceError, is_saved
from kdfast.resolve.architecture import is_library_name
from kdfast.resolve.trained import find_trained
from kdfast.trainer.commits import load_checkpoint, newest
from kdfast.trainer.logs import LOG
from kdfast.trainer.sharding import units_of

# Batches that the planner may choose.
PLANNED = tuple(2**i for i in range(11))


def chain_steps(config: ChainConfig, classes: int) -> list[PlannedStep]:
    """The steps of all links in their order; the files that the config names need not exist."""
    links = links_of(config)
    teachers: list[Link | None] = [None, *links]
    return [
        link_step(config, link, teacher, classes)
        for link, teacher in zip(links, teachers, strict=False)
    ]


def link_step(config: ChainConfig, link: Link, teacher: Link | None, classes: int) -> PlannedStep:
    """The step that trains a link.

    Args:
        config: The whole chain.
        link: The model that is trained.
        teacher: The link that teaches it; None: none does.
        classes: Number of classes, which only the data knows.
    """

    def model(of: Link, recompute: bool) -> LinkModel:
        # Where the weights come from has no influence on memory, and they need not be there.
        made = build_link(replace(of, init="scratch"), classes, checkpointing=recompute)
        if config.accelerate:
            accelerate(made.net)
        return made

    def build(recompute: bool) -> Step:
        student, above = model(link, recompute), None
        if teacher is not None and not config.cache:
            above = model(teacher, False).requires_grad_(False).eval()
        with as_config_error():
            objective = Objective(
                student,
                above,
                "multiclass",
                config.distill,
                epochs=link.epochs,
                distilled=teacher is not None,
                size=(config.data.size, config.data.size),
                weights=planned_weights(config.distill, "multiclass", classes),
            )

        def loss(images: Tensor, labels: Tensor) -> Tensor:
            kept = None
            if teacher is not None and above is None:
                kept = torch.zeros(len(images), classes)
            total: Tensor = objective(images, labels, 0, kept)[0]["total"]
            return total

        frozen: list[nn.Module] = [] if above is None else [above]
        if config.optim.ema is not None:
            frozen.append(copy.deepcopy(student).requires_grad_(False))
        # Not fused: the chain makes its optimiser by timm, also AdamW.
        return Step(objective, loss, frozen, optimizer_of(config.optim.opt, fused=False))

    batch = per_link(config.batch, link.index)
    taught = "" if teacher is None else f" taught by {teacher.model}"
    return PlannedStep(
        f"{config.name}, {link.role}: {link.model}{taught}",
        build,
        None if batch == "auto" else int(batch),
        (config.data.size, config.data.size),
        PRECISION[config.precision],
        config.checkpointing,
        epochs=link.epochs,
        images=config.data.limit,
        shard=config.shard,
    )


def check_links(config: ChainConfig, classes: int) -> None:
    """Builds every link that the stage needs, and asks whether the terms fit, before any training.

    The models have no memory here; saved ones are read.

    Raises:
        ConfigError: A link cannot be built or sharded, its weights do not fit it, or attention maps
            or features of two links cannot be compared.
    """
    links, chosen = links_of(config), stages(config)
    needed = sorted({i for index in chosen for i in (index - 1, index) if i >= 0})
    models = {index: _without_memory(links[index], classes) for index in needed}
    if config.shard == "fsdp":
        for model in models.values():
            units_of(model)
    if not (config.distill.attention or config.distill.feature):
        return
    for index in chosen:
        if index == 0:
            continue
        with torch.device("meta"), as_config_error():
            Objective(
                models[index],
                models[index - 1],
                "multiclass",
                config.distill,
                epochs=links[index].epochs,
                distilled=True,
                size=(config.data.size, config.data.size),
            )


def _without_memory(link: Link, classes: int) -> LinkModel:
    """A link as it will be built; weights that are to be downloaded are only asked for."""
    if link.init == "pretrained" and not is_saved(link.model):
        link = replace(link, init="scratch")
        try:
            if is_library_name(link.model):
                find_trained(link.model, f"init: {link.role}")
        except SourceError as error:
            raise ConfigError([str(error)]) from error
    with torch.device("meta"):
        return build_link(link, classes)


def batch_size(run: LinkRun, student: LinkModel, device: torch.device, *, resume: bool) -> int:
    """Images per step of a link: the config's, or what the planner finds to fit.

    A resumed link keeps what was planned at its beginning: ``vram_gib`` may be another one now.

    Raises:
        ConfigError: Nothing fits, or the checkpoint is damaged.
    """
    value = per_link(run.config.batch, run.link.index)
    if value != "auto":
        return int(value)
    path = newest(run.checkpoints) if resume else None
    if path is not None:
        with as_config_error():
            return int(load_checkpoint(path)["chain"]["batch"])
    plan = planned_batch(run, device)
    if plan.checkpointing and not run.config.checkpointing:
        LOG.info("%s: fits with checkpointing only, which is switched on", run.link.role)
        switch_checkpointing(student.net, run.link.model)
    LOG.info("%s: batch %d planned\n%s", run.link.role, plan.batch, plan.table)
    return plan.batch


def planned_batch(run: LinkRun, device: torch.device) -> BatchPlan:
    """The largest power of two that fits into ``vram_gib``, or into the GPU.

    Raises:
        ConfigError: Nothing fits, or there is neither a limit nor a GPU.
    """
    config = run.config
    if config.vram_gib is not None:
        vram = int(config.vram_gib * 2**30)
    elif device.type == "cuda":
        vram = torch.cuda.get_device_properties(device).total_memory
    else:
        raise ConfigError(["vram_gib: batch auto needs it where there is no GPU"])
    images = min(config.data.limit or len(run.data.train), len(run.data.train))
    step = link_step(config, run.link, run.teacher, len(run.data.class_names))
    candidates = [size for size in PLANNED if size <= images] or [1]
    count = dist.get_world_size() if dist.is_initialized() else 1
    plan = partial(step.plan, processes=count)
    try:
        return largest(plan, vram, candidates, checkpointing=config.checkpointing)
    except ValueError as error:
        raise ConfigError([f"batch: {run.link.role}: {error}"]) from error
