# SPDX-License-Identifier: Apache-2.0
"""A linear layer on the faster of the libraries that torch ships. See docs/ops/linear.md.

C input channels, P output channels; rows are all the leading dimensions.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function
from torch.utils.flop_counter import register_flop_formula

from kdfast.ops._autocast import without_autocast
from kdfast.ops._checks import check_tensors
from kdfast.ops._library import (
    EXTENSION,
    LIB,
    call_below_autograd,
    register_fake,
    register_gradient,
)
from kdfast.ops._matmul import (
    LEAST_WORK,
    SUPPORTED,
    choice,
    is_batched,
    is_plain,
    product,
    seen_by_torch,
)

OP = "linear"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``, its three products each on the faster library.

    On a CPU torch has MKL and oneDNN at hand. A fixed rule by processor, dtype and shape
    (``KDFAST_LINEAR`` overrides it, ``kdfast.info`` prints it) picks one for the product itself and
    for either gradient. Everything else is torch's own function: other devices and dtypes, tensor
    subclasses, exports and traces, ``torch.func``, forward-mode derivatives. Autocast is obeyed.

    Args:
        x: (..., C), fp16/bf16/fp32/fp64.
        weight: (P, C), dtype and device of x.
        bias: (P,), dtype and device of x, or None.

    Returns:
        (..., P) in x's dtype.

    Raises:
        TypeError: An argument is not a tensor.
        RuntimeError: What torch's own function raises, where shapes, dtypes or devices do not
            match.

    Gradients: x, weight, bias, of any order. Deterministic: yes. Source: as ``F.linear``.
    """
    if x is None or weight is None or not is_plain(x, weight, bias):
        # A tracer's stand-in for a tensor is none, and torch's function takes it.
        if not has_torch_function((x, weight, bias)):
            check_tensors(OP, ("x", "weight"), x, weight)
            check_tensors(OP, ("bias",), bias, optional=True)
        return F.linear(x, weight, bias)
    if seen_by_torch():
        return F.linear(x, weight, bias)
    context, (x, weight, bias) = without_autocast("cpu", x, weight, bias)
    with context:
        if not _fits(x, weight, bias) or not choice(x.dtype).forward:
            return F.linear(x, weight, bias)
        out: Tensor = call_below_autograd(torch.ops.kdfast.linear.default, x, weight, bias)
        return out


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN takes these shapes and dtypes, and there is enough work to gain by it."""
    return (
        x.dim() > 0
        and weight.dim() == 2
        and x.shape[-1] == weight.shape[1]
        and x.dtype == weight.dtype
        and (bias is None or (bias.dtype == x.dtype and bias.shape == weight.shape[:1]))
        and x.dtype in SUPPORTED
        and x.numel() * weight.shape[0] >= LEAST_WORK
    )


def reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The specification."""
    return F.linear(x, weight, bias)


LIB.define(f"{OP}(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def _cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not _fits(x, weight, bias):
        return F.linear(x, weight, bias)
    return product(x, weight, bias)


LIB.impl(OP, _cpu, "CPU")


@register_fake(OP)
def _fake(*, x: Tensor, weight: Tensor, **_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@register_flop_formula(torch.ops.kdfast.linear)
def _flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    """What torch counts for its own; asked where a counter looks at a backward pass alone."""
    return 2 * math.prod(x) * int(weight[0])


def _setup_context(ctx: Any, given: Any, output: Tensor) -> None:
    ctx.save_for_backward(given.x, given.weight)


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient (..., C) of the input, from that of the output (..., P) and the weight."""
    if choice(grad.dtype).input_gradient and not is_batched(grad):
        out: Tensor = torch.ops.kdfast.linear.default(grad, weight.t(), None)
        return out
    return grad @ weight


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient (P, C) of the weight, from that of the output (rows, P) and x (rows, C)."""
    chosen = choice(grad.dtype)
    if is_batched(grad):
        return grad.t() @ x
    if chosen.tall_gradient if grad.shape[1] > x.shape[1] else chosen.weight_gradient:
        out: Tensor = torch.ops.kdfast.linear.default(grad.t(), x.t(), None)
        return out
    return grad.t() @ x


LIB.define("transpose_sum(Tensor x, bool sums) -> (Tensor out, Tensor sums)")


@register_fake("transpose_sum")
def _fake_transpose(*, x: Tensor, sums: bool) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    return x.new_empty(columns, rows), x.new_empty(columns if sums else 0)


def parameter_gradients(
    grad: Tensor, x: Tensor, weight: bool, bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """``weight_gradient`` where it is wanted, and the gradient (P,) of the bias.

    oneDNN wants the transpose of ``grad`` in memory. Where nothing is to be differentiated again it
    is written by a kernel of our own, which adds up the columns on the way.
    """
    turned = weight and grad.dtype == torch.float32 and EXTENSION is not None
    if not turned or torch.is_grad_enabled() or is_batched(grad) or not _onednn_weight(grad, x):
        return weight_gradient(grad, x) if weight else None, grad.sum(0) if bias else None
    tall, sums = torch.ops.kdfast.transpose_sum.default(grad, bias)
    return torch.ops.kdfast.linear.default(tall, x.t(), None), sums if bias else None


def _onednn_weight(grad: Tensor, x: Tensor) -> bool:
    """Whether the rule gives the weight's gradient to oneDNN, and the op will do so, too."""
    chosen = choice(grad.dtype)
    taken = chosen.tall_gradient if grad.shape[1] > x.shape[1] else chosen.weight_gradient
    return taken and grad.numel() * x.shape[1] >= LEAST_WORK


def _rows(x: Tensor) -> Tensor:
    """(rows, C) of (..., C), also of (C,) and under vmap."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _backward(ctx: Any, grad: Tensor) -> dict[str, Tensor | None]:
    x, weight = ctx.saved_tensors
    gradients: dict[str, Tensor | None] = {}
    # A backward pass may run inside of autocast, which has had its say in the forward pass.
    with torch.autocast("cpu", enabled=False):
        if ctx.needs.x:
            gradients["x"] = input_gradient(grad, weight)
        rows = _rows(grad)
        wanted = ctx.needs.weight, ctx.needs.bias
        gradients["weight"], gradients["bias"] = parameter_gradients(rows, _rows(x), *wanted)
    return gradients


register_gradient(OP, _backward, _setup_context)
