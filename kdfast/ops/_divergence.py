# SPDX-License-Identifier: Apache-2.0
"""Distances between the softened probabilities of student and teacher, at any temperature.

C classes. With T the temperature, P = softmax(s / T) of the student's logits s and R =
softmax(t / T) of the teacher's. See docs/ops/kd_loss.md.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

KINDS = ("kl", "reverse_kl", "jsd")
# Temperature above which P and R are so close that their difference is computed as such; repeated
# in csrc/cpu/isa/kd_loss_rows.h.
WARM = 32.0


def softened(s: Tensor, t: Tensor, temperature: float, kind: str) -> Tensor:
    """(...) ``T^2`` times the distance ``kind`` of P and R, for fp32 or fp64 logits (..., C)."""
    # Beyond this it is at its limit, and T^2 would be infinite.
    temperature = min(temperature, torch.finfo(s.dtype).max ** 0.5)
    plain = _plain(s, t, temperature, kind)
    if temperature <= WARM:
        return plain
    warm, near = _warm(s, t, temperature, kind)
    return torch.where(near, warm, plain)


def weighted(weight: Tensor, x: Tensor) -> Tensor:
    """``weight * x``, and 0 where the weight is 0 even if x is infinite."""
    return torch.where(weight == 0, 0, weight * torch.where(weight == 0, 0, x))


def mixed(alpha: float, kd: Tensor, ce: Tensor) -> Tensor:
    """``alpha * kd + (1 - alpha) * ce`` without the part that has no weight, whatever it is."""
    if alpha in (0, 1):
        return 1.0 * (kd if alpha else ce)
    return alpha * kd + (1 - alpha) * ce


def _plain(s: Tensor, t: Tensor, temperature: float, kind: str) -> Tensor:
    # Logits below their maximum become 0 or -inf at a tiny temperature, never NaN.
    ds, dt = (x - x.amax(-1, keepdim=True).detach() for x in (s, t))
    inverse = min(1 / temperature, torch.finfo(s.dtype).max)
    log_p, log_r = ((x * inverse).log_softmax(-1) for x in (ds, dt))
    p, r = log_p.exp(), log_r.exp()
    if kind == "jsd":
        log_m = torch.logaddexp(log_p, log_r) - math.log(2)
        rows = (weighted(r, log_r - log_m) + weighted(p, log_p - log_m)).sum(-1) / 2
        return temperature * (temperature * rows)
    if temperature < 1:
        # T (log R - log P), which stays finite where log R and log P do not.
        rest = temperature * ((ds * inverse).logsumexp(-1) - (dt * inverse).logsumexp(-1))
        gap = dt - ds + rest[..., None]
        return temperature * (weighted(r, gap) if kind == "kl" else weighted(p, -gap)).sum(-1)
    rows = weighted(r, log_r - log_p) if kind == "kl" else weighted(p, log_p - log_r)
    return temperature * (temperature * rows.sum(-1))


def _warm(s: Tensor, t: Tensor, temperature: float, kind: str) -> tuple[Tensor, Tensor]:
    """The distance where P is close to R, and (...) where it is.

    With u = s - t less its mean under R and w = u / T, ``E[e^w] = 1 + E[e^w - 1 - w]``, and x =
    log P - log R is ``w - log E[e^w]``. Each kind is then a mean under R of a function of x whose
    values are about x^2; divided by x^2, it is multiplied by T^2 x^2, and nothing cancels.
    """
    u = s - t
    near = u.isfinite().all(-1)
    r = (torch.where(near[..., None], t, 0) / temperature).softmax(-1)
    u = torch.where(near[..., None], u, 0)
    u = u - (r * u).sum(-1, keepdim=True)
    near = near & (u.detach().abs().amax(-1) <= temperature)
    u = torch.where(near[..., None], u, 0)
    curved = (r * u.square() * _kl(u / temperature)).sum(-1)
    excess = curved / (temperature * temperature)
    curved = curved * _log1p_over(excess)  # T^2 log E[e^w]
    if kind == "kl":
        return curved, near
    y = u - (curved / temperature)[..., None]
    form = _reverse_kl if kind == "reverse_kl" else _jsd
    return (r * y.square() * form(y / temperature)).sum(-1), near


def _split(
    x: Tensor, small: Tensor, near: Callable[[Tensor], Tensor], far: Callable[[Tensor], Tensor]
) -> Tensor:
    """``near(x)`` where x is ``small`` and ``far(x)`` elsewhere, with the gradient of each."""
    return torch.where(small, near(torch.where(small, x, 0)), far(torch.where(small, 1, x)))


def _series(x: Tensor, weights: list[float]) -> Tensor:
    total = torch.full_like(x, weights[-1])
    for weight in weights[-2::-1]:
        total = total * x + weight
    return total


def _kl(x: Tensor) -> Tensor:
    """(e^x - 1 - x) / x^2."""
    weights = [1 / math.factorial(n) for n in range(2, 13)]
    return _split(
        x, x.abs() < 0.3, lambda x: _series(x, weights), lambda x: (x.expm1() - x) / x.square()
    )


def _reverse_kl(x: Tensor) -> Tensor:
    """(x e^x - e^x + 1) / x^2."""
    weights = [(n - 1) / math.factorial(n) for n in range(2, 13)]
    return _split(
        x,
        x.abs() < 0.3,
        lambda x: _series(x, weights),
        lambda x: (x * x.exp() - x.expm1()) / x.square(),
    )


def _jsd(x: Tensor) -> Tensor:
    """(e^x (x - l) - l) / (2 x^2) with l = log((1 + e^x) / 2), by hyperbolic functions of x / 2."""

    def far(x: Tensor) -> Tensor:
        z = x / 2
        log_cosh = (2 * (z / 2).sinh().square()).log1p()
        return z.exp() * (z * z.sinh() - z.cosh() * log_cosh) / x.square()

    return _split(x, x.abs() < 0.01, lambda x: (x / 2).exp() / 8, far)


def _log1p_over(x: Tensor) -> Tensor:
    """log(1 + x) / x."""
    return _split(x, x < 1e-9, lambda x: 1 - x / 2, lambda x: x.log1p() / x)
