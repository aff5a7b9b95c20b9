# SPDX-License-Identifier: Apache-2.0
"""Autocast, of which the kernels know nothing."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

UNCHANGED = nullcontext()
# Asked beforehand for what torch.compile may meet: that of torch 2.11 cannot trace the question.
_KNOWN = frozenset(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "xpu", "mps", "hpu")))


def _has_autocast(device: str) -> bool:
    return device in _KNOWN or (
        not torch.compiler.is_compiling() and torch.amp.is_autocast_available(device)
    )


def without_autocast(
    device: str, *tensors: Tensor | None
) -> tuple[AbstractContextManager[None], tuple[Any, ...]]:
    """A context that turns autocast off, and the tensors as autocast would take them.

    Args:
        device: Device type of the tensors.
        *tensors: Cast to autocast's dtype where that is on; None and fp64 stay as they are.
    """
    if not (_has_autocast(device) and torch.is_autocast_enabled(device)):
        return UNCHANGED, tensors
    dtype = torch.get_autocast_dtype(device)
    cast = tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors)
    return torch.autocast(device, enabled=False), cast
