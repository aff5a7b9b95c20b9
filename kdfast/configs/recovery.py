# SPDX-License-Identifier: Apache-2.0
"""The typed config tree of the trainer; docs/use/training.md explains every key."""

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


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its learning rate over the run, and clipping.

    Attributes:
        lr: Peak learning rate.
        betas: AdamW's betas.
        weight_decay: On weights of two and more dimensions; none on norms and biases.
        layer_decay: Factor of the learning rate from one block to the one before it; null: none.
        warmup: Steps of linear warm-up; cut to a tenth of the run where that is less.
        warmup_ratio: Factor at the first step.
        min_ratio: Factor that the cosine ends with.
        clip: Largest L2 norm of the gradient; null: no clipping.
    """

    lr: Positive = 2e-4
    betas: tuple[Rate, Rate] = (0.9, 0.999)
    weight_decay: NonNegative = 0.01
    layer_decay: Share | None = None
    warmup: Natural = 500
    warmup_ratio: Fraction = 0.1
    min_ratio: Fraction = 0.01
    clip: Positive | None = 10.0


@dataclass(frozen=True)
class VitConfig:
    """Arguments of ``kdfast.models.EVAViT`` for a teacher that is trained here."""

    img_size: Count
    patch_size: Count
    embed_dim: Count
    depth: Count
    num_heads: Count
    window_size: Natural
    window_block_indexes: tuple[int, ...]
    mlp_ratio: Positive = 8 / 3
    pt_hw_seq_len: Count = 16
    pretrain_img_size: Count = 224


@dataclass(frozen=True)
class HeadSizes:
    """Sizes of small versions of ORION's heads, for a teacher that is trained here on frames.

    Attributes:
        dim: Width of the queries, a multiple of 8.
        layers: Layers of both decoders.
        ffn: Hidden width of their feed-forward layers.
        queries: Learned queries of the detection head; half as many come from its memory.
        lanes: One-to-one lanes of the map head; three times as many one-to-many ones help.
        dn_groups: Noised copies of every box in training.
    """

    dim: Count = 64
    layers: Count = 2
    ffn: Count = 128
    queries: Count = 40
    lanes: Count = 20
    dn_groups: Count = 3


@dataclass(frozen=True)
class FitTeacherConfig:
    """How to train a teacher where there is no checkpoint of one.

    Attributes:
        model: The backbone.
        head_dim: Width of the dense head; frames have ``heads`` instead.
        epochs: Passes over the training data.
        batch_size: Images per process and step.
        optim: Optimiser.
        heads: Small heads for ``frames``; null for labels of pixels.
    """

    model: VitConfig
    head_dim: Count
    epochs: Count
    batch_size: Count
    optim: OptimConfig = field(default_factory=OptimConfig)
    heads: HeadSizes | None = None


@dataclass(frozen=True)
class TeacherConfig:
    """Where the teacher comes from.

    Attributes:
        checkpoint: ORION checkpoint, a file of ``save_backbone``, or a folder of ``kdfast prune``;
            null: train it, see ``fit``.
        fit: Training of the teacher; null where there is a checkpoint.
        cache: Folder that keeps trained teachers for the next run.
        img_size: Side of the image that a checkpoint without rotary buffers was trained for, 640 in
            ORION; null: the checkpoint shows it.
        window_size: Side of its windows in patches, 16 in ORION; null likewise.
        window_block_indexes: Its blocks with windows, in ORION all but every third; null likewise.
        head_dim: Channels of a head where that is not 64; null likewise.
    """

    checkpoint: str | None = None
    fit: FitTeacherConfig | None = None
    cache: str = "runs/teachers"
    img_size: Count | None = None
    window_size: Count | None = None
    window_block_indexes: tuple[Natural, ...] | None = None
    head_dim: Count | None = None

    def shape(self) -> dict[str, Any]:
        """What the config says of the checkpoint, as ``load_orion_backbone`` takes it."""
        names = ("img_size", "window_size", "window_block_indexes", "head_dim")
        given = {name: getattr(self, name) for name in names}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class DataConfig:
    """What the images are.

    Attributes:
        kind: ``images`` (a folder of pictures), ``webdataset`` (tar shards), ``huggingface`` (a
            dataset of that library), ``bench2drive`` (a folder, or its shards), ``scenes``
            (rendered, with labels), or ``frames``: Bench2Drive prepared by ``kdfast.data infos``,
            with the loss of ORION's heads.
        root: Folder of ``images``, ``bench2drive`` and ``frames``; folder, pattern or fsspec URL of
            tar shards; the same of parquet files, or a name on the hub, for ``huggingface``.
        image_key: Field of ``webdataset``, or column of ``huggingface``, with the picture; null:
            the only one of a picture's type.
        split_file: List of validation clips of ``bench2drive``.
        val_fraction: Part of ``images``, ``webdataset`` and ``huggingface`` that is held out where
            there are no folders, shards or splits train and val.
        size: (height, width) of the network input.
        augment: Random crops and flips in training.
        photometric: ORION's colour distortion in training; needs ``augment``.
        gridmask: Probability of GridMask on a training batch.
        frames: Training frames of ``scenes``.
        val_frames: Held-out frames of ``scenes``.
        workers: Loader processes; 0 loads in the training process.
        cache: Keep every item in memory; needs ``augment`` false.
        sequence: Frames of ``frames`` that a stream walks through in a row; 0: whole clips.
        stride: Every how many frames of a clip one is taken, for ``frames``.
        sample: Write the synthetic set of ``kdfast.data sample`` to ``root`` if nothing is there.
    """

    kind: Literal["images", "webdataset", "huggingface", "bench2drive", "scenes", "frames"] = (
        "images"
    )
    root: str | None = None
    image_key: str | None = None
    split_file: str | None = None
    val_fraction: Half = 0.1
    size: tuple[Count, Count] = (640, 640)
    augment: bool = True
    photometric: bool = False
    gridmask: Fraction = 0.0
    frames: Count = 100
    val_frames: Count = 20
    workers: Natural = 0
    cache: bool = False
    sequence: Natural = 80
    stride: Count = 1
    sample: bool = False


@dataclass(frozen=True)
class PruneConfig:
    """Which heads the student keeps, and what it starts from; docs/use/compensation.md.

    Attributes:
        method: Criterion of ``kdfast.pruning.head_scores``.
        keep: Heads that stay: a number in each block (4), a part (0.5), or a number for each block
            ([4, 4, 2]).
        heads: JSON file of the heads that stay, in place of ``method``, ``keep`` and ``scope``, see
            ``kdfast.pruning.selection_file``; null: those with the best scores.
        scope: ``block``: the same number in each block; ``global``: the best of the whole model.
        batches: Batches of training images for criteria that read data; ``reconstruction`` reads
            ``calibration_views``.
        batch_size: Images of such a batch, and per process of one of the calibration; without
            recomputation, so memory grows with it.
        compensate: Fold what the removed heads compute into the weights that stay; the distillation
            starts from there. False: they are only cut away.
        calibration_views: Training images of all processes that this is fitted on, without their
            labels; rounded up to whole batches.
        sequential: Fit one block after the other on the pruned model's own stream, which keeps
            these images and two streams of each in memory. False: all at once.
        ridge: Strength of the fit's ridge term; null: that of ``kdfast.prune_heads``.
        mlp_keep: The same of the MLPs' hidden units, in ``scope``; null: all of them. They are
            chosen by the error that remains after the compensation, without one by magnitude.
    """

    method: Literal["magnitude", "gradient", "taylor", "entropy", "reconstruction"] = "taylor"
    keep: Count | Share | tuple[Natural, ...] = 0.5
    heads: str | None = None
    scope: Literal["block", "global"] = "block"
    batches: Count = 32
    batch_size: Count = 1
    compensate: bool = True
    calibration_views: Count = 256
    sequential: bool = True
    ridge: Positive | None = None
    mlp_keep: Count | Share | tuple[Natural, ...] | None = None


@dataclass(frozen=True)
class DistillConfig:
    """The objective; docs/use/distillation.md has the formulas.

    Attributes:
        alpha_warmup: Weight of distillation in the first ``warmup_epochs`` epochs.
        alpha: Weight of distillation after that.
        warmup_epochs: Epochs with ``alpha_warmup``.
        temperature: T of the attention and output terms.
        feature: Weight of the feature term.
        attention: Weight of the attention term.
        output: Weight of the output term.
        vl: Weight of the tokens that the heads of ``frames`` hand to a language model; ORION's
            documents have 0, and 0.1 in a variant.
        attention_kind: Kind of ``kdfast.attention_distill``.
        feature_kind: Kind of ``kdfast.feature_loss``.
        feature_normalize: Normalisation of ``kdfast.feature_loss``; null: none.
        feature_layers: Blocks of the feature term: ``global`` (blocks that attend globally),
            ``all``, or a list of indices; the last block is the output term's.
        drop_path: Stochastic depth of the student's last block.
    """

    alpha_warmup: Fraction = 0.8
    alpha: Fraction = 0.6
    warmup_epochs: Natural = 1
    temperature: Positive = 3.0
    feature: NonNegative = 0.5
    attention: NonNegative = 0.3
    output: NonNegative = 0.2
    vl: NonNegative = 0.0
    attention_kind: Literal["kl", "reverse_kl", "jsd", "mse", "cosine", "logit_mse"] = "kl"
    feature_kind: Literal["mse", "cosine", "smooth_l1"] = "mse"
    feature_normalize: Literal["layer", "channel"] | None = "layer"
    feature_layers: Literal["global", "all"] | tuple[Natural, ...] = "global"
    drop_path: Rate = 0.0


@dataclass(frozen=True)
class RunConfig:
    """Length, batches, precision and bookkeeping of the run.

    Attributes:
        epochs: Passes over the training data.
        batch_size: Images per process and forward; of ``frames`` streams, with six images each.
        accumulate: Forwards per optimiser step.
        precision: ``fp32``, or autocast in ``bf16`` or ``fp16`` (with loss scaling, on a GPU);
            ``auto``: bf16 on a GPU that has it, else fp32.
        checkpointing: Recompute the student's blocks in the backward.
        max_steps: Stop and save after so many optimiser steps; the schedules keep their length.
        save_every: Optimiser steps between checkpoints; one is also saved after each epoch.
        log_every: Optimiser steps between log rows.
        eval_images: Held-out images that are evaluated; null: all.
        orion_keys: Give the tensors of ``student.safetensors`` their names in ORION's whole model.
        device: ``auto`` takes the GPU if there is one.
        deterministic: cuDNN takes the same kernels in every run; false: the fastest it finds.
        shard: ``fsdp``: each of several processes holds a part of teacher, student, gradients and
            optimiser states while it trains; ``none``: every process holds all of them.
    """

    epochs: Count = 3
    batch_size: Count = 4
    accumulate: Count = 1
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    checkpointing: bool = False
    max_steps: Count | None = None
    save_every: Count = 500
    log_every: Count = 10
    eval_images: Count | None = None
    orion_keys: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = True
    shard: Literal["none", "fsdp"] = "none"


@dataclass(frozen=True)
class Config:
    """Everything that defines a run.

    Attributes:
        name: The config function that this one starts from.
        output: Folder of the run.
        seed: Seed of weights, order, augmentation and masks.
        note: Printed at the start; says when the embedded default took the place of absent files.
        teacher: The teacher.
        data: The images.
        prune: The pruning.
        distill: The objective.
        optim: The optimiser.
        run: The run.
    """

    name: str
    output: str
    seed: Natural = 0
    note: str = ""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
