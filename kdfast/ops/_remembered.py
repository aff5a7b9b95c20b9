# SPDX-License-Identifier: Apache-2.0
"""What a module computes from its own tensors at every call, in inference only once."""

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kdfast.ops._packed import hooked, inferring
from kdfast.ops._tensor_state import Origin, can_be_watched


class _Kept(NamedTuple):
    key: Hashable
    origin: Origin
    value: Tensor


# By module, so that neither a state dict nor a copy of the module ever holds it.
_kept: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()


def remembered(
    module: nn.Module,
    x: Tensor,
    tensors: Sequence[Tensor],
    make: Callable[[], Tensor],
    *,
    key: Hashable = None,
    network: nn.Module | None = None,
    keep: Callable[[Tensor], Tensor] = Tensor.contiguous,
) -> Tensor:
    """``make()``, which in inference is called again only when a tensor or the key has changed.

    Args:
        module: What owns the result: it is freed with it, and at a call that is no inference.
        x: What the module is called with.
        tensors: What ``make`` reads, besides those of ``network``.
        make: Computes the result.
        key: All else that the result depends on.
        network: A module that ``make`` calls.
        keep: Brings what is kept into the form that is read fastest, without another value.
    """
    if network is not None:
        if any(part.training or hooked(part) for part in network.modules()):
            return make()
        tensors = [*tensors, *network.parameters(), *network.buffers()]
    tracked = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if tracked or not inferring(module, x):
        if not torch.compiler.is_compiling():
            _kept.pop(module, None)
        return make()
    if torch.is_autocast_enabled("cpu"):
        return make()
    kept = _kept.get(module)
    if kept is not None and kept.key == key and kept.origin.stands_for(tensors):
        return kept.value
    if not all(map(can_be_watched, tensors)):
        return make()
    origin = Origin.of(tensors)
    with torch.inference_mode(False), torch.no_grad():
        value = keep(make())
    _kept[module] = _Kept(key, origin, value)
    return value
