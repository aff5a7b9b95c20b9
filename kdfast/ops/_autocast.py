# SPDX-License-Identifier: Apache-2.0
"""Autocast, of which the kernels know nothing."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

UNCHANGED = nullcontext()


def without_autocast(
    device: str, *tensors: Tensor | None
) -> tuple[AbstractContextManager[None], tuple[Any, ...]]:
    """A context that turns autocast off, and the tensors as autocast would take them.

    Args:
        device: Device type of the tensors.
        *tensors: Cast to autocast's dtype where that is on; None and fp64 stay as they are.
    """
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return UNCHANGED, tensors
    dtype = torch.get_autocast_dtype(device)
    cast = tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors)
    return torch.autocast(device, enabled=False), cast
