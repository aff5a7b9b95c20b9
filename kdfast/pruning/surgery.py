# SPDX-License-Identifier: Apache-2.0
"""Builds a physically smaller model from the kept heads and hidden units.

See docs/use/pruning.md.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kdfast.nn.attention import qualified_name
from kdfast.nn.heads import HeadAxis
from kdfast.ops._checks import head_list
from kdfast.ops.head_gather import MAX_HEADS
from kdfast.ops.head_gather_block import head_gather_block
from kdfast.pruning.adapter import Anatomy, Site
from kdfast.pruning.calibration import Calibration
from kdfast.pruning.compensate import RIDGE, SEQUENTIAL_RIDGE, SiteError
from kdfast.pruning.families import anatomy_of
from kdfast.pruning.observe import MeanObserver, observe
from kdfast.pruning.refit import Compensation

Model = TypeVar("Model", bound=nn.Module)


def prune_heads(
    model: Model,
    selection: Sequence[Sequence[int]] | None,
    *,
    mlp: Sequence[Sequence[int]] | None = None,
    compensate: Calibration | None = None,
    sequential: bool = False,
    ridge: float | None = None,
    mean_context: bool = False,
    data: Iterable[Any] | None = None,
    batches: int | None = None,
    progress: bool = True,
    errors: list[SiteError] | None = None,
) -> Model:
    """A new model that holds only the selected heads; the given one is not changed.

    Without more, the result computes exactly what the model computes with the context of all other
    heads (and the other hidden units) set to zero before the projection that reads them, whose bias
    stays whole. A norm between them, over all heads or hidden units, is taken over the kept ones.

    With ``compensate`` each projection's weight and bias are changed so that its output comes as
    near to the original's as a linear layer of the kept slices can, in the mean square over the
    calibration's tokens; see docs/use/compensation.md. A projection without a bias stays without.

    Args:
        model: A model of a family in docs/use/pruning.md, already pruned or not.
        selection: For every block the positions of the heads to keep among those that the model
            holds, so 0 is its first head, whatever its original index; a block may keep none.
            Order has no meaning: heads stay in ascending order. None keeps every head.
        mlp: The same for the hidden units of every block's MLP; None keeps them all.
        compensate: Result of ``calibrate`` on this model.
        sequential: Fit one site after the other, on what the pruned model computes there, towards
            the stream of the original; needs ``compensate`` and ``data``.
        ridge: Added to the variance of every kept channel in the fit, as a share of their mean; in
            (0, inf). None: 0.001, with ``sequential`` 0.03.
        mean_context: Add to each projection's bias what the removed slices write on average over
            ``data``, instead of nothing.
        data: Batches as in ``head_scores``: for ``mean_context``, for ``sequential``, and for
            ``compensate`` where a norm stands between slices and projection (EVA's MLP, scale
            norms): such a site is fitted on what the norm of the kept slices gives.
        batches: Use at most so many; None: all.
        progress: Show a progress bar on a terminal.
        errors: Gets the error of every site that was compensated, before and after.

    Returns:
        A model with its own memory, of the same class; attention modules of a library may be
        replaced, see docs. Types, devices, ``requires_grad`` and the training mode of every module
        are those of the model; gradients are not copied. Original indices of the heads are kept,
        so pruning twice names the same heads as once.

    Raises:
        TypeError: The model's family is not known, or a selection is not a list of lists of ints.
        ValueError: Not one list per block, or a position is out of range or repeated, a group of
            heads that share keys is split, the calibration is of another model, options do not go
            together, or a layer that would be cut is adapted, parametrized or quantized; the
            message names it and what makes it plain. Nothing is changed then.
    """
    anatomy = anatomy_of("prune_heads", model)
    _check_options(anatomy, compensate, sequential, ridge, mean_context, data)
    adapter, attentions, mlps = anatomy.adapter, anatomy.attentions, anatomy.mlps
    kept = _positions("selection", selection, attentions)
    if mlp is not None and not mlps:
        raise ValueError(
            f"prune_heads: mlp must be None, no MLP of {qualified_name(model)} can be pruned"
        )
    units = _positions("mlp", mlp, mlps)
    originals = [[site.held[p] for p in row] for site, row in zip(attentions, kept, strict=True)]
    cuts = list(zip((*attentions, *mlps), (*kept, *units), strict=True))
    _check_layers(cuts)
    student = adapter.empty(model, originals, [len(row) for row in units])
    _fill(model, student, cuts)
    adapter.refresh(student)
    _copy_flags(model, student)
    if compensate is not None:
        smaller = Anatomy.of(adapter, student)
        if ridge is None:
            ridge = SEQUENTIAL_RIDGE if sequential else RIDGE
        fit = Compensation(anatomy, smaller, compensate, ridge, data, batches, progress)
        rows = [row for _, row in cuts]
        found = fit.sequential(rows) if sequential else fit.at_once(rows)
        if errors is not None:
            errors += found
    elif data is not None:
        means, _ = observe("prune_heads", anatomy, MeanObserver(anatomy), data, batches, progress)
        _fold(cuts, means, Anatomy.of(adapter, student))
    return student  # type: ignore[return-value]


def _check_layers(cuts: Sequence[tuple[Site, Sequence[int]]]) -> None:
    """Raises ValueError before anything is built where a layer to be cut is more than it holds."""
    for site, row in cuts:
        if len(row) < len(site.held) and (reason := site.uncuttable()):
            raise ValueError(f"prune_heads: {reason}")


def _check_options(
    anatomy: Anatomy,
    compensate: Calibration | None,
    sequential: bool,
    ridge: float | None,
    mean_context: bool,
    data: Iterable[Any] | None,
) -> None:
    if compensate is None:
        if sequential:
            raise ValueError("prune_heads: sequential=True needs compensate and data")
        if mean_context != (data is not None):
            raise ValueError(
                "prune_heads: data must be given with mean_context=True or compensate, and only "
                "then"
            )
        return
    if not isinstance(compensate, Calibration):
        raise TypeError(
            "prune_heads: compensate must be a result of kdfast.calibrate, got "
            f"{type(compensate).__name__}"
        )
    if mean_context:
        raise ValueError("prune_heads: mean_context must be False with compensate, which has it")
    if sequential and data is None:
        raise ValueError("prune_heads: sequential=True needs data, got None")
    if ridge is not None and not 0 < ridge < math.inf:
        raise ValueError(f"prune_heads: ridge must be in (0, inf), got {ridge}")
    compensate.check("prune_heads", anatomy)


def _positions(
    name: str, selection: Sequence[Sequence[int]] | None, sites: Sequence[Site]
) -> list[list[int]]:
    sizes = [len(site.held) for site in sites]
    if selection is None:
        return [list(range(size)) for size in sizes]
    if not isinstance(selection, Sequence) or not all(isinstance(x, Sequence) for x in selection):
        raise TypeError(
            f"prune_heads: {name} must be a list of lists of ints, one per block, got {selection!r}"
        )
    if len(selection) != len(sizes):
        raise ValueError(
            f"prune_heads: {name} must have one list per block ({len(sizes)}), got {len(selection)}"
        )
    rows = [
        sorted(head_list("prune_heads", f"{name}[{block}]", kept, size)) if len(kept) else []
        for block, (kept, size) in enumerate(zip(selection, sizes, strict=True))
    ]
    for block, (row, site) in enumerate(zip(rows, sites, strict=True)):
        if len({position // site.group for position in row}) * site.group != len(row):
            raise ValueError(
                f"prune_heads: {name}[{block}] must hold whole groups of {site.group} heads that "
                f"share a key/value head, got {row}"
            )
    return rows


@torch.no_grad()
def _fill(model: nn.Module, student: nn.Module, cuts: Sequence[tuple[Site, Sequence[int]]]) -> None:
    """Copies every tensor of the model, those that hold slices cut to the kept ones.

    Tensors that the model shares between names are shared again. Buffers that the state dict lacks,
    such as tables of positions, are copied where the student has none of its own.
    """
    given = model.state_dict(keep_vars=True)
    buffers = dict(model.named_buffers(remove_duplicate=False))
    copies = _cuts({**buffers, **given}, cuts)

    def copied(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.detach().clone()
        if isinstance(tensor, nn.Parameter) and not isinstance(copies[id(tensor)], nn.Parameter):
            copies[id(tensor)] = nn.Parameter(copies[id(tensor)], tensor.requires_grad)
        return copies[id(tensor)]

    state = {name: copied(tensor) for name, tensor in given.items()}
    # Strict: a tensor that was missed, is left over or has another shape is an error.
    student.load_state_dict(state, strict=True, assign=True)
    own = dict(student.named_buffers(remove_duplicate=False))
    for name, buffer in buffers.items():
        if name in own and own[name].device.type == "meta":
            owner, _, leaf = name.rpartition(".")
            student.get_submodule(owner)._buffers[leaf] = copied(buffer)


def _cuts(
    tensors: Mapping[str, Tensor], cuts: Sequence[tuple[Site, Sequence[int]]]
) -> dict[int, Tensor]:
    """Every tensor that holds slices, cut to the kept ones, by the id of the original."""
    results: dict[int, Tensor] = {}
    for site, row in cuts:
        # The tensors of a block with the same heads: one launch on a GPU.
        alike: dict[tuple[Any, ...], dict[int, tuple[Tensor, HeadAxis]]] = {}
        for name, axis in site.axes.items():
            tensor = tensors.get(f"{site.name}.{name}")
            if tensor is None or id(tensor) in results:
                continue
            group = site.group if axis.grouped else 1
            slices = axis.parts * (len(site.held) // group)
            size = tensor.shape[axis.dim] // slices if row else 0
            alike.setdefault((group, size, tensor.device), {})[id(tensor)] = (tensor, axis)
        for (group, size, _), found in alike.items():
            kept = sorted({position // group for position in row})
            cut = _cut(list(found.values()), len(site.held) // group, kept, size)
            results.update(zip(found, cut, strict=True))
    return results


def _cut(
    tensors: Sequence[tuple[Tensor, HeadAxis]], blocks: int, kept: Sequence[int], size: int
) -> list[Tensor]:
    """Cuts each tensor to the ``kept`` ones of its ``blocks`` slices, each ``size`` long."""
    if not kept:
        return [x.detach().narrow(axis.dim, 0, 0).clone() for x, axis in tensors]
    dims = [axis.dim % x.dim() for x, axis in tensors]
    views = [
        x.detach().unflatten(dim, (axis.parts, -1))
        for (x, axis), dim in zip(tensors, dims, strict=True)
    ]
    # The kernel is for heads; hidden units are too many for its table of indices.
    backend = "reference" if blocks > MAX_HEADS else None
    cut = head_gather_block(
        views, kept, head_dim=size, dims=[dim + 1 for dim in dims], backend=backend
    )
    return [y.flatten(dim, dim + 1) for y, dim in zip(cut, dims, strict=True)]


def _copy_flags(source: nn.Module, target: nn.Module) -> None:
    requires_grad = {
        name: p.requires_grad for name, p in source.named_parameters(remove_duplicate=False)
    }
    for name, parameter in target.named_parameters():
        parameter.requires_grad_(requires_grad[name])
    training = {
        name: module.training for name, module in source.named_modules(remove_duplicate=False)
    }
    for name, module in target.named_modules():
        # Not train(): it would set the children too, and a frozen model refuses it.
        module.training = training[name]


@torch.no_grad()
def _fold(
    cuts: Sequence[tuple[Site, Sequence[int]]], means: Sequence[Tensor], student: Anatomy
) -> None:
    """Adds what the removed slices write on average to the biases of the student's projections."""
    targets = (*student.attentions, *student.mlps)
    for (site, row), mean, target in zip(cuts, means, targets, strict=True):
        removed = sorted(set(range(len(site.held))) - set(row))
        if not removed:
            continue
        bias = target.projection.bias
        if not isinstance(bias, Tensor):
            raise ValueError(
                f"prune_heads: mean_context needs a bias in the projection of {site.name}"
            )
        columns = site.weight().double()
        columns = columns.unflatten(1, (-1, site.size))[:, removed]
        context = mean.to(columns).unflatten(0, (-1, site.size))[removed]
        written = torch.einsum("csd,sd->c", columns, context)
        bias.add_(written.to(bias.dtype))
