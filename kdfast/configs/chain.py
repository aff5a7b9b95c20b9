# SPDX-License-Identifier: Apache-2.0
"""The typed config tree of a distillation chain; docs/use/vit_chain.md explains how it is used."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from kdfast.configs.fields import (
    Count,
    Fraction,
    Half,
    Natural,
    NonNegative,
    Positive,
    Rate,
    Share,
)

# What a link may start from, besides a checkpoint file.
INITS = ("scratch", "pretrained")


@dataclass(frozen=True)
class ChainDataConfig:
    """The labelled images; kinds and folders are those of ``build_classification``.

    Attributes:
        kind: ``digits`` needs no file; ``imagefolder`` is a folder of classes.
        set: Name of the set where ``kind`` is ``medmnist``, such as ``pathmnist``.
        root: Folder or file of the data; null: the default place of the kind.
        size: Side of the square images that the loader yields; every model resizes from there.
        val_fraction: Part of the training images that is held out where the data has no own split.
        augment: Augmentation of training images.
        variants: Different augmentations of an image; epoch e sees number e modulo ``variants``.
        limit: Use only so many training images, an even part of every class; null: all.
        workers: Loader processes; 0 loads in the training process.
        seed: Seed of split and augmentation; null: the run's, so every seed has its own split.
        verify: Whether files of CIFAR and MedMNIST must be the official ones; false for a set of
            your own in their format.
    """

    kind: str = "digits"
    set: str | None = None
    root: str | None = None
    size: Count = 224
    val_fraction: Half = 0.1
    augment: Literal["default", "none"] = "default"
    variants: Count = 1
    limit: Count | None = None
    workers: Natural = 2
    seed: Natural | None = None
    verify: bool = True


@dataclass(frozen=True)
class ChainDistillConfig:
    """The objective; docs/use/vit_chain.md has the formulas.

    Attributes:
        temperature: T of the distillation loss.
        alpha: Weight of distillation in the first epoch; the task has 1 - alpha.
        schedule: How alpha moves to ``alpha_end`` over the epochs.
        alpha_end: Alpha in the last epoch, unless the schedule is constant.
        label_smoothing: Label smoothing of the task's cross-entropy.
        class_weights: Factors of the task's loss by class: ``none``, ``balanced`` (N / (C n) for n
            of N training images), or a list in the order of the classes.
        pos_weights: For several labels per image, factors of the positive part: ``none``,
            ``balanced`` (negatives / positives of a label), or a list.
        focal_gamma: Exponent of the task's focal term; 0: none.
        focal_alpha: For several labels per image, the focal term's factor of positives, negatives
            have 1 minus it; null: neither.
        attention: Weight of the attention term.
        attention_kind: Kind of ``kdfast.attention_distill``.
        attention_map: ``groups``: student head i imitates teacher head floor(i Ht / Hs);
            ``relation``: queries and keys of all heads are split anew into ``relation_heads``.
        relation_heads: Heads of ``relation``; must divide the width of both models.
        feature: Weight of the feature term.
        feature_kind: Kind of ``kdfast.feature_loss``.
        feature_normalize: Normalisation of ``kdfast.feature_loss``; null: none.
        layers: Student layers of both terms: ``all`` or ``last``; layer i of Ls is compared with
            the teacher's ceil((i + 1) Lt / Ls) - 1.
    """

    temperature: Positive = 4.0
    alpha: Fraction = 0.7
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    alpha_end: Fraction = 0.5
    label_smoothing: Fraction = 0.0
    class_weights: Literal["none", "balanced"] | tuple[NonNegative, ...] = "none"
    pos_weights: Literal["none", "balanced"] | tuple[NonNegative, ...] = "none"
    focal_gamma: NonNegative = 0.0
    focal_alpha: Fraction | None = None
    attention: NonNegative = 0.0
    attention_kind: Literal["kl", "reverse_kl", "jsd", "mse", "cosine", "logit_mse"] = "kl"
    attention_map: Literal["groups", "relation"] = "groups"
    relation_heads: Count = 12
    feature: NonNegative = 0.0
    feature_kind: Literal["mse", "cosine", "smooth_l1"] = "mse"
    feature_normalize: Literal["layer", "channel"] | None = "layer"
    layers: Literal["all", "last"] = "all"


@dataclass(frozen=True)
class ChainOptimConfig:
    """timm's optimiser and scheduler, Mixup, EMA and clipping.

    Attributes:
        opt: Name of ``timm.optim.create_optimizer_v2``; norms and biases get no weight decay.
        lr: Peak learning rate.
        weight_decay: Weight decay.
        momentum: Momentum, for the optimisers that have one.
        layer_decay: Factor of the learning rate from one block to the one before it; null: none.
        sched: Name of ``timm.scheduler.create_scheduler_v2``, or ``none``.
        warmup_epochs: Epochs of linear warm-up; of a shorter run it is half of the epochs.
        warmup_ratio: Part of ``lr`` at the first step of the warm-up.
        min_ratio: Part of ``lr`` that the schedule ends with.
        clip: Largest L2 norm of the gradient; null: no clipping.
        mixup: Alpha of Mixup; 0: off.
        cutmix: Alpha of CutMix; 0: off.
        ema: Decay of the averaged weights, which are then evaluated and passed on; null: none.
    """

    opt: str = "adamw"
    lr: Positive = 3e-4
    weight_decay: NonNegative = 0.05
    momentum: Fraction = 0.9
    layer_decay: Share | None = None
    sched: str = "cosine"
    warmup_epochs: Natural = 5
    warmup_ratio: Share = 0.01
    min_ratio: Fraction = 0.01
    clip: Positive | None = 1.0
    mixup: NonNegative = 0.0
    cutmix: NonNegative = 0.0
    ema: Rate | None = None


@dataclass(frozen=True)
class ChainConfig:
    """Everything that defines a chain of distillations.

    What is given per link is a list with an entry for each link, or one entry for all.

    Attributes:
        name: The config function that this one starts from.
        output: Root of all files; a relative one counts from the working folder.
        note: Printed at the start; says when the embedded default took the place of absent files.
        chain: timm model of every link, the first teacher first.
        model_args: Per link: keyword arguments of ``timm.create_model``.
        init: Per link: ``scratch``, ``pretrained``, or a checkpoint file.
        stage: ``all``; ``teacher`` (first link), ``student`` (last), ``assistant`` (what lies
            between), or ``assistant1`` and so on in longer chains. A link needs the ``best``
            checkpoint of the one before it.
        twin: Train the last link once more without distillation, as a comparison.
        seeds: One run of the chain for each of them.
        vary: ``all``: every link is trained for every seed; ``student``: only the last one (and
            its twin), the links before it are trained once, with the first seed.
        batch: Per link: images per step; ``auto`` asks ``kdfast.plan``.
        vram_gib: Memory that ``auto`` may plan with; null: that of the device.
        epochs: Per link: passes over the training data.
        patience: Epochs without a better validation score after which a link ends; null: never.
        precision: ``fp32``, or autocast in ``bf16`` or ``fp16`` (with loss scaling, on a GPU);
            ``auto``: bf16 on a GPU that has it, else fp32.
        checkpointing: Recompute the blocks in the backward.
        accelerate: Apply ``kdfast.accelerate`` to all models; results are the same within rounding.
        cache: Keep the teacher's outputs on disk instead of running it in every epoch.
        cache_dir: Folder of kept outputs, shared by runs; null: beside the link.
        cache_top_k: Classes of which the cache keeps the output.
        device: ``auto`` takes the GPU if there is one.
        deterministic: cuDNN takes the same kernels in every run; false: the fastest it finds.
        save_every: Steps between checkpoints; one is also saved after each epoch.
        log_every: Steps between rows of the step log.
        eval_batch: Images per forward in evaluation.
        report: File that gets a copy of the comparison; null: none.
        max_steps: Stop a link after so many steps; the schedules keep their length.
        data: The images.
        distill: The objective.
        optim: The optimiser.
    """

    name: str
    output: str = "runs"
    note: str = ""
    chain: tuple[str, ...] = (
        "vit_base_patch16_224",
        "vit_small_patch16_224",
        "vit_tiny_patch16_224",
    )
    model_args: tuple[dict[str, Any], ...] = ()
    init: str | tuple[str, ...] = "scratch"
    stage: str = "all"
    twin: bool = False
    seeds: tuple[Natural, ...] = (42,)
    vary: Literal["all", "student"] = "all"
    batch: Literal["auto"] | Count | tuple[Count, ...] = (8, 16, 32)
    vram_gib: Positive | None = None
    epochs: Count | tuple[Count, ...] = 100
    patience: Count | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    checkpointing: bool = False
    accelerate: bool = True
    cache: bool = False
    cache_dir: str | None = None
    cache_top_k: Count = 16
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = True
    save_every: Count = 500
    log_every: Count = 10
    eval_batch: Count = 64
    report: str | None = None
    max_steps: Count | None = None
    data: ChainDataConfig = field(default_factory=ChainDataConfig)
    distill: ChainDistillConfig = field(default_factory=ChainDistillConfig)
    optim: ChainOptimConfig = field(default_factory=ChainOptimConfig)


def roles(count: int) -> list[str]:
    """Names of the links of a chain: teacher, assistant (or assistant1, ...), student."""
    middle = [f"assistant{i}" for i in range(1, count - 1)] if count > 3 else ["assistant"]
    return ["teacher", *middle[: max(0, count - 2)], "student"][:count]


def per_link(value: Any, index: int) -> Any:
    """The value of link ``index`` where a key has one for all links, or a list of one or of all."""
    if not isinstance(value, (list, tuple)):
        return value
    return value[0 if len(value) == 1 else index]


def stages(config: ChainConfig) -> list[int]:
    """Indices of the links that ``config.stage`` names; empty where it names none."""
    names = roles(len(config.chain))
    if config.stage == "all":
        return list(range(len(names)))
    return [
        i
        for i, name in enumerate(names)
        if config.stage in (name, name.rstrip("0123456789") if "assistant" in name else name)
    ]
