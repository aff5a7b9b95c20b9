# SPDX-License-Identifier: Apache-2.0
"""A run of seconds with every part of ``orion50_scenes``: checks an installation, feeds tests."""

from __future__ import annotations

from kdfast.configs.recovery import (
    Config,
    DataConfig,
    DistillConfig,
    FitTeacherConfig,
    OptimConfig,
    PruneConfig,
    RunConfig,
    TeacherConfig,
    VitConfig,
)


def smoke() -> Config:
    """Too small to learn anything: two windowed blocks and two global ones, four heads each."""
    vit = VitConfig(
        img_size=32,
        patch_size=8,
        embed_dim=64,
        depth=4,
        num_heads=4,
        window_size=3,
        window_block_indexes=(0, 2),
        pt_hw_seq_len=3,
        pretrain_img_size=32,
    )
    optim = OptimConfig(lr=1e-3, warmup=2)
    fit = FitTeacherConfig(model=vit, head_dim=16, epochs=1, batch_size=4, optim=optim)
    return Config(
        name="smoke",
        output="runs/smoke",
        teacher=TeacherConfig(checkpoint=None, fit=fit),
        data=DataConfig(
            kind="scenes", size=(32, 32), augment=False, cache=True, frames=8, val_frames=2
        ),
        prune=PruneConfig(batches=2, batch_size=4),
        distill=DistillConfig(),
        optim=optim,
        run=RunConfig(epochs=2, batch_size=4, save_every=100, log_every=4),
    )
