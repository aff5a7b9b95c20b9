# SPDX-License-Identifier: Apache-2.0
"""ResNet-50 -> 34 -> 18: the same chain with convolutional networks."""

from __future__ import annotations

from kdfast.configs.chain import ChainConfig, ChainDataConfig, ChainOptimConfig
from kdfast.configs.vit_chain import CIFAR10


def cnn_chain() -> ChainConfig:
    """CIFAR-10 at 224 x 224, batches of 32, with the source's weight decay."""
    return ChainConfig(
        name="cnn_chain",
        output="runs/cnn_chain",
        chain=("resnet50", "resnet34", "resnet18"),
        batch=32,
        data=ChainDataConfig(kind="cifar10", root=CIFAR10),
        optim=ChainOptimConfig(lr=1e-3, weight_decay=1e-4),
    )


def cnn_chain_digits() -> ChainConfig:
    """The embedded default of ``cnn_chain``: scikit-learn's digits at 32 x 32."""
    return ChainConfig(
        name="cnn_chain_digits",
        output="runs/cnn_chain",
        chain=("resnet50", "resnet34", "resnet18"),
        batch=32,
        epochs=3,
        data=ChainDataConfig(kind="digits", size=32, workers=0),
        optim=ChainOptimConfig(lr=1e-3, weight_decay=1e-4, warmup_epochs=1),
    )
