# SPDX-License-Identifier: Apache-2.0
"""The protocol by which scoring, surgery and accounting see a model of any family.

See docs/use/add_a_family.md.

B batch, H heads, N tokens, D head dim, C channels, U hidden units.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from kdfast.nn.heads import AttentionCall, HeadAxis, find_tensor, submodule
from kdfast.pruning.effective import effective, is_linear, obstacle


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
        name: Name of the module, as in the state dict.
        module: The attention or the MLP.
        axes: Names of the module's tensors that hold slices, and where in each the slices lie.
            Names that the module lacks are skipped.
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
        """The axes and tensors that the module has; of adapted layers, what they compute with."""
        found: dict[str, tuple[HeadAxis, Tensor]] = {}
        computed: dict[str, dict[str, Tensor | None]] = {}
        for name, axis in self.axes.items():
            path, _, leaf = name.rpartition(".")
            owner = submodule(self.module, path)
            if owner is None:
                continue
            if path and is_linear(owner) and obstacle(owner):
                if path not in computed:
                    pair = effective(f"{self.name}.{path}", owner)
                    computed[path] = dict(zip(("weight", "bias"), pair, strict=True))
                tensor = computed[path].get(leaf)
            else:
                slot = find_tensor(self.module, name)
                tensor = None if slot is None else slot.tensor
            if tensor is not None:
                found[name] = (axis, tensor)
        return found

    def weight(self) -> Tensor:
        """(O, len(held) * size): what ``projection`` multiplies by, detached."""
        return effective(f"the projection of {self.name}", self.projection)[0]

    def uncuttable(self) -> str | None:
        """Which layer's tensors cannot be cut, why, and the way out; None if all can."""
        for name in self.axes:
            path, _, leaf = name.rpartition(".")
            owner = submodule(self.module, path)
            if owner is None:
                continue
            whole = f"{self.name}.{path}".rstrip(".")
            if path and (reason := obstacle(owner)):
                return f"{whole} {reason}"
            computed = leaf not in {**owner._parameters, **owner._buffers}
            if computed and isinstance(getattr(owner, leaf, None), Tensor):
                return f"{whole} computes its {leaf}, which can then not be cut"
        return None


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

    To list the attentions of a model can mean a stand-in for each of them. So they are listed once
    and handed to the methods that need them; ``Anatomy`` does so.

    Attributes:
        family: Name of the model class or of the family, for messages.
    """

    @property
    def family(self) -> str: ...

    def fits(self, model: nn.Module) -> bool:
        """Whether the model is of this family; must not import a library that is not loaded."""

    def attentions(self, model: nn.Module) -> list[Site]:
        """The heads of every block, in the order of execution."""

    def why_not(self, model: nn.Module, attentions: Sequence[Site]) -> str | None:
        """The reason why a model of this family cannot be pruned, or None."""

    def blocks(self, model: nn.Module, attentions: Sequence[Site]) -> list[nn.Module]:
        """The module of every block, in the order of execution."""

    def mlps(self, model: nn.Module, attentions: Sequence[Site]) -> list[Site]:
        """The hidden units of every block's MLP; empty where they cannot be removed."""

    def weights(self, site: Site) -> HeadWeights:
        """The heads' slices, detached."""

    def call(
        self, site: Site, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> AttentionCall:
        """Reads a forward call of ``site.module`` from its arguments and its output."""

    def pads(self, site: Site, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """Which rows of the projection's input in a call of ``site.module`` are no tokens.

        Bool, of the shape of that input without its last dimension; None: all rows are tokens.
        """

    def running(self, model: nn.Module, attentions: Sequence[Site]) -> AbstractContextManager[None]:
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


@dataclass(frozen=True)
class Anatomy:
    """A model as its family's adapter sees it. Valid until modules of the model are replaced.

    Attributes:
        adapter: The adapter of the model's family.
        model: The model.
        attentions: The heads of every block.
    """

    adapter: Adapter
    model: nn.Module
    attentions: Sequence[Site]

    @classmethod
    def of(cls, adapter: Adapter, model: nn.Module) -> "Anatomy":
        """The anatomy of a model of the adapter's family."""
        return cls(adapter, model, adapter.attentions(model))

    @cached_property
    def mlps(self) -> list[Site]:
        """The hidden units of every block's MLP; empty where they cannot be removed."""
        return self.adapter.mlps(self.model, self.attentions)

    @property
    def blocks(self) -> list[nn.Module]:
        """The module of every block."""
        return self.adapter.blocks(self.model, self.attentions)

    def running(self) -> AbstractContextManager[None]:
        """As in ``Adapter``."""
        return self.adapter.running(self.model, self.attentions)
