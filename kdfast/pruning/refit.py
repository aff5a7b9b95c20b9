# SPDX-License-Identifier: Apache-2.0
"""Compensates a pruned model: from moments alone, or on what the pruned model itself computes.

See docs/use/compensation.md. T tokens, K kept channels, O outputs of a projection.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

from kdfast.machine.ranks import Ranks
from kdfast.machine.turns import share_of
from kdfast.pruning.adapter import Anatomy, Site
from kdfast.pruning.branch import norm_of
from kdfast.pruning.calibration import Calibration, SiteMoments
from kdfast.pruning.compensate import (
    SiteError,
    channels,
    fold,
    measured_problem,
    output_variance,
    problem_of,
)
from kdfast.pruning.inputs import Inputs, batches_of, model_inputs, outputs
from kdfast.pruning.moments import Moments, Shift, exact_products, lead_moments, wide
from kdfast.pruning.observe import frozen_eval, moved, observe, tokens_of
from kdfast.pruning.runner import Runner, Watch

# Gains below this share of the largest are not divided by: such a channel's drift stays.
SMALLEST_GAIN = 1e-3


@dataclass(frozen=True)
class Compensation:
    """The fits of all sites of a pruned model.

    Attributes:
        anatomy: The original.
        student: The pruned model, with cut weights; the fits are written into it.
        calibration: Of the original.
        ridge: As in ``prune_heads``.
        data: As in ``prune_heads``.
        batches: As in ``prune_heads``.
        progress: As in ``prune_heads``.
    """

    anatomy: Anatomy
    student: Anatomy
    calibration: Calibration
    ridge: float
    data: Iterable[Any] | None
    batches: int | None
    progress: bool

    def at_once(self, rows: Sequence[Sequence[int]]) -> list[SiteError]:
        """Fits every site that lost slices on its inputs in the original.

        Args:
            rows: Kept positions of every site; attentions, then MLPs.
        """
        lost = self._lost(rows)
        watched = [
            index for index in lost if self._sites[index][0].norm is not None and rows[index]
        ]
        if watched and self.data is None:
            names = ", ".join(self._sites[index][0].name for index in watched)
            raise ValueError(
                "prune_heads: compensate needs data too where a norm stands before the projection, "
                f"as in {names}"
            )
        measured = dict(zip(watched, self._watched(watched), strict=True))
        errors = []
        for index in lost:
            site, target = self._sites[index]
            moments = self._moments(site)
            if index in measured:
                errors.append(self._folded(site, target, measured[index]))
                continue
            kept = channels(site, rows[index])
            problem = problem_of(moments, site.weight().double().cpu(), kept)
            errors.append(fold(site, target, problem, self.ridge))
        return errors

    def sequential(self, rows: Sequence[Sequence[int]]) -> list[SiteError]:
        """Fits one site after the other on the pruned model's inputs, towards the original's
        stream. All images are kept in memory, with what one block of each model gives for them.
        """
        lost = self._lost(rows)
        ranks = Ranks.here()
        images: list[Tensor | Inputs] = []
        if not sum(ranks.shared(lambda: self._read(images, ranks))):
            raise ValueError("prune_heads: data must give at least one batch, got none")
        depth = len(self.anatomy.attentions)
        runners = Runner(self.anatomy, images), Runner(self.student, images)
        errors: list[SiteError] = []
        quiet = None if self.progress and ranks.main else True
        bar = tqdm(range(depth), desc="compensate", unit="block", disable=quiet)
        models = self.anatomy.model, self.student.model
        with (
            bar,
            self.anatomy.running(),
            self.student.running(),
            frozen_eval(models[0]),
            frozen_eval(models[1]),
        ):
            for block in bar:
                for part, index in enumerate((block, depth + block)):
                    if index in lost:
                        errors.append(self._fit_drift(ranks, runners, block, part, index))
                ranks.shared(partial(_advance, runners, block))
        return errors

    def _read(self, images: list[Tensor | Inputs], ranks: Ranks) -> int:
        """Fills ``images`` with those of this process; returns how many batches they are."""
        count = None if self.batches is None else share_of(self.batches, ranks)
        for batch in islice(self._batches, count):
            given = moved(batch, self._device)
            images.append(model_inputs("prune_heads", self.anatomy.model, given))
        return len(images)

    @property
    def _device(self) -> torch.device:
        return next(self.anatomy.model.parameters()).device

    @property
    def _batches(self) -> Iterable[Any]:
        return () if self.data is None else batches_of(self.data)

    @property
    def _sites(self) -> list[tuple[Site, Site]]:
        """Pairs of a site and the same of the pruned model."""
        (a, b), (c, d) = (
            (anatomy.attentions, anatomy.mlps) for anatomy in (self.anatomy, self.student)
        )
        return list(zip((*a, *b), (*c, *d), strict=True))

    def _lost(self, rows: Sequence[Sequence[int]]) -> list[int]:
        """Indices of the sites that lost slices."""
        lost = [i for i, (site, _) in enumerate(self._sites) if len(rows[i]) < len(site.held)]
        if not self.calibration.mlps and any(i >= len(self.anatomy.attentions) for i in lost):
            raise ValueError(
                "prune_heads: compensate must know the hidden units to remove some, got a "
                "calibration with mlps=False"
            )
        weights = [id(self._sites[i][1].projection.weight) for i in lost]
        if len(set(weights)) < len(weights):
            raise ValueError(
                "prune_heads: compensate needs a projection of its own in every site, some share "
                "theirs"
            )
        return lost

    def _moments(self, site: Site) -> SiteMoments:
        return {**self.calibration.attentions, **self.calibration.mlps}[site.name]

    def _folded(self, site: Site, target: Site, sums: Moments) -> SiteError:
        size = output_variance(self._moments(site), site.weight().double().cpu())
        return fold(site, target, measured_problem(sums, size), self.ridge)

    def _watched(self, indices: Sequence[int]) -> list[Moments]:
        """Inputs of these sites in the pruned model's modules, run on the original's inputs."""
        if not indices or self.data is None:
            return []
        observer = ModuleObserver(self.anatomy, [self._sites[index] for index in indices])
        with frozen_eval(self.student.model), self.student.running():
            given = self.data, self.batches, self.progress
            observe("prune_heads", self.anatomy, observer, *given, observer.lead)
        for sums in observer.sums:
            sums.sum_over_processes(Ranks.here(), self._device)
        return observer.sums

    def _fit_drift(
        self, ranks: Ranks, runners: tuple[Runner, Runner], block: int, part: int, index: int
    ) -> SiteError:
        """Fits a site to what its branch lacks to bring the original's stream.

        The branch writes ``gain * output`` into the stream, so a lack of the stream is one of
        ``lack / gain`` in the output. Where the gain is not known the branch alone is compared.
        """
        sums = Moments()
        held: list[tuple[Tensor, Tensor]] = []
        pieces = self._drifts(runners, block, part, index)

        def begin() -> Shift | None:
            held.extend(islice(pieces, 1))
            if not held or not len(held[0][0]):
                return None
            shift = Moments.shift_of(*held[0])
            return shift[0].cpu(), shift[1].cpu()

        def add() -> None:
            for c, residual in chain(held, pieces):
                sums.add(c, residual)

        # All subtract the same from their rows, for the same rows in fp32 as in one process.
        shift = next((shift for shift in ranks.shared(begin) if shift is not None), None)
        if shift is not None:
            sums.start((shift[0].to(self._device), shift[1].to(self._device)))
        ranks.shared(add)
        sums.sum_over_processes(ranks, self._device)
        return self._folded(*self._sites[index], sums)

    def _drifts(
        self, runners: tuple[Runner, Runner], block: int, part: int, index: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs (T, K) of a site in the pruned model and what its output lacks (T, O), by batch;
        in fp32 or fp64."""
        pair = self._sites[index]
        gain = self._moments(pair[0]).gain
        norms = [norm_of(runner.blocks[block], part) for runner in runners]
        watches = [
            Watch(runner.anatomy, site, norm)
            for runner, site, norm in zip(runners, pair, norms, strict=True)
        ]
        ends = [
            None if part or norm is None else norm_of(runner.blocks[block], 1)
            for runner, norm in zip(runners, norms, strict=True)
        ]
        for batch in range(len(runners[0].images)):
            for runner, watch, end in zip(runners, watches, ends, strict=True):
                with watch():
                    runner.run(block, batch, end)
            whole, pruned = watches
            if whole.output is None or pruned.input is None:
                raise ValueError(
                    f"prune_heads: block {block} must run the projection of {pair[0].name}"
                )
            c = wide(tokens_of(pruned.input, whole.pads))
            residual = wide(tokens_of(whole.output, whole.pads)) - _linear(pair[1], c)
            if gain is not None and whole.before is not None and pruned.before is not None:
                residual += _drift(whole.before, pruned.before, gain.to(residual))
            yield c, residual.to(c.dtype)


def _advance(runners: Sequence[Runner], block: int) -> None:
    """Runs a block on all batches of this process, for the next one to start from."""
    for batch in range(len(runners[0].images)):
        for runner in runners:
            runner.finish(batch, runner.run(block, batch))


def _drift(whole: Tensor, pruned: Tensor, gain: Tensor) -> Tensor:
    """(T, O): the difference of two streams, in units of the branch's output."""
    lack = (whole - pruned).flatten(0, -2).to(gain)
    safe = gain.abs() > SMALLEST_GAIN * gain.abs().max()
    return torch.where(safe, lack / torch.where(safe, gain, 1.0), 0.0)


def _linear(site: Site, c: Tensor) -> Tensor:
    """The site's projection of rows (T, K), in fp32 or fp64."""
    projection: Any = site.projection
    bias = getattr(projection, "bias", None)
    c = wide(c)
    with exact_products(c.device):
        return nn.functional.linear(
            c, projection.weight.to(c.dtype), None if bias is None else bias.to(c.dtype)
        )


class ModuleObserver:
    """Runs the pruned model's modules on the original's inputs, all sites in one pass."""

    def __init__(self, anatomy: Anatomy, pairs: Sequence[tuple[Site, Site]]) -> None:
        self.anatomy, self.pairs = anatomy, pairs
        self.sums = [Moments() for _ in pairs]
        self._seen: dict[str, Tensor] = {}

    def attach(self) -> list[RemovableHandle]:
        handles = []
        for index, (site, target) in enumerate(self.pairs):
            output, inside = partial(self._output, site.name), partial(self._inside, target.name)
            run = partial(self._run, index)
            handles += [
                site.projection.register_forward_hook(output),
                target.projection.register_forward_pre_hook(inside),
                site.module.register_forward_hook(run, with_kwargs=True),
            ]
        return handles

    def _output(self, name: str, _: nn.Module, args: Any, output: Tensor) -> None:
        self._seen[f"output {name}"] = output

    def _inside(self, name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._seen[f"input {name}"] = args[0]

    def _run(
        self, index: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        site, target = self.pairs[index]
        target.module(*args, **kwargs)
        pads = self.anatomy.adapter.pads(site, args, kwargs)
        wanted = tokens_of(self._seen.pop(f"output {site.name}"), pads)
        c = tokens_of(self._seen.pop(f"input {target.name}"), pads)
        self.sums[index].add(c, wide(wanted) - _linear(target, c))

    def lead(self, ranks: Ranks) -> None:
        """Lets all processes subtract what the first one does, for the same rows in fp32."""
        lead_moments(ranks, self.sums, next(self.anatomy.model.parameters()).device)

    def run(self, images: Tensor | Inputs, batch: Any, number: int) -> list[Tensor]:
        with torch.no_grad():
            outputs(self.anatomy.model, images)
        return []
