# SPDX-License-Identifier: Apache-2.0
"""The fused linear_kd_loss: matrix products of torch around the kernel of kd_loss, in chunks.

C classes, D features; gradients of a row stay unscaled until they have been multiplied, so that
fp16 does not lose those of a mean over many rows.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.ops._losses import accumulator, saved_dtype


def logits_dtype(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_logits: Tensor | None,
    teacher_hidden: Tensor | None,
) -> torch.dtype:
    """The dtype to which the logits of student and teacher are promoted."""
    teacher = teacher_hidden if teacher_logits is None else teacher_logits
    return hidden.dtype if teacher is None else torch.promote_types(hidden.dtype, teacher.dtype)


def empty_gradients(student: Sequence[Tensor | None], need: Sequence[bool]) -> list[Tensor]:
    """Uninitialised gradients of hidden, weight and bias, (0,) where there is no need for one."""
    hidden = student[0]
    if hidden is None:
        raise ValueError("linear_kd_loss: hidden must be a tensor, got None")
    return [
        hidden.new_empty(
            x.shape if wanted and x is not None else (0,), dtype=saved_dtype(hidden.dtype)
        )
        for x, wanted in zip(student, need, strict=True)
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
    """
    rows, dtype = (
        hidden.shape[0],
        logits_dtype(hidden, weight, bias, teacher_logits, teacher_hidden),
    )
    kd_count, ce_count = _counts(rows, target, reduction, ignore_index)
    # What a row's kd and ce count in the loss; 0 instead of a part of no rows.
    kd_part = alpha / max(kd_count, 1)
    ce_part = 0.0 if target is None else (1 - alpha) / max(ce_count, 1)
    # The kernel's gradient is that of share kd + (1 - share) ce.
    factor = kd_part + ce_part
    options = (temperature, kd_part / factor if factor else 1.0, "none", label_smoothing)
    # Nobody else has the logits of a chunk, so their gradient can take their place.
    over = hidden.device.type == "cpu" and dtype != torch.float16
    gradients = _Gradients(hidden, weight, bias, need_grad, factor)
    kd, ce = (hidden.new_empty(rows, dtype=accumulator(dtype)) for _ in range(2))
    for begin in range(0, rows, chunk):
        part = slice(begin, begin + chunk)
        if teacher_logits is None:
            t = F.linear(teacher_hidden[part], teacher_weight, teacher_bias)  # type: ignore
        else:
            t = teacher_logits[part]
        s = F.linear(hidden[part], weight, bias)
        y = None if target is None else target[part]
        s, t = s.to(dtype), t.to(dtype)
        if any(need_grad) and over:
            _, kd[part], ce[part] = torch.ops.kdfast.kd_loss_.default(
                s, t, y, *options, ignore_index
            )
            g = s
        else:
            _, kd[part], ce[part], g = torch.ops.kdfast.kd_loss.default(
                s, t, y, *options, ignore_index, any(need_grad)
            )
        if any(need_grad):
            gradients.add(part, g if row_weight is None else g.mul_(row_weight[part, None]))
    if reduction != "none":
        kd, ce = (
            (x.sum(dtype=torch.float64) / count).to(x.dtype)
            for x, count in ((kd, kd_count), (ce, ce_count))
        )
    return alpha * kd + (1 - alpha) * ce, kd, ce, *gradients.results()


def _counts(rows: int, target: Tensor | None, reduction: str, ignore_index: int) -> tuple[int, int]:
    """What the sums of kd and ce are divided by."""
    if reduction != "batchmean":
        return 1, 1
    if target is None:
        return rows, 1
    if target.is_floating_point():
        return rows, rows
    return rows, int((target != ignore_index).sum())


class _Gradients:
    """Gradients of a linear layer, from those of its output chunk by chunk, times a factor."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        need: Sequence[bool],
        factor: float,
    ) -> None:
        self.hidden, self.weight, self.factor, self.need = hidden, weight, factor, need
        self.d_hidden, *sums = empty_gradients((hidden, weight, bias), need)
        dtype = accumulator(hidden.dtype)
        self.d_weight, self.d_bias = (torch.zeros_like(x, dtype=dtype) for x in sums)

    def add(self, part: slice, g: Tensor) -> None:
        """Adds the rows ``part``, whose logits have the gradient ``g`` (rows, C)."""
        need_hidden, need_weight, need_bias = self.need
        g = g.to(self.hidden.dtype)
        if need_hidden:
            out = self.d_hidden[part]
            if out.dtype == g.dtype:
                torch.addmm(out, g, self.weight, beta=0, alpha=self.factor, out=out)
            else:
                torch.mul((g @ self.weight).to(out.dtype), self.factor, out=out)
        if need_weight:
            if self.d_weight.dtype == g.dtype:
                self.d_weight.addmm_(g.t(), self.hidden[part], alpha=self.factor)
            else:
                self.d_weight.add_(g.t() @ self.hidden[part], alpha=self.factor)
        if need_bias:
            self.d_bias.add_(g.sum(0, dtype=self.d_bias.dtype), alpha=self.factor)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of hidden, weight and bias, in the dtypes of ``empty_gradients``."""
        dtype = self.d_hidden.dtype
        return self.d_hidden, self.d_weight.to(dtype), self.d_bias.to(dtype)
