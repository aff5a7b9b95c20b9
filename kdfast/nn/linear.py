# SPDX-License-Identifier: Apache-2.0
"""Linear layers and patch embeddings on the faster library. See docs/use/accelerate.md.

An instance changes its class: it keeps its identity, tensors, hooks and names, and is still what
``isinstance`` took it for. B batch, C input channels, P output channels.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy

from kdfast.nn.attention import qualified_name
from kdfast.ops._matmul import choice, is_plain, seen_by_torch
from kdfast.ops._packed import (
    Layer,
    Product,
    enough_work,
    forget,
    free_in_training,
    inferring,
    packed,
)
from kdfast.ops.linear import linear

# Channels of a patch from which on a product beats torch's convolution; smaller ones are Swin's.
PATCH_CHANNELS = 512


class FusedLinear(nn.Linear):
    """``torch.nn.Linear`` by ``kdfast.linear``; in inference on a packed weight."""

    kdfast_linear = True
    kdfast_source = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """(..., C) to (..., P)."""
        return projected(self, input, (self.bias,))


class FusedOutLinear(NonDynamicallyQuantizableLinear):
    """The same for the output projection of ``torch.nn.MultiheadAttention``."""

    kdfast_linear = True
    kdfast_source = NonDynamicallyQuantizableLinear
    forward = FusedLinear.forward


class FusedPatches(nn.Conv2d):
    """A convolution over patches that do not overlap: a linear layer on each."""

    kdfast_source = nn.Conv2d

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, h * p, w * p) to (B, P, h, w), as a view of (B, h * w, P)."""
        x = input
        side, width = self.kernel_size
        # First whether it is a tensor at all: a tracer's stand-in must not be asked for its shape.
        fits = is_plain(x, self.weight) and x.dim() == 4 and x.shape[1] == self.in_channels
        if not fits or x.dtype != self.weight.dtype or not _faster(x):
            return super().forward(x)
        if x.numel() == 0 or x.shape[2] % side or x.shape[3] % width:
            return super().forward(x)
        grid = (x.shape[2] // side, x.shape[3] // width)
        tall = x.unflatten(2, (grid[0], side)).unflatten(4, (grid[1], width))
        patches = tall.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        out = projected(self, patches, (self.bias,))
        return out.transpose(1, 2).unflatten(2, grid)


def _faster(x: Tensor) -> bool:
    """Whether the rule says so, for a call that nothing watches."""
    return not seen_by_torch() and choice(x.dtype).packed


# What an instance of a class becomes; exactly these classes: a subclass may compute anything.
FUSED_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: FusedLinear,
    NonDynamicallyQuantizableLinear: FusedOutLinear,
    nn.Conv2d: FusedPatches,
}
ORIGINAL_LAYERS = {fused: original for original, fused in FUSED_LAYERS.items()}


def projected(
    module: Any, x: Tensor, biases: tuple[Tensor | None, ...], weight: str = "weight"
) -> Tensor:
    """A module's linear layer, packed where that is allowed.

    Args:
        module: Its owner.
        x: (..., C).
        biases: The pieces of its bias.
        weight: Name of the weight (P, ...), whose further dimensions make up C.
    """
    if product := _product(module, x, biases, weight):
        return product(x)
    given = [bias for bias in biases if bias is not None]
    bias = given[0] if len(given) == 1 else torch.cat(given) if given else None
    return linear(x, getattr(module, weight).flatten(1), bias)


def _product(
    module: Any, x: Tensor, biases: tuple[Tensor | None, ...], weight: str
) -> Product | None:
    """The packed layer of ``projected``, if a call with ``x`` may use it."""
    tensor = module._parameters.get(weight)
    if tensor is None:  # parametrized: it is computed anew at every call
        return None
    free_in_training(module)
    if torch.is_grad_enabled() and tensor.requires_grad:
        # Soon to be changed: a copy would only take memory.
        if not torch.compiler.is_compiling():
            forget(module)
        return None
    if not inferring(module, x) or not enough_work(x, tensor):
        return None
    products = packed(module, x, [Layer((tensor,), biases)])
    return None if products is None else products[0]


def is_weights_alone(layer: nn.Module) -> bool:
    """Whether a linear layer computes what its weight and bias say, however they come about."""
    return isinstance(layer, nn.Linear) and type(layer).forward in (
        nn.Linear.forward,
        FusedLinear.forward,
    )


def is_known(module: nn.Module) -> bool:
    """Whether a module is a linear layer or the patch embedding of an image."""
    if isinstance(module, nn.Linear):
        return True
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == module.stride
        and module.padding in ((0, 0), "valid")
        and module.dilation == (1, 1)
        and module.groups == 1
        and module.weight is not None
        and not is_lazy(module.weight)
        and module.weight[0].numel() >= PATCH_CHANNELS
    )


def why_not(module: nn.Module) -> str | None:
    """The reason why a layer of this class has to stay as it is, or None."""
    if type(module) not in FUSED_LAYERS and type(module) not in ORIGINAL_LAYERS:
        if getattr(module, "parametrizations", None) is not None:
            return "it is parametrized"
        return f"{qualified_name(module)} may compute something else than its base class"
    weight = module._parameters.get("weight")
    if weight is not None and type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}, no plain tensor"
    return None


def replace(module: nn.Module) -> None:
    """Makes a layer run on the faster library."""
    module.__class__ = FUSED_LAYERS.get(type(module), type(module))


def put_back(module: nn.Module) -> bool:
    """Undoes ``replace``; whether there was something to undo."""
    original = ORIGINAL_LAYERS.get(type(module))
    if original is None:
        return False
    module.__class__ = original
    forget(module)
    return True
