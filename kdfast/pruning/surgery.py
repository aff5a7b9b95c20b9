# SPDX-License-Identifier: Apache-2.0
"""Builds a physically smaller model from the kept heads. See docs/pruning.md."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from kdfast.nn.heads import HeadAxis
from kdfast.ops._checks import head_list
from kdfast.ops.head_gather import head_gather
from kdfast.pruning.adapter import Adapter, adapter_of

Model = TypeVar("Model", bound=nn.Module)


def prune_heads(model: Model, selection: Sequence[Sequence[int]]) -> Model:
    """A new model that holds only the selected heads; the given one is not changed.

    The result computes exactly what the model computes with the context of all other heads set to
    zero before the output projection, whose bias stays whole.

    Args:
        model: An EVAViT, already pruned or not.
        selection: For every block the positions of the heads to keep among those that the model
            holds, so 0 is its first head, whatever its original index. Order has no meaning: heads
            stay in ascending order.

    Returns:
        A model of the same class with its own memory. Types, devices, ``requires_grad`` and the
        training mode of every module are those of the model; hooks and gradients are not copied.
        ``attn.heads`` holds original indices, so pruning twice names the same heads as once.

    Raises:
        TypeError: The model's family is not known, or ``selection`` is not a list of lists of ints.
        ValueError: Not one list per block, or a position is out of range or repeated, or a block
            would keep no head.
    """
    adapter = adapter_of("prune_heads", model)
    positions = _positions(selection, [len(kept) for kept in adapter.heads(model)])
    originals = [
        [held[position] for position in kept]
        for held, kept in zip(adapter.heads(model), positions, strict=True)
    ]
    student = adapter.empty(model, originals)
    # Strict: a tensor that was missed, is left over or has another shape is an error.
    student.load_state_dict(_pruned_state(adapter, model, positions), strict=True, assign=True)
    adapter.refresh(student)
    _copy_flags(model, student)
    return student  # type: ignore[return-value]


def _positions(selection: Sequence[Sequence[int]], sizes: Sequence[int]) -> list[list[int]]:
    if not isinstance(selection, Sequence) or not all(isinstance(x, Sequence) for x in selection):
        raise TypeError(
            "prune_heads: selection must be a list of lists of ints, one per block, "
            f"got {selection!r}"
        )
    if len(selection) != len(sizes):
        raise ValueError(
            f"prune_heads: selection must have one list per block ({len(sizes)}), "
            f"got {len(selection)}"
        )
    return [
        sorted(head_list("prune_heads", f"selection[{block}]", kept, size))
        for block, (kept, size) in enumerate(zip(selection, sizes, strict=True))
    ]


@torch.no_grad()
def _pruned_state(
    adapter: Adapter, model: nn.Module, positions: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """Copies of every tensor of the state dict, those that hold heads cut to the kept ones."""
    cuts: dict[str, tuple[HeadAxis, Sequence[int]]] = {}
    for prefix, kept in zip(adapter.attentions(model), positions, strict=True):
        cuts.update({f"{prefix}.{name}": (axis, kept) for name, axis in adapter.axes.items()})
    head_dim = adapter.head_dim(model)
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name in cuts:
            (dim, parts, _), kept = cuts[name]
            held = tensor.shape[dim] // (parts * head_dim)
            heads = [part * held + head for part in range(parts) for head in kept]
            state[name] = head_gather(tensor.detach(), heads, head_dim=head_dim, dim=dim)
        else:
            state[name] = tensor.detach().clone()
    return state


def _copy_flags(source: nn.Module, target: nn.Module) -> None:
    requires_grad = {name: p.requires_grad for name, p in source.named_parameters()}
    for name, parameter in target.named_parameters():
        parameter.requires_grad_(requires_grad[name])
    training = {name: module.training for name, module in source.named_modules()}
    for name, module in target.named_modules():
        # Not train(): it would set the children too, and a frozen model refuses it.
        module.training = training[name]
