# SPDX-License-Identifier: Apache-2.0
"""Class weights and focal terms of a loss on labels. See docs/ops/kd_loss.md.

C classes or labels. All sums are in fp32, or fp64 for fp64.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.ops import _library
from kdfast.ops._checks import check_tensors
from kdfast.ops._divergence import weighted
from kdfast.ops._losses import FLOATING


def check_weights(op: str, name: str, value: Tensor | None, logits: Tensor) -> None:
    """Raises, in the name of ``op``, unless ``value`` is None or (C,) weights for ``logits``.

    Their values are not looked at, which would stall a GPU.
    """
    check_tensors(op, (name,), value, optional=True)
    if value is None:
        return
    if value.dtype not in FLOATING:
        raise TypeError(f"{op}: {name} must be one of {FLOATING}, got {value.dtype}")
    if value.shape != logits.shape[-1:]:
        want = tuple(logits.shape[-1:])
        raise ValueError(f"{op}: {name} must be {want}, got {tuple(value.shape)}")
    if value.device != logits.device:
        raise ValueError(
            f"{op}: {name} must be on the device of student_logits, got {value.device} and "
            f"{logits.device}"
        )


def check_gamma(op: str, gamma: float, backend: str | None) -> None:
    """Raises, in the name of ``op``, for a gamma out of range or one that no kernel has."""
    if not 0 <= gamma < math.inf:
        raise ValueError(f"{op}: focal_gamma must be at least 0 and finite, got {gamma}")
    if gamma and (_library.DEFAULT_BACKEND if backend is None else backend) == "fused":
        raise NotImplementedError(
            f"{op}: backend='fused' cannot run here: the kernels have no focal term, which is "
            f"computed by torch, got focal_gamma {gamma}"
        )


def class_probabilities(
    op: str,
    target: Tensor,
    classes: int,
    class_weight: Tensor | None,
    *,
    dtype: torch.dtype,
    smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor | None]:
    """q (..., C) with which ``-sum_c q_c log p_c`` is the smoothed, weighted loss of a row.

    Args:
        op: Name of the caller, for messages.
        target: (...) int64, or (..., C) class probabilities.
        classes: C.
        class_weight: (C,), or None for ones.
        dtype: Of the result.
        smoothing: Label smoothing.
        ignore_index: Class index of rows that get zeros.

    Returns:
        q, and what the mean over all rows is multiplied by to be that of torch's ``cross_entropy``:
        the sum over rows divided by the weights of their classes. None for class probabilities.

    Raises:
        IndexError: A class index is neither in [0, C) nor ``ignore_index``; on the CPU.
    """
    with torch.no_grad():
        ones = torch.ones(classes, dtype=dtype, device=target.device)
        weight = ones if class_weight is None else class_weight.to(dtype)
        if target.is_floating_point():
            q = weighted(weight, target.to(dtype) * (1 - smoothing) + smoothing / classes)
            return q, None
        valid = target != ignore_index
        index = torch.where(valid, target, 0)
        try:
            hot = torch.zeros(*target.shape, classes, dtype=dtype, device=target.device)
            hot = hot.scatter(-1, index.unsqueeze(-1), 1.0)
        except RuntimeError as error:
            if "out of bounds" not in str(error):
                raise
            raise IndexError(
                f"{op}: class indices must be in [0, {classes}) or {ignore_index}: {error}"
            ) from error
        q = weighted(weight, hot * (1 - smoothing) + smoothing / classes)
        total = torch.where(valid, (hot * weight).sum(-1), 0).sum()
        return torch.where(valid.unsqueeze(-1), q, 0), target.numel() / total


def focal_rows(logits: Tensor, q: Tensor, gamma: float) -> Tensor:
    """(...): ``-sum_c q_c (1 - p_c)^gamma log p_c`` with p the softmax of logits (..., C)."""
    log_p = logits.log_softmax(-1)
    # Where p is 0 or 1 the factor is constant; the derivative of the product has no limit problem.
    inside = (log_p < 0) & (log_p > -math.inf)
    factor = (-torch.where(inside, log_p, -1).expm1()).pow(gamma)
    factor = torch.where(inside, factor, (log_p != 0).to(log_p.dtype))
    return -weighted(q, factor * log_p).sum(-1)


def binary_terms(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    pos_weight: Tensor | None,
    gamma: float,
    alpha: float | None,
) -> Tensor:
    """(..., C): the binary cross-entropy of every label, weighted, and focal with a gamma.

    Args:
        logits: (..., C).
        target: (..., C) in [0, 1].
        class_weight: (C,) factor of every label, or None.
        pos_weight: (C,) factor of the positive part, or None.
        gamma: Exponent of ``1 - p_t``; 0: none.
        alpha: Factor of positives, ``1 - alpha`` that of negatives; None: neither.
    """
    target = target.to(logits.dtype)
    weight, positive = (
        None if x is None else x.detach().to(logits.dtype) for x in (class_weight, pos_weight)
    )
    terms = F.binary_cross_entropy_with_logits(
        logits, target, weight, pos_weight=positive, reduction="none"
    )
    if gamma:
        # 1 - p_t without a difference of nearly equal numbers.
        missed = target * (-logits).sigmoid() + (1 - target) * logits.sigmoid()
        some = missed > 0
        factor = torch.where(some, missed, 1).pow(gamma)
        terms = terms * torch.where(some, factor, 0)
    if alpha is not None:
        terms = terms * (alpha * target + (1 - alpha) * (1 - target))
    return terms
