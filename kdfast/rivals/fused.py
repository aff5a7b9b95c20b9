# SPDX-License-Identifier: Apache-2.0
"""kdfast itself."""

from __future__ import annotations

import copy
from pathlib import Path

from torch import Tensor, nn

from kdfast.nn import accelerate
from kdfast.rivals.eager import DTYPES, TorchRival, given
from kdfast.rivals.rival import Loaded, main_tensor


class Fused(TorchRival):
    """A copy of the model after ``kdfast.accelerate``."""

    def load(self, model: nn.Module | None, example: Tensor, folder: Path) -> Loaded:
        """As in ``Rival``."""
        mine = copy.deepcopy(given(model))
        report = accelerate(mine.to(DTYPES[self.dtype]))
        note = f"{len(report.replaced)} modules fused, {len(report.left)} left"
        return Loaded(self.call_of(WithTensor(mine).eval()), note)


class WithTensor(nn.Module):
    """A model whose output is one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) to the logits or features."""
        return main_tensor(self.model(pictures))
