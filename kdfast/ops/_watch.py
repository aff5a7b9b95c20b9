# SPDX-License-Identifier: Apache-2.0
"""Who looks at every operator of a call, so that torch's own must run. See docs/use/tracing.md."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kdfast.ops._torch_private import (
    FakeTensor,
    FunctionalTensor,
    exporting,
    forward_level,
    functorch_active,
    tracing_state,
)

# Other subclasses may have no data of their own, as the masks of torch.nn.attention.bias, or know
# torch's operators alone.
PLAIN = (Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)
TRANSFORM = "torch.func and forward-mode derivatives look into every operator"


def transformed() -> bool:
    """Whether torch.func transforms the call, or a forward-mode derivative may be asked for."""
    # torch.compile knows the right answer of this question, not of others about the stack.
    return functorch_active() or forward_level() >= 0


def traced() -> bool:
    """Whether the call is recorded for a place that need not have kdfast.

    That is ``torch.export``, with it the ONNX exporter, and ``torch.jit.trace``; not
    ``torch.compile``.
    """
    if torch.compiler.is_compiling():
        return exporting()
    return tracing_state() is not None


def has_values(x: Tensor) -> bool:
    """Whether x is a strided tensor whose own memory is its value."""
    return type(x) in PLAIN and x.layout == torch.strided and not x.is_nested


def watcher(*tensors: Tensor | None) -> str | None:
    """The reason why a call with these tensors takes torch's own operators, or None.

    A torch.func transform, a forward-mode derivative, an exporter or tracer, a tensor subclass of
    somebody else, a meta tensor. Costs less than a microsecond.
    """
    if transformed():
        return TRANSFORM
    if traced():
        return "torch.export and torch.jit.trace record torch's operators"
    for x in tensors:
        if x is None:
            continue
        if type(x) not in PLAIN:
            return f"{type(x).__name__} may know torch's operators alone"
        if x.is_meta:
            return "meta tensors have no values"
    return None


def has_tangent(args: tuple[object, ...]) -> bool:
    """Whether one of an operator's arguments carries a forward-mode derivative."""
    for x in args:
        if isinstance(x, Tensor):
            if forward_ad.unpack_dual(x).tangent is not None:
                return True
        elif isinstance(x, list | tuple) and has_tangent(tuple(x)):
            return True
    return False
