# SPDX-License-Identifier: Apache-2.0
"""LayerNorm in inference, inside fused blocks.

torch's own wakes a second thread for what one has done before the other is awake. C channels.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.ops._library import EXTENSION, LIB, register_fake
from kdfast.ops._matmul import is_plain
from kdfast.ops._packed import hooked

LIB.define("layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor")


@register_fake("layer_norm")
def _fake(*, x: Tensor, **_: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@functools.cache
def _is_plain(cls: Any) -> bool:
    """Whether a class's forward is ``F.layer_norm`` of its own tensors and nothing besides."""
    return cls is nn.LayerNorm or f"{cls.__module__}.{cls.__qualname__}" == _TIMM


_TIMM = "timm.layers.norm.LayerNorm"


def is_layer_norm(norm: Any) -> bool:
    """Whether a module is a LayerNorm of single tokens, and nothing watches its calls."""
    cls: Any = type(norm)
    return _is_plain(cls) and len(norm.normalized_shape) == 1 and not hooked(norm)


def normed(norm: Any, x: Tensor) -> Tensor:
    """``norm(x)`` in a call that is ``inferring``: by the kernel where it is a plain LayerNorm.

    Args:
        norm: Any module.
        x: (..., C).
    """
    out: Tensor
    if EXTENSION is not None and is_layer_norm(norm) and not torch.is_autocast_enabled("cpu"):
        weight, bias = norm.weight, norm.bias
        if _fits(norm, x, weight) and _fits(norm, x, bias) and _alike(weight, bias):
            out = torch.ops.kdfast.layer_norm.default(x, weight, bias, norm.eps)
            return out
    out = norm(x)
    return out


def _fits(norm: Any, x: Tensor, given: Tensor | None) -> bool:
    """Whether the kernel takes a weight or a bias, which torch's own would take, too."""
    if x.dim() == 0 or x.shape[-1] != norm.normalized_shape[0] or x.dtype not in _WIDE:
        return False
    return given is None or (
        is_plain(given) and given.dtype in (x.dtype, _WIDE[x.dtype]) and given.is_contiguous()
    )


def _alike(weight: Tensor | None, bias: Tensor | None) -> bool:
    return weight is None or bias is None or weight.dtype == bias.dtype


# By dtype of the input, that of its sums, which weights may have, too.
_WIDE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}
