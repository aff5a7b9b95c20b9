# SPDX-License-Identifier: Apache-2.0
"""Where an attention keeps its heads, how its tensors are resized, and what a call computed.

B batch, H heads, N tokens, D head dim.
"""

from typing import NamedTuple

from torch import Tensor, nn

from kdfast.ops.geometry import Rope, Window
from kdfast.ops.pruned_attention import math_dtype, rotated


class HeadAxis(NamedTuple):
    """Where a tensor of the attention holds its heads.

    Attributes:
        dim: The dimension with H equal blocks, one a head (D long in a projection).
        parts: How many times the H blocks repeat along ``dim``: 3 for a fused qkv.
        grouped: The blocks are key/value heads, each shared by ``kv_group`` consecutive query
            heads, so there are H // kv_group of them.
    """

    dim: int
    parts: int = 1
    grouped: bool = False


class Slot(NamedTuple):
    """A tensor, with the module that holds it under the name ``leaf``."""

    owner: nn.Module
    leaf: str
    tensor: Tensor


def submodule(module: nn.Module, path: str) -> nn.Module | None:
    """The module with this dotted name below another, itself for "", or None if there is none."""
    owner: nn.Module | None = module
    for step in path.split(".") if path else ():
        owner = None if owner is None else owner._modules.get(step)
    return owner


def find_tensor(module: nn.Module, name: str) -> Slot | None:
    """The tensor with this dotted name below a module, or None if there is none."""
    path, _, leaf = name.rpartition(".")
    owner = submodule(module, path)
    tensor = None if owner is None else getattr(owner, leaf, None)
    return Slot(owner, leaf, tensor) if owner is not None and isinstance(tensor, Tensor) else None


def resize(slot: Slot, tensor: Tensor) -> None:
    """Puts a tensor of another size in place, and corrects the sizes that its owner states.

    A parameter stays one, with the same ``requires_grad``; its gradient is dropped.
    """
    owner, leaf, old = slot
    if isinstance(old, nn.Parameter):
        tensor = nn.Parameter(tensor, old.requires_grad)
    setattr(owner, leaf, tensor)
    if isinstance(owner, nn.Linear) and leaf == "weight":
        owner.out_features, owner.in_features = tensor.shape
    elif isinstance(owner, nn.Conv2d) and leaf == "weight":
        owner.out_channels, owner.in_channels = tensor.shape[:2]
    elif hasattr(owner, "normalized_shape"):
        setattr(owner, "normalized_shape", tuple(tensor.shape))  # noqa: B010


class AttentionCall(NamedTuple):
    """The inputs of one attention, from which probabilities and outputs of its heads follow.

    Attributes:
        q: (B, H, N, D) before the rotation, after a query norm.
        k: (B, H, N, D) before the rotation, after a key norm.
        rope: Rotary tables of the call; None where ``q`` and ``k`` are not rotated, or hold a
            rotation already that no ``Rope`` can say (tables per head or per image).
        window: Windows of the call.
        scale: Factor of the logits; D ** -0.5 if None.
        v: (B, H, N, D) values; None where the reader did not ask for them.
        bias: (G, H, N, N) added to the scaled scores; G divides B, image b takes ``bias[b % G]``.
    """

    q: Tensor
    k: Tensor
    rope: Rope | None
    window: Window | None
    scale: float | None
    v: Tensor | None = None
    bias: Tensor | None = None

    def scores(self) -> Tensor:
        """(B, H, N, N), what the softmax of a call without windows gets: held whole, in fp32."""
        dtype = math_dtype(self.q.dtype)
        q, k = (rotated(x, self.rope, None).to(dtype) for x in (self.q, self.k))
        scale = q.shape[3] ** -0.5 if self.scale is None else self.scale
        scores = scale * q @ k.transpose(-1, -2)
        if self.bias is None:
            return scores
        # Windows of an image follow one another and take the biases in turn.
        tall = scores.unflatten(0, (-1, self.bias.shape[0]))
        return (tall + self.bias.to(dtype)).flatten(0, 1)
