# SPDX-License-Identifier: Apache-2.0
"""Linear layers in inference: weights in oneDNN's own layout, and what follows in the same pass.

A packed weight is a copy, so at every use the original is asked whether it is still the same. See
docs/ops/linear.md. C input channels, P output channels.
"""

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from kdfast.ops import _torch_private as private
from kdfast.ops._matmul import LEAST_WORK, choice, is_plain, seen_by_torch
from kdfast.ops._tensor_state import Origin, can_be_watched

# oneDNN's name and algorithm of what can follow a product in the same pass.
ACTIVATIONS = {
    "none": ("none", ""),
    "relu": ("relu", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "silu": ("swish", ""),
}


class Layer(NamedTuple):
    """Linear layers that read the same input, as one.

    Attributes:
        weights: (P_i, ...) each; what follows the first dimension is flattened to C.
        biases: The pieces of the bias (P,); a None stands for zeros, one for each weight then.
        gain: (P,), by which the output is multiplied before anything is added to it (LayerScale);
            None for 1.
        factor: By which the output is multiplied, too.
        reach: By which the input is multiplied.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    gain: Tensor | None = None
    factor: float = 1.0
    reach: float = 1.0

    def tensors(self) -> list[Tensor]:
        """All that are given."""
        given = [*self.weights, *[bias for bias in self.biases if bias is not None]]
        return given if self.gain is None else [*given, self.gain]

    def folded(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Weight (P, C) and bias (P,) of all in ``dtype``; folding is done in fp32 at least."""
        wide = torch.promote_types(dtype, torch.float32)
        weight = torch.cat([weight.flatten(1) for weight in self.weights])
        bias = None
        if any(piece is not None for piece in self.biases):
            bias = torch.cat(
                [
                    self.weights[i].new_zeros(len(self.weights[i])) if piece is None else piece
                    for i, piece in enumerate(self.biases)
                ]
            )
        if self.gain is not None or self.factor != 1.0 or self.reach != 1.0:
            gain = torch.full((1,), self.factor, dtype=wide)
            gain = gain if self.gain is None else gain * self.gain.to(wide)
            weight = weight.to(wide) * (gain * self.reach)[:, None]
            bias = None if bias is None else bias.to(wide) * gain
        return weight.to(dtype).contiguous(), None if bias is None else bias.to(dtype)


class Product:
    """A linear layer on a packed weight, and what follows it, in one pass.

    Attributes:
        dtype: Of inputs and results.
        nbytes: Memory of the packed weight and the bias.
    """

    def __init__(self, layer: Layer, dtype: torch.dtype) -> None:
        self.dtype = dtype
        gain = dtype if layer.gain is None else layer.gain.dtype
        self._branch_dtype = torch.promote_types(dtype, gain)
        weight, self._bias = layer.folded(dtype)
        self.nbytes = weight.nbytes + (0 if self._bias is None else self._bias.nbytes)
        # The layout does not depend on the number of rows that the input is going to have.
        self._weight: Tensor = private.reorder_linear_weight(weight, None)

    def __call__(self, x: Tensor, activation: str = "none") -> Tensor:
        """f(x W^T + b), (..., P) of x (..., C); ``activation`` is one of ACTIVATIONS."""
        name, algorithm = ACTIVATIONS[activation]
        x = x if x.dtype == self.dtype else x.to(self.dtype)
        call = private.linear_pointwise.default
        out: Tensor = call(x, self._weight, self._bias, name, [], algorithm)
        return out

    def added(self, x: Tensor, other: Tensor) -> Tensor:
        """x W^T + b + other, (..., P)."""
        return self._binary(x, other, "add")

    def onto(self, x: Tensor, stream: Tensor) -> Tensor:
        """``added`` to a residual stream, in the dtype that eager code gives."""
        # Under autocast a LayerScale gives fp32, and a stream of fp32 stays so.
        dtype = torch.promote_types(stream.dtype, self._branch_dtype)
        return self.added(x, stream) if dtype == self.dtype else stream.to(dtype) + self(x)

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """(x W^T + b) * other, (..., P)."""
        return self._binary(x, other, "mul")

    def _binary(self, x: Tensor, other: Tensor, name: str) -> Tensor:
        x = x if x.dtype == self.dtype else x.to(self.dtype)
        other = other if other.dtype == self.dtype else other.to(self.dtype)
        out: Tensor = private.linear_pointwise.binary(x, other, self._weight, self._bias, name)
        return out


class _Packs(NamedTuple):
    """The packed layers of a module.

    Attributes:
        dtype: Of inputs and results.
        cast: Whether autocast said so.
        origin: The tensors that they were made of.
        products: The packed layers.
    """

    dtype: torch.dtype
    cast: bool
    origin: Origin
    products: tuple[Product, ...]


# By module, so that neither a state dict nor a copy of the module ever holds a packed weight.
_packs: weakref.WeakKeyDictionary[nn.Module, _Packs] = weakref.WeakKeyDictionary()


def forget(module: nn.Module) -> None:
    """Frees the packed weights of a module, if it has any."""
    _packs.pop(module, None)


def packed_bytes(model: nn.Module) -> int:
    """Memory of the packed weights that a model's modules hold now."""
    kept = [_packs[module] for module in model.modules() if module in _packs]
    return sum(product.nbytes for packs in kept for product in packs.products)


def inferring(module: nn.Module, x: Tensor) -> bool:
    """Whether a call with ``x`` may use packed weights, by all but the weights.

    It may in evaluation, without a gradient, and on an ordinary tensor of the CPU.
    """
    return not (
        module.training
        or torch.compiler.is_compiling()
        # A tracer's stand-in for a tensor must not be asked for anything.
        or type(x) not in _KINDS
        or not is_plain(x)
        or (torch.is_grad_enabled() and x.requires_grad)
        or seen_by_torch()
    )


def free_in_training(module: nn.Module) -> None:
    """Frees the packed weights of a module that trains: they would only take memory."""
    if module.training and not torch.compiler.is_compiling():
        forget(module)


def tracked(module: nn.Module, *given: Any) -> bool:
    """Whether autograd would record a call of a module with these further arguments."""
    return torch.is_grad_enabled() and (
        any(parameter.requires_grad for parameter in module.parameters())
        or any(isinstance(x, Tensor) and x.requires_grad for x in given)
    )


def packed(
    module: nn.Module, x: Tensor, layers: Sequence[Layer], reads: int = 0
) -> tuple[Product, ...] | None:
    """The packed layers of a module for a call that is ``inferring``, or None if it must not be.

    Args:
        module: What owns the packed weights: they are freed with it, and kept until a call with
            other layers, or the same ones changed.
        x: (..., C).
        layers: Its layers; in autocast they multiply in its dtype.
        reads: Which of the layers reads C channels.
    """
    cast = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype("cpu") if cast else x.dtype
    tensors = [tensor for layer in layers for tensor in layer.tensors()]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return None
    if not choice(dtype).packed:
        return None
    reader = layers[reads].weights[0]
    if reader.dim() < 2 or x.shape[-1] != math.prod(reader.shape[1:]):
        return None
    kept = _packs.get(module)
    if kept is not None and (kept.dtype, kept.cast) == (dtype, cast):
        if kept.origin.stands_for(tensors):
            return kept.products
    if not all(_may_be_packed(tensor, dtype, cast) for tensor in tensors):
        return None
    # Asked before anything is copied: the next call sees what another thread writes meanwhile.
    origin = Origin.of(tensors)
    with torch.inference_mode(False), torch.no_grad():
        products = tuple(Product(layer, dtype) for layer in layers)
    _packs[module] = _Packs(dtype, cast, origin, products)
    return products


def is_plain_linear(module: Any) -> bool:
    """Whether a module is its weight and bias and nothing besides: no subclass, hook or adapter."""
    cls = type(module)
    plain = cls in (nn.Linear, NonDynamicallyQuantizableLinear)
    return (
        # Or one of those classes whose forward is kdfast's.
        (plain or "kdfast_linear" in cls.__dict__)
        and not hooked(module)
        and type(module._parameters.get("weight")) in _KINDS
    )


def hooked(module: nn.Module, idle: Callable[[Any], bool] | None = None) -> bool:
    """Whether something wants to see or change what goes into or out of a module.

    Args:
        module: Any module.
        idle: Says of a hook around the forward whether it does nothing now.
    """
    # A forward asks this of a hundred modules: through the dictionary it costs a fraction.
    own = module.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"]:
        hooks = (*own["_forward_hooks"].values(), *own["_forward_pre_hooks"].values())
        if idle is None or not all(map(idle, hooks)):
            return True
    return bool(
        own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or private.any_global_hook()
    )


def only_follows(hook: Any) -> bool:
    """Whether a hook is our own, which follows the calls and needs no value of a module."""
    return getattr(hook, "only_follows", False) is True


def hooked_everywhere() -> bool:
    """Whether a hook of the whole process sees the calls of every module."""
    return bool(private.any_global_hook())


def enough_work(x: Tensor, weight: Tensor) -> bool:
    """Whether a product is large enough to gain by oneDNN."""
    return x.numel() * len(weight) >= LEAST_WORK


_KINDS = (Tensor, nn.Parameter)


def _may_be_packed(tensor: Tensor, dtype: torch.dtype, cast: bool) -> bool:
    """Whether a tensor holds something to watch, in a dtype that torch's own layer would take.

    Args:
        tensor: A weight, a bias or a gain.
        dtype: In which the layer multiplies.
        cast: Whether autocast casts to it.
    """
    return (
        can_be_watched(tensor)
        and tensor.is_floating_point()
        and (tensor.dtype == dtype or (cast and tensor.dtype != torch.float64))
        # oneDNN has no layout for a layer without channels, of a block that lost a whole branch.
        and tensor.numel() > 0
    )
