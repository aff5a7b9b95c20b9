# SPDX-License-Identifier: Apache-2.0
"""Evaluates a model as if it had lost some heads, on its own weights. See docs/use/pruning.md.

B batch, H heads, N tokens, D head dim.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

from kdfast.machine.ranks import Ranks
from kdfast.ops._checks import head_list
from kdfast.pruning.adapter import Anatomy, Site
from kdfast.pruning.families import anatomy_of
from kdfast.pruning.inputs import Inputs, outputs
from kdfast.pruning.observe import main_output, observe

Metric = Callable[[Any, Any], Tensor | float]


def evaluate_selections(
    model: nn.Module,
    selections: Sequence[Sequence[Sequence[int]]],
    metric: Metric | None,
    data: Iterable[Any],
    *,
    batches: int | None = None,
    progress: bool = True,
) -> list[float]:
    """The metric of every selection, as if the model were pruned to it; nothing is built.

    The heads that a selection drops are silenced by their index while the model runs on its own
    weights. Blocks before the first one that loses a head are not run again.

    Args:
        model: As in ``head_scores``.
        selections: Each as in ``prune_heads``.
        metric: ``metric(model output, batch)``, the mean over the batch's images, higher is
            better. None: minus the relative change of the output against the whole model's.
        data: Batches as in ``head_scores``; read once.
        batches: Use at most so many; None: all.
        progress: Show a progress bar on a terminal.

    Returns:
        Mean over all images, one value per selection.

    Raises:
        TypeError: The model's family is not known, or a batch or a metric is of another kind.
        ValueError: A selection does not fit the model, there is no batch, or a metric is not
            finite.
    """
    anatomy = anatomy_of("evaluate_selections", model)
    sites = anatomy.attentions
    kept = [_checked(index, selection, sites) for index, selection in enumerate(selections)]
    if not kept:
        raise ValueError("evaluate_selections: selections must name at least one, got none")
    observer = SelectionObserver(anatomy, kept, metric, progress)
    (values,), _ = observe("evaluate_selections", anatomy, observer, data, batches, progress)
    return values[1:].tolist()


def _checked(
    index: int, selection: Sequence[Sequence[int]], sites: Sequence[Site]
) -> dict[int, list[int]]:
    """Kept positions of the blocks that lose a head."""
    if len(selection) != len(sites):
        raise ValueError(
            f"evaluate_selections: selections[{index}] must have one list per block "
            f"({len(sites)}), got {len(selection)}"
        )
    changed = {}
    for block, (row, site) in enumerate(zip(selection, sites, strict=True)):
        name, size = f"selections[{index}][{block}]", len(site.held)
        kept = sorted(head_list("evaluate_selections", name, row, size)) if len(row) else []
        if len(kept) < size:
            changed[block] = kept
    return changed


def leave_one_out(sites: Sequence[Site]) -> list[dict[int, list[int]]]:
    """One selection per head, or group of heads, that drops it, in the order of the sites."""
    return [
        {block: [p for p in range(len(site.held)) if p // site.group != group]}
        for block, site in enumerate(sites)
        for group in range(len(site.held) // site.group)
    ]


class SelectionObserver:
    """Metric of the whole model, then of each of S selections; its row is (1 + S,)."""

    def __init__(
        self,
        anatomy: Anatomy,
        selections: Sequence[dict[int, list[int]]],
        metric: Metric | None,
        progress: bool,
    ) -> None:
        self.model, self.selections, self.metric = anatomy.model, selections, metric
        self.progress = progress and Ranks.here().main
        self.sites, self.blocks = anatomy.attentions, anatomy.blocks
        self._kept: dict[int, list[int]] = {}
        self._outputs: dict[int, Any] = {}
        self._order: list[int] = []
        self._watch = False

    def attach(self) -> list[RemovableHandle]:
        handles = []
        for block, site in enumerate(self.sites):
            handles.append(site.projection.register_forward_pre_hook(partial(self._mask, block)))
            if site.norm is not None:
                handles.append(site.norm.register_forward_hook(partial(self._norm, block)))
        for index, module in enumerate(self.blocks):
            handles.append(module.register_forward_hook(partial(self._store, index)))
        return handles

    def _mask(self, block: int, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if block not in self._kept:
            return None
        site, context = self.sites[block], args[0]
        mask = context.new_zeros(len(site.held))
        mask[self._kept[block]] = 1
        return context * mask.repeat_interleave(site.size), *args[1:]

    def _norm(self, block: int, norm: nn.Module, args: tuple[Any, ...], out: Tensor) -> Any:
        if block not in self._kept:
            return None
        site = self.sites[block]
        channels = torch.arange(len(site.held) * site.size, device=out.device)
        index = channels.view(-1, site.size)[self._kept[block]].flatten()
        result = torch.zeros_like(out)
        result[..., index] = _norm_over(norm, args[0], index).to(out.dtype)
        return result

    def _store(self, index: int, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._watch:
            self._outputs[index] = output
            self._order.append(index)

    def _before(self, kept: dict[int, list[int]]) -> list[int]:
        """Blocks that run before the first one that loses a head: nothing changes for them."""
        if len(set(self._order)) < len(self._order):
            return []
        first = next((at for at, index in enumerate(self._order) if index in kept), None)
        return self._order[:first]

    def run(self, images: Tensor | Inputs, batch: Any, number: int) -> list[Tensor]:
        self._kept, self._outputs, self._order, self._watch = {}, {}, [], True
        with torch.no_grad():
            whole = outputs(self.model, images)
            self._watch = False
            values = [self._value(whole, whole, batch)]
            work = [(kept, self._before(kept)) for kept in self.selections]
            # By blocks to run, not by selections: those that change late blocks cost less.
            steps = [len(self._order) + 1 - len(done) for _, done in work]
            with tqdm(
                total=sum(steps),
                desc=f"{len(work)} selections",
                unit="block",
                leave=False,
                disable=None if self.progress else True,
            ) as bar:
                for (kept, done), step in zip(work, steps, strict=True):
                    self._kept = kept
                    with replayed([(self.blocks[i], self._outputs[i]) for i in done]):
                        values.append(self._value(outputs(self.model, images), whole, batch))
                    bar.update(step)
        self._kept, self._outputs = {}, {}
        return [len(images) * torch.tensor(values, dtype=torch.float64)]

    def _value(self, output: Any, whole: Any, batch: Any) -> float:
        if self.metric is None:
            return -_change(main_output(output), main_output(whole))
        value = self.metric(output, batch)
        if isinstance(value, Tensor) and value.numel() == 1:
            return value.item()
        if isinstance(value, Tensor) or not isinstance(value, (int, float)):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"metric: must return a number, got {got}")
        return value


@contextmanager
def replayed(pairs: Sequence[tuple[nn.Module, Any]]) -> Iterator[None]:
    """Context in which each of these modules returns its stored output without computing it."""
    before = [module.__dict__.get("forward") for module, _ in pairs]
    try:
        for module, output in pairs:
            module.__dict__["forward"] = partial(_give, output)
        yield
    finally:
        for (module, _), old in zip(pairs, before, strict=True):
            module.__dict__.pop("forward", None)
            if old is not None:
                module.__dict__["forward"] = old


def _give(output: Any, *args: Any, **kwargs: Any) -> Any:
    return output


def _norm_over(norm: nn.Module, x: Tensor, index: Tensor) -> Tensor:
    """The norm of some channels of x (..., C) alone, with their weights."""
    part = copy.copy(norm)
    part._parameters = {
        name: None if p is None else nn.Parameter(p[index], requires_grad=False)
        for name, p in norm._parameters.items()
    }
    part._forward_hooks, part._forward_pre_hooks = {}, {}
    part.normalized_shape = (len(index),)  # type: ignore[assignment]
    out: Tensor = part.forward(x[..., index])
    return out


def _change(output: Any, whole: Any) -> float:
    """Mean over images of ||output - whole|| / ||whole||."""
    if not isinstance(output, Tensor):
        raise TypeError(
            f"metric: must be given where the output is no tensor, got {type(output).__name__}"
        )
    difference = (output.double() - whole.double()).flatten(1).norm(dim=1)
    size = whole.double().flatten(1).norm(dim=1)
    return (difference / size.clamp_min(torch.finfo(torch.float64).tiny)).mean().item()
