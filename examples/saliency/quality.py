# SPDX-License-Identifier: Apache-2.0
"""How far the maps of a pruned model agree with those of the whole model.

B batch, N tokens, C channels, (H, W) pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.saliency.model import Saliency

# Where the wheel cuts a map, scaled to [0, 1], into regions of interest.
REGION = 0.8


@dataclass(frozen=True)
class Answers:
    """What a model says of some pictures.

    Attributes:
        maps: (B, H, W) importance in [0, 1].
        tokens: (B, N, C) after the backbone's last norm.
    """

    maps: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Agreement:
    """Means over pictures.

    Attributes:
        pearson: Correlation of the maps.
        error: Mean absolute error of the maps.
        iou: Of the regions: where the map, scaled to [0, 1], is at least 0.8.
        cosine: Of tokens, class token included.
    """

    pearson: float
    error: float
    iou: float
    cosine: float


@torch.no_grad()
def answers(model: Saliency, batches: Sequence[Tensor]) -> Answers:
    """What a model says of batches (B, 3, H, W); it is left in eval mode."""
    model.eval()
    tokens = [model.backbone.forward_features(batch).float() for batch in batches]
    size = batches[0].shape[-2:]
    maps = [model.logits(some, size).sigmoid() for some in tokens]
    return Answers(torch.cat(maps), torch.cat(tokens))


def agreement(got: Answers, want: Answers) -> dict[str, Any]:
    """``Agreement`` of two models' answers, as plain values."""
    mine, theirs = got.maps.flatten(1).double(), want.maps.flatten(1).double()
    regions = [_scaled(x) >= REGION for x in (mine, theirs)]
    both, either = (regions[0] & regions[1]).sum(1), (regions[0] | regions[1]).sum(1)
    found = Agreement(
        pearson=correlation(mine, theirs).mean().item(),
        error=(mine - theirs).abs().mean().item(),
        iou=(both / either).mean().item(),
        cosine=F.cosine_similarity(got.tokens, want.tokens, dim=-1).mean().item(),
    )
    return asdict(found)


def correlation(mine: Tensor, theirs: Tensor) -> Tensor:
    """Pearson's, of every row of two (B, P)."""
    own, other = (x - x.mean(1, keepdim=True) for x in (mine, theirs))
    return F.cosine_similarity(own, other, dim=1)


def _scaled(maps: Tensor) -> Tensor:
    low, high = maps.aminmax(dim=1, keepdim=True)
    return (maps - low) / (high - low).clamp_min(1e-12)
