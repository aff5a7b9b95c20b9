# SPDX-License-Identifier: Apache-2.0
"""PyTorch as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from kdfast.rivals.plain import without_kdfast
from kdfast.rivals.rival import Call, Loaded, Rival, weight_bytes

DTYPES = {"fp32": None, "bf16": torch.bfloat16}


class TorchRival(Rival):
    """A model that stays in PyTorch; bf16 is ``model.to(torch.bfloat16)``, not autocast."""

    runtime = "torch"
    effort = 0
    loads_model = True

    def __init__(self, name: str, dtype: str, about: str) -> None:
        self.name, self.dtype, self.about = name, dtype, about

    def export(
        self, model: nn.Module, example: Tensor, pictures: Sequence[Tensor], folder: Path
    ) -> None:
        """Nothing: the model itself is loaded."""

    def nbytes(self, model: nn.Module | None, folder: Path) -> int:
        """What a safetensors file of the weights takes."""
        whole = weight_bytes(given(model))
        return whole if self.dtype == "fp32" else whole // 2

    def call_of(self, module: Callable[[Tensor], Tensor]) -> Call:
        """The call of a module in this dtype, without gradients."""
        dtype = DTYPES[self.dtype]

        def call(pictures: Tensor) -> Tensor:
            with torch.no_grad():
                return module(pictures if dtype is None else pictures.to(dtype)).float()

        return call


class Eager(TorchRival):
    """The model as it is, with torch's own attention."""

    def load(self, model: nn.Module | None, example: Tensor, folder: Path) -> Loaded:
        """As in ``Rival``."""
        return Loaded(self.call_of(without_kdfast(given(model), example, DTYPES[self.dtype])))


def given(model: nn.Module | None) -> nn.Module:
    if model is None:
        raise TypeError("a rival that stays in PyTorch loads the model itself, got None")
    return model
