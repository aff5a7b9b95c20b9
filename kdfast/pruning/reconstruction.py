# SPDX-License-Identifier: Apache-2.0
"""Scores by the error that remains after compensation. See docs/use/compensation.md.

D channels and O outputs of a site, S slices that can only go whole.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from kdfast.pruning.adapter import Anatomy, Site
from kdfast.pruning.calibration import Calibration, SiteMoments, calibrate
from kdfast.pruning.compensate import RIDGE
from kdfast.pruning.eliminate import Path, best_sets, inverse, slice_path, slopes, unit_path

# Of equal scores the one that goes later is higher by this share, so that ranks are the order.
STEP = 1e-9


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
    rows: list[Tensor] = []
    choices: list[list[list[int]] | None] = []
    quiet = None if progress else True
    for site in tqdm(sites, desc="reconstruction", unit="site", disable=quiet):
        row, choice = _site_scores(site, moments[site.name])
        rows.append(row)
        choices.append(choice)
    return rows, {"choices": choices} if any(choices) else {}


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


def _site_scores(site: Site, moments: SiteMoments) -> tuple[Tensor, list[list[int]] | None]:
    count, size = len(site.held) // site.group, site.size * site.group
    if count == 0:
        return torch.zeros(0, dtype=torch.float64), None
    weight = weighted(site, moments)
    a, g = inverse(moments.covariance, RIDGE), weight.T @ weight
    path = unit_path(a, g) if size == 1 else slice_path(a, g, size)
    best = None if size == 1 else best_sets(a, g, size)
    errors, choice = path.errors, None
    if best is not None:
        # Budgets are shared out by what the best sets cost; ranks stay those of the path.
        errors = [error for error, _ in best[1:]]
        choice = [
            [
                position
                for position in range(len(site.held))
                if position // site.group not in set(gone)
            ]
            for _, gone in reversed(best)
        ]
    return _scores(Path(path.order, errors), site.group), choice


def _scores(path: Path, group: int) -> Tensor:
    """(S * group,): slopes in the order of removal, each head of a group its part."""
    result = torch.zeros(len(path.order), dtype=torch.float64)
    floor = torch.finfo(torch.float64).tiny / STEP
    for rank, (index, slope) in enumerate(zip(path.order, slopes(path.errors), strict=True)):
        result[index] = max(slope, floor) * (1 + STEP * rank) / group
    return result.repeat_interleave(group)
