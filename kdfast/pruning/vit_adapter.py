# SPDX-License-Identifier: Apache-2.0
"""timm, torchvision, and every model whose attentions have a fused stand-in with head axes.

A pruned model holds those stand-ins (``kdfast.nn.FusedAttention``), which take any number of heads.
H heads, D head dim, C channels.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from kdfast.nn.attention import FusedAttention, qualified_name
from kdfast.nn.heads import AttentionCall
from kdfast.nn.table import FUSED, unfused_reason
from kdfast.pruning.adapter import Site
from kdfast.pruning.site_adapter import SiteAdapter

# torch's own module is used in many ways; in this block it is plain self-attention.
MULTIHEAD = "torch.nn.modules.activation.MultiheadAttention"
TORCHVISION_BLOCK = "torchvision.models.vision_transformer.EncoderBlock"


def stand_in(module: nn.Module, parent: nn.Module | None) -> FusedAttention | str | None:
    """The fused stand-in of an attention, the reason why there is none, or None for the rest."""
    fused = isinstance(module, FusedAttention)
    source = module.source if isinstance(module, FusedAttention) else qualified_name(module)
    if not fused and source not in FUSED:
        reason = unfused_reason(module)
        return f"{source}: {reason}" if reason else None
    kind = type(module) if isinstance(module, FusedAttention) else FUSED[source]
    if kind.unprunable:
        return f"{source}: {kind.unprunable}"
    if parent is None:
        return f"{source}: it is the model itself, which nothing holds"
    if source == MULTIHEAD and qualified_name(parent) != TORCHVISION_BLOCK:
        return f"{source}: only torchvision's blocks are known to use it for self-attention"
    if isinstance(module, FusedAttention):
        return module
    if reason := kind.why_not(module):
        return f"{source}: {reason}"
    return kind.adopt(module)


def stand_ins(model: nn.Module) -> Iterator[tuple[str, FusedAttention | str]]:
    """Every attention of a model by name, or why it cannot lose heads."""
    for name, module in model.named_modules():
        parent = model.get_submodule(name.rpartition(".")[0]) if name else None
        found = stand_in(module, parent)
        if found is not None:
            yield name, found


class VitAdapter(SiteAdapter):
    """Models of timm and torchvision."""

    family = "timm or torchvision ViT"

    def fits(self, model: nn.Module) -> bool:
        # Stops at the first: each attention costs a stand-in to ask.
        return any(isinstance(found, FusedAttention) for _, found in stand_ins(model))

    def attentions(self, model: nn.Module) -> list[Site]:
        sites = []
        for name, fused in stand_ins(model):
            if isinstance(fused, str):
                continue
            norm = fused._modules.get("norm") if "norm.weight" in fused.axes else None
            sites.append(
                Site(
                    name,
                    fused,
                    fused.axes,
                    fused.slice_dim(),
                    list(fused.heads),
                    fused.projection(),
                    fused.kv_group,
                    None if isinstance(norm, nn.Identity) else norm,
                )
            )
        return sites

    def call(
        self, site: Site, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> AttentionCall:
        attention: Any = site.module
        # A mask of tokens is left out: entropy is that of attention among all of them.
        call: AttentionCall = attention.read(args, kwargs)
        return call

    def pads(self, site: Site, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        attention: Any = site.module
        x = args[0] if args else kwargs.get("x")
        known = isinstance(attention, FusedAttention) and isinstance(x, Tensor)
        return attention.pads(x) if known else None

    @contextmanager
    def running(self, model: nn.Module, attentions: Sequence[Site]) -> Iterator[None]:
        """Runs the stand-ins inside: not every original calls the modules that are watched."""
        replaced: list[tuple[nn.Module, str, Any]] = []
        try:
            for site in attentions:
                path, _, leaf = site.name.rpartition(".")
                parent = model.get_submodule(path)
                replaced.append((parent, leaf, parent._modules[leaf]))
                parent._modules[leaf] = site.module
            yield
        finally:
            for parent, leaf, module in replaced:
                parent._modules[leaf] = module

    def set_heads(self, model: nn.Module, site: Site, kept: list[int]) -> None:
        path, _, leaf = site.name.rpartition(".")
        attention: Any = site.module
        attention.keep_heads(kept)
        model.get_submodule(path)._modules[leaf] = attention

    def image_size(self, model: Any) -> tuple[int, int]:
        embed = getattr(model, "patch_embed", None)
        config = getattr(model, "pretrained_cfg", None) or {}
        size = getattr(embed, "img_size", None) or getattr(model, "image_size", None)
        return self.as_size(size or config.get("input_size", ())[1:] or None)
