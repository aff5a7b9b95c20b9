# SPDX-License-Identifier: Apache-2.0
"""timm, torchvision, and every model whose attentions have a fused stand-in with head axes.

A pruned model holds those stand-ins (``kdfast.nn.FusedAttention``), which take any number of heads.
H heads, D head dim, C channels.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.nn.attention import FusedAttention, qualified_name
from kdfast.nn.heads import AttentionCall
from kdfast.nn.table import FUSED, unfused_reason
from kdfast.pruning.adapter import BlockFlops, HeadWeights, Site
from kdfast.pruning.skeleton import (
    counted_flops,
    meta_copy,
    mlp_sites,
    narrow,
)

# Token attentions whose stand-ins take any number of heads and call their projection as a module.
PRUNABLE = (
    "timm.layers.attention.Attention",
    "timm.layers.attention.AttentionRope",
    "timm.models.eva.EvaAttention",
    "torch.nn.modules.activation.MultiheadAttention",
)
# torch's own module is used in many ways; here it is plain self-attention.
TORCHVISION_BLOCK = "torchvision.models.vision_transformer.EncoderBlock"


def stand_in(module: nn.Module, parent: nn.Module | None) -> FusedAttention | str | None:
    """The fused stand-in of an attention, the reason why there is none, or None for the rest."""
    fused = isinstance(module, FusedAttention)
    source = module.source if isinstance(module, FusedAttention) else qualified_name(module)
    if source not in PRUNABLE:
        if not fused and source not in FUSED:
            reason = unfused_reason(module)
            return f"{source}: {reason}" if reason else None
        return f"{source}: its heads cannot be removed"
    if parent is None:
        return f"{source}: it is the model itself, which nothing holds"
    if source == PRUNABLE[-1] and qualified_name(parent) != TORCHVISION_BLOCK:
        return f"{source}: only torchvision's blocks are known to use it for self-attention"
    if isinstance(module, FusedAttention):
        return module
    if source not in FUSED:
        return f"{source}: it has no fused stand-in"
    if reason := FUSED[source].why_not(module):
        return f"{source}: {reason}"
    return FUSED[source].adopt(module)


def stand_ins(model: nn.Module) -> Iterator[tuple[str, FusedAttention | str]]:
    """Every attention of a model by name, or why it cannot lose heads."""
    for name, module in model.named_modules():
        parent = model.get_submodule(name.rpartition(".")[0]) if name else None
        found = stand_in(module, parent)
        if found is not None:
            yield name, found


@dataclass(frozen=True)
class VitAdapter:
    """Models of timm and torchvision."""

    family: str = "timm or torchvision ViT"

    def fits(self, model: nn.Module) -> bool:
        return any(isinstance(found, FusedAttention) for _, found in stand_ins(model))

    def why_not(self, model: nn.Module) -> str | None:
        for site in self.attentions(model):
            if site.norm is not None and not hasattr(site.norm, "normalized_shape"):
                return f"{site.name} has a {qualified_name(site.norm)}, which cannot be cut"
        return None

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return [
            model.get_submodule(site.name.rpartition(".")[0]) for site in self.attentions(model)
        ]

    def attentions(self, model: nn.Module) -> list[Site]:
        sites = []
        for name, fused in stand_ins(model):
            if isinstance(fused, str):
                continue
            norm = fused._modules.get("norm")
            sites.append(
                Site(
                    name,
                    fused,
                    fused.axes,
                    fused.head_dim,
                    list(fused.heads),
                    fused.projection(),
                    fused.kv_group,
                    None if isinstance(norm, nn.Identity) else norm,
                )
            )
        return sites

    def mlps(self, model: nn.Module) -> list[Site]:
        return mlp_sites(model, self.attentions(model))

    def weights(self, site: Site) -> HeadWeights:
        named = {name: tensor.detach() for name, (_, tensor) in site.tensors().items()}
        q, k, v = _rows(named, site)
        columns: Any = site.projection.weight
        weight = columns.detach()
        if site.norm is not None and isinstance(site.norm.weight, Tensor):
            weight = weight * site.norm.weight.detach()
        proj = weight.unflatten(1, (-1, site.size)).transpose(0, 1)
        hidden = not isinstance(site.module._modules.get("q_norm") or nn.Identity(), nn.Identity)
        return HeadWeights(None if hidden else q, None if hidden else k, v, proj)

    def call(
        self, site: Site, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> AttentionCall:
        attention: Any = site.module
        # A mask has no part in what the entropy is of.
        known = {name: value for name, value in kwargs.items() if name in ("x", "rope")}
        call: AttentionCall = attention.project(*args, **known)
        return call

    @contextmanager
    def running(self, model: nn.Module) -> Iterator[None]:
        """Runs the stand-ins inside: not every original calls the modules that are watched."""
        replaced: list[tuple[nn.Module, str, nn.Module]] = []
        try:
            for site in self.attentions(model):
                path, _, leaf = site.name.rpartition(".")
                parent = model.get_submodule(path)
                replaced.append((parent, leaf, parent._modules[leaf]))  # type: ignore[arg-type]
                parent._modules[leaf] = site.module
            yield
        finally:
            for parent, leaf, module in replaced:
                parent._modules[leaf] = module

    def empty(
        self, model: nn.Module, heads: Sequence[Sequence[int]], widths: Sequence[int]
    ) -> nn.Module:
        skeleton: nn.Module = meta_copy(model)
        self.shrink(skeleton, heads, widths)
        return skeleton

    def shrink(
        self, model: nn.Module, heads: Sequence[Sequence[int]], widths: Sequence[int]
    ) -> None:
        """In place: stand-ins with these original heads, and MLPs of these widths."""
        sites, mlps = self.attentions(model), self.mlps(model)
        for site, kept in zip(sites, heads, strict=True):
            path, _, leaf = site.name.rpartition(".")
            attention: Any = site.module
            attention.keep_heads(kept)
            model.get_submodule(path)._modules[leaf] = attention
        for site, width in zip(mlps, widths, strict=True):
            narrow(site, width)

    def refresh(self, student: nn.Module) -> None:
        pass

    def image_size(self, model: Any) -> tuple[int, int]:
        embed = getattr(model, "patch_embed", None)
        config = getattr(model, "pretrained_cfg", None) or {}
        size = getattr(embed, "img_size", None) or getattr(model, "image_size", None)
        size = size or config.get("input_size", (None, None, None))[1:]
        if isinstance(size, int):
            return size, size
        if None in size:
            raise ValueError(f"{self.family}: image_size must be given, the model names none")
        return int(size[0]), int(size[1])

    def flops(self, model: nn.Module, image_size: tuple[int, int]) -> tuple[list[BlockFlops], int]:
        skeleton = meta_copy(model).eval()
        with self.running(skeleton):
            sites = self.attentions(skeleton)
            return counted_flops(self.family, skeleton, sites, image_size)


def _rows(named: dict[str, Tensor], site: Site) -> list[Tensor]:
    """Rows of q, k and v, each (H, D, C'), from packed or separate projections."""
    biases: Sequence[Tensor | None]
    packed = next((n for n in ("qkv.weight", "in_proj_weight") if n in named), None)
    if packed is not None:
        weights = named[packed].chunk(3)
        bias = named.get("qkv.bias", named.get("in_proj_bias"))
        biases = [None] * 3 if bias is None else bias.chunk(3)
    else:
        weights = tuple(named[f"{x}_proj.weight"] for x in "qkv")
        biases = [named.get(f"{x}_proj.bias") for x in "qkv"]
    rows = []
    for x, weight, bias in zip("qkv", weights, biases, strict=True):
        bias = named.get(f"{x}_bias", bias)
        full = weight if bias is None else torch.cat((weight, bias[:, None]), 1)
        row = full.unflatten(0, (-1, site.size))
        # Heads of a group share their key and value.
        rows.append(row.repeat_interleave(site.group, 0) if len(row) < len(site.held) else row)
    return rows
