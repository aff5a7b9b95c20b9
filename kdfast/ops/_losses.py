# SPDX-License-Identifier: Apache-2.0
"""What the losses that compute their gradient in the forward pass share."""

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and results for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def saved_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the gradient of an input of ``dtype`` waits for the backward pass."""
    # The loss scale that keeps fp16 gradients from vanishing arrives only in the backward pass.
    return torch.float32 if dtype == torch.float16 else dtype


def scaled_gradient(op: str, saved: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient saved in the forward pass times the upstream gradient, in ``dtype``.

    Raises:
        NotImplementedError: Under ``create_graph=True``: the saved tensor has no derivative.
    """
    if torch.is_grad_enabled():
        raise NotImplementedError(
            f"{op}: the fused kernel has no second derivative; use backend='reference'"
        )
    # The usual upstream of loss.backward(); spares a pass. Looking would stall a GPU and cannot be
    # traced, where tensors are subclasses.
    plain = type(upstream) is Tensor and upstream.device.type == "cpu" and upstream.dim() == 0
    if plain and not torch.compiler.is_compiling() and upstream.item() == 1:
        return saved.to(dtype)
    return (saved * upstream).to(dtype)
