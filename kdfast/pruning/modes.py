# SPDX-License-Identifier: Apache-2.0
"""Evaluation for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context in which a model is in eval mode; the modes of all modules are put back at the end.

    Flags are set one by one: ``eval`` of a frozen or compiled model may be refused.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode
