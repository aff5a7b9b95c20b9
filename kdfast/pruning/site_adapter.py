# SPDX-License-Identifier: Apache-2.0
"""The adapter of a family that only has to say where its heads are. See docs/use/add_a_family.md.

H heads, D head dim, C channels.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kdfast.nn.attention import qualified_name
from kdfast.nn.heads import AttentionCall
from kdfast.pruning.adapter import Anatomy, BlockFlops, HeadWeights, Site
from kdfast.pruning.skeleton import counted_flops, meta_copy, mlp_sites, narrow


class SiteAdapter:
    """An adapter that derives everything from ``attentions``, for models that are cut in place.

    Attributes:
        family: Name for messages.
        packed: Name of a projection that holds queries, keys and values one after the other.
        separate: Names of the projections where each is its own.
        counts: Names of the attributes that state an attention's number of heads.
    """

    family: str = "ViT"
    packed: ClassVar[str] = "qkv"
    separate: ClassVar[tuple[str, str, str]] = ("q_proj", "k_proj", "v_proj")
    counts: ClassVar[tuple[str, ...]] = ("num_heads", "num_attention_heads", "heads")

    def attentions(self, model: nn.Module) -> list[Site]:
        """The heads of every block, in the order of execution."""
        raise NotImplementedError(f"{self.family}: attentions must be implemented")

    def fits(self, model: nn.Module) -> bool:
        return bool(self.attentions(model))

    def why_not(self, model: nn.Module, attentions: Sequence[Site]) -> str | None:
        for site in attentions:
            if site.norm is not None and not hasattr(site.norm, "normalized_shape"):
                return f"{site.name} has a {qualified_name(site.norm)}, which cannot be cut"
        return None

    def blocks(self, model: nn.Module, attentions: Sequence[Site]) -> list[nn.Module]:
        return [model.get_submodule(site.name.rpartition(".")[0]) for site in attentions]

    def mlps(self, model: nn.Module, attentions: Sequence[Site]) -> list[Site]:
        return mlp_sites(model, attentions)

    def weights(self, site: Site) -> HeadWeights:
        named = {name: tensor.detach() for name, (_, tensor) in site.tensors().items()}
        q, k, v = self._rows(named, site)
        weight = site.weight()
        # A norm before the projection scales its columns.
        if site.norm is not None and isinstance(site.norm.weight, Tensor):
            weight = weight * site.norm.weight.detach()
        proj = weight.unflatten(1, (len(site.held), site.size)).transpose(0, 1)
        # A norm of queries and keys, or their scaling to length 1, hides the size of the weights.
        hidden = not isinstance(site.module._modules.get("q_norm") or nn.Identity(), nn.Identity)
        hidden |= getattr(site.module, "cosine", False)
        return HeadWeights(None if hidden else q, None if hidden else k, v, proj)

    def _rows(self, named: Mapping[str, Tensor], site: Site) -> list[Tensor]:
        """Rows of q, k and v, each (H, D, C'), from packed or separate projections."""
        weights: Sequence[Tensor]
        biases: Sequence[Tensor | None]
        packed = next((n for n in (f"{self.packed}.weight", "in_proj_weight") if n in named), None)
        if packed is not None:
            parts = (site.axes[packed].parts == 1) * len(site.held)

            def third(tensor: Tensor) -> Sequence[Tensor]:
                # (3, H, D) rows, or (H, 3, D) where q, k and v of a head are side by side.
                if not parts:
                    return tensor.chunk(3)
                tall = tensor.unflatten(0, (parts, 3, -1)).transpose(0, 1)
                return tall.flatten(1, 2).unbind(0)

            weights = third(named[packed])
            bias = named.get(packed.removesuffix("weight") + "bias")
            biases = [None] * 3 if bias is None else third(bias)
        else:
            weights = [named[f"{name}.weight"] for name in self.separate]
            biases = [named.get(f"{name}.bias") for name in self.separate]
        rows = []
        for x, weight, bias in zip("qkv", weights, biases, strict=True):
            bias = named.get(f"{x}_bias", bias)
            full = weight if bias is None else torch.cat((weight, bias[:, None]), 1)
            heads = len(full) // site.size
            row = full.unflatten(0, (heads, site.size))
            # Heads of a group share their key and value.
            rows.append(row if heads == len(site.held) else row.repeat_interleave(site.group, 0))
        return rows

    def call(
        self, site: Site, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> AttentionCall:
        raise NotImplementedError(
            f"{self.family}: the entropy of attention needs the adapter's method 'call'"
        )

    def pads(self, site: Site, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        return None

    def running(self, model: nn.Module, attentions: Sequence[Site]) -> AbstractContextManager[None]:
        return nullcontext()

    def empty(
        self, model: nn.Module, heads: Sequence[Sequence[int]], widths: Sequence[int]
    ) -> nn.Module:
        skeleton: nn.Module = meta_copy(model)
        self.shrink(Anatomy.of(self, skeleton), heads, widths)
        return skeleton

    def shrink(
        self, anatomy: Anatomy, heads: Sequence[Sequence[int]], widths: Sequence[int]
    ) -> None:
        """Resizes a model of this family, in place, to these original heads and MLP widths.

        The values of the resized tensors are undefined.
        """
        mlps = anatomy.mlps
        for site, kept in zip(anatomy.attentions, heads, strict=True):
            self.set_heads(anatomy.model, site, list(kept))
        for site, width in zip(mlps, widths, strict=True):
            if site.held:
                narrow(site, width)

    def set_heads(self, model: nn.Module, site: Site, kept: list[int]) -> None:
        """Cuts one attention; ``kept_heads`` then names the original heads that it holds."""
        attention: Any = site.module
        if site.held:
            narrow(site, len(kept))
        attention.kept_heads = kept
        for name in self.counts:
            if isinstance(attention.__dict__.get(name), int):
                setattr(attention, name, len(kept))

    def refresh(self, student: nn.Module) -> None:
        pass

    def image_size(self, model: Any) -> tuple[int, int]:
        size = getattr(model, "image_size", None)
        return self.as_size(size)

    def as_size(self, size: Any) -> tuple[int, int]:
        """(height, width) from a side or such a pair; ValueError if there is neither."""
        if size is None:
            raise ValueError(f"{self.family}: image_size must be given, the model names none")
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    def flops(self, model: nn.Module, image_size: tuple[int, int]) -> tuple[list[BlockFlops], int]:
        skeleton: nn.Module = meta_copy(model).eval()
        sites = self.attentions(skeleton)
        with self.running(skeleton, sites):
            return counted_flops(self.family, skeleton, sites, image_size)
