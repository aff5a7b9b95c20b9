# SPDX-License-Identifier: Apache-2.0
"""KL divergence and cross-entropy of logits, with their gradient. See docs/ops/kd_loss.md.

C classes. A program owns a few rows. Rows of up to ``ONE_TILE`` classes stay in registers, longer
ones are read a second time for the gradient, from L2 where it holds them.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.kernels._common import SUM_BLOCK, power_of_two, unit_stride

ONE_TILE = 8192
TILE = 4096
# Values of the constexpr TARGET.
NO_TARGET, INDICES, PROBABILITIES = (tl.constexpr(i) for i in range(3))


@triton.jit
def _inside(cols, classes, UNIT: tl.constexpr):
    """``cols < classes``, so that the compiler sees that a unit is masked as a whole."""
    return cols // UNIT < classes // UNIT


@triton.jit
def _weights(target_ptr, label, cols, ok, keep, spread, TARGET: tl.constexpr):
    """(R, W) weights q of the cross-entropy; 0 where not ``ok``."""
    if TARGET == PROBABILITIES:
        q = tl.load(target_ptr + cols[None, :], mask=ok, other=0.0).to(tl.float32) * keep + spread
    else:
        q = tl.where(cols[None, :] == label[:, None], keep, 0.0) + spread
    return tl.where(ok, q, 0.0)


@triton.jit
def _finite_or_zero(x):
    """A row maximum to subtract: rows that are all -inf so far must not give NaN."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def _row_sum(x):
    """(R,) sums of (R, W): fp32 over 16 neighbours, fp64 over those; fp64 is slow on most GPUs."""
    parts = tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // 16, 16)), 2)
    return tl.sum(parts.to(tl.float64), 1)


@triton.jit
def _sums(s, t, q, max_s, max_t, inverse, TARGET: tl.constexpr):
    """Z_1, Z_s, Z_t, X, sum q and sum q (s - max_s), fp64; -inf marks absent columns."""
    s, t = s - max_s[:, None], t - max_t[:, None]
    e_t = tl.exp(t * inverse)
    z_s, z_t = _row_sum(tl.exp(s * inverse)), _row_sum(e_t)
    x = _row_sum(tl.where(e_t == 0, 0.0, e_t * (t - s) * inverse))
    z_1, total, cross = z_s * 0, z_s * 0, z_s * 0
    if TARGET != NO_TARGET:
        z_1, total = _row_sum(tl.exp(s)), _row_sum(q)
        cross = _row_sum(tl.where(q == 0, 0.0, q * s))
    return z_1, z_s, z_t, x, total, cross


@triton.jit
def _gradient(
    s, t, q, max_s, max_t, z_1, z_s, z_t, total, w_kd, w_ce, inverse, TARGET: tl.constexpr
):
    """w_kd (p_T(s) - p_T(t)) + w_ce (total p_1(s) - q)."""
    s, t = s - max_s[:, None], t - max_t[:, None]
    g = tl.exp(s * inverse) / z_s[:, None] - tl.exp(t * inverse) / z_t[:, None]
    g = w_kd * g
    if TARGET != NO_TARGET:
        ce = total[:, None] * (tl.exp(s) / z_1[:, None]) - q
        g += tl.where(w_ce[:, None] == 0, 0.0, w_ce[:, None] * ce)
    return g


@triton.jit
def _rows_kernel(
    student_ptr,  # (R, C)
    teacher_ptr,  # (R, C)
    target_ptr,  # (R,) int64 or (R, C)
    count_ptr,  # (1,) rows that the cross-entropy is averaged over
    kd_ptr,  # (R,)
    ce_ptr,  # (R,)
    grad_ptr,  # (R, C), contiguous
    stride_s,
    stride_t,
    rows,
    classes,
    temperature,
    weight_kd,
    weight_ce,
    keep,  # 1 - label_smoothing
    spread,  # label_smoothing / C
    ignore_index,
    TARGET: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    ONE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Both losses of each row, and the gradient of the weighted loss."""
    # Where the program's rows start, their labels, and the weight of their cross-entropy.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    row = row.to(tl.int64)
    inverse = 1.0 / temperature
    student_ptr += (row * (stride_s // UNIT) * UNIT)[:, None]
    teacher_ptr += (row * (stride_t // UNIT) * UNIT)[:, None]
    grad_ptr += (row * (classes // UNIT) * UNIT)[:, None]
    label, valid = row, there
    place = target_ptr
    if TARGET == INDICES:
        label = tl.load(target_ptr + row, mask=there, other=ignore_index)
        valid = label != ignore_index
    if TARGET == PROBABILITIES:
        place = target_ptr + (row * (classes // UNIT) * UNIT)[:, None]
    w_ce = tl.where(valid, weight_ce, 0.0)
    if TARGET != NO_TARGET:
        w_ce = tl.where(valid, weight_ce / tl.load(count_ptr), 0.0)

    cols = tl.arange(0, COLS)
    # The sums over each row, from which both losses follow; see _sums.
    if ONE:
        ok = there[:, None] & _inside(cols, classes, UNIT)[None, :]
        s = tl.load(student_ptr + cols[None, :], mask=ok, other=float("-inf")).to(tl.float32)
        t = tl.load(teacher_ptr + cols[None, :], mask=ok, other=float("-inf")).to(tl.float32)
        q = _weights(place, label, cols, ok, keep, spread, TARGET)
        top_s, top_t = tl.max(s, 1), tl.max(t, 1)
        max_s, max_t = _finite_or_zero(top_s), _finite_or_zero(top_t)
        z_1, z_s, z_t, x, total, cross = _sums(s, t, q, max_s, max_t, inverse, TARGET)
    else:
        top_s = tl.full((ROWS,), float("-inf"), tl.float32)
        top_t = tl.full((ROWS,), float("-inf"), tl.float32)
        zero = tl.zeros((ROWS,), tl.float64)
        z_1, z_s, z_t, x, total, cross = zero, zero, zero, zero, zero, zero
        for c in range(0, classes, COLS):
            at = c + cols
            ok = there[:, None] & _inside(at, classes, UNIT)[None, :]
            s = tl.load(student_ptr + at[None, :], mask=ok, other=float("-inf")).to(tl.float32)
            t = tl.load(teacher_ptr + at[None, :], mask=ok, other=float("-inf")).to(tl.float32)
            q = _weights(place, label, at, ok, keep, spread, TARGET)
            new_s, new_t = tl.maximum(top_s, tl.max(s, 1)), tl.maximum(top_t, tl.max(t, 1))
            max_s, max_t = _finite_or_zero(new_s), _finite_or_zero(new_t)
            new_z_1, new_z_s, new_z_t, new_x, new_total, new_cross = _sums(
                s, t, q, max_s, max_t, inverse, TARGET
            )
            # Sums hold exponentials relative to a maximum. Where a tile raises it, those so far are
            # scaled down by exp(old - new), and the logits in X and cross move by the same
            # difference; only then are the sums of the tile added.
            fall_s = _finite_or_zero(top_s).to(tl.float64) - max_s
            fall_t = _finite_or_zero(top_t).to(tl.float64) - max_t
            fade_s, fade_t = top_s.to(tl.float64) - max_s, top_t.to(tl.float64) - max_t
            decay = tl.exp(fade_t * inverse)
            x = new_x + tl.where(decay == 0, 0.0, decay * (x + z_t * (fall_t - fall_s) * inverse))
            z_t = new_z_t + z_t * decay
            z_s = new_z_s + z_s * tl.exp(fade_s * inverse)
            z_1 = new_z_1 + z_1 * tl.exp(fade_s)
            cross, total = new_cross + cross + total * fall_s, total + new_total
            top_s, top_t = new_s, new_t
        max_s, max_t = _finite_or_zero(top_s), _finite_or_zero(top_t)

    # The losses of each row.
    if TARGET == INDICES:
        total = tl.full((ROWS,), 1.0, tl.float64)
    # A row of nothing but -inf is NaN, as in a softmax.
    z_s = tl.where(top_s == float("-inf"), float("nan"), z_s)
    z_t = tl.where(top_t == float("-inf"), float("nan"), z_t)
    kd = temperature * temperature * (x / z_t + tl.log(z_s / z_t))
    tl.store(kd_ptr + row, kd.to(tl.float32), mask=there)
    ce = tl.zeros_like(kd)
    if TARGET != NO_TARGET:
        z_1 = tl.where(top_s == float("-inf"), float("nan"), z_1)
        ce = tl.where(valid, total * tl.log(z_1) - cross, 0.0)
    tl.store(ce_ptr + row, ce.to(tl.float32), mask=there)

    # The gradient; rows of more than one tile are read again.
    if NEED_GRAD:
        w_kd = weight_kd * temperature
        z_1, z_s, z_t = z_1.to(tl.float32), z_s.to(tl.float32), z_t.to(tl.float32)
        total = total.to(tl.float32)
        if ONE:
            g = _gradient(s, t, q, max_s, max_t, z_1, z_s, z_t, total, w_kd, w_ce, inverse, TARGET)
            tl.store(grad_ptr + cols[None, :], g.to(grad_ptr.dtype.element_ty), mask=ok)
        else:
            for c in range(0, classes, COLS):
                at = c + cols
                ok = there[:, None] & _inside(at, classes, UNIT)[None, :]
                s = tl.load(student_ptr + at[None, :], mask=ok, other=float("-inf")).to(tl.float32)
                t = tl.load(teacher_ptr + at[None, :], mask=ok, other=float("-inf")).to(tl.float32)
                q = _weights(place, label, at, ok, keep, spread, TARGET)
                g = _gradient(
                    s, t, q, max_s, max_t, z_1, z_s, z_t, total, w_kd, w_ce, inverse, TARGET
                )
                tl.store(grad_ptr + at[None, :], g.to(grad_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _count_kernel(target_ptr, count_ptr, rows, ignore_index, BLOCK: tl.constexpr):
    """Rows that are not ignored."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, rows, BLOCK):
        i = start + tl.arange(0, BLOCK)
        label = tl.load(target_ptr + i, mask=i < rows, other=ignore_index)
        total += tl.where(label != ignore_index, 1.0, 0.0)
    tl.store(count_ptr, tl.sum(total, 0))


@triton.jit
def _total_kernel(
    rows_kd_ptr,  # (R,)
    rows_ce_ptr,
    count_ptr,
    loss_ptr,  # (), as are kd and ce
    kd_ptr,
    ce_ptr,
    rows,
    alpha,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The losses of all rows, added up in fp64 and in one order."""
    kd = tl.zeros((BLOCK,), tl.float64)
    ce = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, rows, BLOCK):
        i = start + tl.arange(0, BLOCK)
        kd += tl.load(rows_kd_ptr + i, mask=i < rows, other=0.0).to(tl.float64)
        ce += tl.load(rows_ce_ptr + i, mask=i < rows, other=0.0).to(tl.float64)
    kd, ce = tl.sum(kd, 0), tl.sum(ce, 0)
    if MEAN:
        kd, ce = kd / rows, ce / tl.load(count_ptr).to(tl.float64)
    tl.store(loss_ptr, (alpha * kd + (1 - alpha) * ce).to(tl.float32))
    tl.store(kd_ptr, kd.to(tl.float32))
    tl.store(ce_ptr, ce.to(tl.float32))


def forward(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    temperature: float,
    alpha: float,
    reduction: str,
    label_smoothing: float,
    ignore_index: int,
    need_grad: bool,
    *,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches ``kdfast::kd_loss``: loss, kd, ce and the gradient of loss (empty if not needed).

    With ``inplace`` the gradient takes the place of student, which is then contiguous. A row is
    read as a whole, or a tile of it, before any of it is written.
    """
    device = student.device
    rows, mean = student.shape[:-1].numel(), reduction == "batchmean"
    with torch.cuda.device_of(student):
        # Always a divisor on the device, so that the count of a hard target needs no sync.
        count = torch.full((1,), float(rows if mean else 1), device=device)
        if target is not None:
            target = target.contiguous()
            if mean and not target.is_floating_point():
                _count_kernel[(1,)](target, count, rows, ignore_index, BLOCK=SUM_BLOCK)
        # kd and ce of every row, and the gradient.
        kd, ce, grad = rows_of(
            *(student, teacher, target, count, rows if mean else 1, temperature, alpha),
            *(label_smoothing, ignore_index, need_grad),
            inplace=inplace,
        )
        if reduction == "none":
            return alpha * kd + (1 - alpha) * ce, kd, ce, grad
        # One program adds the rows up.
        totals = tuple(torch.empty((), device=device) for _ in range(3))
        _total_kernel[(1,)](kd, ce, count, *totals, rows, float(alpha), MEAN=mean, BLOCK=SUM_BLOCK)
    return *totals, grad


def forward_inplace(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    temperature: float,
    alpha: float,
    reduction: str,
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches ``kdfast::kd_loss_``: loss, kd and ce; student becomes its gradient."""
    options = (temperature, alpha, reduction, label_smoothing, ignore_index)
    loss, kd, ce, _ = forward(student, teacher, target, *options, True, inplace=True)
    return loss, kd, ce


def rows_of(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    count: Tensor,
    kd_count: int,
    temperature: float,
    alpha: float,
    label_smoothing: float,
    ignore_index: int,
    need_grad: bool,
    *,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """kd and ce of each row, and the gradient of alpha kd / kd_count + (1 - alpha) ce / count.

    The rows may be some of those that ``kd_count`` and ``count``, (1,) fp32, have counted.
    """
    classes, device = student.shape[-1], student.device
    s, t = (unit_stride(x.reshape(-1, classes)) for x in (student, teacher))
    rows = s.shape[0]
    saved = torch.float32 if student.dtype == torch.float16 else student.dtype
    grad = student
    if not inplace:
        grad = torch.empty(student.shape if need_grad else (0,), dtype=saved, device=device)
    kd, ce = (torch.empty(student.shape[:-1], device=device) for _ in range(2))
    if rows == 0:
        return kd, ce, grad
    if target is None:
        kind = NO_TARGET
    else:
        kind = PROBABILITIES if target.is_floating_point() else INDICES
    # Short rows share a program, which holds them whole; longer ones stream through it by tiles.
    one = classes <= ONE_TILE
    cols = max(16, power_of_two(classes)) if one else TILE
    rows_per_program = max(1, 1024 // cols)
    with torch.cuda.device_of(student):
        _rows_kernel[(-(-rows // rows_per_program),)](
            s,
            t,
            s if target is None else target,
            count,
            kd,
            ce,
            grad,
            s.stride(0),
            t.stride(0),
            rows,
            classes,
            float(temperature),
            alpha / kd_count,
            1.0 - alpha,
            1.0 - label_smoothing,
            label_smoothing / classes,
            ignore_index,
            TARGET=kind.value,
            NEED_GRAD=need_grad,
            ONE=one,
            ROWS=rows_per_program,
            COLS=cols,
            UNIT=math.gcd(16, classes, s.stride(0), t.stride(0)),
            num_warps=max(4, min(16, cols * rows_per_program // 512)),
        )
    return kd, ce, grad
