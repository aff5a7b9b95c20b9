# SPDX-License-Identifier: Apache-2.0
"""Distillation and cross-entropy loss from the logits of student and teacher.

See docs/ops/kd_loss.md.

C classes; rows are all the leading dimensions together.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.ops._checks import check_tensors
from kdfast.ops._divergence import KINDS, WARM, mixed, softened, weighted
from kdfast.ops._hard_target import (
    check_gamma,
    check_weights,
    class_probabilities,
    focal_rows,
)
from kdfast.ops._library import (
    LIB,
    forbid_gradient,
    fused_devices,
    not_compiled,
    register_fake,
    register_gradient,
    register_launcher,
    use_fused,
)
from kdfast.ops._losses import (
    FLOATING,
    Options,
    accumulator,
    check_pair,
    saved_dtype,
    scaled_gradient,
)
from kdfast.ops._watch import watcher

# Those of the registered op; "mean" is made of the first.
REDUCTIONS = ("batchmean", "sum", "none")


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 4.0,
    alpha: float = 0.7,
    kind: str = "kl",
    reduction: str = "batchmean",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    class_weight: Tensor | None = None,
    focal_gamma: float = 0.0,
    inplace: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Softened divergence from the teacher plus cross-entropy with the target.

    ``kd = T^2 KL(softmax(t / T) || softmax(s / T))``, ``ce = cross_entropy(s, target)`` and
    ``loss = alpha * kd + (1 - alpha) * ce``, of which a part with weight 0 is left out even if it
    is infinite; see docs/ops/kd_loss.md.

    Args:
        student_logits: (..., C), fp16/bf16/fp32/fp64. A dense map (B, C, h, w) has to be moved to
            (B, h, w, C) first: ``logits.movedim(1, -1)``.
        teacher_logits: (..., C); two different dtypes are promoted to one. -inf rules a class out.
        target: None for no cross-entropy; (...) int64 class indices; or (..., C) floating class
            probabilities.
        temperature: T, above 0.
        alpha: Weight of ``kd`` in [0, 1]; ``ce`` has the weight ``1 - alpha``, also without target.
        kind: "kl" as above; "reverse_kl", with student and teacher swapped in the divergence; or
            "jsd", the Jensen-Shannon divergence, half the sum of the divergences of both from
            their mean. The last two have no kernel yet: the reference computes them.
        reduction: "batchmean" averages ``kd`` over all rows and ``ce`` over the rows that are not
            ignored; "mean" divides that ``kd`` by C, as torch's ``kl_div`` of this name; "sum" adds
            the rows up; "none" keeps one value per row.
        label_smoothing: In [0, 1], with the meaning of ``torch.nn.functional.cross_entropy``.
        ignore_index: Class index of rows that ``ce`` leaves out; ``kd`` keeps them.
        class_weight: (C,) floating: ``weight`` of ``cross_entropy``, by whose sum over the rows the
            mean of ``ce`` is then divided; acts on ``ce`` alone. None: ones.
        focal_gamma: Multiplies the part of ``ce`` of class c by ``(1 - softmax(s)_c)^focal_gamma``;
            0: no focal term. Torch computes it beside the kernel.
        inplace: Overwrites ``student_logits`` with the gradient, which then needs no memory of its
            own. They must be contiguous, not a leaf, and of no further use; one backward pass only.
        backend: "auto", "fused" or "reference"; ``KDFAST_BACKEND`` if None.

    Returns:
        (loss, kd, ce): scalars, or (...) with reduction "none"; fp32 (fp64 for fp64 logits), as
        are all sums. Only ``loss`` is differentiable: ``kd`` and ``ce`` are detached, for logs.
        As in torch, the mean over no rows is NaN and the sum is 0.

    Raises:
        TypeError: Logits, target or weights have an unsupported dtype, or are no tensors.
        ValueError: Shapes or devices do not match, there are no classes, or an option is out of
            range.
        IndexError: A class index is neither in [0, C) nor ``ignore_index`` (CPU only: looking
            would stall a GPU).
        NotImplementedError: ``backend="fused"`` and the kernel cannot run (the reason is given), or
            with a focal term; second derivatives of the fused kernel; ``inplace`` where the kernel
            for it cannot run.

    Gradients: student_logits; never teacher_logits or target. The fused kernel computes the
    gradient in the forward pass and keeps it (one tensor like the logits, fp32 for fp16) in place
    of both logits. Deterministic: yes. Source: arXiv 1503.02531.
    """
    names = ("student_logits", "teacher_logits")
    check_tensors("kd_loss", names, student_logits, teacher_logits)
    check_tensors("kd_loss", ("target",), target, optional=True)
    check_pair("kd_loss", names, student_logits, teacher_logits)
    if student_logits.dim() == 0 or student_logits.shape[-1] == 0:
        raise ValueError(
            "kd_loss: student_logits must be (..., C) with C >= 1, "
            f"got {tuple(student_logits.shape)}"
        )
    check_options("kd_loss", temperature, alpha, reduction, label_smoothing)
    if kind not in KINDS:
        raise ValueError(f"kd_loss: kind must be one of {KINDS}, got {kind!r}")
    check_weights("kd_loss", "class_weight", class_weight, student_logits)
    check_gamma("kd_loss", focal_gamma, backend)
    if target is not None:
        shape, device = student_logits.shape, student_logits.device
        check_target("kd_loss", shape, device, target, ignore_index)
    dtype = torch.promote_types(student_logits.dtype, teacher_logits.dtype)
    student, teacher = student_logits.to(dtype), teacher_logits.detach().to(dtype)
    if target is not None and target.is_floating_point():
        target = target.detach().to(accumulator(dtype))
    options = Options(temperature, alpha, reduction, label_smoothing, ignore_index)
    scale = None
    if target is not None and (class_weight is not None or focal_gamma):
        target, options, scale = with_weights(student, target, class_weight, options)
        if focal_gamma:
            q = target if scale is None else target * scale
            return _focal(student, teacher, q, options, focal_gamma, kind, inplace, backend)
    options, factor, per = by_element(options, student.shape[-1])
    reason = why_not(student, temperature, kind)
    if inplace:
        _check_inplace(student_logits, teacher, backend, reason)
        loss, kd, ce = _InPlace.apply(student_logits, teacher, target, options)
    elif use_fused(
        *("kd_loss", backend, reason),
        compiled=student.device.type in FUSED_ON,
        given=(student, teacher, target),
    ):
        need_grad = student.requires_grad and torch.is_grad_enabled()
        op = torch.ops.kdfast.kd_loss.default
        loss, kd, ce, _ = op(student, teacher, target, *options, need_grad)
    else:
        loss, kd, ce = reference(student, teacher, target, *options, kind)
    ce = ce if scale is None else ce * scale
    return (loss, kd, ce) if reduction != "mean" else (loss * factor, kd / per, ce)


def with_weights(
    student: Tensor, target: Tensor, class_weight: Tensor | None, options: Options
) -> tuple[Tensor, Options, Tensor | None]:
    """The target as class probabilities that hold smoothing and weights, and the options left.

    Returns:
        (..., C); the options; what ``ce`` has still to be multiplied by, or None.
    """
    q, scale = class_probabilities(
        "kd_loss",
        target,
        student.shape[-1],
        class_weight,
        dtype=accumulator(student.dtype),
        smoothing=options.label_smoothing,
        ignore_index=options.ignore_index,
    )
    options = options._replace(label_smoothing=0.0, ignore_index=-100)
    if scale is None or options.reduction not in ("batchmean", "mean"):
        return q, options, None
    # Without weight in the loss it must not get there either: it is NaN if no row has weight.
    return (q, options, scale) if options.alpha == 1 else (q * scale, options, None)


def _focal(
    student: Tensor,
    teacher: Tensor,
    q: Tensor,
    options: Options,
    gamma: float,
    kind: str,
    inplace: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's distillation beside torch's focal term of class probabilities q (..., C)."""
    if inplace:
        raise NotImplementedError(f"kd_loss: inplace has no focal term, got focal_gamma {gamma}")
    reduction = options.reduction
    # A part without weight gets no gradient.
    kd, logged, _ = kd_loss(
        student if options.alpha else student.detach(),
        teacher,
        temperature=options.temperature,
        alpha=1.0,
        kind=kind,
        reduction=reduction,
        backend=backend,
    )
    rows = focal_rows(student.to(accumulator(student.dtype)), q, gamma)
    ce = _reduced(rows, "batchmean" if reduction == "mean" else reduction)
    return mixed(options.alpha, kd, ce), logged, ce.detach()


def by_element(options: Options, classes: int) -> tuple[Options, float, int]:
    """Options of the registered op, and what its loss is multiplied and its kd divided by.

    ``alpha kd / C + (1 - alpha) ce`` is a multiple of ``share kd + (1 - share) ce``.
    """
    if options.reduction != "mean":
        return options, 1.0, 1
    part = options.alpha / classes
    factor = part + 1 - options.alpha
    return options._replace(alpha=part / factor, reduction="batchmean"), factor, classes


def check_options(
    op: str, temperature: float, alpha: float, reduction: str, smoothing: float
) -> None:
    """Raises ValueError, in the name of ``op``, for an option out of range."""
    if not 0 < temperature < float("inf"):
        raise ValueError(f"{op}: temperature must be above 0 and finite, got {temperature}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"{op}: alpha must be in [0, 1], got {alpha}")
    if reduction not in (*REDUCTIONS, "mean"):
        known = (*REDUCTIONS, "mean")
        raise ValueError(f"{op}: reduction must be one of {known}, got {reduction!r}")
    if not 0 <= smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1], got {smoothing}")


def check_target(
    op: str, shape: torch.Size, device: torch.device, target: Tensor, ignore_index: int
) -> None:
    """Raises, in the name of ``op``, for a target that does not fit logits of ``shape``."""
    soft = target.dtype in FLOATING
    if not soft and target.dtype != torch.int64:
        raise TypeError(f"{op}: target must be int64 or one of {FLOATING}, got {target.dtype}")
    want = shape if soft else shape[:-1]
    if target.shape != want:
        kind = "class probabilities" if soft else "class indices"
        raise ValueError(f"{op}: target of {kind} must be {tuple(want)}, got {tuple(target.shape)}")
    if target.device != device:
        raise ValueError(
            f"{op}: target must be on the device of the student, got {target.device} and {device}"
        )
    if soft and ignore_index >= 0:
        raise ValueError(
            f"{op}: ignore_index must be negative with class probabilities, which it cannot mark, "
            f"got {ignore_index}"
        )


def _check_inplace(
    student: Tensor, teacher: Tensor, backend: str | None, reason: str | None
) -> None:
    reason = watcher(student, teacher) or reason
    if reason and student.device.type in INPLACE_ON:
        raise NotImplementedError(f"kd_loss: inplace cannot run here: {reason}")
    if student.device.type not in INPLACE_ON or backend == "reference":
        raise NotImplementedError(
            f"kd_loss: inplace needs a compiled kernel, got {student.device.type} tensors and "
            f"backend {backend!r}"
        )
    if student.dtype not in (torch.float32, torch.bfloat16) or teacher.dtype != student.dtype:
        # In fp16 a gradient would vanish before the loss scale of the backward pass reaches it.
        raise NotImplementedError(
            "kd_loss: inplace needs fp32 or bf16 logits of one dtype, got "
            f"{student.dtype} and {teacher.dtype}"
        )
    if student.requires_grad and student.is_leaf:
        raise ValueError("kd_loss: inplace cannot overwrite a leaf that requires a gradient")
    shared = student.untyped_storage().data_ptr() == teacher.untyped_storage().data_ptr()
    if not student.is_contiguous() or (shared and student.numel()):
        raise ValueError(
            "kd_loss: inplace needs contiguous student_logits that share no memory with "
            "teacher_logits"
        )


def why_not(student: Tensor, temperature: float = 1.0, kind: str = "kl") -> str | None:
    """The reason why the compiled kernel cannot run this input, or None."""
    if student.device.type == "cuda" and student.dtype == torch.float64:
        return "the CUDA kernel takes fp16, bf16 and fp32, not fp64"
    if kind != "kl" and student.device.type in FUSED_ON:
        return f"the kernels have the kind 'kl', got {kind!r}"
    return too_warm(student.device, temperature) or not_compiled(
        "kd_loss", student.device, FUSED_ON
    )


def too_warm(device: torch.device, temperature: float) -> str | None:
    """The reason why the kernel of a device lacks the digits for this temperature, or None."""
    if device.type == "cuda" and temperature > WARM:
        return f"the CUDA kernel takes temperatures up to {WARM}, got {temperature}"
    return None


def reference(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    temperature: float,
    alpha: float,
    reduction: str,
    label_smoothing: float,
    ignore_index: int,
    kind: str = "kl",
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification, in plain torch on checked arguments."""
    dtype = accumulator(student.dtype)
    s, t = student.to(dtype), teacher.detach().to(dtype)
    kd = _reduced(softened(s, t, temperature, kind), reduction)
    if target is None:
        # Zeros with a place in the graph: alone in the loss they have the gradient 0.
        ce = _reduced(s[..., :0].sum(-1), "none" if reduction == "none" else "sum")
    elif target.is_floating_point():
        weight = target.detach() * (1 - label_smoothing) + label_smoothing / s.shape[-1]
        ce = _reduced(-weighted(weight, F.log_softmax(s, -1)).sum(-1), reduction)
    else:
        ce = F.cross_entropy(
            s.reshape(-1, s.shape[-1]),
            target.reshape(-1),
            ignore_index=ignore_index,
            reduction="mean" if reduction == "batchmean" else reduction,
            label_smoothing=label_smoothing,
        ).view(kd.shape)
    return mixed(alpha, kd, ce), kd.detach(), ce.detach()


def _reduced(rows: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return rows
    return rows.mean() if reduction == "batchmean" else rows.sum()


LIB.define(
    "kd_loss(Tensor student, Tensor teacher, Tensor? target, float temperature, float alpha, "
    "str reduction, float label_smoothing, int ignore_index, bool need_grad) "
    "-> (Tensor loss, Tensor kd, Tensor ce, Tensor dstudent)"
)


def _empty_losses(student: Tensor, reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised loss, kd and ce of logits (..., C)."""
    dtype = accumulator(student.dtype)
    shape = student.shape[:-1] if reduction == "none" else ()
    loss, kd, ce = (student.new_empty(shape, dtype=dtype) for _ in range(3))
    return loss, kd, ce


@register_fake("kd_loss")
def _fake(*, student: Tensor, reduction: str, need_grad: bool, **_: Any) -> tuple[Tensor, ...]:
    shape = student.shape if need_grad else (0,)
    dstudent = student.new_empty(shape, dtype=saved_dtype(student.dtype))
    return *_empty_losses(student, reduction), dstudent


def _setup_context(ctx: Any, given: Any, output: tuple[Tensor, ...]) -> None:
    loss, kd, ce, dstudent = output
    ctx.mark_non_differentiable(kd, ce, dstudent)
    # Or the backward pass would be handed zeros of that size for it.
    ctx.set_materialize_grads(False)
    # The gradient itself, so that neither logits have to live until the backward pass.
    ctx.save_for_backward(dstudent)
    ctx.dtype = given.student.dtype


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> dict[str, Tensor | None]:
    if grad_loss is None or not ctx.needs.student:
        return {}
    (dstudent,) = ctx.saved_tensors
    upstream = grad_loss.unsqueeze(-1) if grad_loss.dim() else grad_loss
    return {"student": scaled_gradient("kd_loss", dstudent, upstream, ctx.dtype)}


register_gradient("kd_loss", _backward, _setup_context)


LIB.define(
    "kd_loss_(Tensor(a!) student, Tensor teacher, Tensor? target, float temperature, float alpha, "
    "str reduction, float label_smoothing, int ignore_index) -> (Tensor loss, Tensor kd, Tensor ce)"
)


@register_fake("kd_loss_")
def _fake_inplace(*, student: Tensor, reduction: str, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_losses(student, reduction)


class _InPlace(torch.autograd.Function):
    """``kd_loss_``: the logits become their gradient, and that the result of the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, target: Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, kd, ce = torch.ops.kdfast.kd_loss_.default(student, teacher, target, *options)
        # So that autograd refuses whatever saved the logits themselves for its backward pass.
        torch.autograd.graph.increment_version(student)
        ctx.mark_non_differentiable(kd, ce)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(student)
        return loss, kd, ce

    @staticmethod
    def backward(
        ctx: Any, grad_loss: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, None, None, None]:
        if grad_loss is None:
            return None, None, None, None
        if torch.is_grad_enabled():
            raise NotImplementedError("kd_loss: inplace has no second derivative")
        # A second backward pass finds a newer version of what was saved, which autograd refuses.
        (saved,) = ctx.saved_tensors
        upstream = grad_loss.unsqueeze(-1) if grad_loss.dim() else grad_loss
        return saved.mul_(upstream), None, None, None


_cuda = register_launcher("kd_loss", "kd_loss.forward")
_cuda_inplace = register_launcher("kd_loss_", "kd_loss.forward_inplace")
forbid_gradient("kd_loss_")
FUSED_ON = fused_devices("kd_loss")
INPLACE_ON = fused_devices("kd_loss_")
