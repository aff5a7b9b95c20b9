# SPDX-License-Identifier: Apache-2.0
"""The training steps of a config, built as the trainers build them, but without data and files."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kdfast.chain.links import LinkModel, build_link, links_of
from kdfast.chain.objective import Objective
from kdfast.configs import ChainConfig, Config, plain
from kdfast.configs.chain import per_link
from kdfast.data.scenes import CLASSES
from kdfast.memory.measure import MemoryPlan, Step, optimizer_of, plan_step
from kdfast.models.dense_head import DenseHead
from kdfast.models.eva import EVAViT, eva_vit_l_orion
from kdfast.nn import accelerate
from kdfast.pruning.select import kept_counts
from kdfast.recovery.objective import Distiller
from kdfast.trainer.optim import adamw, param_groups

PRECISION = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Job:
    """One stage of a config.

    Attributes:
        title: Models of the stage.
        build: Makes the step, with checkpointing or not.
        batch: Images per step that the config says; None: it asks the planner.
        image_size: (height, width).
        amp: Dtype of autocast.
        checkpointing: What the config says.
    """

    title: str
    build: Callable[[bool], Step]
    batch: int | None
    image_size: tuple[int, int]
    amp: torch.dtype | None
    checkpointing: bool

    def plan(self, batch: int, checkpointing: bool, device: str = "cuda") -> MemoryPlan:
        """Predicted peak with this batch."""
        return plan_step(
            lambda: self.build(checkpointing),
            batch,
            image_size=self.image_size,
            amp=self.amp,
            checkpointing=checkpointing,
            device=device,
        )


def jobs_of(config: Config | ChainConfig, classes: int = 10) -> list[Job]:
    """The stages of a config that train on the GPU, in their order.

    Args:
        config: Its files need not exist: an ORION checkpoint is taken to be EVA-L.
        classes: Of a chain's data, which only the data knows.
    """
    if isinstance(config, ChainConfig):
        return [_link_job(config, index, classes) for index in range(len(config.chain))]
    return [_pruning_job(config)]


def _pruning_job(config: Config) -> Job:
    fit, run = config.teacher.fit, config.run

    def build(recompute: bool) -> Step:
        teacher = (
            eva_vit_l_orion(with_cp=False)
            if config.teacher.checkpoint is not None or fit is None
            else EVAViT(**plain(fit.model), with_cp=False)
        )
        counts = kept_counts("plan", config.prune.keep, [len(heads) for heads in teacher.heads])
        # Which heads stay has no influence on memory.
        heads = [held[:count] for held, count in zip(teacher.heads, counts, strict=True)]
        changes = {"heads": heads, "drop_path_rate": config.distill.drop_path}
        student = EVAViT(**{**teacher.config, **changes, "with_cp": recompute})
        head = None
        if fit is not None and config.teacher.checkpoint is None:
            patch = fit.model.patch_size
            head = DenseHead(fit.model.embed_dim, fit.head_dim, len(CLASSES), patch)
        distiller = Distiller(student, teacher, head, config.distill)

        def loss(images: Tensor, _: Tensor) -> Tensor:
            labels = None
            if head is not None:
                labels = torch.zeros((len(images), *images.shape[2:]), dtype=torch.int64)
            total: Tensor = distiller(images, labels, 0)["total"]
            return total

        def optimizer(module: nn.Module) -> torch.optim.Optimizer:
            return adamw(param_groups(module, config.optim, len(student.blocks)), config.optim)

        frozen: list[nn.Module] = [teacher] if head is None else [teacher, head]
        return Step(distiller, loss, frozen, optimizer)

    keep = f"{config.prune.keep:.0%}" if isinstance(config.prune.keep, float) else config.prune.keep
    return Job(
        f"{config.name}: distil into {keep} of the heads",
        build,
        run.batch_size,
        config.data.size,
        PRECISION[run.precision],
        run.checkpointing,
    )


def _link_job(config: ChainConfig, index: int, classes: int) -> Job:
    # Where the weights come from has no influence on memory, and they need not be there.
    links = [replace(link, init="scratch") for link in links_of(config)]
    link, above = links[index], links[index - 1] if index else None

    def model(which: int, recompute: bool) -> LinkModel:
        made = build_link(links[which], classes, checkpointing=recompute)
        if config.accelerate:
            accelerate(made.net)
        return made

    def build(recompute: bool) -> Step:
        student = model(index, recompute)
        teacher = None
        if above is not None and not config.cache:
            teacher = model(index - 1, False).requires_grad_(False).eval()
        objective = Objective(
            student,
            teacher,
            "multiclass",
            config.distill,
            epochs=link.epochs,
            distilled=above is not None,
        )

        def loss(images: Tensor, labels: Tensor) -> Tensor:
            kept = None
            if above is not None and teacher is None:
                kept = torch.zeros(len(images), classes)
            total: Tensor = objective(images, labels, 0, kept)["total"]
            return total

        frozen: list[nn.Module] = [] if teacher is None else [teacher]
        if config.optim.ema is not None:
            frozen.append(copy.deepcopy(student).requires_grad_(False))
        # Not fused: the chain makes its optimiser by timm, also AdamW.
        return Step(objective, loss, frozen, optimizer_of(config.optim.opt, fused=False))

    batch = per_link(config.batch, index)
    taught = f" taught by {above.model}" if above is not None else ""
    return Job(
        f"{config.name}, {link.role}: {link.model}{taught}",
        build,
        None if batch == "auto" else int(batch),
        (config.data.size, config.data.size),
        PRECISION[config.precision],
        config.checkpointing,
    )
