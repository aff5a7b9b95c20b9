# SPDX-License-Identifier: Apache-2.0
"""LayerNorm of a gated product, the inside of a SwiGLU MLP. See docs/ops/swiglu_norm.md.

C hidden channels, in rows of P >= C elements.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.ops._checks import check_tensors
from kdfast.ops._library import (
    LIB,
    forbid_second_derivative,
    fused_devices,
    not_compiled,
    register_fake,
    register_gradient,
    register_launcher,
    second_derivative,
    use_fused,
)
from kdfast.ops._losses import FLOATING, accumulator

MAX_WIDTH = 8192  # of the CUDA kernel, which holds a row in registers


def swiglu_norm(
    gate: Tensor,
    value: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """``LayerNorm(silu(gate) * value)`` over the first C elements of the last dimension.

    Args:
        gate: (..., P), fp16/bf16/fp32/fp64; the elements from C on are padding. Rows may have any
            stride: the halves of a packed projection are read in place.
        value: Shape and dtype of ``gate``.
        weight: (C,) of the norm, in the dtype of ``gate``; under a low-precision ``gate`` also
            fp32, as autocast has it.
        bias: (C,), dtype of ``weight``.
        eps: Added to the variance.
        backend: "auto", "fused" or "reference"; ``KDFAST_BACKEND`` if None.

    Returns:
        (..., P) in the dtype of ``gate``; the padding is 0, also in gradients. The fused kernel
        computes in fp32 (fp64 for fp64) and rounds once; the reference rounds like eager code, also
        after silu and the product.

    Raises:
        TypeError: Dtypes are not floating or do not go together, or an input is no tensor.
        ValueError: Shapes or devices do not match, or ``eps`` is negative.
        NotImplementedError: ``backend="fused"`` and the kernel cannot run (the reason is given).

    Gradients: gate, value, weight, bias. The fused kernel keeps its inputs and two numbers per row;
    gradients that are to be differentiated again come from the reference. Deterministic: yes,
    whatever the number of threads.
    """
    names = ("gate", "value", "weight", "bias")
    check_tensors("swiglu_norm", names, gate, value, weight, bias)
    _check(gate, value, weight, bias, eps)
    compiled = gate.device.type in FUSED_ON
    given = (gate, value, weight, bias)
    if use_fused("swiglu_norm", backend, why_not(gate), compiled=compiled, given=given):
        out: Tensor = torch.ops.kdfast.swiglu_norm.default(gate, value, weight, bias, eps)[0]
        return out
    return reference(gate, value, weight, bias, eps)


def _check(gate: Tensor, value: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    if gate.dtype not in FLOATING or value.dtype != gate.dtype:
        raise TypeError(
            f"swiglu_norm: gate and value must have one dtype of {FLOATING}, "
            f"got {gate.dtype} and {value.dtype}"
        )
    wide = accumulator(gate.dtype)
    if weight.dtype not in (gate.dtype, wide) or bias.dtype != weight.dtype:
        raise TypeError(
            f"swiglu_norm: weight and bias must both be {gate.dtype} or both {wide}, "
            f"got {weight.dtype} and {bias.dtype}"
        )
    if gate.dim() == 0 or gate.shape != value.shape:
        raise ValueError(
            "swiglu_norm: gate and value must both be (..., P), "
            f"got {tuple(gate.shape)} and {tuple(value.shape)}"
        )
    width = gate.shape[-1]
    if weight.dim() != 1 or not 0 < weight.shape[0] <= width or bias.shape != weight.shape:
        raise ValueError(
            f"swiglu_norm: weight and bias must both be (C,) with 0 < C <= {width}, "
            f"got {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    for name, x in (("value", value), ("weight", weight), ("bias", bias)):
        if x.device != gate.device:
            raise ValueError(
                f"swiglu_norm: {name} must be on the device of gate, "
                f"got {x.device} and {gate.device}"
            )
    if not eps >= 0:
        raise ValueError(f"swiglu_norm: eps must not be negative, got {eps}")


def why_not(gate: Tensor) -> str | None:
    """The reason why the compiled kernel cannot run this input, or None."""
    if gate.device.type == "cuda":
        if gate.dtype == torch.float64:
            return "the CUDA kernel takes fp16, bf16 and fp32, not fp64"
        if gate.shape[-1] > MAX_WIDTH:
            return f"the CUDA kernel takes rows of up to {MAX_WIDTH}, got {gate.shape[-1]}"
    return not_compiled("swiglu_norm", gate.device, FUSED_ON)


def reference(gate: Tensor, value: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The specification, in plain torch on checked inputs."""
    channels, width = weight.shape[0], gate.shape[-1]
    hidden = F.silu(gate[..., :channels]) * value[..., :channels]
    normed = F.layer_norm(hidden.to(weight.dtype), weight.shape, weight, bias, eps)
    return F.pad(normed.to(gate.dtype), (0, width - channels))


LIB.define(
    "swiglu_norm(Tensor gate, Tensor value, Tensor weight, Tensor bias, float eps) "
    "-> (Tensor out, Tensor mean, Tensor rstd)"
)
LIB.define(
    "swiglu_norm_bwd(Tensor grad_out, Tensor gate, Tensor value, Tensor weight, Tensor mean, "
    "Tensor rstd) -> (Tensor dgate, Tensor dvalue, Tensor dweight, Tensor dbias)"
)


@register_fake("swiglu_norm")
def _fake(*, gate: Tensor, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (gate.new_empty(gate.shape[:-1], dtype=accumulator(gate.dtype)) for _ in range(2))
    return gate.new_empty(gate.shape), mean, rstd


@register_fake("swiglu_norm_bwd")
def _fake_bwd(*, gate: Tensor, weight: Tensor, **_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dgate, dvalue = (gate.new_empty(gate.shape) for _ in range(2))
    dweight, dbias = (weight.new_empty(weight.shape) for _ in range(2))
    return dgate, dvalue, dweight, dbias


def _setup_context(ctx: Any, given: Any, output: tuple[Tensor, ...]) -> None:
    _, mean, rstd = output
    # The product is made again from gate and value; mean and rstd spare the backward its sums.
    ctx.save_for_backward(given.gate, given.value, given.weight, given.bias, mean, rstd)
    ctx.eps = given.eps
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, *_: Tensor | None) -> dict[str, Tensor | None]:
    if grad_out is None:
        return {}
    gate, value, weight, bias, mean, rstd = ctx.saved_tensors
    if torch.is_grad_enabled():
        inputs = {"gate": gate, "value": value, "weight": weight, "bias": bias}
        return second_derivative(
            lambda **given: [reference(**given, eps=ctx.eps)], inputs, [grad_out]
        )
    op = torch.ops.kdfast.swiglu_norm_bwd.default
    dgate, dvalue, dweight, dbias = op(grad_out, gate, value, weight, mean, rstd)
    return {"gate": dgate, "value": dvalue, "weight": dweight, "bias": dbias}


register_gradient("swiglu_norm", _backward, _setup_context)
forbid_second_derivative("swiglu_norm_bwd", "swiglu_norm")

_cuda = register_launcher("swiglu_norm", "swiglu_norm.forward")
_cuda_bwd = register_launcher("swiglu_norm_bwd", "swiglu_norm.backward")
FUSED_ON = fused_devices("swiglu_norm")
