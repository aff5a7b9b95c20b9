# SPDX-License-Identifier: Apache-2.0
"""What a linear layer multiplies by, where tensors of its own do not say it.

Adapters (LoRA), parametrizations, weight norms, masks and quantized layers compute their weight or
add to it. C input channels, P output channels.
"""

from typing import Any

import torch
from torch import Tensor, nn

from kdfast.nn.attention import qualified_name, width_of
from kdfast.nn.linear import is_weights_alone
from kdfast.pruning.modes import evaluating

# Parameters that the hooks of torch.nn.utils leave beside a weight, and what takes them away.
_WAYS_OUT = {
    "weight_g": "torch.nn.utils.remove_weight_norm(layer)",
    "weight_u": "torch.nn.utils.remove_spectral_norm(layer)",
    "weight_mask": "torch.nn.utils.prune.remove(layer, 'weight')",
    "bias_mask": "torch.nn.utils.prune.remove(layer, 'bias')",
}


def obstacle(layer: nn.Module) -> str | None:
    """Why the weight and bias of a layer cannot be cut, and the way out; None if they can."""
    kind = qualified_name(layer)
    if hasattr(layer, "parametrizations"):
        out = "torch.nn.utils.parametrize.remove_parametrizations(layer, name)"
        return f"is parametrized; {out} makes it plain"
    for name, out in _WAYS_OUT.items():
        if name in layer._parameters or name in layer._buffers:
            return f"computes its weight or bias anew at every call; {out} makes it plain"
    if "forward" in layer.__dict__:
        return "has a forward of its own; delete it first"
    if hasattr(layer, "base_layer"):
        return f"is an adapter ({kind}); merge it first, as peft's merge_and_unload() does"
    weight = layer._parameters.get("weight")
    # Norms may have none, which is then registered, and identities are empty.
    computed = "weight" not in layer._parameters and (hasattr(layer, "weight") or layer._modules)
    if computed:
        return f"is a {kind} without a weight of its own; put an nn.Linear in its place first"
    if isinstance(layer, nn.Linear) and not is_weights_alone(layer):
        return f"is a {kind}, which may compute anything; put an nn.Linear in its place first"
    if weight is not None and type(weight) is not nn.Parameter:
        return f"has a {type(weight).__name__} as weight; put a plain tensor in its place first"
    return None


def is_linear(layer: nn.Module) -> bool:
    """Whether a module is a linear layer, or something around one."""
    return hasattr(layer, "in_features") or any(isinstance(m, nn.Linear) for m in layer.modules())


def effective(name: str, layer: Any) -> tuple[Tensor, Tensor | None]:
    """Weight (P, C) and bias (P,) of what a layer computes, detached.

    Args:
        name: Of the layer, for the message.
        layer: Anything that is linear in its input; adapters and quantized layers are asked for
            their outputs of unit vectors.

    Raises:
        ValueError: The layer is not linear.
    """
    if obstacle(layer) is None:
        return layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    with torch.no_grad(), evaluating(layer):
        like = next((x for x in layer.parameters() if x.is_floating_point()), torch.empty(0))
        # Not by new_zeros: the tensor may be of a subclass that has no data of its own.
        zero = torch.zeros(1, width_of(layer), dtype=like.dtype, device=like.device)
        shift = layer(zero)  # hooks of torch.nn.utils compute the weight now
        plain = is_weights_alone(layer) and "forward" not in layer.__dict__
        if plain and type(layer.weight) in (Tensor, nn.Parameter):
            weight, bias = layer.weight.detach(), layer.bias
            return weight, None if bias is None else bias.detach()
        weight = (layer(torch.eye(zero.shape[1]).to(zero)) - shift).T
        if not zero.is_meta:
            _check(name, layer, weight, shift)
    return weight, shift[0]


def _check(name: str, layer: Any, weight: Tensor, shift: Tensor) -> None:
    """Raises ValueError unless a layer's output of random numbers is weight and shift's."""
    x = torch.randn(4, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    got, want = layer(x), x @ weight.T + shift
    limit = 50 * torch.finfo(weight.dtype).eps * weight.shape[1] ** 0.5
    if not (got - want).norm() <= max(limit, 0.02) * want.norm():
        raise ValueError(
            f"{name} must be linear in its input, got {qualified_name(layer)}, which is not; "
            "merge or replace it first"
        )
