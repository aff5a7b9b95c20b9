# SPDX-License-Identifier: Apache-2.0
"""LayerNorm of a gated product, forward and backward. See docs/ops/swiglu_norm.md.

P elements of a row, of which the first C are channels that count. A program holds a row in
registers.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.kernels._common import power_of_two, unit_stride

# Programs of the backward at most: each leaves one row of sums for weight and bias.
PROGRAMS = 512
# Rows and channels that a program of the last step adds up at a time.
SUM_ROWS, SUM_COLS = 64, 32


@triton.jit
def _row(ptr, start, cols, ok):
    return tl.load(ptr + start + cols, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)) without an exponential that overflows."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _fwd_kernel(
    gate_ptr,  # (R, P)
    value_ptr,  # (R, P)
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    out_ptr,  # (R, P), contiguous
    mean_ptr,  # (R,)
    rstd_ptr,  # (R,)
    stride_g,
    stride_v,
    width,
    channels,
    eps,
    COLS: tl.constexpr,
    UNIT: tl.constexpr,
):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, COLS)
    # Compared in units, so that the compiler sees that a unit is masked as a whole.
    ok = cols // UNIT < channels // UNIT
    g = _row(gate_ptr, row * (stride_g // UNIT) * UNIT, cols, ok)
    v = _row(value_ptr, row * (stride_v // UNIT) * UNIT, cols, ok)
    h = g * _sigmoid(g) * v
    mean = tl.sum(h, 0) / channels
    d = tl.where(ok, h - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(d * d, 0) / channels + eps)
    out = d * rstd * _row(weight_ptr, 0, cols, ok) + _row(bias_ptr, 0, cols, ok)
    # Weight and bias are loaded as 0 beyond the channels, so the padding of the result is 0.
    place = out_ptr + row * (width // UNIT) * UNIT + cols
    tl.store(place, out.to(out_ptr.dtype.element_ty), mask=cols // UNIT < width // UNIT)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _bwd_kernel(
    grad_ptr,  # (R, P)
    gate_ptr,  # (R, P)
    value_ptr,  # (R, P)
    weight_ptr,  # (C,)
    mean_ptr,  # (R,)
    rstd_ptr,  # (R,)
    dgate_ptr,  # (R, P), contiguous
    dvalue_ptr,  # (R, P), contiguous
    part_ptr,  # (programs, 2, C) sums over this program's rows, for weight and bias
    stride_d,
    stride_g,
    stride_v,
    rows,
    width,
    channels,
    rows_each,
    COLS: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Some neighbouring rows, one after the other."""
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, COLS)
    ok = cols // UNIT < channels // UNIT
    weight = _row(weight_ptr, 0, cols, ok)
    dweight = tl.zeros((COLS,), tl.float32)
    dbias = tl.zeros((COLS,), tl.float32)
    first = program * rows_each
    for row in range(first, tl.minimum(first + rows_each, rows)):
        d = _row(grad_ptr, row * (stride_d // UNIT) * UNIT, cols, ok)
        g = _row(gate_ptr, row * (stride_g // UNIT) * UNIT, cols, ok)
        v = _row(value_ptr, row * (stride_v // UNIT) * UNIT, cols, ok)
        rstd = tl.load(rstd_ptr + row)
        # x, the normalised product, again.
        s = _sigmoid(g)
        silu = g * s
        x = (silu * v - tl.load(mean_ptr + row)) * rstd
        dweight += d * x
        dbias += d
        # The gradient of a LayerNorm, then of the gated product.
        y = d * weight
        centre, slope = tl.sum(y, 0) / channels, tl.sum(y * x, 0) / channels
        dh = (y - centre - x * slope) * rstd
        # Beyond the channels silu and v are 0, so the gradients are.
        inside = cols // UNIT < width // UNIT
        place = row * (width // UNIT) * UNIT + cols
        dtype = dgate_ptr.dtype.element_ty
        tl.store(dvalue_ptr + place, (dh * silu).to(dtype), mask=inside)
        tl.store(dgate_ptr + place, (dh * v * (s + silu * (1.0 - s))).to(dtype), mask=inside)
    part_ptr += program * 2 * (channels // UNIT) * UNIT + cols
    tl.store(part_ptr, dweight, mask=ok)
    tl.store(part_ptr + channels // UNIT * UNIT, dbias, mask=ok)


@triton.jit
def _sum_kernel(
    part_ptr,  # (parts, C)
    total_ptr,  # (C,)
    parts,
    columns,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Adds up the parts of a few columns in one order."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros((COLS,), tl.float32)
    for start in range(0, parts, ROWS):
        row = start + tl.arange(0, ROWS)
        ok = (row < parts)[:, None] & (cols < columns)[None, :]
        place = row.to(tl.int64)[:, None] * columns + cols[None, :]
        total += tl.sum(tl.load(part_ptr + place, mask=ok, other=0.0), 0)
    tl.store(total_ptr + cols, total, mask=cols < columns)


def _as_rows(x: Tensor) -> Tensor:
    return unit_stride(x.reshape(-1, x.shape[-1]))


def _warps(cols: int) -> int:
    return max(1, min(16, cols // 256))


def forward(
    gate: Tensor, value: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches ``kdfast::swiglu_norm``: the result, and mean and 1 / deviation of every row."""
    width, channels = gate.shape[-1], weight.shape[0]
    g, v = _as_rows(gate), _as_rows(value)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    mean, rstd = (torch.empty(gate.shape[:-1], device=gate.device) for _ in range(2))
    cols = max(16, power_of_two(width))
    if out.numel():
        with torch.cuda.device_of(gate):
            _fwd_kernel[(g.shape[0],)](
                g,
                v,
                weight.contiguous(),
                bias.contiguous(),
                out,
                mean,
                rstd,
                g.stride(0),
                v.stride(0),
                width,
                channels,
                eps,
                COLS=cols,
                UNIT=math.gcd(16, width, channels, g.stride(0), v.stride(0)),
                num_warps=_warps(cols),
            )
    return out, mean, rstd


def backward(
    grad: Tensor, gate: Tensor, value: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches ``kdfast::swiglu_norm_bwd``: gradients by gate, value, weight and bias."""
    width, channels, device = gate.shape[-1], weight.shape[0], gate.device
    d, g, v = _as_rows(grad), _as_rows(gate), _as_rows(value)
    rows = g.shape[0]
    dgate, dvalue = (torch.empty(gate.shape, dtype=gate.dtype, device=device) for _ in range(2))
    sums = torch.zeros if rows == 0 else torch.empty
    totals = sums((2, channels), device=device)
    if rows:
        # Each program takes some rows, and leaves one row of sums for weight and bias.
        rows_each = -(-rows // PROGRAMS)
        programs = -(-rows // rows_each)
        parts = torch.empty((programs, 2, channels), device=device)
        cols = max(16, power_of_two(width))
        with torch.cuda.device_of(gate):
            _bwd_kernel[(programs,)](
                d,
                g,
                v,
                weight.contiguous(),
                mean,
                rstd,
                dgate,
                dvalue,
                parts,
                d.stride(0),
                g.stride(0),
                v.stride(0),
                rows,
                width,
                channels,
                rows_each,
                COLS=cols,
                UNIT=math.gcd(16, width, channels, d.stride(0), g.stride(0), v.stride(0)),
                num_warps=_warps(cols),
            )
            # The rows of sums, added up in one order.
            _sum_kernel[(-(-2 * channels // SUM_COLS),)](
                parts, totals, programs, 2 * channels, ROWS=SUM_ROWS, COLS=SUM_COLS
            )
    # Copies: an op's results must not share memory.
    dweight, dbias = (x.to(weight.dtype, copy=True) for x in totals.unbind())
    return dgate, dvalue, dweight, dbias
