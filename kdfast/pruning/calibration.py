# SPDX-License-Identifier: Apache-2.0
"""What a model's heads and hidden units compute on average. See docs/use/compensation.md.

D channels of a site, O outputs of its projection.
"""

import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kdfast.machine.files import replacing
from kdfast.machine.ranks import Ranks
from kdfast.machine.weights import DIGEST, digest_problem, not_finite, tensors_digest
from kdfast.pruning.adapter import Anatomy, Site
from kdfast.pruning.branch import Branch, watch_branches
from kdfast.pruning.families import anatomy_of
from kdfast.pruning.inputs import Inputs, outputs
from kdfast.pruning.moments import Moments, lead_moments
from kdfast.pruning.observe import observe, tokens_of

FORMAT = "kdfast.calibration/1"
# Weights may be cast to bf16 after the calibration, which changes their norm by less.
SAME_WEIGHTS = 0.01


@dataclass(frozen=True, eq=False)
class SiteMoments:
    """What enters the projection of one site, over all tokens; pads do not count.

    Attributes:
        tokens: How many tokens were seen.
        mean: (D,) fp64.
        covariance: (D, D) fp64.
        gain: (O,) fp64, what the block multiplies the projection's output by before it adds it to
            its stream; None where the block does not do that.
        stream: Variance of that stream after the addition, summed over channels.
        weight_norm: Norm of the projection's weight, by which other weights are noticed.
    """

    tokens: int
    mean: Tensor
    covariance: Tensor
    gain: Tensor | None
    stream: float
    weight_norm: float


@dataclass(frozen=True, eq=False)
class Calibration:
    """Moments of every site of a model; a result of ``kdfast.calibrate``.

    Attributes:
        attentions: Of the input of every attention's output projection, by the site's name.
        mlps: Of the hidden units of every MLP; empty where MLPs cannot be pruned or were left out.
        metadata: JSON values: model, batches and images that all processes saw.
    """

    attentions: dict[str, SiteMoments]
    mlps: dict[str, SiteMoments]
    metadata: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes safetensors, D^2 doubles a site; ``load`` restores every bit."""
        tensors: dict[str, Tensor] = {}
        sites: dict[str, dict[str, dict[str, Any]]] = {}
        for part in ("attentions", "mlps"):
            sites[part] = {}
            for name, moments in getattr(self, part).items():
                for key in ("mean", "covariance", "gain"):
                    if (tensor := getattr(moments, key)) is not None:
                        tensors[f"{part}.{name}.{key}"] = tensor.cpu().contiguous()
                facts = {key: getattr(moments, key) for key in ("tokens", "stream", "weight_norm")}
                sites[part][name] = facts
        content = {"format": FORMAT, "metadata": self.metadata, "sites": sites}
        with replacing(Path(path)) as partial_path:
            metadata = {"calibration": json.dumps(content)}
            metadata[DIGEST] = tensors_digest(tensors, metadata)
            save_file(tensors, partial_path, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module) -> "Calibration":
        """Reads what ``save`` wrote.

        Args:
            path: The file.
            model: The model that it is to be used for.

        Raises:
            FileNotFoundError: There is no such file.
            TypeError: The model's family is not known.
            ValueError: The file is damaged or of another kind, or belongs to another model.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"Calibration: {path} must be a file, got none")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = dict(file.metadata() or {})
                content = json.loads(metadata.get("calibration", "{}"))
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
            if problem := digest_problem(tensors, metadata):
                raise ValueError(problem)
            if not isinstance(content, dict):
                raise ValueError("its metadata must be a JSON object")
            if bad := [name for name, tensor in tensors.items() if not_finite(tensor)]:
                raise ValueError(f"its tensors must be finite, got others in {bad[:5]}")
        except (SafetensorError, ValueError, RecursionError) as error:
            raise ValueError(
                f"Calibration: {path} must be a whole safetensors file: {error}"
            ) from error
        if content.get("format") != FORMAT:
            got = content.get("format")
            raise ValueError(f"Calibration: {path} must have format {FORMAT!r}, got {got!r}")
        try:
            sites = content["sites"]
            parts = {part: _loaded(part, sites[part], tensors) for part in sites}
            loaded = cls(**parts, metadata=content["metadata"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"Calibration: {path} is damaged: {error!r}") from error
        loaded.check("Calibration.load", anatomy_of("Calibration.load", model))
        return loaded

    def check(self, function: str, anatomy: Anatomy) -> None:
        """Raises ValueError unless this belongs to a model with these sites and weights."""
        given = {**self.attentions, **self.mlps}
        sites = [*anatomy.attentions, *(anatomy.mlps if self.mlps else ())]
        if missing := [site.name for site in sites if site.name not in given]:
            raise ValueError(f"{function}: the calibration must know {missing[0]}, got none")
        if len(given) != len(sites):
            raise ValueError(
                f"{function}: the calibration must have {len(sites)} sites, got {len(given)}"
            )
        for site in sites:
            moments, width = given[site.name], len(site.held) * site.size
            if moments.mean.shape != (width,):
                raise ValueError(
                    f"{function}: the calibration must have {width} channels for {site.name}, "
                    f"got {len(moments.mean)}; calibrate the model as it is now"
                )
            norm = weight_norm(site)
            if not math.isclose(norm, moments.weight_norm, rel_tol=SAME_WEIGHTS, abs_tol=1e-12):
                raise ValueError(
                    f"{function}: the calibration must be of these weights; the norm of the "
                    f"projection of {site.name} was {moments.weight_norm:.6g} and is {norm:.6g}"
                )


def calibrate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    batches: int | None = None,
    mlps: bool = True,
    progress: bool = True,
) -> Calibration:
    """Means and covariances of every attention's context and of all hidden units, in one pass.

    The calibration serves ``prune_heads(compensate=)`` and the scores "reconstruction", for any
    number of selections. No labels and no gradients are needed.

    Args:
        model: A model of a family in docs/use/pruning.md, already pruned or not.
        data: Batches as in ``head_scores``.
        batches: Use at most so many; None: all.
        mlps: False leaves the hidden units out, which are most of the memory: enough to compensate
            for heads.
        progress: Show a progress bar on a terminal.

    Returns:
        D^2 doubles for a site of D channels, on the CPU. Where ``torch.distributed`` is initialised
        all processes call this, each with its share of the data, which may be none, and get the
        same whole: with batches that were dealt out in turn, that of one process but for the order
        of fp64 sums.

    Raises:
        TypeError: The model's family is not known, or a batch is of another kind.
        ValueError: There is no batch, or what enters a projection is not finite.
        PeerError: Another process failed.

    Warns:
        UserWarning: There are fewer tokens than twice the channels of a site.

    The model is left as it was, also when an error is raised. Products of tokens are in fp32 at
    full precision whatever the model's type, sums in fp64.
    """
    anatomy = anatomy_of("calibrate", model)
    observer = MomentObserver(anatomy, mlps)
    _, seen = observe("calibrate", anatomy, observer, data, batches, progress, observer.lead)
    ranks, device = Ranks.here(), next(model.parameters()).device
    for _, sums, branch in observer.records:
        sums.sum_over_processes(ranks, device)
        branch.sum_over_processes(ranks, device)
    parts = [
        {record[0].name: _moments(*record) for record in records}
        for records in (observer.attentions, observer.mlps)
    ]
    result = Calibration(parts[0], parts[1], {"model": anatomy.adapter.family, **seen})
    if ranks.main:
        _warn_of_few(result, seen["images"])
    return result


class MomentObserver:
    """Adds up the moments of every site and how its block uses it."""

    def __init__(self, anatomy: Anatomy, mlps: bool) -> None:
        self.anatomy = anatomy
        self._device = next(anatomy.model.parameters()).device
        self.attentions = [(site, Moments(), Branch()) for site in anatomy.attentions]
        self.mlps = [(site, Moments(), Branch()) for site in (anatomy.mlps if mlps else ())]
        self._pads: dict[str, Tensor | None] = {}

    @property
    def records(self) -> list[tuple[Site, Moments, Branch]]:
        """All sites with their sums; attentions, then MLPs."""
        return [*self.attentions, *self.mlps]

    def lead(self, ranks: Ranks) -> None:
        """Lets all processes subtract what the first one does, for the same rows in fp32."""
        lead_moments(ranks, [sums for _, sums, _ in self.records], self._device)

    def attach(self) -> list[RemovableHandle]:
        blocks = [
            [branch for _, _, branch in (record, *self.mlps[index : index + 1])]
            for index, record in enumerate(self.attentions)
        ]
        handles = watch_branches(self.anatomy, blocks)
        for site, sums, _ in self.records:
            enter, see = partial(self._enter, site), partial(self._see, site.name, sums)
            handles.append(site.module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(site.projection.register_forward_pre_hook(see))
        return handles

    def _enter(
        self, site: Site, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self._pads[site.name] = self.anatomy.adapter.pads(site, args, kwargs)

    def _see(self, name: str, sums: Moments, _: nn.Module, args: tuple[Any, ...]) -> None:
        sums.add(tokens_of(args[0], self._pads.get(name)))

    def run(self, images: Tensor | Inputs, batch: Any, number: int) -> list[Tensor]:
        with torch.no_grad():
            outputs(self.anatomy.model, images)
        for site, sums, _ in self.records:
            if not sums.finite():
                raise ValueError(
                    f"calibrate: what enters the projection of {site.name} must be finite"
                )
        return []


def _moments(site: Site, sums: Moments, branch: Branch) -> SiteMoments:
    """The site's moments."""
    gain, stream = branch.result()
    return SiteMoments(
        sums.count,
        sums.mean().cpu(),
        sums.covariance().cpu(),
        None if gain is None else gain.cpu(),
        stream,
        weight_norm(site),
    )


def weight_norm(site: Site) -> float:
    """Norm of the weight of the site's projection."""
    return float(site.weight().double().norm())


def _loaded(
    part: str, sites: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, Tensor]
) -> dict[str, SiteMoments]:
    return {
        name: SiteMoments(
            mean=tensors[f"{part}.{name}.mean"],
            covariance=tensors[f"{part}.{name}.covariance"],
            gain=tensors.get(f"{part}.{name}.gain"),
            **facts,
        )
        for name, facts in sites.items()
    }


def _warn_of_few(calibration: Calibration, images: int) -> None:
    """Warns where the fit of a site would rest on the ridge term alone."""
    worst = max(
        ({**calibration.attentions, **calibration.mlps}).items(),
        key=lambda item: len(item[1].mean) / max(item[1].tokens, 1),
    )
    name, moments = worst
    needed = 2 * len(moments.mean)
    if moments.tokens < needed:
        each = moments.tokens / images
        warnings.warn(
            f"calibrate: {name} has {len(moments.mean)} channels and saw {moments.tokens} tokens; "
            f"a fit needs at least {needed}, that is {math.ceil(needed / each)} images",
            UserWarning,
            stacklevel=3,
        )
