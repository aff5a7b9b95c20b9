# SPDX-License-Identifier: Apache-2.0
"""AdamW with layer decay, and the learning rate over a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from kdfast.configs.recovery import OptimConfig
from kdfast.trainer.logs import LOG
from kdfast.trainer.schedule import cosine_with_warmup

# Longest warm-up as a part of the run: the recipe's 500 steps belong to a run of 5,500.
WARMUP_SHARE = 0.1


def block_depth(name: str, depth: int) -> int:
    """How many steps of layer decay lie between a parameter and the output.

    Args:
        name: Name of the parameter; ``blocks.<i>.`` anywhere in it places it.
        depth: Number of blocks.

    Returns:
        ``depth - i`` in block i; ``depth + 1`` for the embeddings before the first block; 0 for
        what comes after the blocks (a head).
    """
    parts = name.split(".")
    if "blocks" in parts[:-1]:
        return depth - int(parts[parts.index("blocks") + 1])
    return depth + 1 if {"patch_embed", "pos_embed"} & set(parts) else 0


def param_groups(module: nn.Module, config: OptimConfig, depth: int) -> list[dict[str, Any]]:
    """Groups for AdamW by weight decay and learning-rate factor.

    Args:
        module: Parameters without gradient are left out.
        config: Weight decay and layer decay.
        depth: Number of blocks.

    Returns:
        Groups with ``params``, ``weight_decay``, ``factor`` (of the learning rate) and ``names``.
        One-dimensional parameters (norms, biases) have no weight decay.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = 0.0 if parameter.ndim <= 1 else config.weight_decay
        rate = config.layer_decay
        factor = 1.0 if rate is None else rate ** block_depth(name, depth)
        group = groups.setdefault(
            (decay, factor), {"params": [], "names": [], "weight_decay": decay, "factor": factor}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over groups of ``param_groups``; the learning rate is set before every step."""
    kept = [{key: value for key, value in group.items() if key != "names"} for group in groups]
    return torch.optim.AdamW(kept, lr=config.lr, betas=config.betas, fused=True)


def schedule(config: OptimConfig, total: int) -> Callable[[int], float]:
    """Factor of the learning rate by step, counted from 0.

    A cosine from 1 to ``min_ratio`` over the run; in the first W steps multiplied by a line from
    ``warmup_ratio`` to 1. W is ``warmup``, but at most a tenth of the run.

    Args:
        config: Shape of the schedule.
        total: Optimiser steps of the whole run.
    """
    return cosine_with_warmup(
        total,
        warmup=min(config.warmup, int(total * WARMUP_SHARE)),
        warmup_ratio=config.warmup_ratio,
        min_ratio=config.min_ratio,
    )


def lr_setter(
    optimizer: torch.optim.Optimizer, config: OptimConfig, total: int
) -> Callable[[int], float]:
    """Sets the learning rates of an optimiser of ``adamw`` for a step, and returns the largest.

    Args:
        optimizer: Its groups have a ``factor``.
        config: Shape of the schedule.
        total: Optimiser steps of the whole run.
    """
    factor, cut = schedule(config, total), int(total * WARMUP_SHARE)
    if config.warmup > total * WARMUP_SHARE:
        LOG.info("warm-up of %d steps cut to %d of %d", config.warmup, cut, total)

    def set_lr(step: int) -> float:
        lr = config.lr * factor(step)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        return lr

    return set_lr
