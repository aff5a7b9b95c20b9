# SPDX-License-Identifier: Apache-2.0
"""The model families that can be pruned, and which of them a model belongs to."""

from torch import nn

from kdfast.nn.attention import qualified_name
from kdfast.pruning.adapter import Adapter, Anatomy
from kdfast.pruning.eva_adapter import EvaAdapter
from kdfast.pruning.hf_adapter import HfAdapter
from kdfast.pruning.vit_adapter import VitAdapter, stand_ins

# The first that fits a model wins.
FAMILIES: tuple[Adapter, ...] = (EvaAdapter(), HfAdapter(), VitAdapter())
_registered: list[Adapter] = []


def register_family(adapter: Adapter) -> None:
    """Adds a family for this process; it is asked before those of kdfast."""
    _registered.insert(0, adapter)


def anatomy_of(function: str, model: nn.Module) -> Anatomy:
    """The adapter of the model's family, and what it finds in the model.

    Args:
        function: Name of the caller, for the message.
        model: Any module.

    Raises:
        TypeError: No adapter knows the model, or it has something that cannot be pruned; the
            message names its class and the reason.
    """
    known = (*_registered, *FAMILIES)
    got = qualified_name(model)
    for adapter in known:
        if adapter.fits(model):
            anatomy = Anatomy.of(adapter, model)
            if reason := adapter.why_not(model, anatomy.attentions):
                raise TypeError(f"{function}: cannot prune a {got}: {reason}")
            return anatomy
    names = ", ".join(adapter.family for adapter in known)
    reasons = dict.fromkeys(str(reason) for _, reason in stand_ins(model))
    why = f" ({'; '.join(reasons)})" if reasons else ", which holds no attention"
    raise TypeError(f"{function}: model must be one of {names}, got {got}{why}")
