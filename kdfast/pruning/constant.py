# SPDX-License-Identifier: Apache-2.0
"""Blocks that only add a vector, in place of blocks that lost everything. See docs/use/pruning.md.

C channels of the stream.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdfast.pruning.adapter import Anatomy
from kdfast.pruning.families import anatomy_of
from kdfast.pruning.inputs import Inputs, model_inputs, outputs
from kdfast.pruning.observe import frozen_eval, moved

# Rounding of a sum of three numbers in two orders, in units of the type's precision.
ROUNDING = 8
Call = tuple[tuple[Any, ...], Mapping[str, Any]]


class ConstantBlock(nn.Module):
    """What is left of a block without heads and hidden units: its constant, added to every token.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., C) to (..., C); whatever else the block was given is not needed."""
        return x + self.bias


class DropReport(NamedTuple):
    """What ``drop_blocks`` did.

    Attributes:
        dropped: Names of the blocks that are a vector now.
        left: Names of empty blocks that stay as they are, and why.
    """

    dropped: list[str]
    left: dict[str, str]


def drop_blocks(model: nn.Module, batch: Any = None) -> DropReport:
    """Removes, in place, the blocks that have neither heads nor hidden units.

    Such a block adds the same vector to every token. It makes way for a module that holds this
    vector, as a parameter ``bias``, under the block's name: other names, indices of blocks and
    results stay as they are, up to the order of two additions. ``save_pretrained`` and
    ``load_pretrained`` know such models; further pruning works on the blocks that are left.

    The vector is what the block makes of zeros. That the block adds it and does nothing else is
    checked in a run of the whole model.

    Args:
        model: A model of a family in docs/use/pruning.md, usually from ``prune_heads``.
        batch: A batch as in ``head_scores`` for that run; None: noise of the model's image size.

    Returns:
        The blocks that were removed, and those that had to stay. ``EVAViT`` keeps its blocks, and
        runs an empty one as that addition by itself.

    Raises:
        TypeError: The model's family is not known, or the batch is of another kind.
        ValueError: The model names no image size and there is no batch.
    """
    anatomy = anatomy_of("drop_blocks", model)
    empty = _empty_blocks(anatomy)
    if not empty:
        return DropReport([], {})
    left = {
        name: "EVAViT adds its constant by itself"
        for name, block in empty.items()
        if getattr(block, "adds_constant", False)
    }
    empty = {name: block for name, block in empty.items() if name not in left}
    new: dict[str, ConstantBlock] = {}
    if empty:
        grads = {n: any(p.requires_grad for p in b.parameters()) for n, b in empty.items()}
        images = _images(anatomy, batch)
        with frozen_eval(model), torch.no_grad():
            calls = _calls(model, empty, images)
            for name, block in empty.items():
                found = _constant(block, calls[name])
                if isinstance(found, str):
                    left[name] = found
                    continue
                new[name] = ConstantBlock(len(found)).to(found)
                new[name].bias.copy_(found)
        for name, constant in new.items():
            constant.bias.requires_grad_(grads[name])
            constant.training = empty[name].training
            put(model, name, constant)
    return DropReport(list(new), left)


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Places a module under a name in place of the one that is there."""
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._modules[leaf] = module


def constant_blocks(model: nn.Module) -> dict[str, int]:
    """Channels of every block that only adds a vector, by its name."""
    return {
        name: len(module.bias)
        for name, module in model.named_modules()
        if isinstance(module, ConstantBlock)
    }


def _empty_blocks(anatomy: Anatomy) -> dict[str, nn.Module]:
    """The blocks without heads and hidden units, by name."""
    names = {id(module): name for name, module in anatomy.model.named_modules()}
    rows = zip(anatomy.blocks, anatomy.attentions, anatomy.mlps, strict=False)
    return {
        names[id(block)]: block
        for block, attention, mlp in rows
        if not attention.held and not mlp.held
    }


def _images(anatomy: Anatomy, batch: Any) -> Tensor | Inputs:
    like = next(anatomy.model.parameters())
    if batch is not None:
        return model_inputs("drop_blocks", anatomy.model, moved(batch, like.device))
    first = next((m for m in anatomy.model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = 3 if first is None else first.in_channels
    size = anatomy.adapter.image_size(anatomy.model)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, channels, *size, generator=generator).to(like)


def _calls(
    model: nn.Module, blocks: Mapping[str, nn.Module], images: Tensor | Inputs
) -> dict[str, list[Call]]:
    """Arguments of all calls of some blocks in one run of the model, by the blocks' names."""
    calls: dict[str, list[Call]] = {name: [] for name in blocks}

    def keep(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        calls[name].append((args, dict(kwargs)))

    handles = [
        block.register_forward_pre_hook(partial(keep, name), with_kwargs=True)
        for name, block in blocks.items()
    ]
    try:
        outputs(model, images)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _constant(block: nn.Module, calls: list[Call]) -> Tensor | str:
    """The vector (C,) that the block adds, or the reason why it is not that simple."""
    if len(calls) != 1 or not calls[0][0] or not isinstance(calls[0][0][0], Tensor):
        return "the model does not call it once with its stream as the first argument"
    (x, *rest), kwargs = calls[0]
    zero = block(torch.zeros_like(x), *rest, **kwargs)
    if not isinstance(zero, Tensor) or zero.shape != x.shape:
        return f"it returns a {type(zero).__name__} that is not like its stream"
    rows = zero.flatten(0, -2)
    limit = ROUNDING * torch.finfo(x.dtype).eps
    size = float(x.abs().max()) + float(zero.abs().max())
    whole = block(x, *rest, **kwargs)
    if float((rows - rows[0]).abs().max()) or float((whole - x - rows[0]).abs().max()) > (
        limit * size
    ):
        return "it does more than to add one vector to all tokens"
    return rows[0].clone()
