# SPDX-License-Identifier: Apache-2.0
"""Mean squared difference of attention scores by Gram matrices. See docs/ops/attention_distill.md.

B batch, K heads, N tokens, D head dim, Dt the teacher's, W the larger; n tokens of a window.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.ops._attention_args import window_args
from kdfast.ops._checks import check_tensors
from kdfast.ops._library import (
    LIB,
    forbid_second_derivative,
    register_fake,
    register_flops,
    register_gradient,
    second_derivative,
)
from kdfast.ops.geometry import Window

# Gram matrices take 20 n W^2 operations for a window of n tokens, tiles of scores that ride on the
# attention 4 n^2 W and a few passes over the tiles. Measured on top of attention, forward and
# backward, at D = 64: n = 257 +95 % against +40 %, n = 1600 +20 % against +38 % (fp32) and +31 %
# against +38 % (bf16; Zen 4, AVX512_BF16, one thread, 2026-11-22).
TOKENS_PER_DIM = 16
# Values of a matrix (tokens, 2 W) that exist at a time, over images and heads: 1 MiB in fp32 if one
# image is no more.
TILE = 1 << 18
# Factor of q and k of both sides, taken out again at the end. Squares of bf16 values end in few
# patterns of bits, so that sums of them in fp32 would all round to one side.
BLUR = 0.8346268


def pays(tokens: int, head_dim: int, teacher_dim: int, window: Window | None) -> bool:
    """Whether Gram matrices cost less than tiles of scores do."""
    if window is not None:
        tokens = min(window.size, window.grid[0]) * min(window.size, window.grid[1])
    return tokens > TOKENS_PER_DIM * max(head_dim, teacher_dim)


def logit_mse(
    q: Tensor,
    k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    scale: float,
    teacher_scale: float,
    window: Window | None,
) -> Tensor:
    """Mean over images, heads, queries and the real keys of their window, in O(N W^2) time.

    Args:
        q: (B, K, N, D), rotated.
        k: (B, K, N, D).
        teacher_q: (B, K, N, Dt), rotated.
        teacher_k: (B, K, N, Dt).
        scale: Multiplies the scores, the temperature in it; not 0.
        teacher_scale: Multiplies the teacher's.
        window: Its pads are of logit 0 on both sides and make no difference.

    Returns:
        Scalar, fp32 (fp64 for fp64), never negative; 0 for equal q and k of both sides.

    Gradients: q and k; those that are to be differentiated again by ``reference``.
    """
    grid, size, _ = window_args(window)
    op = torch.ops.kdfast.attention_logit_mse.default
    loss: Tensor = op(q, k, teacher_q, teacher_k, scale, teacher_scale, grid, size)[0]
    return loss


def reference(
    q: Tensor,
    k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    scale: float,
    teacher_scale: float,
    grid: list[int] | None,
    size: int,
) -> Tensor:
    """The specification: the loss from whole scores."""
    q, k, teacher_q, teacher_k = (x.to(_dtype(q)) for x in (q, k, teacher_q, teacher_k))
    total = q.new_zeros(())
    for index in _groups(q.shape[2], grid, size, q.device):
        a, b, c, d = (x[:, :, index] for x in (q, k, teacher_q, teacher_k))
        difference = scale * a @ b.mT - teacher_scale * c @ d.mT
        total = total + difference.square().mean(-1).sum()
    return total / max(1, q.shape[0] * q.shape[1] * q.shape[2])


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor teacher_q, Tensor teacher_k, float scale, float teacher_scale, "
    "int[]? grid, int window"
)
LIB.define(f"attention_logit_mse({_ARGUMENTS}) -> (Tensor loss, Tensor factors)")
LIB.define(
    f"attention_logit_mse_bwd(Tensor grad_loss, Tensor factors, {_ARGUMENTS}) "
    "-> (Tensor dq, Tensor dk)"
)


def _dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _groups(tokens: int, grid: list[int] | None, size: int, device: torch.device) -> list[Tensor]:
    """(windows, n) tokens of all windows of one shape, for each of the up to four shapes."""
    if grid is None:
        return [torch.arange(tokens, device=device)[None]]
    window = Window((grid[0], grid[1]), size)
    shapes: dict[tuple[int, int], list[Tensor]] = {}
    for rows, cols in window.spans():
        shape = (rows.stop - rows.start, cols.stop - cols.start)
        shapes.setdefault(shape, []).append(window.token_index((rows, cols), device))
    return [torch.stack(index) for index in shapes.values()]


def _window_count(grid: list[int] | None, size: int) -> int:
    return 1 if grid is None else -(-grid[0] // size) * -(-grid[1] // size)


def _parts(
    q: Tensor, teacher_q: Tensor, grid: list[int] | None, size: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Images, windows and the tokens of those (windows, n) that are taken at a time."""
    batch, kept, tokens, head_dim = q.shape
    values = max(1, 2 * kept * tokens * max(head_dim, teacher_q.shape[3]))
    step, first = max(1, TILE // values), 0
    for index in _groups(tokens, grid, size, q.device):
        windows = slice(first, first + len(index))
        first = windows.stop
        for image in range(0, batch, step):
            yield slice(image, image + step), windows, index


def _halves(
    own: Tensor, other: Tensor, index: Tensor, scale: float, other_scale: float, swap: bool
) -> Tensor:
    """Difference and mean of both sides (b, K, windows, n, 2 W), the mean first if ``swap``."""
    dtype = _dtype(own)
    whole = index.shape == (1, own.shape[2])
    x, y = ((t[:, :, None] if whole else t[:, :, index]).to(dtype) for t in (own, other))
    # Missing channels are zero on the side that lacks them: its scores stay as they are.
    wide = max(x.shape[-1], y.shape[-1])
    x, y = (F.pad(t, (0, wide - t.shape[-1])) if t.shape[-1] < wide else t for t in (x, y))
    both = x.new_empty((*x.shape[:4], 2 * wide))
    difference, mean = both.split(wide, -1)[:: -1 if swap else 1]
    if scale != other_scale:
        y = y * (other_scale / scale)
    # Scaled after the subtraction, which is exact where both sides are close.
    torch.sub(x, y, out=difference).mul_(scale * BLUR)
    torch.add(x, y, out=mean).mul_(scale * BLUR / 2)
    return both


def _check(
    q: Tensor,
    k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    grid: list[int] | None,
    window: int,
) -> None:
    """Raises ValueError for arguments of the registered op that leave results unwritten."""
    names = ("q", "k", "teacher_q", "teacher_k")
    check_tensors("attention_logit_mse", names, q, k, teacher_q, teacher_k)
    sides = (q, k), (teacher_q, teacher_k)
    if any(x.dim() != 4 or x.shape != y.shape or x.shape[3] == 0 for x, y in sides) or (
        q.shape[:3] != teacher_q.shape[:3]
    ):
        shapes = [tuple(x.shape) for side in sides for x in side]
        raise ValueError(
            f"attention_logit_mse: both sides must be (B, K, N, D) with D >= 1, got {shapes}"
        )
    if grid is None:
        return
    if len(grid) != 2 or min(*grid, window) < 1 or grid[0] * grid[1] != q.shape[2]:
        raise ValueError(
            f"attention_logit_mse: grid must hold {q.shape[2]} tokens and window be positive, got "
            f"{grid} and {window}"
        )


def _empty_results(
    q: Tensor, teacher_q: Tensor, grid: list[int] | None, window: int
) -> tuple[Tensor, Tensor]:
    """Uninitialised loss and factors."""
    (batch, kept, _, dim), dtype = q.shape, _dtype(q)
    wide, windows = max(dim, teacher_q.shape[3]), _window_count(grid, window)
    factors = q.new_empty((batch, kept, windows, 2, 2 * wide, dim), dtype=dtype)
    return q.new_empty((), dtype=dtype), factors


@torch.library.impl(LIB, "attention_logit_mse", "CompositeExplicitAutograd")
def _forward(
    q: Tensor,
    k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    scale: float,
    teacher_scale: float,
    grid: list[int] | None,
    window: int,
) -> tuple[Tensor, Tensor]:
    _check(q, k, teacher_q, teacher_k, grid, window)
    loss, factors = _empty_results(q, teacher_q, grid, window)
    if q.shape[2] == 0:
        return loss.zero_(), factors.zero_()
    total, wide = q.new_zeros((), dtype=torch.float64), max(q.shape[3], teacher_q.shape[3])
    for images, windows, index in _parts(q, teacher_q, grid, window):
        # With E and A the difference and the mean of the scaled queries, M and F the mean and the
        # difference of the keys, the scores differ by E M^T + A F^T.
        ea = _halves(q[images], teacher_q[images], index, scale, teacher_scale, False)
        mf = _halves(k[images], teacher_k[images], index, 1.0, 1.0, True)
        (e, a), (m, f) = ea.split(wide, -1), mf.split(wide, -1)
        ee, ea_ = (e.mT @ ea).split(wide, -1)
        fm, ff = (f.mT @ mf).split(wide, -1)
        aa, mm = a.mT @ a, m.mT @ m
        for left, right, weight in ((ee, mm, 1), (ea_, fm.mT, 2), (aa, ff, 1)):
            total += (left.double() * right).sum() * (weight / index.shape[1])
        own = factors[images, :, windows]
        dim = q.shape[3]
        # [M F]^T k and [E A]^T q, with k = M + F / 2 and q = A + E / 2.
        own[..., 0, :wide, :] = (mm + fm.mT / 2)[..., :dim]
        own[..., 0, wide:, :] = (fm + ff / 2)[..., :dim]
        own[..., 1, :wide, :] = (ea_ + ee / 2)[..., :dim]
        own[..., 1, wide:, :] = (aa + ea_.mT / 2)[..., :dim]
    rows = max(1, q.shape[0] * q.shape[1] * q.shape[2])
    return loss.copy_(total.clamp_min(0) / (rows * BLUR**4)), factors


@torch.library.impl(LIB, "attention_logit_mse_bwd", "CompositeExplicitAutograd")
def _backward(
    grad_loss: Tensor,
    factors: Tensor,
    q: Tensor,
    k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    scale: float,
    teacher_scale: float,
    grid: list[int] | None,
    window: int,
) -> tuple[Tensor, Tensor]:
    _check(q, k, teacher_q, teacher_k, grid, window)
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    if q.numel() == 0:
        return dq, dk
    count = q.shape[0] * q.shape[1] * q.shape[2]
    for images, windows, index in _parts(q, teacher_q, grid, window):
        weight = 2 * grad_loss / (count * index.shape[1] * BLUR**3)
        ea = _halves(q[images], teacher_q[images], index, scale, teacher_scale, False)
        mf = _halves(k[images], teacher_k[images], index, 1.0, 1.0, True)
        own = factors[images, :, windows] * weight
        for to, left, right in ((dq, ea, scale * own[..., 0, :, :]), (dk, mf, own[..., 1, :, :])):
            to[images, :, index.flatten()] = (left @ right).flatten(2, 3).to(to.dtype)
    return dq, dk


@register_fake("attention_logit_mse")
def _fake(
    *, q: Tensor, teacher_q: Tensor, grid: list[int] | None, window: int, **_: Any
) -> tuple[Tensor, Tensor]:
    return _empty_results(q, teacher_q, grid, window)


@register_fake("attention_logit_mse_bwd")
def _fake_bwd(*, q: Tensor, k: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k)


@register_flops("attention_logit_mse")
def _flops(*, q: Sequence[int], teacher_q: Sequence[int], **_: Any) -> int:
    rows, wide = q[0] * q[1] * q[2], max(q[3], teacher_q[3])
    return 12 * rows * wide**2


@register_flops("attention_logit_mse_bwd")
def _flops_bwd(*, q: Sequence[int], teacher_q: Sequence[int], **_: Any) -> int:
    rows, wide = q[0] * q[1] * q[2], max(q[3], teacher_q[3])
    return 8 * rows * wide * q[3]


def _setup_context(ctx: Any, given: Any, output: tuple[Tensor, Tensor]) -> None:
    _, factors = output
    # What the backward multiplies both sides with: O(D^2) for each window of each head.
    ctx.save_for_backward(factors, given.q, given.k, given.teacher_q, given.teacher_k)
    # What comes after the tensors in the schema.
    ctx.plain = given.scale, given.teacher_scale, given.grid, given.window
    ctx.mark_non_differentiable(factors)


def _autograd(ctx: Any, grad_loss: Tensor, _: Tensor | None) -> dict[str, Tensor | None]:
    if torch.is_grad_enabled():
        _, q, k, *teacher = ctx.saved_tensors
        return second_derivative(
            lambda q, k: [reference(q, k, *teacher, *ctx.plain)], {"q": q, "k": k}, [grad_loss]
        )
    op = torch.ops.kdfast.attention_logit_mse_bwd.default
    dq, dk = op(grad_loss, *ctx.saved_tensors, *ctx.plain)
    return {"q": dq, "k": dk}


register_gradient("attention_logit_mse", _autograd, _setup_context)
forbid_second_derivative("attention_logit_mse_bwd", "attention_distill")
