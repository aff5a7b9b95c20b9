# SPDX-License-Identifier: Apache-2.0
"""Folds what removed slices compute into the slices that stay. See docs/use/compensation.md.

K kept and R removed channels of a site, O outputs of its projection.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast.pruning.adapter import Site
from kdfast.pruning.calibration import SiteMoments
from kdfast.pruning.eliminate import regular_factor
from kdfast.pruning.moments import Moments

RIDGE = 1e-3
# Residuals against a stream hold more that the kept channels cannot explain.
SEQUENTIAL_RIDGE = 3e-2


class SiteError(NamedTuple):
    """What pruning one site does to its projection's output, on the calibration's tokens.

    Attributes:
        name: The site.
        kept: Slices that stay.
        of: Slices that there were.
        cut: Mean squared error of the output if the others are only cut away, as a share of the
            output's variance.
        compensated: The same after the fit.
    """

    name: str
    kept: int
    of: int
    cut: float
    compensated: float


class Problem(NamedTuple):
    """Moments of a fit of residuals r (O,) on inputs c (K,), all fp64.

    The residual is what the cut layer lacks: target - (W_K c + b).

    Attributes:
        mean: (K,) of c.
        covariance: (K, K) of c.
        residual_mean: (O,) of r.
        residual_variance: (O,) of r.
        cross: (O, K), covariance of r and c.
        output_variance: Variance of the target, summed over O.
    """

    mean: Tensor
    covariance: Tensor
    residual_mean: Tensor
    residual_variance: Tensor
    cross: Tensor
    output_variance: float


def channels(site: Site, slices: Sequence[int]) -> Tensor:
    """Indices of the channels of some slices in the projection's input."""
    every = torch.arange(len(site.held) * site.size).view(-1, site.size)
    return every[list(slices)].flatten()


def output_variance(moments: SiteMoments, weight: Tensor) -> float:
    """Variance of the projection's output in the original, summed over outputs."""
    return float(((weight @ moments.covariance) * weight).sum())


def problem_of(moments: SiteMoments, weight: Tensor, kept: Tensor) -> Problem:
    """The fit of what the removed channels write, from moments of all channels.

    Args:
        moments: Of the site.
        weight: (O, D) fp64 of the projection.
        kept: Indices of the kept channels.
    """
    gone = torch.ones(len(moments.mean), dtype=torch.bool)
    gone[kept] = False
    removed = gone.nonzero().flatten()
    c, columns = moments.covariance, weight[:, removed]
    rows = c[removed]
    own = columns @ rows[:, removed]
    return Problem(
        moments.mean[kept],
        c[kept][:, kept],
        columns @ moments.mean[removed],
        (own * columns).sum(1),
        columns @ rows[:, kept],
        output_variance(moments, weight),
    )


def measured_problem(sums: Moments, variance: float) -> Problem:
    """The fit of residuals that were watched together with their inputs; on the CPU."""
    return Problem(
        sums.mean().cpu(),
        sums.covariance().cpu(),
        sums.target_mean().cpu(),
        sums.target_variance().cpu(),
        sums.cross().cpu(),
        variance,
    )


def fitted(problem: Problem, ridge: float, bias: bool) -> tuple[Tensor, Tensor, float, float]:
    """The change of weight and bias that makes up for the residual, and the errors without and
    with it.

    It minimises ``E |r - dW c - db|^2 + ridge * m |dW|^2`` with m the mean variance of a channel,
    so its error is never larger than that of the cut. Without a bias to change, db is 0 and the
    moments are taken about zero in place of the mean.

    Returns:
        (O, K) and (O,) fp64; mean squared errors, summed over outputs.
    """
    mean, covariance, residual_mean, _, cross, _ = problem
    cut = float((problem.residual_variance + residual_mean.square()).sum())
    if not bias:
        covariance = covariance + torch.outer(mean, mean)
        cross = cross + torch.outer(residual_mean, mean)
    change = torch.zeros_like(cross)
    if len(mean):
        change = torch.cholesky_solve(cross.T, regular_factor(covariance, ridge)).T
    shift = residual_mean - change @ mean if bias else torch.zeros_like(residual_mean)
    base = float(problem.residual_variance.sum()) if bias else cut
    after = base - 2 * float((change * cross).sum()) + float(((change @ covariance) * change).sum())
    return change, shift, cut, max(after, 0.0)


@torch.no_grad()
def fold(site: Site, target: Site, problem: Problem, ridge: float) -> SiteError:
    """Writes the fit into the projection of the pruned model's site ``target``.

    Args:
        site: The original's.
        target: The same site of the pruned model, with the cut weights.
        problem: The fit.
        ridge: As in ``prune_heads``.

    Raises:
        ValueError: The covariance is not positive definite with this ridge.
    """
    projection: Any = target.projection
    biased = isinstance(getattr(projection, "bias", None), Tensor)
    try:
        change, shift, cut, after = fitted(problem, ridge, biased)
    except ValueError as error:
        raise ValueError(f"prune_heads: {site.name}: {error}") from error
    weight = projection.weight.double().cpu() + change
    projection.weight.copy_(weight)
    if biased:
        projection.bias.copy_(projection.bias.double().cpu() + shift)
    size = problem.output_variance or 1.0
    return SiteError(site.name, len(target.held), len(site.held), cut / size, after / size)
