# SPDX-License-Identifier: Apache-2.0
"""ORION's EVA-ViT-L with half of its heads, and the small stand-in for machines without it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kdfast.configs.recovery import (
    Config,
    DataConfig,
    DistillConfig,
    FitTeacherConfig,
    HeadSizes,
    OptimConfig,
    PruneConfig,
    RunConfig,
    TeacherConfig,
    VitConfig,
)

CHECKPOINT = "ckpts/orion/orion.pth"
# Where else ORION's checkpoint lies in its own code, under the name that it is published by.
FOLDERS, FILES = ("ckpts/orion", "ckpts", "ckpt/orion", "ckpt", "."), ("orion.pth", "Orion.pth")
DATA = "data/bench2drive"
# Where `orion50_mini` has its synthetic set; it is written there if nothing is.
SAMPLE = "runs/orion_sample"


def checkpoint_here() -> str:
    """ORION's checkpoint where people keep it; ``CHECKPOINT`` where there is none."""
    places = [Path(folder, name) for folder in FOLDERS for name in FILES]
    return str(next((path for path in places if path.is_file()), CHECKPOINT))


def orion50() -> Config:
    """The recipe of the distillation add-on for ORION, on Bench2Drive without labels."""
    return Config(
        name="orion50",
        output="runs/orion50",
        teacher=TeacherConfig(checkpoint=checkpoint_here()),
        data=DataConfig(
            kind="bench2drive",
            root=DATA,
            split_file="data/splits/bench2drive_base_train_val_split.json",
            size=(640, 640),
            photometric=True,
            gridmask=0.7,
            workers=4,
        ),
        prune=PruneConfig(method="taylor", keep=0.5, scope="block", batches=32),
        distill=DistillConfig(),
        optim=OptimConfig(),
        run=RunConfig(
            epochs=3, batch_size=4, precision="bf16", checkpointing=True, eval_images=240
        ),
    )


def orion50_mlp() -> Config:
    """``orion50`` with half of the hidden units too, both where the whole model needs them least.

    About 152M of the backbone's 303M parameters stay.
    """
    base = orion50()
    prune = replace(base.prune, scope="global", mlp_keep=0.5)
    return replace(base, name="orion50_mlp", output="runs/orion50_mlp", prune=prune)


def orion50_frames() -> Config:
    """``orion50`` with the loss of ORION's frozen heads, on a Bench2Drive that has infos.

    A batch is frames of two streams, twelve images; ORION walks through 80 frames in a row in its
    first epoch.
    """
    base = orion50()
    return replace(
        base,
        name="orion50_frames",
        data=replace(base.data, kind="frames", sequence=80),
        run=replace(base.run, batch_size=2),
    )


def orion50_scenes() -> Config:
    """The embedded default: rendered scenes, a small EVA-ViT trained here, and a dense head.

    Same code and same objective as ``orion50``; it needs no file and a few minutes on two cores.
    """
    vit = VitConfig(
        img_size=80,
        patch_size=8,
        embed_dim=128,
        depth=6,
        num_heads=16,
        window_size=4,
        window_block_indexes=(0, 1, 3, 4),
        pt_hw_seq_len=4,
        pretrain_img_size=80,
    )
    # Batches of 8: a third cheaper per image on two cores than batches of 16, and more steps.
    fit = FitTeacherConfig(
        model=vit,
        head_dim=64,
        epochs=5,
        batch_size=8,
        optim=OptimConfig(lr=1.5e-3, weight_decay=0.05, warmup=100, clip=1.0),
    )
    return Config(
        name="orion50_scenes",
        output="runs/orion50",
        teacher=TeacherConfig(checkpoint=None, fit=fit),
        data=DataConfig(
            kind="scenes", size=(80, 80), augment=False, cache=True, frames=240, val_frames=40
        ),
        prune=PruneConfig(method="taylor", keep=0.5, scope="block", batches=16, batch_size=8),
        distill=DistillConfig(),
        optim=OptimConfig(lr=7e-4, warmup=50),
        run=RunConfig(epochs=3, batch_size=8, save_every=200),
    )


def orion50_mini() -> Config:
    """The same with small versions of ORION's heads, on the synthetic set of `kdfast.data sample`.

    Task loss through frozen heads with a memory, detection and map metrics; needs no file and a few
    minutes on two cores.
    """
    vit = VitConfig(
        img_size=96,
        patch_size=8,
        embed_dim=96,
        depth=4,
        num_heads=12,
        window_size=6,
        window_block_indexes=(0, 2),
        pt_hw_seq_len=6,
        pretrain_img_size=96,
    )
    fit = FitTeacherConfig(
        model=vit,
        head_dim=64,
        epochs=10,
        batch_size=2,
        optim=OptimConfig(lr=1e-3, weight_decay=0.01, warmup=100, clip=35.0),
        heads=HeadSizes(),
    )
    return Config(
        name="orion50_mini",
        output="runs/orion50_mini",
        teacher=TeacherConfig(checkpoint=None, fit=fit),
        data=DataConfig(
            kind="frames",
            root=SAMPLE,
            split_file=f"{SAMPLE}/splits/bench2drive_base_train_val_split.json",
            size=(96, 96),
            augment=False,
            sequence=10,
            sample=True,
        ),
        prune=PruneConfig(
            method="taylor",
            keep=0.5,
            scope="block",
            batches=16,
            batch_size=6,
            calibration_views=240,
        ),
        distill=DistillConfig(),
        optim=OptimConfig(lr=4e-4, warmup=50),
        run=RunConfig(epochs=3, batch_size=2, save_every=200),
    )
