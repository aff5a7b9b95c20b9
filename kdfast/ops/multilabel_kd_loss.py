# SPDX-License-Identifier: Apache-2.0
"""Distillation and binary cross-entropy where an image has several labels.

See docs/ops/multilabel_kd_loss.md. C labels.
"""

from functools import partial

import torch
from torch import Tensor

from kdfast.ops._checks import check_tensors
from kdfast.ops._divergence import mixed
from kdfast.ops._hard_target import binary_terms, check_gamma, check_weights
from kdfast.ops._losses import FLOATING, accumulator, check_pair
from kdfast.ops.kd_loss import check_options, kd_loss

OP = "multilabel_kd_loss"
# And what they are called in ``kd_loss``, whose rows are the labels of all images.
REDUCTIONS = {"mean": "batchmean", "sum": "sum", "none": "none"}


def multilabel_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 4.0,
    alpha: float = 0.7,
    kind: str = "kl",
    class_weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    focal_gamma: float = 0.0,
    focal_alpha: float | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of ``kd_loss`` for labels that do not exclude each other.

    Of every label, with S the logistic function: ``kd = T^2 KL(Bern(S(t / T)) || Bern(S(s / T)))``
    and ``bce = binary_cross_entropy_with_logits(s, target)``; ``loss = alpha * kd +
    (1 - alpha) * bce``. Weights and focal terms act on ``bce`` alone.

    Args:
        student_logits: (..., C), fp16/bf16/fp32/fp64.
        teacher_logits: (..., C); two different dtypes are promoted to one.
        target: None for no cross-entropy; (..., C) floating values in [0, 1].
        temperature: T, above 0.
        alpha: Weight of ``kd`` in [0, 1]; ``bce`` has the weight ``1 - alpha``.
        kind: As in ``kd_loss``.
        class_weight: (C,) factor of every label; None: ones.
        pos_weight: (C,) factor of the positive part, as in torch's BCE with logits; None: ones.
        focal_gamma: Multiplies by ``(1 - p_t)^focal_gamma`` with ``p_t`` the probability of the
            target; 0: no focal term.
        focal_alpha: Multiplies positives by it and negatives by ``1 - focal_alpha``, in [0, 1];
            None: neither. Needs ``focal_gamma``.
        reduction: "mean" over all labels of all rows, "sum" over them, or "none".
        backend: "auto", "fused" or "reference"; ``KDFAST_BACKEND`` if None.

    Returns:
        (loss, kd, bce): scalars, or (..., C) with reduction "none"; fp32 (fp64 for fp64 logits).
        Only ``loss`` is differentiable.

    Raises:
        TypeError: Logits, target or weights have an unsupported dtype, or are no tensors.
        ValueError: Shapes or devices do not match, or an option is out of range.
        NotImplementedError: As ``kd_loss``, and ``backend="fused"`` with a focal term.

    Gradients: student_logits. It runs the kernel of ``kd_loss`` on the pairs ``(z, 0)``, weights
    included; a focal term is computed by torch beside it. Deterministic: yes.
    Source: arXiv 1503.02531; focal: arXiv 1708.02002.
    """
    names = ("student_logits", "teacher_logits")
    check_tensors(OP, names, student_logits, teacher_logits)
    check_tensors(OP, ("target",), target, optional=True)
    check_pair(OP, names, student_logits, teacher_logits)
    if reduction not in REDUCTIONS:
        raise ValueError(f"{OP}: reduction must be one of {(*REDUCTIONS,)}, got {reduction!r}")
    check_options(OP, temperature, alpha, "sum", 0.0)
    if student_logits.dim() == 0:
        raise ValueError(f"{OP}: student_logits must be (..., C), got ()")
    check_weights(OP, "class_weight", class_weight, student_logits)
    check_weights(OP, "pos_weight", pos_weight, student_logits)
    check_gamma(OP, focal_gamma, backend)
    if focal_alpha is not None and not (focal_gamma and 0 <= focal_alpha <= 1):
        raise ValueError(
            f"{OP}: focal_alpha must be in [0, 1] and beside a focal_gamma, got {focal_alpha} and "
            f"{focal_gamma}"
        )
    if target is not None:
        _check_target(student_logits, target)
        target = target.detach()
    student, teacher = _two_classes(student_logits), _two_classes(teacher_logits)
    call = partial(
        kd_loss,
        temperature=temperature,
        kind=kind,
        reduction=REDUCTIONS[reduction],
        backend=backend,
    )
    if target is None or not focal_gamma:
        pairs = None if target is None else _pairs(student, target, class_weight, pos_weight)
        return call(student, teacher, pairs, alpha=alpha)
    # A part without weight gets no gradient.
    kd, logged, _ = call(student if alpha else student.detach(), teacher, alpha=1.0)
    wide = student_logits.to(accumulator(logged.dtype))
    bce = binary_terms(wide, target, class_weight, pos_weight, focal_gamma, focal_alpha)
    if reduction != "none":
        bce = bce.mean() if reduction == "mean" else bce.sum()
    return mixed(alpha, kd, bce), logged, bce.detach()


def _two_classes(logits: Tensor) -> Tensor:
    """(..., C, 2): logits whose softmax is the probability of "yes" and "no"."""
    return torch.stack([logits, torch.zeros_like(logits)], -1)


def _check_target(logits: Tensor, target: Tensor) -> None:
    if target.dtype not in FLOATING:
        raise TypeError(f"{OP}: target must be one of {FLOATING}, got {target.dtype}")
    if target.shape != logits.shape or target.device != logits.device:
        raise ValueError(
            f"{OP}: target must have the shape and device of student_logits, got "
            f"{tuple(target.shape)} on {target.device} and {tuple(logits.shape)} on {logits.device}"
        )


def _pairs(
    student: Tensor, target: Tensor, class_weight: Tensor | None, pos_weight: Tensor | None
) -> Tensor:
    """(..., C, 2): class probabilities, weights included, of "yes" and "no"."""
    target = target.to(accumulator(student.dtype))
    yes, no = target, 1 - target
    if pos_weight is not None:
        yes = yes * pos_weight.detach().to(yes)
    if class_weight is not None:
        yes, no = (x * class_weight.detach().to(x) for x in (yes, no))
    return torch.stack([yes, no], -1)
