# SPDX-License-Identifier: Apache-2.0
"""Transformer blocks and MLPs in inference: each product takes along what follows it.

Activations, residuals and LayerScale are computed in the pass that writes a product's result, on
packed weights. A call that is no inference runs the block's own code. See docs/use/accelerate.md.

B batch, N tokens, C channels, H * D channels of the heads' outputs, P hidden units.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdfast.ops._layer_norm import normed
from kdfast.ops._packed import (
    Layer,
    Product,
    enough_work,
    forget,
    free_in_training,
    hooked,
    inferring,
    packed,
    tracked,
)

# The channels are chosen as oneDNN's SiLU takes them: QuickGELU is x sigmoid(1.702 x).
QUICK = 1.702


class Mlp(NamedTuple):
    """What an MLP computes: ``out(norm(f(first(x)) [* value(x)]))``.

    Attributes:
        first: C to P, followed by the activation.
        value: The other half of a gated MLP, C to P, or None.
        activation: One of ``_packed.ACTIVATIONS``.
        norm: What hidden units pass through before ``out``, or None.
        out: P to C.
    """

    first: Layer
    value: Layer | None
    activation: str
    norm: nn.Module | None
    out: Layer

    def layers(self) -> list[Layer]:
        """Those that are packed, in the order in which ``run`` takes them."""
        return [self.first, *([] if self.value is None else [self.value]), self.out]

    def run(self, x: Tensor, products: list[Product], add: Tensor | None) -> Tensor:
        """(B, N, C) of x (B, N, C), plus ``add``."""
        hidden = products[0](x, self.activation)
        if self.value is not None:
            hidden = products[1].times(x, hidden)
        if self.norm is not None:
            hidden = normed(self.norm, hidden)
        return products[-1](hidden) if add is None else products[-1].onto(hidden, add)


class Branches(NamedTuple):
    """What a block computes: ``x += out(attend(norm1(x)))``, then ``x += mlp(norm2(x))``.

    Attributes:
        norm1: Norm in front of the attention.
        project: The projections to queries, keys and values, as one; None where ``attend`` makes
            them.
        attend: The heads' outputs (B, N, H * D) of what ``project`` made, or of the normed tokens.
        out: H * D to C, with its LayerScale.
        norm2: Norm in front of the MLP.
        mlp: The MLP, with its LayerScale.
        order: For a block on maps (B, h, w, C), the order in which it sees tokens; None for one on
            sequences (B, N, C).
    """

    norm1: nn.Module
    project: Layer | None
    attend: Callable[[Tensor], Tensor]
    out: Layer
    norm2: nn.Module
    mlp: Mlp
    order: "WindowOrder | None" = None


class WindowOrder(NamedTuple):
    """In which order the tokens of a map come when it is cut into windows.

    Everything but the attention works on single tokens, so a whole block may run in this order.

    Attributes:
        tokens: Number of tokens of a window, N.
        places: (h * w,), where in the map a token of the windows is.
        inverse: (h * w,), where in the windows a token of the map is.
    """

    tokens: int
    places: Tensor
    inverse: Tensor

    def cut(self, x: Tensor) -> Tensor:
        """Windows (B * G, N, C) of a map (B, h, w, C)."""
        return x.flatten(1, 2).index_select(1, self.places).view(-1, self.tokens, x.shape[3])

    def join(self, windows: Tensor, x: Tensor) -> Tensor:
        """A map like x (B, h, w, C) of windows (B * G, N, C)."""
        tokens = windows.view(x.shape[0], -1, x.shape[3])
        return tokens.index_select(1, self.inverse).view(x.shape)


@functools.lru_cache(maxsize=256)
def window_order(
    size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]
) -> WindowOrder | None:
    """The order of a map's tokens in its windows; None where windows do not fill the map.

    Args:
        size: Height and width of the map.
        window: Height and width of a window.
        shift: By how much the map is rolled up and left before it is cut.
    """
    (h, w), (high, wide) = size, window
    if h % high or w % wide:
        return None
    with torch.inference_mode(False):
        rolled = torch.arange(h * w).view(h, w).roll((-shift[0], -shift[1]), (0, 1))
        tall = rolled.unflatten(1, (-1, wide)).unflatten(0, (-1, high))
        places = tall.transpose(1, 2).flatten()
        return WindowOrder(high * wide, places, places.argsort())


# Reads a block for a call with these arguments of its forward, of which the first is the input.
# None: this call, or this block as it is now, must run its own code.
Reader = Callable[..., Branches | None]
MlpReader = Callable[[Any], Mlp | None]


def inert(*modules: nn.Module) -> bool:
    """Whether modules (dropout, stochastic depth, identities) hand on what they get."""
    for m in modules:
        if type(m) is not nn.Identity and (m.training or type(m).__name__ not in _DROPPING):
            return False
        if hooked(m):
            return False
    return True


_DROPPING = (
    *("Dropout", "DropPath", "StochasticDepth"),
    *("Dinov2DropPath", "Dinov2WithRegistersDropPath"),
)


def run_block(block: nn.Module, read: Reader, args: Any, kwargs: Any) -> Tensor | None:
    """The block's output, or None if its own code has to run."""
    x = args[0] if args else None
    free_in_training(block)
    if not isinstance(x, Tensor) or not inferring(block, x) or x.dim() not in (3, 4):
        return None
    if tracked(block, *args, *kwargs.values()):
        return None
    parts = read(block, *args, **kwargs)
    if parts is None or not enough_work(x, parts.out.weights[0]):
        return None
    if (x.dim() == 4) != (parts.order is not None):
        return None
    first = [] if parts.project is None else [parts.project]
    # Heads may have been removed: it is the MLP that has C channels for certain.
    layers = [*first, parts.out, *parts.mlp.layers()]
    products = packed(block, x, layers, reads=len(first) + 1)
    if products is None:
        forget(block)
        return None
    order = parts.order
    stream = x if order is None else order.cut(x)
    y = normed(parts.norm1, stream)
    if parts.project is not None:
        y = products[0](y)
    stream = products[len(first)].onto(parts.attend(y), stream)
    rest = list(products[len(first) + 1 :])
    out = parts.mlp.run(normed(parts.norm2, stream), rest, stream)
    return out if order is None else order.join(out, x)


def run_mlp(module: nn.Module, read: MlpReader, args: Any, kwargs: Any) -> Tensor | None:
    """The MLP's output, or None if its own code has to run."""
    x = args[0] if len(args) == 1 and not kwargs else None
    free_in_training(module)
    if not isinstance(x, Tensor) or not inferring(module, x) or tracked(module):
        return None
    parts = read(module)
    if parts is None or not enough_work(x, parts.out.weights[0]):
        return None
    products = packed(module, x, parts.layers())
    if products is None:
        forget(module)
        return None
    return parts.run(x, list(products), None)
