# SPDX-License-Identifier: Apache-2.0
"""Distances between the softened probabilities of student and teacher, at any temperature.

C classes. With T the temperature, P = softmax(s / T) of the student and R = softmax(t / T) of the
teacher. See docs/ops/kd_loss.md.
"""

import math

import torch
from torch import Tensor

KINDS = ("kl", "reverse_kl", "jsd")
# Temperature above which the difference of P and R is computed as such; repeated in
# csrc/cpu/isa/kd_loss_rows.h.
WARM = 32.0


def softened(s: Tensor, t: Tensor, temperature: float, kind: str) -> Tensor:
    """(...) ``T^2 D`` of logits (..., C) in fp32 or fp64; D is the distance ``kind``."""
    plain = _plain(s, t, temperature, kind)
    if temperature <= WARM:
        return plain
    warm, near = _warm(s, t, temperature, kind)
    return torch.where(near, warm, plain)


def weighted(weight: Tensor, x: Tensor) -> Tensor:
    """``weight * x``, and 0 where the weight is 0 even if x is infinite."""
    return torch.where(weight == 0, 0, weight * x)


def mixed(alpha: float, kd: Tensor, ce: Tensor) -> Tensor:
    """``alpha * kd + (1 - alpha) * ce`` without the part that has no weight, whatever it is."""
    if alpha in (0, 1):
        return 1.0 * (kd if alpha else ce)
    return alpha * kd + (1 - alpha) * ce


def _plain(s: Tensor, t: Tensor, temperature: float, kind: str) -> Tensor:
    # Logits less their maximum are 0 or negative: a tiny temperature makes 0 or -inf of them.
    ds, dt = (x - x.amax(-1, keepdim=True).detach() for x in (s, t))
    inverse = min(1 / temperature, torch.finfo(s.dtype).max)
    sum_s, sum_t = ((x * inverse).logsumexp(-1) for x in (ds, dt))
    p, r = (ds * inverse).softmax(-1), (dt * inverse).softmax(-1)
    # T (log P - log R) is `gap - rest`.
    gap, rest = ds - dt, temperature * (sum_s - sum_t)
    if kind == "kl":
        return temperature * (rest - weighted(r, gap).sum(-1))
    if kind == "reverse_kl":
        return temperature * (weighted(p, gap).sum(-1) - rest)
    log_p, log_r = ds * inverse - sum_s[..., None], dt * inverse - sum_t[..., None]
    log_m = torch.logaddexp(log_p, log_r) - math.log(2)
    both = weighted(r, log_r - log_m) + weighted(p, log_p - log_m)
    return temperature * (temperature * both.sum(-1) / 2)


def _warm(s: Tensor, t: Tensor, temperature: float, kind: str) -> tuple[Tensor, Tensor]:
    """The distance where P is close to R, and (...) where it is.

    With u = s - t less its mean under R and w = u / T, log P - log R is ``w - log E[e^w]`` and
    ``E[e^w] = 1 + E[e^w - 1 - w]``: nothing cancels.
    """
    u = s - t
    near = u.isfinite().all(-1)
    u = torch.where(near[..., None], u, 0)
    r = (torch.where(near[..., None], t, 0) / temperature).softmax(-1)
    u = u - (r * u).sum(-1, keepdim=True)
    near = near & (u.detach().abs().amax(-1) <= temperature)
    u = torch.where(near[..., None], u, 0)
    # T log E[e^w], to be taken off u: then T^2 D is a sum of terms that are never negative.
    shift = temperature * ((r * u.square() * _curve(u / temperature)).sum(-1) / temperature**2).log1p()
    raise NotImplementedError
