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
    """Tensors at a moment; equal to another as long as they are the same, with the same elements.

    They are not kept alive.
    """

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
        """Whether ``Origin.of(tensors)`` would be equal; False also where that is costly to say.

        A call in inference asks this of every weight, and nearly always they are still the same:
        those in the same memory, contiguous, need no more questions before their state is read.
        """
        if len(tensors) != len(self._memory):
            return False
        for memory, x in zip(self._memory, tensors, strict=True):
            if type(x) not in _KINDS or x.layout is not torch.strided:
                return False
            if memory() is not x.untyped_storage() or not x.is_contiguous():
                return False
        return bool(_state(list(tensors)) == self._state)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Origin) or self._state != other._state:
            return False
        mine, others = ([ref() for ref in origin._memory] for origin in (self, other))
        return len(mine) == len(others) and all(
            a is not None and a is b for a, b in zip(mine, others, strict=True)
        )

    __hash__ = None  # type: ignore[assignment]


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
