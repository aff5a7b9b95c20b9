# SPDX-License-Identifier: Apache-2.0
"""timm's optimiser and learning-rate schedule, as a chain's config names them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.optim._optim_factory import create_optimizer_v2
from timm.scheduler.scheduler_factory import create_scheduler_v2
from torch import nn

from kdfast.configs.chain import ChainOptimConfig


def timm_optimizer(module: nn.Module, config: ChainOptimConfig) -> torch.optim.Optimizer:
    """Optimiser of all parameters of a module that are trained.

    Raises:
        ValueError: timm has none of that name.
    """
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        module,
        opt=config.opt,
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        layer_decay=config.layer_decay,
    )
    return optimizer


def warmup_of(config: ChainOptimConfig, epochs: int) -> int:
    """Epochs of warm-up in a training of so many: half of them where the config's do not fit."""
    if config.sched == "none" or config.warmup_epochs < epochs:
        return config.warmup_epochs
    return epochs // 2


def timm_lr_setter(
    optimizer: torch.optim.Optimizer, config: ChainOptimConfig, *, epochs: int, per_epoch: int
) -> Callable[[int], float]:
    """Sets the learning rates of an optimiser for a step, and returns the largest.

    Args:
        optimizer: Has the peak learning rates.
        config: Shape of the schedule.
        epochs: Passes over the training data.
        per_epoch: Optimiser steps of each.

    Raises:
        ValueError: timm has no schedule of that name.
    """
    scheduler = None
    if config.sched != "none":
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=config.sched,
            num_epochs=epochs,
            decay_epochs=max(1, epochs // 3),
            min_lr=config.lr * config.min_ratio,
            warmup_epochs=warmup_of(config, epochs),
            warmup_lr=config.lr * config.warmup_ratio,
            step_on_epochs=False,
            updates_per_epoch=per_epoch,
        )
        if scheduler is None:
            raise ValueError(f"optim.sched: timm has none of that name, got {config.sched!r}")

    def set_lr(step: int) -> float:
        if scheduler is not None:
            scheduler.step_update(step)
        return max(float(group["lr"]) for group in optimizer.param_groups)

    return set_lr
