# SPDX-License-Identifier: Apache-2.0
"""The fused linear_kd_loss: matrix products of torch around the kernel of kd_loss, in chunks.

C classes, D features; gradients of a row stay unscaled until they have been multiplied, so that
fp16 does not lose those of a mean over many rows.
"""

import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.ops._checks import check_tensors
from kdfast.ops._divergence import mixed
from kdfast.ops._losses import Options, accumulator, saved_dtype
from kdfast.ops._matmul import choice
from kdfast.ops.linear import input_gradient, linear, weight_gradient

# kd, ce and the gradient of rows; what makes them of the logits of both sides and the target.
Losses = tuple[Tensor, Tensor, Tensor]
Step = Callable[[Tensor, Tensor, Tensor | None], Losses]
# Devices whose results the host should not wait for.
COUNTED_ON = frozenset({"cuda"})


class Layers(NamedTuple):
    """Both last layers, their inputs and the target, in the order of the schema."""

    hidden: Tensor  # (..., D)
    weight: Tensor  # (C, D)
    bias: Tensor | None  # (C,)
    teacher_logits: Tensor | None  # (..., C), or the next two
    teacher_hidden: Tensor | None  # (..., Dt)
    teacher_weight: Tensor | None  # (C, Dt)
    teacher_bias: Tensor | None  # (C,)
    target: Tensor | None  # (...) or (..., C)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype to which the logits of student and teacher are promoted."""
        teacher = self.teacher_hidden if self.teacher_logits is None else self.teacher_logits
        if teacher is None:
            return self.hidden.dtype
        return torch.promote_types(self.hidden.dtype, teacher.dtype)

    def by_row(self, change: Callable[[Tensor], Tensor]) -> "Layers":
        """The same with ``change`` of every tensor that has the rows in front."""

        def changed(x: Tensor | None) -> Tensor | None:
            return None if x is None else change(x)

        return Layers(
            change(self.hidden),
            *(self.weight, self.bias),
            *(changed(self.teacher_logits), changed(self.teacher_hidden)),
            *(self.teacher_weight, self.teacher_bias),
            changed(self.target),
        )

    def logits(self) -> tuple[Tensor, Tensor]:
        """Logits of student and teacher."""
        student = linear(self.hidden, self.weight, self.bias)
        if self.teacher_logits is not None:
            return student, self.teacher_logits
        if self.teacher_hidden is None or self.teacher_weight is None:
            raise ValueError("linear_kd_loss: the teacher must be given, got None")
        return student, linear(self.teacher_hidden, self.teacher_weight, self.teacher_bias)


def empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, need: Sequence[bool]
) -> list[Tensor]:
    """Uninitialised gradients of hidden, weight and bias, (0,) where there is no need for one."""
    return [
        hidden.new_empty(
            x.shape if wanted and x is not None else (0,), dtype=saved_dtype(hidden.dtype)
        )
        for x, wanted in zip((hidden, weight, bias), need, strict=True)
    ]


def chunked(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_logits: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    target: Tensor | None,
    row_weight: Tensor | None,
    temperature: float,
    alpha: float,
    reduction: str,
    label_smoothing: float,
    ignore_index: int,
    chunk: int,
    need_grad: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The registered op; ``row_weight`` (rows,) is the upstream gradient of reduction "none".

    Shapes are those of the public function with all rows in one dimension.

    Raises:
        ValueError: The rows of the tensors differ, or there is no chunk or reduction like this.
    """
    teacher = (teacher_logits, teacher_hidden, teacher_weight, teacher_bias)
    layers = Layers(hidden, weight, bias, *teacher, target)
    _check_rows(layers, row_weight, chunk, reduction)
    options = Options(temperature, alpha, reduction, label_smoothing, ignore_index)
    rows, dtype, some = hidden.shape[0], layers.dtype, any(need_grad)
    kd_count, ce_count = _counts(rows, target, options)
    if isinstance(ce_count, Tensor):
        half = hidden.dtype == torch.float16
        step, factor = _by_count(kd_count, ce_count, options, some, half)
    else:
        over = hidden.device.type == "cpu" and dtype != torch.float16
        ce_part = 0.0 if target is None else 1 / max(ce_count, 1)
        step, factor = _by_parts(1 / max(kd_count, 1), ce_part, options, some, over)
    gradients = _Gradients(hidden, weight, bias, need_grad, factor)
    kd, ce = (hidden.new_empty(rows, dtype=accumulator(dtype)) for _ in range(2))
    for begin in range(0, rows, chunk):
        part = slice(begin, begin + chunk)
        here = layers.by_row(operator.itemgetter(part))
        s, t = here.logits()
        kd[part], ce[part], g = step(s.to(dtype), t.to(dtype), here.target)
        if some:
            gradients.add(part, g if row_weight is None else g.mul_(row_weight[part, None]))
    if reduction != "none":
        kd, ce = (
            (x.sum(dtype=torch.float64) / count).to(x.dtype)
            for x, count in ((kd, kd_count), (ce, ce_count))
        )
    return mixed(alpha, kd, ce), kd, ce, *gradients.results()


def _check_rows(layers: Layers, row_weight: Tensor | None, chunk: int, reduction: str) -> None:
    """Raises for what would leave a row of the results unwritten, or written by another row."""
    check_tensors("linear_kd_loss", ("hidden", "weight"), layers.hidden, layers.weight)
    rows = len(layers.hidden) if layers.hidden.dim() == 2 else -1
    for x in (layers.teacher_logits, layers.teacher_hidden, layers.target, row_weight):
        if x is not None and (x.dim() == 0 or len(x) != rows):
            raise ValueError(
                f"linear_kd_loss: hidden must be (rows, D) and all else have as many rows, got "
                f"{tuple(layers.hidden.shape)} and {tuple(x.shape)}"
            )
    if chunk < 1 or reduction not in ("batchmean", "sum", "none"):
        raise ValueError(
            "linear_kd_loss: chunk must be at least 1 and reduction batchmean, sum or none, got "
            f"{chunk} and {reduction!r}"
        )


def _counts(rows: int, target: Tensor | None, options: Options) -> tuple[int, int | Tensor]:
    """What the sums of kd and ce are divided by; () where reading it would stall a GPU."""
    if options.reduction != "batchmean":
        return 1, 1
    if target is None:
        return rows, 1
    if target.is_floating_point():
        return rows, rows
    count = (target != options.ignore_index).sum()
    return rows, count if target.device.type in COUNTED_ON else int(count)


def _by_parts(
    kd_part: float, ce_part: float, options: Options, need_grad: bool, over: bool
) -> tuple[Step, float]:
    """kd, ce and the gradient over the factor of a chunk's rows, by the op; and the factor.

    ``kd_part`` and ``ce_part`` are what a row counts in the mean, ``over`` lets the gradient take
    the place of the logits.
    """
    kd_part, ce_part = options.alpha * kd_part, (1 - options.alpha) * ce_part
    factor = kd_part + ce_part
    # The kernel's gradient is that of share kd + (1 - share) ce.
    share = kd_part / factor if factor else 1.0
    others = options.label_smoothing, options.ignore_index
    arguments = Options(options.temperature, share, "none", *others)

    def step(s: Tensor, t: Tensor, y: Tensor | None) -> Losses:
        # Nobody else has the logits of a chunk.
        if need_grad and over:
            _, kd, ce = torch.ops.kdfast.kd_loss_.default(s, t, y, *arguments)
            return kd, ce, s
        _, kd, ce, g = torch.ops.kdfast.kd_loss.default(s, t, y, *arguments, need_grad)
        return kd, ce, g

    return step, factor


def _by_count(
    rows: int, count: Tensor, options: Options, need_grad: bool, half: bool
) -> tuple[Step, float | Tensor]:
    """``_by_parts`` for means over ``rows`` and ``count`` rows, which stays on the device."""
    from kdfast.kernels.kd_loss import rows_of

    alpha = options.alpha
    divisor = count.float().view(1)
    factor = alpha / max(rows, 1) + (1 - alpha) / count.clamp(min=1)

    def step(s: Tensor, t: Tensor, y: Tensor | None) -> Losses:
        over = need_grad and s.dtype != torch.float16
        kd, ce, g = rows_of(
            s,
            t,
            y,
            count=divisor,
            kd_count=rows,
            temperature=options.temperature,
            alpha=alpha,
            label_smoothing=options.label_smoothing,
            ignore_index=options.ignore_index,
            need_grad=need_grad,
            inplace=over,
        )
        return kd, ce, g / factor if half else g

    return step, factor if half else 1.0


class _Gradients:
    """Gradients of a linear layer, from those of its output chunk by chunk, times a factor."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        need: Sequence[bool],
        factor: float | Tensor,
    ) -> None:
        self.hidden, self.weight, self.need = hidden, weight, need
        # torch's own product adds to what is there; oneDNN's is faster, with a pass to add it.
        self.onednn = hidden.device.type == "cpu" and choice(hidden.dtype).input_gradient
        # A number goes into the products; one on the device would have to be read for that.
        self.last = factor if isinstance(factor, Tensor) else None
        self.factor = 1.0 if isinstance(factor, Tensor) else factor
        self.dhidden, *sums = empty_gradients(hidden, weight, bias, need)
        dtype = accumulator(hidden.dtype)
        self.dweight, self.dbias = (torch.zeros_like(x, dtype=dtype) for x in sums)

    def add(self, part: slice, g: Tensor) -> None:
        """Adds the rows ``part``, whose logits have the gradient ``g`` (rows, C)."""
        needhidden, needweight, needbias = self.need
        g = g.to(self.hidden.dtype)
        if needhidden:
            out = self.dhidden[part]
            if out.dtype == g.dtype and not self.onednn:
                torch.addmm(out, g, self.weight, beta=0, alpha=self.factor, out=out)
            else:
                torch.mul(input_gradient(g, self.weight).to(out.dtype), self.factor, out=out)
        if needweight:
            if self.dweight.dtype == g.dtype and not self.onednn:
                self.dweight.addmm_(g.t(), self.hidden[part], alpha=self.factor)
            else:
                self.dweight.add_(weight_gradient(g, self.hidden[part]), alpha=self.factor)
        if needbias:
            self.dbias.add_(g.sum(0, dtype=self.dbias.dtype), alpha=self.factor)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of hidden, weight and bias, in the dtypes of ``empty_gradients``."""
        dtype = self.dhidden.dtype
        if self.last is not None:
            for x in (self.dhidden, self.dweight, self.dbias):
                x.mul_(self.last)
        return self.dhidden, self.dweight.to(dtype), self.dbias.to(dtype)
