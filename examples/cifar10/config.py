# SPDX-License-Identifier: Apache-2.0
"""All settings of the example: what is committed is what made the result file."""

from __future__ import annotations

from dataclasses import dataclass, field

from examples.training import Recipe


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the Vision Transformer.

    Attributes:
        width: Channels of a token.
        depth: Blocks.
        heads: Attention heads of a block.
        mlp_ratio: Hidden units of a block's MLP by ``width``.
    """

    width: int = 96
    depth: int = 4
    heads: int = 6
    mlp_ratio: float = 2.0


@dataclass(frozen=True)
class PruneConfig:
    """What is removed and how it is compensated.

    Attributes:
        keep: Part of the heads, and of the hidden units, that stays.
        pictures: Training pictures of the calibration; their labels are not used.
        batch: Of them.
    """

    keep: float = 0.5
    pictures: int = 2000
    batch: int = 250


@dataclass(frozen=True)
class DistilConfig:
    """The objective of the distillation.

    Attributes:
        logits: Weight of the distance of the logits; the rest is the labels' cross-entropy.
        temperature: Of the logits.
        feature: Weight of the distance of the tokens after every block.
        attention: Weight of the distance of the attention maps.
    """

    logits: float = 0.9
    temperature: float = 2.0
    feature: float = 0.5
    attention: float = 0.5


@dataclass(frozen=True)
class Config:
    """The whole run.

    Attributes:
        smoothing: Label smoothing of the first training.
        cutmix: Part of its batches whose pictures get a piece of another one each. Without it the
            model learns the training pictures by heart long before the last epoch.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    train: Recipe = field(default_factory=lambda: Recipe(epochs=100, lr=2e-3, batch=128))
    prune: PruneConfig = field(default_factory=PruneConfig)
    smoothing: float = 0.1
    cutmix: float = 0.5
    recover: Recipe = field(default_factory=lambda: Recipe(epochs=3, lr=5e-4, batch=128))
    distil: DistilConfig = field(default_factory=DistilConfig)
