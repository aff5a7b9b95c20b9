# SPDX-License-Identifier: Apache-2.0
"""Distance of features, with its gradient. See docs/ops/feature_loss.md.

C features. A program holds a few positions, with all their features, in registers.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.kernels._common import SUM_BLOCK, power_of_two, total_kernel, unit_stride

# Must equal those of kdfast/ops/feature_loss.py, as a test asserts.
EPS = tl.constexpr(1e-6)
ZERO_NORM = tl.constexpr(1e-8)
KINDS = ("mse", "cosine", "smooth_l1")
NORMALIZATIONS = ("none", "layer", "channel")
MSE, COSINE, SMOOTH_L1 = (tl.constexpr(i) for i in range(3))
NONE, LAYER, CHANNEL = (tl.constexpr(i) for i in range(3))
# Features that a program takes at once, and positions and channels of one program of statistics.
TILE = 1024
STAT_ROWS, STAT_COLS = 128, 32


@triton.jit
def _load(ptr, offsets, cols, ok):
    return tl.load(ptr + offsets[:, None] + cols[None, :], mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _layer(x, ok, features):
    """x (R, W) normalised over its features, and the factor (R,) that did it."""
    x = tl.where(ok, x - (tl.sum(x, 1) / features)[:, None], 0.0)
    factor = 1.0 / tl.sqrt(tl.sum(x * x, 1) / features + EPS)
    return x * factor[:, None], factor


@triton.jit
def _unit(x):
    """x (R, W) at norm 1, the factor (R,) that did it, and where x has no direction: 0 there."""
    square = tl.sum(x * x, 1)
    none = square <= ZERO_NORM * ZERO_NORM
    factor = tl.where(none, 0.0, 1.0 / tl.sqrt(tl.where(none, 1.0, square)))
    return x * factor[:, None], factor, none


@triton.jit
def _positions_kernel(
    student_ptr,  # (P, C)
    teacher_ptr,  # (P, C)
    mean_ptr,  # (C,) of the teacher's channels
    factor_ptr,  # (C,) 1 / sqrt(variance + EPS)
    part_ptr,  # (programs,) sums of the positions' distances
    grad_ptr,  # (P, C), contiguous
    stride_s,
    stride_t,
    positions,
    features,
    weight,  # of one position's distance in the loss
    KIND: tl.constexpr,
    NORM: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    UNIT: tl.constexpr,
):
    """The distances of a few positions and their gradient."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < positions
    cols = tl.arange(0, COLS)
    # Compared in units, so that the compiler sees that a unit is masked as a whole.
    ok = there[:, None] & (cols // UNIT < features // UNIT)[None, :]
    row = row.to(tl.int64)
    s = _load(student_ptr, row * (stride_s // UNIT) * UNIT, cols, ok)
    t = _load(teacher_ptr, row * (stride_t // UNIT) * UNIT, cols, ok)
    # Both sides as the loss compares them.
    scale = tl.full((ROWS,), 1.0, tl.float32)
    if NORM == LAYER:
        s, scale = _layer(s, ok, features)
        t, _ = _layer(t, ok, features)
    if NORM == CHANNEL:
        mean = tl.load(mean_ptr + cols, mask=cols // UNIT < features // UNIT, other=0.0)
        factor = tl.load(factor_ptr + cols, mask=cols // UNIT < features // UNIT, other=0.0)
        s = tl.where(ok, (s - mean[None, :]) * factor[None, :], 0.0)
        t = tl.where(ok, (t - mean[None, :]) * factor[None, :], 0.0)
    # The distance of each position, and its gradient by the student's compared features.
    if KIND == COSINE:
        u, length, no_s = _unit(s)
        v, _, no_t = _unit(t)
        d = u - v
        apart = 0.5 * tl.sum(d * d, 1)
        loss = tl.where((no_s != no_t) & (apart == apart), 1.0, apart)
        g = (d - u * apart[:, None]) * tl.where(no_t, 0.0, length)[:, None]
    else:
        d = s - t
        if KIND == MSE:
            loss, g = tl.sum(d * d, 1), 2 * d
        else:
            size = tl.abs(d)
            loss = tl.sum(tl.where(size < 1, 0.5 * d * d, size - 0.5 * (size >= 1)), 1)
            g = tl.where(size < 1, d, tl.where(d < 0, -1.0, 1.0))
    tl.store(part_ptr + tl.program_id(0), tl.sum(tl.where(there, loss, 0.0), 0))
    # The gradient by the features themselves, back through their normalisation.
    if NEED_GRAD:
        g = tl.where(ok, g * weight, 0.0)
        if NORM == LAYER:
            centre, along = tl.sum(g, 1) / features, tl.sum(g * s, 1) / features
            g = (g - centre[:, None] - s * along[:, None]) * scale[:, None]
        if NORM == CHANNEL:
            g *= factor[None, :]
        place = grad_ptr + (row * (features // UNIT) * UNIT)[:, None] + cols[None, :]
        tl.store(place, g.to(grad_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _moments_kernel(
    teacher_ptr,  # (P, C)
    mean_ptr,  # (blocks, C)
    square_ptr,  # (blocks, C) sums of squared deviations
    stride_t,
    positions,
    features,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Mean and squared deviations of a block of positions, for a few channels."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    ok = (row < positions)[:, None] & (cols < features)[None, :]
    count = tl.minimum(ROWS, positions - tl.program_id(0) * ROWS)
    x = _load(teacher_ptr, row.to(tl.int64) * stride_t, cols, ok)
    mean = tl.sum(x, 0) / count
    # The mean of what is left corrects the rounding of a mean that is far from 0.
    x = tl.where(ok, x - mean[None, :], 0.0)
    rest = tl.sum(x, 0) / count
    mean += rest
    x = tl.where(ok, x - rest[None, :], 0.0)
    place = tl.program_id(0).to(tl.int64) * features + cols
    tl.store(mean_ptr + place, mean, mask=cols < features)
    tl.store(square_ptr + place, tl.sum(x * x, 0), mask=cols < features)


@triton.jit
def _statistics_kernel(
    means_ptr,  # (blocks, C)
    squares_ptr,
    mean_ptr,  # (C,)
    factor_ptr,
    positions,
    features,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Merges the blocks of a few channels in their order."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    ok = cols < features
    mean = tl.zeros((COLS,), tl.float32)
    square = tl.zeros((COLS,), tl.float32)
    for start in range(0, positions, ROWS):
        count = tl.minimum(ROWS, positions - start)
        d = tl.load(means_ptr + cols, mask=ok, other=0.0) - mean
        share = count / (start + count)
        mean += d * share
        square += tl.load(squares_ptr + cols, mask=ok, other=0.0) + d * d * share * start
        means_ptr += features
        squares_ptr += features
    tl.store(mean_ptr + cols, mean, mask=ok)
    tl.store(factor_ptr + cols, 1.0 / tl.sqrt(square / positions + EPS), mask=ok)


def channel_statistics(t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + EPS), fp32, of each channel of t (P, C)."""
    positions, features = t.shape
    blocks = -(-positions // STAT_ROWS)
    across = -(-features // STAT_COLS)
    means, squares = (torch.empty((blocks, features), device=t.device) for _ in range(2))
    mean, factor = (torch.empty(features, device=t.device) for _ in range(2))
    _moments_kernel[(blocks, across)](
        t, means, squares, t.stride(0), positions, features, ROWS=STAT_ROWS, COLS=STAT_COLS
    )
    _statistics_kernel[(across,)](
        means, squares, mean, factor, positions, features, ROWS=STAT_ROWS, COLS=STAT_COLS
    )
    return mean, factor


def forward(
    student: Tensor, teacher: Tensor, kind: str, normalize: str, need_grad: bool
) -> tuple[Tensor, Tensor]:
    """Launches ``kdfast::feature_loss``: the loss and its gradient (empty if not needed)."""
    features, device = student.shape[-1], student.device
    s, t = (unit_stride(x.reshape(-1, features)) for x in (student, teacher))
    positions = s.shape[0]
    saved = torch.float32 if student.dtype == torch.float16 else student.dtype
    grad = torch.empty(student.shape if need_grad else (0,), dtype=saved, device=device)
    loss = torch.empty((), device=device)
    if positions == 0:
        return loss.fill_(math.nan), grad
    cols = max(16, power_of_two(features))
    rows = max(1, TILE // cols)
    programs = -(-positions // rows)
    divisor = positions if kind == "cosine" else positions * features
    with torch.cuda.device_of(student):
        # Each program leaves the sum over its positions, and their gradient.
        part = torch.empty(programs, device=device)
        mean, factor = channel_statistics(t) if normalize == "channel" else (part, part)
        _positions_kernel[(programs,)](
            s,
            t,
            mean,
            factor,
            part,
            grad,
            s.stride(0),
            t.stride(0),
            positions,
            features,
            1.0 / divisor,
            KIND=KINDS.index(kind),
            NORM=NORMALIZATIONS.index(normalize),
            NEED_GRAD=need_grad,
            ROWS=rows,
            COLS=cols,
            UNIT=math.gcd(16, features, s.stride(0), t.stride(0)),
            num_warps=max(4, min(16, rows * cols // 512)),
        )
        # One program adds the sums up.
        total_kernel[(1,)](part, loss, programs, float(divisor), BLOCK=SUM_BLOCK)
    return loss, grad
