# SPDX-License-Identifier: Apache-2.0
"""The blocks of a model, by the table of families that pruning knows."""

from __future__ import annotations

from torch import nn

from kdfast.models.prepared import PreparedModel
from kdfast.pruning.families import anatomy_of


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a model in the order of execution, each once.

    Args:
        model: A model of a family that can be pruned, or a ``PreparedModel`` around one.

    Raises:
        TypeError: Its blocks are not known; the message names its class and the reason.
    """
    net = model.net if isinstance(model, PreparedModel) else model
    return list(dict.fromkeys(anatomy_of("blocks", net).blocks))
