# SPDX-License-Identifier: Apache-2.0
"""All settings of the example: what is committed is what made the result file."""

from __future__ import annotations

from dataclasses import dataclass, field

from examples.training import Recipe


@dataclass(frozen=True)
class DistilConfig:
    """The objective of the distillation; the divergence of the maps has weight 1.

    Attributes:
        correlation: Weight of one minus the correlation of the maps.
        feature: Weight of the distance of the tokens after every block.
        attention: Weight of the distance of the attention maps.
    """

    correlation: float = 0.5
    feature: float = 0.5
    attention: float = 0.1


@dataclass(frozen=True)
class Config:
    """The whole run.

    Attributes:
        keep: Part of the heads and of the hidden units that stays, or of the blocks' FLOPs.
        held: Pictures of the first folder that everything is measured on; no other step sees them.
        calibrate: Pictures of the first folder to compensate with.
        batch: Pictures of a batch where nothing is trained.
        seed: Of the choice of pictures, their order and their crops.
        shortest: Smallest side of a training crop by the picture's.
        recipe: Of the distillation.
        distil: Its objective.
    """

    keep: float = 0.5
    held: int = 100
    calibrate: int = 200
    batch: int = 20
    seed: int = 0
    shortest: float = 0.8
    recipe: Recipe = field(default_factory=lambda: Recipe(epochs=15, lr=6e-6, batch=8, warmup=0.1))
    distil: DistilConfig = field(default_factory=DistilConfig)
