# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's vision transformers, whose attentions are cut in place of being replaced.

Their forward takes the number of heads from the width of the projections, so nothing else changes;
``attn_implementation`` (perhaps "kdfast") stays what it was. H heads, N tokens, D head dim.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from kdfast.nn.attention import height_of, qualified_name
from kdfast.nn.heads import AttentionCall, HeadAxis
from kdfast.ops._no_heads import no_heads
from kdfast.ops.geometry import Rope
from kdfast.pruning.adapter import Site
from kdfast.pruning.site_adapter import SiteAdapter

# Classes whose forward was read: separate q, k and v projections, reshaped by the head dim.
ATTENTIONS = {
    f"transformers.models.{path}Attention"
    for path in (
        "vit.modeling_vit.ViT",
        "deit.modeling_deit.DeiT",
        "dinov2.modeling_dinov2.Dinov2",
        "dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegisters",
        "dinov3_vit.modeling_dinov3_vit.DINOv3ViT",
        "clip.modeling_clip.CLIP",
        "siglip.modeling_siglip.Siglip",
        "siglip2.modeling_siglip2.Siglip2",
        "ijepa.modeling_ijepa.IJepa",
        "vit_mae.modeling_vit_mae.ViTMAE",
    )
}


class NoHeads(nn.Module):
    """An attention without heads: the bias of its output projection."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(original.__dict__)
        self.source = qualified_name(original)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """(B, N, C) to (B, N, C), and no attention weights."""
        out = _projection(self)
        context = hidden_states.new_zeros(*hidden_states.shape[:-1], 0)
        return out(no_heads(self, context, hidden_states)), None


def _projection(attention: nn.Module) -> Any:
    return attention._modules.get("o_proj") or attention._modules["out_proj"]


def _axes(attention: nn.Module) -> dict[str, HeadAxis]:
    axes = {f"{x}_proj.{leaf}": HeadAxis(0) for x in "qkv" for leaf in ("weight", "bias")}
    last = "o_proj" if "o_proj" in attention._modules else "out_proj"
    return {**axes, f"{last}.weight": HeadAxis(1)}


class HfAdapter(SiteAdapter):
    """ViT, DeiT, DINOv2, DINOv3, I-JEPA, ViT-MAE and the vision towers of CLIP and SigLIP."""

    family = "Hugging Face ViT"

    def fits(self, model: nn.Module) -> bool:
        bases = {f"{base.__module__}.{base.__name__}" for base in type(model).__mro__}
        return "transformers.modeling_utils.PreTrainedModel" in bases

    def why_not(self, model: nn.Module, attentions: Sequence[Site]) -> str | None:
        if not attentions:
            found = {qualified_name(m) for m in model.modules() if "Attention" in type(m).__name__}
            return f"none of its attentions is of a known class, got {sorted(found) or 'none'}"
        if "text_model" in model._modules:
            return "it has a text model as well; give its vision model"
        return None

    def attentions(self, model: nn.Module) -> list[Site]:
        sites = []
        for name, module in model.named_modules():
            source = module.source if isinstance(module, NoHeads) else qualified_name(module)
            if source not in ATTENTIONS:
                continue
            attention: Any = module
            count = height_of(attention.q_proj) // attention.head_dim
            held = list(getattr(attention, "kept_heads", range(count)))
            axes = _axes(module)
            sites.append(Site(name, module, axes, attention.head_dim, held, _projection(module)))
        return sites

    def call(
        self, site: Site, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> AttentionCall:
        attention: Any = site.module
        hidden = args[0] if args else kwargs["hidden_states"]
        heads = (len(site.held), site.size)
        q, k = (
            layer(hidden).unflatten(-1, heads).transpose(1, 2)
            for layer in (attention.q_proj, attention.k_proj)
        )
        rope = None
        positions = kwargs.get("position_embeddings")
        if positions is not None:
            cos, sin = (table.reshape(-1, table.shape[-1]) for table in positions)
            rope = Rope(cos, sin, q.shape[2] - len(cos), "half")
        scale = getattr(attention, "scaling", None) or getattr(attention, "scale", None)
        return AttentionCall(q, k, rope, None, scale)

    def set_heads(self, model: nn.Module, site: Site, kept: list[int]) -> None:
        super().set_heads(model, site, kept)
        if not kept and not isinstance(site.module, NoHeads):
            path, _, leaf = site.name.rpartition(".")
            model.get_submodule(path)._modules[leaf] = NoHeads(site.module)

    def image_size(self, model: Any) -> tuple[int, int]:
        return self.as_size(getattr(model.config, "image_size", None))
