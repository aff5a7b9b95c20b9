# SPDX-License-Identifier: Apache-2.0
"""Whether tensors still are what something was once computed from."""

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from kdfast.ops import _torch_private as private
from kdfast.ops._library import EXTENSION, LIB
from kdfast.ops._matmul import is_ordinary

_KINDS = (Tensor, torch.nn.Parameter)

LIB.define("tensor_state(Tensor[] x, int[] versions) -> int")


class Origin:
    """Tensors at a moment, which are not kept alive."""

    def __init__(self, state: object, storages: Sequence[torch.UntypedStorage]) -> None:
        self._state = state
        # An address alone may be given out again, as it is to the weights that
        # ``torch.func.functional_call`` gets one after the other.
        self._memory = tuple(map(weakref.ref, storages))

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "Origin":
        """That of tensors which all ``can_be_watched``."""
        return cls(_state(list(tensors)), [tensor.untyped_storage() for tensor in tensors])

    def stands_for(self, tensors: Sequence[Tensor]) -> bool:
        """Whether tensors are still those of this origin, with the same elements.

        A call in inference asks this of every weight. Most of ``can_be_watched`` need not be asked
        again of what lies in the same memory.
        """
        if len(tensors) != len(self._memory):
            return False
        for memory, x in zip(self._memory, tensors, strict=True):
            if type(x) not in _KINDS or x.layout is not torch.strided:
                return False
            if memory() is not x.untyped_storage() or not _is_dense(x):
                return False
        return bool(_state(list(tensors)) == self._state)


def can_be_watched(tensor: Tensor) -> bool:
    """Whether a change of a tensor's elements would be seen."""
    return is_ordinary(tensor) and not tensor.is_inference() and _is_dense(tensor)


def _is_dense(x: Tensor) -> bool:
    """Whether the elements fill a piece of memory, in any order of dimensions."""
    if x.is_contiguous():
        return True
    strides = x.stride()
    order = sorted(range(x.dim()), key=lambda dim: strides[dim], reverse=True)
    return x.permute(order).is_contiguous()


def _state(tensors: list[Tensor]) -> object:
    """Differs when a tensor is another one, was written to, or got other elements.

    Of the elements a sample is compared: that is for edits through ``.data`` or an array that
    shares the memory, of which torch's version counter knows nothing.
    """
    versions = [private.version(x) for x in tensors]
    if EXTENSION is not None:
        return torch.ops.kdfast.tensor_state.default(tensors, versions)
    facts = [(x.data_ptr(), x.dtype, x.shape, x.stride()) for x in tensors]
    return versions, facts, [x.flatten()[:: max(1, x.numel() // 64)].tolist() for x in tensors]
