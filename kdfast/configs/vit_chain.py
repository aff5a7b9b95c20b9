# SPDX-License-Identifier: Apache-2.0
"""ViT-Base -> Small -> Tiny, its small stand-in for machines without data, and a CIFAR-10 run."""

from __future__ import annotations

from typing import Any

from kdfast.configs.chain import ChainConfig, ChainDataConfig, ChainOptimConfig

CIFAR10 = "data/cifar10"


def _small(dim: int, depth: int, heads: int, patch: int = 4) -> dict[str, Any]:
    """Arguments that turn a timm ViT into a small one for 32 x 32 pixels."""
    return {
        "img_size": 32,
        "patch_size": patch,
        "embed_dim": dim,
        "depth": depth,
        "num_heads": heads,
    }


def vit_chain() -> ChainConfig:
    """The chain of the source document: CIFAR-10 at 224 x 224, batches of 8, 16 and 32."""
    return ChainConfig(
        name="vit_chain",
        output="runs/vit_chain",
        data=ChainDataConfig(kind="cifar10", root=CIFAR10),
    )


def vit_chain_digits() -> ChainConfig:
    """The embedded default: scikit-learn's digits and small ViTs; no file, minutes on two cores.

    The digits are enlarged from 8 x 8, so that a patch of 8 is 2 x 2 pixels of the original.
    """
    return ChainConfig(
        name="vit_chain_digits",
        output="runs/vit_chain",
        model_args=(_small(96, 4, 6, 8), _small(64, 3, 4, 8), _small(32, 2, 2, 8)),
        twin=True,
        seeds=(0, 1, 2),
        batch=32,
        epochs=(14, 14, 30),
        data=ChainDataConfig(kind="digits", size=32, augment="none", workers=0),
        optim=ChainOptimConfig(lr=1e-3, warmup_epochs=1),
    )


def cifar10() -> ChainConfig:
    """CIFAR-10 as a folder of pictures, 32 x 32: does distillation beat the twin without it?

    For two cores and less than half an hour: a few epochs from scratch, where a convolutional
    teacher is far ahead of a ViT of the same cost; pictures as they are, so that the outputs of
    the assistant are computed once for all seeds and epochs.
    """
    return ChainConfig(
        name="cifar10",
        output="runs/cifar10",
        chain=("resnet18", "vit_small_patch16_224", "vit_tiny_patch16_224"),
        model_args=({"channels": [32, 64, 128, 256]}, _small(96, 4, 3), _small(64, 4, 2)),
        twin=True,
        seeds=(0, 1, 2),
        vary="student",
        batch=64,
        epochs=(6, 4, 3),
        cache=True,
        cache_dir="runs/cifar10_teacher_cache",
        data=ChainDataConfig(
            kind="imagefolder", root=CIFAR10, size=32, augment="none", workers=0, seed=0
        ),
        optim=ChainOptimConfig(lr=2e-3, warmup_epochs=1),
    )
