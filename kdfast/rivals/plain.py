# SPDX-License-Identifier: Apache-2.0
"""A model as it runs without kdfast, which is what the rivals get."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.nn.attention import FusedAttention
from kdfast.ops.sdpa import TORCH
from kdfast.rivals.rival import main_tensor, told


class Plain(nn.Module):
    """A model on torch's own ops, whose output is one tensor.

    Pruned models hold attentions of kdfast: a copy is made whose attentions run torch's function.

    Args:
        model: In eval mode; it is not changed.
        dtype: To which a copy is converted; None leaves it.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        stand_ins = [m for m in model.modules() if isinstance(m, FusedAttention)]
        if stand_ins or dtype is not None:
            model = copy.deepcopy(model)
        for module in model.modules():
            if isinstance(module, FusedAttention):
                module.backend = TORCH
        self.model = model if dtype is None else model.to(dtype)
        self.eval()

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) to the logits or features."""
        return main_tensor(self.model(pictures))


def without_kdfast(
    model: nn.Module, example: Tensor, dtype: torch.dtype | None = None
) -> nn.Module:
    """A module that holds none of kdfast's ops.

    Args:
        model: In eval mode; it is not changed.
        example: (B, 3, H, W), fp32.
        dtype: To which it is converted; None leaves it.

    Returns:
        ``Plain``; for ORION's EVA-ViT, which is written on kdfast's ops, its exported graph.

    Raises:
        Unavailable: The model calls kdfast's ops and cannot be exported.
    """
    plain = Plain(model, dtype)
    if not type(model).__module__.startswith("kdfast."):
        return plain
    with told("torch.export"), torch.no_grad():
        exported: Any = torch.export.export(plain, (example.to(dtype or torch.float32),))
    graph: nn.Module = exported.module(check_guards=False)
    return graph
