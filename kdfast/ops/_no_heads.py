# SPDX-License-Identifier: Apache-2.0
"""Attention without heads, whose parameters and inputs stay in the graph."""

import torch
from torch import Tensor, nn

from kdfast.ops._torch_private import exporting


def no_heads(module: nn.Module, context: Tensor, *inputs: Tensor | None) -> Tensor:
    """The empty output of an attention without heads, with a zero gradient to what it depends on.

    Distributed training waits for the gradient of every parameter. Such an attention still has
    some, like projections of no rows, norms of queries and keys and tables of positions, and its
    inputs come from others, like the norm before it.

    Args:
        module: The attention.
        context: A tensor without elements.
        inputs: What it attends to, its bias and its rotation; None is skipped.
    """
    if not torch.is_grad_enabled() or exporting():
        return context
    sources = [x[..., :0] for x in inputs if x is not None and x.requires_grad]
    sources += [p.flatten()[:0] for p in module.parameters() if p.requires_grad]
    for source in sources:
        context = context + source.sum().to(context.dtype)
    return context
