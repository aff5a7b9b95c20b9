# SPDX-License-Identifier: Apache-2.0
"""``kd_loss`` of a linear layer's logits, which never exist whole. See docs/ops/linear_kd_loss.md.

C classes, D features of the student, Dt of the teacher; rows are all the leading dimensions.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdfast.ops import kd_loss as logits_op
from kdfast.ops._autocast import without_autocast
from kdfast.ops._checks import check_tensors
from kdfast.ops._library import (
    LIB,
    fused_devices,
    not_compiled,
    register_fake,
    register_flops,
    register_gradient,
    use_fused,
)
from kdfast.ops._linear_kd import Layers, chunked, empty_gradients
from kdfast.ops._losses import FLOATING, Options, accumulator, scaled_gradient

OP = "linear_kd_loss"
STUDENT = ("hidden", "weight", "bias")
TEACHER = ("teacher_hidden", "teacher_weight", "teacher_bias")
OPTIONAL = ("teacher_logits", "target", *TEACHER, "bias")
# Logits of a chunk, and rows it has at least: fewer make the matrix products slow.
CHUNK_LOGITS = {"cpu": 1 << 21, "cuda": 1 << 27}
CHUNK_ROWS = {"cpu": 512, "cuda": 1024}


def linear_kd_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher_logits: Tensor | None = None,
    target: Tensor | None = None,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 4.0,
    alpha: float = 0.7,
    reduction: str = "batchmean",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    chunk: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``kd_loss(F.linear(hidden, weight, bias), teacher's logits, target)``, chunk by chunk.

    The teacher's logits are either given or ``F.linear(teacher_hidden, teacher_weight,
    teacher_bias)``. Logits of ``chunk`` rows exist at a time, so memory is that of the inputs and
    their gradients. Under autocast all tensors but fp64 and the target are cast to its dtype.

    Args:
        hidden: (..., D), fp16/bf16/fp32/fp64: what the student's last layer gets.
        weight: (C, D), dtype of hidden: that layer.
        teacher_logits: (..., C), any floating dtype; as in ``kd_loss`` two dtypes are promoted.
        target: None; (...) int64 class indices; or (..., C) floating class probabilities.
        teacher_hidden: (..., Dt), in place of teacher_logits; together with teacher_weight.
        teacher_weight: (C, Dt), dtype of teacher_hidden.
        teacher_bias: (C,), dtype of teacher_hidden.
        bias: (C,), dtype of hidden.
        temperature: As in ``kd_loss``, like the next four.
        alpha: Weight of ``kd``.
        reduction: "batchmean", "mean", "sum" or "none".
        label_smoothing: In [0, 1].
        ignore_index: Class index of rows that ``ce`` leaves out.
        chunk: Rows whose logits exist at a time; chosen by the device and C if None. The result
            depends on it only by rounding.
        backend: "auto", "fused" or "reference" (which holds all logits); ``KDFAST_BACKEND`` if
            None.

    Returns:
        (loss, kd, ce) as ``kd_loss`` returns them.

    Raises:
        TypeError: A tensor has an unsupported dtype, another one than its partner, or is of another
            type.
        ValueError: Shapes or devices do not match, the teacher is given twice or not at all, or
            an option is out of range.
        IndexError: A class index is neither in [0, C) nor ``ignore_index`` (CPU only).
        NotImplementedError: ``backend="fused"`` and the kernel cannot run (the reason is given);
            second derivatives of the fused op.

    Gradients: hidden, weight, bias; never the teacher or the target. "batchmean" and "sum" compute
    them in the forward pass; "none" recomputes the logits in the backward pass. The weight's
    gradient is accumulated in fp32. Deterministic: yes.
    """
    check_tensors(OP, ("hidden", "weight"), hidden, weight)
    given = (teacher_logits, target, teacher_hidden, teacher_weight, teacher_bias, bias)
    check_tensors(OP, OPTIONAL, *given, optional=True)
    device = hidden.device.type
    context, (hidden, weight, bias, *teacher) = without_autocast(
        *(device, hidden, weight, bias),
        *(teacher_logits, teacher_hidden, teacher_weight, teacher_bias),
    )
    teacher = [None if x is None else x.detach() for x in teacher]
    classes = _check_layer(STUDENT, hidden, weight, bias)
    dtype = torch.promote_types(hidden.dtype, _check_teacher(hidden, classes, *teacher))
    logits_op.check_options(OP, temperature, alpha, reduction, label_smoothing)
    if target is not None:
        shape = torch.Size((*hidden.shape[:-1], classes))
        logits_op.check_target(OP, shape, hidden.device, target, ignore_index)
        if target.is_floating_point():
            target = target.detach().to(accumulator(dtype))
    if chunk is not None and chunk < 1:
        raise ValueError(f"{OP}: chunk must be at least 1, got {chunk}")
    layers = Layers._make((hidden, weight, bias, *teacher, target))
    options = Options(temperature, alpha, reduction, label_smoothing, ignore_index)
    options, factor, per = logits_op.by_element(options, classes)
    reason = why_not(hidden.device, dtype, temperature)
    fused = use_fused(OP, backend, reason, compiled=device in FUSED_ON, given=layers)
    with context:
        loss, kd, ce = _fused(layers, options, chunk) if fused else reference(layers, options)
    return (loss, kd, ce) if reduction != "mean" else (loss * factor, kd / per, ce)


def _fused(layers: Layers, options: Options, chunk: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """The registered op on rows; checked arguments as ``reference`` takes them."""
    shape = layers.hidden.shape[:-1]
    if chunk is None:
        chunk = default_chunk(layers.hidden.device.type, shape.numel(), layers.weight.shape[0])
    # "none" has no gradient in the forward pass: what a row weighs in it is not known there.
    ready = torch.is_grad_enabled() and options.reduction != "none"
    student = (layers.hidden, layers.weight, layers.bias)
    need = [ready and x is not None and x.requires_grad for x in student]
    rows = layers.by_row(lambda x: x.reshape(-1, *x.shape[len(shape) :]))
    op = torch.ops.kdfast.linear_kd_loss.default
    loss, kd, ce, *_ = op(*rows, None, *options, chunk, need)
    if options.reduction == "none":
        return loss.reshape(shape), kd.reshape(shape), ce.reshape(shape)
    return loss, kd, ce


def default_chunk(device: str, rows: int, classes: int) -> int:
    """Rows per chunk: logits that stay in cache, if so few rows still make fast products."""
    most = max(CHUNK_ROWS[device], CHUNK_LOGITS[device] // classes)
    chunks = max(1, -(-rows // most))
    return max(1, -(-rows // chunks))


def _check_layer(
    names: tuple[str, str, str], x: Tensor, weight: Tensor, bias: Tensor | None
) -> int:
    """Number of classes of a linear layer whose tensors fit each other."""
    name, *others = names
    if x.dtype not in FLOATING:
        raise TypeError(f"{OP}: {name} must be one of {FLOATING}, got {x.dtype}")
    if x.dim() == 0 or weight.dim() != 2 or weight.shape[1] != x.shape[-1] or not len(weight):
        raise ValueError(
            f"{OP}: {others[0]} must be (C, features) with C >= 1 for {name} (..., features), got "
            f"{tuple(weight.shape)} and {tuple(x.shape)}"
        )
    classes = weight.shape[0]
    if bias is not None and bias.shape != (classes,):
        raise ValueError(f"{OP}: {others[1]} must be ({classes},), got {tuple(bias.shape)}")
    for other, value in zip(others, (weight, bias), strict=True):
        if value is not None and value.dtype != x.dtype:
            raise TypeError(f"{OP}: {other} must be {x.dtype} like {name}, got {value.dtype}")
        if value is not None and value.device != x.device:
            raise ValueError(f"{OP}: {other} must be on {x.device} like {name}, got {value.device}")
    return classes


def _check_teacher(
    student: Tensor,
    classes: int,
    logits: Tensor | None,
    hidden: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> torch.dtype:
    """Dtype of the teacher's logits."""
    if logits is not None and hidden is None and weight is None and bias is None:
        x, count = logits, logits.shape[-1] if logits.dim() else 0
    elif logits is None and hidden is not None and weight is not None:
        x, count = hidden, _check_layer(TEACHER, hidden, weight, bias)
    else:
        raise ValueError(
            f"{OP}: the teacher must be either teacher_logits, or teacher_hidden and "
            "teacher_weight with or without teacher_bias, got another combination"
        )
    name = TEACHER[0] if logits is None else "teacher_logits"
    if x.dtype not in FLOATING:
        raise TypeError(f"{OP}: {name} must be one of {FLOATING}, got {x.dtype}")
    if count != classes or x.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            f"{OP}: {name} must have hidden's rows {tuple(student.shape[:-1])} and {classes} "
            f"classes, got {tuple(x.shape)} and {count} classes"
        )
    if x.device != student.device:
        raise ValueError(f"{OP}: {name} must be on {student.device} like hidden, got {x.device}")
    return x.dtype


def why_not(device: torch.device, dtype: torch.dtype, temperature: float = 1.0) -> str | None:
    """The reason why the compiled kernel cannot run logits of ``dtype``, or None."""
    if device.type == "cuda" and dtype == torch.float64:
        return "the CUDA kernel of kd_loss takes fp16, bf16 and fp32, not fp64"
    return logits_op.too_warm(device, temperature) or not_compiled(OP, device, FUSED_ON)


def reference(layers: Layers, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """The specification, in plain torch on checked arguments."""
    s, t = (x.to(layers.dtype) for x in layers.logits())
    return logits_op.reference(s, t, layers.target, *options)


LIB.define(
    f"{OP}(Tensor hidden, Tensor weight, Tensor? bias, Tensor? teacher_logits, "
    "Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias, Tensor? target, "
    "Tensor? row_weight, float temperature, float alpha, str reduction, float label_smoothing, "
    "int ignore_index, SymInt chunk, bool[] need_grad) -> "
    "(Tensor loss, Tensor kd, Tensor ce, Tensor dhidden, Tensor dweight, Tensor dbias)"
)


@register_fake(OP)
def _fake(
    *,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_logits: Tensor | None,
    teacher_hidden: Tensor | None,
    reduction: str,
    need_grad: list[bool],
    **_: Any,
) -> tuple[Tensor, ...]:
    shape = hidden.shape[:-1] if reduction == "none" else ()
    layers = Layers(hidden, weight, bias, teacher_logits, teacher_hidden, None, None, None)
    loss, kd, ce = (hidden.new_empty(shape, dtype=accumulator(layers.dtype)) for _ in range(3))
    return loss, kd, ce, *empty_gradients(hidden, weight, bias, need_grad)


@register_flops(OP)
def _flops(
    *,
    hidden: Sequence[int],
    weight: Sequence[int],
    teacher_hidden: Sequence[int] | None,
    teacher_weight: Sequence[int] | None,
    need_grad: list[bool],
    **_: Any,
) -> int:
    rows = math.prod(hidden[:-1])
    products = 2 * rows * math.prod(weight) * (1 + sum(need_grad[:2]))
    if teacher_hidden is not None and teacher_weight is not None:
        products += 2 * rows * math.prod(teacher_weight)
    return products


def _setup_context(ctx: Any, given: Any, output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    # Or the backward pass would be handed zeros of the gradients' sizes.
    ctx.set_materialize_grads(False)
    ctx.dtype, ctx.chunk = given.hidden.dtype, given.chunk
    weights = given.temperature, given.alpha
    ctx.options = Options(*weights, given.reduction, given.label_smoothing, given.ignore_index)
    # The gradients themselves, or, where the weight of a row comes later, what they come from.
    if given.reduction == "none":
        ctx.save_for_backward(*(getattr(given, name) for name in Layers._fields))
    else:
        _, _, _, dhidden, dweight, dbias = output
        ctx.save_for_backward(dhidden, dweight, dbias)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> dict[str, Tensor | None]:
    if grad_loss is None:
        return {}
    need = [bool(getattr(ctx.needs, name)) for name in STUDENT]
    if ctx.options.reduction == "none":
        if torch.is_grad_enabled():
            raise NotImplementedError(
                f"{OP}: the fused kernel has no second derivative; use backend='reference'"
            )
        op = torch.ops.kdfast.linear_kd_loss.default
        row_weight = grad_loss.contiguous()
        results = op(*ctx.saved_tensors, row_weight, *ctx.options, ctx.chunk, need)
        gradients = [x.to(ctx.dtype) for x in results[3:]]
    else:
        gradients = [
            scaled_gradient(OP, x, grad_loss, ctx.dtype) if wanted else x
            for x, wanted in zip(ctx.saved_tensors, need, strict=True)
        ]
    found = zip(STUDENT, gradients, need, strict=True)
    return {name: gradient for name, gradient, wanted in found if wanted}


register_gradient(OP, _backward, _setup_context)

for _device in logits_op.FUSED_ON:
    torch.library.impl(LIB, OP, _device.upper())(chunked)

FUSED_ON = fused_devices(OP)
