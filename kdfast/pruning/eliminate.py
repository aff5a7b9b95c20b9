# SPDX-License-Identifier: Apache-2.0
"""Which slices cost least once the others make up for them. See docs/use/compensation.md.

D channels, O outputs, S slices of s channels each.

With A = (C + lambda I)^-1 of the channels' covariance C and the Gram matrix G = W^T W of the layer
that reads them, the output error that remains when the channels R are removed and the others are
fitted anew is ``tr(A_RR^-1 G_RR)``. To remove R, downdate A and G; then ask the same of what is
left.
"""

from typing import NamedTuple

import torch
from torch import Tensor

PANEL = 64  # removals between two updates of the whole matrices
COMPACT = 0.8  # share of live channels below which the dead ones are dropped from the matrices
SUBSETS = 1024  # at most so many sets of slices are tried


class Path(NamedTuple):
    """An order in which to remove slices.

    Attributes:
        order: Slices in the order of removal, all of them.
        errors: Error that remains after each removal; it never falls.
    """

    order: list[int]
    errors: list[float]


def inverse(covariance: Tensor, ridge: float) -> Tensor:
    """(C + ridge * mean diagonal * I)^-1, fp64."""
    return torch.cholesky_inverse(regular_factor(covariance, ridge))


def regular_factor(covariance: Tensor, ridge: float) -> Tensor:
    """Cholesky factor of C + ridge * mean diagonal * I.

    Raises:
        ValueError: The sum is not positive definite.
    """
    full = covariance.clone()
    # Channels that are all constant have nothing to be relative to; any positive number will do.
    size = float(full.diagonal().mean()) or 1.0
    full.diagonal().add_(ridge * size)
    factor, info = torch.linalg.cholesky_ex(full)
    if info.item() or not bool(torch.isfinite(factor).all()):
        raise ValueError(
            f"ridge: must make the covariance of the kept channels positive definite, got {ridge}"
        )
    return factor


@torch.no_grad()
def unit_path(a: Tensor, g: Tensor) -> Path:
    """Removes single channels, the cheapest first.

    Within a panel only the diagonals and the pivots' rows are kept up to date, by the removals
    since its start; then both matrices are, by products of matrices (BLAS 3).

    Args:
        a: (D, D) inverse of the regularised covariance, fp64.
        g: (D, D) Gram matrix of the weights, fp64.
    """
    a, g = a.clone(), g.clone()
    ids = torch.arange(len(a), device=a.device)
    dead = torch.zeros(len(a), dtype=torch.bool, device=a.device)
    path, left = Path([], []), len(a)
    while left:
        count = min(PANEL, left)
        pivots, x, h, scale = _panel(a, g, dead, count, path.errors)
        path.order.extend(ids[pivots].tolist())
        left -= count
        live = (~dead).nonzero().flatten()
        if len(live) < COMPACT * len(dead):
            a, g = (m.index_select(0, live).index_select(1, live) for m in (a, g))
            x, h = x.index_select(1, live), h.index_select(1, live)
            ids, dead = ids[live], dead[live]
        a.addmm_(x.T * scale, x, alpha=-1)
        g.addmm_(x.T, h, alpha=-1).addmm_(h.T, x, alpha=-1)
    return path


def _panel(
    a: Tensor, g: Tensor, dead: Tensor, count: int, errors: list[float]
) -> tuple[list[int], Tensor, Tensor, Tensor]:
    """Removes ``count`` channels: marks them dead and appends to ``errors``.

    Returns their positions and X, H (count, D) and scales p with which the matrices become
    ``A - X^T diag(p) X`` and ``G - X^T H - H^T X``.
    """
    width = len(a)
    x, h, scale = a.new_zeros(count, width), a.new_zeros(count, width), a.new_zeros(count)
    d, q = a.diagonal().clone(), g.diagonal().clone()
    d[dead], q[dead] = 1.0, torch.inf
    total, pivots = errors[-1] if errors else 0.0, []
    for k in range(count):
        p = int((q / d).argmin())
        size, own = d[p].item(), max(q[p].item(), 0.0)
        row, gram = a[p], g[p]
        if k:
            before, pulled = x[:k], h[:k]
            row = row - (scale[:k] * before[:, p]) @ before
            gram = gram - before[:, p] @ pulled - pulled[:, p] @ before
        torch.div(row, size, out=x[k])
        torch.sub(gram, x[k], alpha=own / 2, out=h[k])
        scale[k] = size
        d.addcmul_(x[k], x[k], value=-size)
        q.addcmul_(x[k], h[k], value=-2)
        dead[p], d[p], q[p] = True, 1.0, torch.inf
        total += own / size
        pivots.append(p)
        errors.append(total)
    return pivots, x, h, scale


def _costs(a: Tensor, g: Tensor, size: int) -> list[float]:
    """Error that the removal of each slice adds."""
    own = a.unflatten(0, (-1, size)).unflatten(2, (-1, size)).diagonal(dim1=0, dim2=2)
    gram = g.unflatten(0, (-1, size)).unflatten(2, (-1, size)).diagonal(dim1=0, dim2=2)
    solved = torch.linalg.solve(own.permute(2, 0, 1), gram.permute(2, 0, 1))
    costs: list[float] = solved.diagonal(dim1=1, dim2=2).sum(1).clamp_min(0).tolist()
    return costs


def _without(
    a: Tensor, g: Tensor, size: int, slice_: int, rest: list[int]
) -> tuple[Tensor, Tensor]:
    """Both matrices after the removal of a slice, for the slices ``rest``."""
    channels = torch.arange(len(a), device=a.device).view(-1, size)
    p, r = channels[slice_], channels[rest].flatten()
    x = torch.linalg.solve(a[p][:, p], a[p][:, r])
    pull = g[p][:, r] - 0.5 * g[p][:, p] @ x
    both = x.T @ pull
    return a[r][:, r] - a[r][:, p] @ x, g[r][:, r] - both - both.T


@torch.no_grad()
def slice_path(a: Tensor, g: Tensor, size: int) -> Path:
    """Removes slices of ``size`` consecutive channels, the cheapest first."""
    names, path, total = list(range(len(a) // size)), Path([], []), 0.0
    while names:
        costs = _costs(a, g, size)
        best = min(range(len(names)), key=costs.__getitem__)
        total += costs[best]
        path.errors.append(total)
        path.order.append(names[best])
        rest = [i for i in range(len(names)) if i != best]
        a, g = _without(a, g, size, best, rest)
        names = [names[i] for i in rest]
    return path


@torch.no_grad()
def best_sets(a: Tensor, g: Tensor, size: int) -> list[tuple[float, list[int]]] | None:
    """For 0 to S removed slices: the smallest error, and the slices whose removal gives it.

    Every set is tried, each by one downdate of another; None where there are more than ``SUBSETS``.
    """
    count = len(a) // size
    if 2**count > SUBSETS:
        return None
    best: list[tuple[float, list[int]]] = [(float("inf"), []) for _ in range(count + 1)]
    best[0] = 0.0, []

    def extend(a: Tensor, g: Tensor, first: int, error: float, gone: list[int]) -> None:
        for index, cost in enumerate(_costs(a, g, size)):
            now, names = error + cost, [*gone, first + index]
            if now < best[len(names)][0]:
                best[len(names)] = now, names
            rest = list(range(index + 1, len(a) // size))
            if rest:
                extend(*_without(a, g, size, index, rest), first + index + 1, now, names)

    extend(a, g, 0, 0.0, [])
    return best


def slopes(errors: list[float]) -> list[float]:
    """Error per removal along the largest convex curve below ``errors``, which starts at 0.

    A budget for several sites that always takes the smallest slope has the smallest total error of
    all budgets whose counts are corners of the curves.
    """
    corners = [(0, 0.0)]
    for k, error in enumerate(errors, 1):
        while len(corners) > 1 and _slope(corners[-2], corners[-1]) >= _slope(
            corners[-1], (k, error)
        ):
            corners.pop()
        corners.append((k, error))
    result: list[float] = []
    for left, right in zip(corners, corners[1:], strict=False):
        result += [_slope(left, right)] * (right[0] - left[0])
    return result


def _slope(left: tuple[int, float], right: tuple[int, float]) -> float:
    return (right[1] - left[1]) / (right[0] - left[0])
