# SPDX-License-Identifier: Apache-2.0
"""What scoring, surgery and accounting have to know about a model family.

See docs/use/add_a_family.md.

B batch, H heads, N tokens, D head dim, C channels, U hidden units.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from kdfast.nn.heads import AttentionCall, HeadAxis


class HeadWeights(NamedTuple):
    """The slices of every head of one attention; C' is C, or C + 1 with a bias as last column.

    Attributes:
        q: (H, D, C'); None where a norm hides the size of queries and keys.
        k: (H, D, C'); None as ``q``.
        v: (H, D, C').
        proj: (H, C, D), the columns of the output projection.
    """

    q: Tensor | None
    k: Tensor | None
    v: Tensor
    proj: Tensor


@dataclass(frozen=True)
class Site:
    """Equal slices of a block that can be removed: an attention's heads or an MLP's hidden units.

    Attributes:
        name: Of the module, as in the state dict.
        module: The attention or the MLP.
        axes: For each of its tensors that holds slices, by its name there, where they lie. Tensors
            that the module lacks are skipped.
        size: Channels of one slice in the input of ``projection``: D, or 1 for a hidden unit.
        held: Original indices of the slices that the module holds, ascending.
        projection: The linear layer whose input (B, N, len(held) * size) is the slices' outputs
            side by side.
        group: Number of consecutive slices that can only go together.
        norm: The norm over all slices before ``projection``, if there is one.
    """

    name: str
    module: nn.Module
    axes: Mapping[str, HeadAxis]
    size: int
    held: list[int]
    projection: nn.Module
    group: int = 1
    norm: nn.Module | None = None

    def tensors(self) -> dict[str, tuple[HeadAxis, Tensor]]:
        """The axes and tensors that the module has."""
        found = {}
        for name, axis in self.axes.items():
            path, _, leaf = name.rpartition(".")
            owner: Any = self.module
            for step in path.split(".") if path else ():
                owner = None if owner is None else owner._modules.get(step)
            tensor = None if owner is None else getattr(owner, leaf, None)
            if isinstance(tensor, Tensor):
                found[name] = (axis, tensor)
        return found


@dataclass(frozen=True)
class BlockFlops:
    """FLOPs of one block for one image; 1 multiply-add is 2.

    Attributes:
        window: Side of the windows, in tokens; 0 for global attention.
        gemm: q, k, v and output projections on the real tokens.
        attention: QK^T and PV between the real tokens of each window.
        gemm_padded: Like ``gemm`` with every pad computed as a token.
        attention_padded: Like ``attention`` with full windows.
        mlp: Everything else in the block.
    """

    window: int
    gemm: int
    attention: int
    gemm_padded: int
    attention_padded: int
    mlp: int


class Adapter(Protocol):
    """Everything that differs between model families.

    Attributes:
        family: Name of the model class or of the family, for messages.
    """

    @property
    def family(self) -> str: ...

    def fits(self, model: nn.Module) -> bool:
        """Whether the model is of this family; must not import a library that is not loaded."""

    def why_not(self, model: nn.Module) -> str | None:
        """The reason why a model of this family cannot be pruned, or None."""

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The module of every block, in the order of execution."""

    def attentions(self, model: nn.Module) -> list[Site]:
        """The heads of every block."""

    def mlps(self, model: nn.Module) -> list[Site]:
        """The hidden units of every block's MLP; empty where they cannot be removed."""

    def weights(self, site: Site) -> HeadWeights:
        """The heads' slices, detached."""

    def call(
        self, site: Site, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> AttentionCall:
        """Reads a forward call of ``site.module`` from its arguments and its output."""

    def running(self, model: nn.Module) -> AbstractContextManager[None]:
        """Inside, every site's projection and norm are called as modules, so hooks see them."""

    def empty(
        self, model: nn.Module, heads: Sequence[Sequence[int]], widths: Sequence[int]
    ) -> nn.Module:
        """The architecture with these original heads and MLP widths, on the meta device.

        ``widths`` is as long as ``mlps``, so empty where MLPs cannot be pruned.
        """

    def refresh(self, student: nn.Module) -> None:
        """Rebuilds what is neither a parameter nor a buffer, after those were put in place."""

    def image_size(self, model: nn.Module) -> tuple[int, int]:
        """(height, width) that the model was configured for."""

    def flops(self, model: nn.Module, image_size: tuple[int, int]) -> tuple[list[BlockFlops], int]:
        """FLOPs of every block and of all the rest; ValueError if the size does not fit."""


_registered: list[Adapter] = []


def register_family(adapter: Adapter) -> None:
    """Adds a family for this process; it is asked before those of kdfast."""
    _registered.insert(0, adapter)


def adapters() -> tuple[Adapter, ...]:
    """All families; the first that fits a model wins."""
    from kdfast.pruning.eva_adapter import EvaAdapter
    from kdfast.pruning.hf_adapter import HfAdapter
    from kdfast.pruning.vit_adapter import VitAdapter

    return (*_registered, EvaAdapter(), HfAdapter(), VitAdapter())


def adapter_of(function: str, model: nn.Module) -> Adapter:
    """The adapter of the model's family.

    Args:
        function: Name of the caller, for the message.
        model: Any module.

    Raises:
        TypeError: No adapter knows the model, or it has something that cannot be pruned; the
            message names its class and the reason.
    """
    from kdfast.pruning.vit_adapter import stand_ins

    known = adapters()
    got = f"{type(model).__module__}.{type(model).__qualname__}"
    for adapter in known:
        if adapter.fits(model):
            if reason := adapter.why_not(model):
                raise TypeError(f"{function}: cannot prune a {got}: {reason}")
            return adapter
    names = ", ".join(adapter.family for adapter in known)
    reasons = dict.fromkeys(str(reason) for _, reason in stand_ins(model))
    why = f" ({'; '.join(reasons)})" if reasons else ", which holds no attention"
    raise TypeError(f"{function}: model must be one of {names}, got {got}{why}")
