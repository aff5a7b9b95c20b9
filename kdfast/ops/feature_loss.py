# SPDX-License-Identifier: Apache-2.0
"""Distance between a student's and a teacher's features. See docs/ops/feature_loss.md.

C features; positions are all the other dimensions together.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.ops._checks import check_tensors
from kdfast.ops._library import (
    LIB,
    fused_devices,
    not_compiled,
    register_fake,
    register_gradient,
    register_launcher,
    use_fused,
)
from kdfast.ops._losses import accumulator, check_pair, saved_dtype, scaled_gradient

KINDS = ("mse", "cosine", "smooth_l1")
NORMALIZATIONS = ("none", "layer", "channel")
# Added to variances; repeated in csrc/cpu/feature_loss.cpp and kernels/feature_loss.py, as is
# ZERO_NORM.
EPS = 1e-6
# A vector no longer than this has no direction.
ZERO_NORM = 1e-8
MAX_FEATURES = 8192  # of the CUDA kernel, which holds a position in registers


def feature_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    kind: str = "mse",
    normalize: str | None = None,
    dim: int = -1,
    backend: str | None = None,
) -> Tensor:
    """Mean distance between the features of student and teacher.

    Args:
        student: Any shape, fp16/bf16/fp32/fp64; dimension ``dim`` holds the C features.
        teacher: Shape of ``student``; two different dtypes are promoted to one.
        kind: "mse" and "smooth_l1" (beta 1) average over all elements. "cosine" averages
            ``1 - cos`` over the positions; a vector of norm <= 1e-8 counts as zero: two zero
            vectors cost 0, one costs 1, and a zero student vector gets no gradient.
        normalize: None; "layer" normalises every position of both sides over its features, as
            LayerNorm without weights (eps 1e-6); "channel" standardises both sides, channel by
            channel, with the mean and the variance (eps 1e-6) of the teacher over all positions.
        dim: The feature axis.
        backend: "auto", "fused" or "reference"; ``KDFAST_BACKEND`` if None.

    Returns:
        Scalar, fp32 (fp64 for fp64 features), as are all sums. As in torch, the mean over no
        positions is NaN.

    Raises:
        TypeError: Features are not floating, or no tensors.
        ValueError: Shapes or devices do not match, ``dim`` is out of range or empty, or an option
            is unknown.
        NotImplementedError: ``backend="fused"`` and the kernel cannot run (the reason is given);
            second derivatives of the fused kernel.

    Gradients: student; never teacher. The fused kernel computes the gradient in the forward pass
    and keeps it (one tensor like the student, fp32 for fp16) in place of both inputs.
    Deterministic: yes.
    """
    check_tensors("feature_loss", ("student", "teacher"), student, teacher)
    _check(student, teacher, kind, normalize, dim)
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    s = student.to(dtype).movedim(dim, -1)
    t = teacher.detach().to(dtype).movedim(dim, -1)
    norm = "none" if normalize is None else normalize
    compiled = s.device.type in FUSED_ON
    if use_fused("feature_loss", backend, why_not(s), compiled=compiled, given=(s, t)):
        need_grad = s.requires_grad and torch.is_grad_enabled()
        loss: Tensor = torch.ops.kdfast.feature_loss.default(s, t, kind, norm, need_grad)[0]
        return loss
    return reference(s, t, kind, norm)


def _check(student: Tensor, teacher: Tensor, kind: str, normalize: str | None, dim: int) -> None:
    check_pair("feature_loss", ("student", "teacher"), student, teacher)
    if kind not in KINDS:
        raise ValueError(f"feature_loss: kind must be one of {KINDS}, got {kind!r}")
    if normalize is not None and normalize not in NORMALIZATIONS[1:]:
        raise ValueError(
            f"feature_loss: normalize must be None or one of {NORMALIZATIONS[1:]}, "
            f"got {normalize!r}"
        )
    if not -student.dim() <= dim < student.dim():
        raise ValueError(
            f"feature_loss: dim must be in [{-student.dim()}, {student.dim()}), got {dim}"
        )
    if student.shape[dim] == 0:
        raise ValueError(
            f"feature_loss: dim {dim} must hold at least one feature, got {tuple(student.shape)}"
        )


def why_not(student: Tensor) -> str | None:
    """The reason why the compiled kernel cannot run this input, or None."""
    if student.device.type == "cuda":
        if student.dtype == torch.float64:
            return "the CUDA kernel takes fp16, bf16 and fp32, not fp64"
        if student.shape[-1] > MAX_FEATURES:
            return f"the CUDA kernel takes up to {MAX_FEATURES} features, got {student.shape[-1]}"
    return not_compiled("feature_loss", student.device, FUSED_ON)


def reference(student: Tensor, teacher: Tensor, kind: str, normalize: str) -> Tensor:
    """The specification, in plain torch on checked (..., C) features."""
    dtype = accumulator(student.dtype)
    s, t = _normalized(student.to(dtype), teacher.detach().to(dtype), normalize)
    if kind == "mse":
        return F.mse_loss(s, t)
    if kind == "smooth_l1":
        return F.smooth_l1_loss(s, t)
    (s, no_s), (t, no_t) = _unit(s), _unit(t)
    # 1 - cos of unit vectors, in the form that loses no digits where they are close.
    square = (s - t).square().sum(-1)
    return torch.where((no_s ^ no_t) & ~square.isnan(), 1.0, 0.5 * square).mean()


def _normalized(s: Tensor, t: Tensor, normalize: str) -> tuple[Tensor, Tensor]:
    if normalize == "layer":
        return F.layer_norm(s, s.shape[-1:], eps=EPS), F.layer_norm(t, t.shape[-1:], eps=EPS)
    if normalize == "channel":
        rows = t.reshape(-1, t.shape[-1])
        mean = rows.mean(0)
        scale = ((rows - mean).square().mean(0) + EPS).rsqrt()
        return (s - mean) * scale, (t - mean) * scale
    return s, t


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """(..., C) vectors of norm 1, zero where x has no direction, and (...) where that is."""
    square = x.square().sum(-1, keepdim=True)
    none = square <= ZERO_NORM**2
    scale = torch.where(none, 0.0, torch.where(none, 1.0, square).rsqrt())
    return x * scale, none.squeeze(-1)


LIB.define(
    "feature_loss(Tensor student, Tensor teacher, str kind, str normalize, bool need_grad) "
    "-> (Tensor loss, Tensor dstudent)"
)


@register_fake("feature_loss")
def _fake(*, student: Tensor, need_grad: bool, **_: Any) -> tuple[Tensor, Tensor]:
    loss = student.new_empty((), dtype=accumulator(student.dtype))
    shape = student.shape if need_grad else (0,)
    return loss, student.new_empty(shape, dtype=saved_dtype(student.dtype))


def _setup_context(ctx: Any, given: Any, output: tuple[Tensor, Tensor]) -> None:
    _, dstudent = output
    ctx.mark_non_differentiable(dstudent)
    # Or the backward pass would be handed zeros of that size for it.
    ctx.set_materialize_grads(False)
    # The gradient itself, so that neither input has to live until the backward pass.
    ctx.save_for_backward(dstudent)
    ctx.dtype = given.student.dtype


def _backward(ctx: Any, grad_loss: Tensor | None, _: Tensor | None) -> dict[str, Tensor | None]:
    if grad_loss is None or not ctx.needs.student:
        return {}
    (dstudent,) = ctx.saved_tensors
    return {"student": scaled_gradient("feature_loss", dstudent, grad_loss, ctx.dtype)}


register_gradient("feature_loss", _backward, _setup_context)

_cuda = register_launcher("feature_loss", "feature_loss.forward")
FUSED_ON = fused_devices("feature_loss")
