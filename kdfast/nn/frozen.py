# SPDX-License-Identifier: Apache-2.0
"""A module that another one uses without owning it."""

from __future__ import annotations

from typing import Generic, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


class Frozen(Generic[M]):
    """Freezes a module and hides it from the module that has it as an attribute.

    ``nn.Module`` takes every module among its attributes for a part of itself: it would save,
    move, broadcast, optimise and switch it to training mode with the rest. It does not look into
    this holder.

    Attributes:
        module: The module, in eval mode and without gradients.
    """

    def __init__(self, module: M) -> None:
        self.module = module.requires_grad_(False).eval()
