# SPDX-License-Identifier: Apache-2.0
"""The options of ``kdfast.distil`` and of ``kdfast distill``; docs/use/distil.md explains them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from kdfast.configs.check import check_device, check_shard
from kdfast.configs.fields import (
    ConfigError,
    Count,
    Fraction,
    Half,
    Natural,
    NonNegative,
    Positive,
    Range,
    build,
)

# Weights of the terms where nothing else is asked for.
WEIGHTS = {"logits": 1.0, "embedding": 1.0, "feature": 0.5, "attention": 0.1}
TERMS = tuple(WEIGHTS)
Side = Annotated[int, Range(8)]


@dataclass(frozen=True)
class DistilConfig:
    """A distillation of one model by another.

    Attributes:
        output: Folder of the run.
        labels: Whether folders of ``data`` are classes, for a cross-entropy and the accuracy.
        epochs: Passes over the training pictures.
        batch_size: Pictures of a step, of each process.
        lr: Peak learning rate of AdamW.
        weight_decay: On weights of two and more dimensions; none on norms and biases.
        warmup: Part of the run in which the learning rate rises.
        clip: Largest L2 norm of the gradient; None: no clipping.
        logits: Weight of the divergence of logits; None: ``WEIGHTS`` where it can be formed.
        embedding: Likewise of the distance of outputs that are no logits.
        feature: Likewise of the distance of the tokens after the blocks.
        attention: Likewise of the distance of the attention maps.
        temperature: Of the logits' divergence.
        alpha: Weight of the distillation beside the labels' cross-entropy.
        attention_kind: Distance of maps, as in ``kdfast.attention_distill``.
        relation_heads: Heads into which the queries and keys of models that were not cut from each
            other are split anew, as in MiniLM; None: heads are paired by groups.
        layers: Of models that were not cut from each other: all their blocks, or the last ones.
        size: Side of the pictures; None: what the models are made for.
        augment: Whether training pictures are cropped, mirrored and changed in colour at random.
        val_fraction: Part of the pictures to measure on, where the folder has no split of its own.
        limit: Largest number of training pictures; None: all.
        memory: GiB that the resized pictures may take; above, they are read every time.
        workers: Loader processes.
        seed: Of the order, the crops and the split.
        precision: Of products: "fp32", "bf16" or "fp16".
        device: "auto", "cuda" or "cpu".
        shard: "fsdp": each of several processes holds a part of teacher, student, gradients and
            optimiser states while it trains, and the models that were given stay so: take those
            of the result; "none": every process holds all of them.
        accelerate: Whether ``kdfast.accelerate`` changes both models first.
        max_steps: Stop and save after so many steps; None: at the end.
        save_every: Steps between checkpoints; one is also saved after each epoch.
        log_every: Steps between rows of the log.
    """

    output: str = "runs/distil"
    labels: bool = False
    epochs: Count = 10
    batch_size: Count = 16
    lr: Positive = 1e-4
    weight_decay: NonNegative = 0.01
    warmup: Fraction = 0.1
    clip: Positive | None = 1.0
    logits: NonNegative | None = None
    embedding: NonNegative | None = None
    feature: NonNegative | None = None
    attention: NonNegative | None = None
    temperature: Positive = 2.0
    alpha: Fraction = 0.7
    attention_kind: Literal["kl", "reverse_kl", "jsd", "mse", "cosine", "logit_mse"] = "kl"
    relation_heads: Count | None = None
    layers: Literal["all", "last"] = "all"
    size: Side | None = None
    augment: bool = True
    val_fraction: Half = 0.1
    limit: Count | None = None
    memory: NonNegative = 1.5
    workers: Natural = 0
    seed: Natural = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: Literal["auto", "cuda", "cpu"] = "auto"
    shard: Literal["none", "fsdp"] = "none"
    accelerate: bool = True
    max_steps: Count | None = None
    save_every: Count = 500
    log_every: Count = 10

    def asked(self, term: str) -> bool:
        """Whether a term was asked for by its name, so that it must not be left out."""
        return bool(getattr(self, term))

    def weight(self, term: str) -> float:
        """Weight of a term where it can be formed."""
        given: float | None = getattr(self, term)
        return WEIGHTS[term] if given is None else given


def distil_config(options: Mapping[str, Any]) -> DistilConfig:
    """The options as a config.

    Args:
        options: Fields of ``DistilConfig`` by name.

    Raises:
        ConfigError: One is unknown or out of range; it lists all that is wrong.
    """
    problems: list[str] = []
    config = build(DistilConfig, options, problems)
    if config is not None:
        problems += check_device(config.device, config.precision)
        problems += check_shard(config.shard, config.precision)
        if not any(config.weight(term) for term in TERMS) and not config.labels:
            problems.append(f"{', '.join(TERMS)}: must not all be 0")
    if problems or config is None:
        raise ConfigError(problems)
    return config
