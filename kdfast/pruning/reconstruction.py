# SPDX-License-Identifier: Apache-2.0
"""Scores by the error that remains after compensation. See docs/use/compensation.md.

D channels and O outputs of a site, S slices that can only go whole.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from kdfast.machine.ranks import Ranks
from kdfast.machine.turns import in_turns
from kdfast.pruning.adapter import Anatomy, Site
from kdfast.pruning.calibration import Calibration, SiteMoments, calibrate
from kdfast.pruning.compensate import RIDGE
from kdfast.pruning.eliminate import best_sets, inverse, slice_path, slopes, unit_path

# Of equal scores the one that goes later is higher by this share, so that ranks are the order.
STEP = 1e-9


class Curve(NamedTuple):
    """What one site loses by how much of it is removed, after compensation.

    Attributes:
        order: Slices, or groups of them, in the order of removal.
        errors: Error that remains without the best 1 to S of them, as a share of the variance of
            the block's stream.
        group: Slices that only go together.
        choices: The best positions to keep by their number, where all sets could be tried.
    """

    order: list[int]
    errors: list[float]
    group: int
    choices: list[list[int]] | None

    def error(self, kept: int) -> float:
        """Error that remains with ``kept`` slices, whole groups."""
        gone = len(self.order) - kept // self.group
        return self.errors[gone - 1] if gone else 0.0

    def best(self, kept: int) -> list[int]:
        """Positions of the ``kept`` slices, whole groups, that lose least."""
        if self.choices is not None:
            return list(self.choices[kept])
        groups = self.order[len(self.order) - kept // self.group :]
        return sorted(group * self.group + i for group in groups for i in range(self.group))


def calibrated(
    function: str,
    anatomy: Anatomy,
    data: Iterable[Any] | Calibration,
    batches: int | None,
    progress: bool,
) -> Calibration:
    """The calibration that was given as data, or one on the data."""
    if not isinstance(data, Calibration):
        return calibrate(anatomy.model, data, batches=batches, progress=progress)
    if batches is not None:
        raise ValueError(f"{function}: batches must be None with a calibration, got {batches}")
    data.check(function, anatomy)
    return data


def reconstruction_scores(
    sites: Sequence[Site], moments: Mapping[str, SiteMoments], progress: bool
) -> tuple[list[Tensor], dict[str, Any]]:
    """Scores of every site, and JSON values for ``HeadScores.metadata``.

    A slice's score is the error that its removal adds, in the order of removal that costs least, as
    a share of the stream's variance; per head where heads go in groups. "choices" holds for every
    site the best positions to keep by their number, where all sets could be tried, else None.
    """
    curves = site_curves(sites, moments, progress)
    choices = [curve.choices for curve in curves]
    return [_scores(curve) for curve in curves], {"choices": choices} if any(choices) else {}


def site_curves(
    sites: Sequence[Site], moments: Mapping[str, SiteMoments], progress: bool
) -> list[Curve]:
    """What every site loses by how much of it is removed; several processes share the sites."""
    ranks = Ranks.here()
    mine = sites[ranks.rank :: ranks.world]
    curves = in_turns(ranks, mine, lambda site, _: _curve(site, moments[site.name]))
    quiet = None if progress and ranks.main else True
    bar = tqdm(curves, total=len(sites), desc="reconstruction", unit="site", disable=quiet)
    return list(bar)


def weighted(site: Site, moments: SiteMoments) -> Tensor:
    """(O, D) fp64: the projection's weight in units in which sites can be compared.

    A squared error of outputs of this weight is one of the stream, as a share of its variance.
    Where the block does not add the output to a stream it is a share of the output's variance.
    """
    weight = site.weight().double().cpu()
    if moments.gain is None:
        size = float(((weight @ moments.covariance) * weight).sum())
    else:
        weight, size = weight * moments.gain[:, None], moments.stream
    return weight / max(size, torch.finfo(torch.float64).tiny) ** 0.5


def _curve(site: Site, moments: SiteMoments) -> Curve:
    count, size = len(site.held) // site.group, site.size * site.group
    if count == 0:
        return Curve([], [], site.group, None)
    weight = weighted(site, moments)
    a, g = inverse(moments.covariance, RIDGE), weight.T @ weight
    path = unit_path(a, g) if size == 1 else slice_path(a, g, size)
    best = None if size == 1 else best_sets(a, g, size)
    if best is None:
        return Curve(path.order, path.errors, site.group, None)
    # Budgets are shared out by what the best sets cost; ranks stay those of the path.
    choices = [
        [head for head in range(len(site.held)) if head // site.group not in set(gone)]
        for _, gone in reversed(best)
    ]
    # By the number of heads: between whole groups there is nothing better than the smaller set.
    by_heads = [choices[kept // site.group] for kept in range(len(site.held) + 1)]
    return Curve(path.order, [error for error, _ in best[1:]], site.group, by_heads)


def _scores(curve: Curve) -> Tensor:
    """(S * group,): slopes in the order of removal, each head of a group its part."""
    result = torch.zeros(len(curve.order), dtype=torch.float64)
    floor = torch.finfo(torch.float64).tiny / STEP
    for rank, (index, slope) in enumerate(zip(curve.order, slopes(curve.errors), strict=True)):
        result[index] = max(slope, floor) * (1 + STEP * rank) / curve.group
    return result.repeat_interleave(curve.group)
