# SPDX-License-Identifier: Apache-2.0
"""Copies of models without memory, narrower layers, and MLPs that can lose hidden units."""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kdfast.nn.attention import FusedAttention, qualified_name, width_of
from kdfast.nn.heads import HeadAxis, find_tensor, resize
from kdfast.pruning.adapter import BlockFlops, Site

_PLAIN = {
    "fc1.weight": HeadAxis(0),
    "fc1.bias": HeadAxis(0),
    "norm.weight": HeadAxis(0),
    "norm.bias": HeadAxis(0),
    "fc2.weight": HeadAxis(1),
}
_PACKED = {**_PLAIN, "fc1.weight": HeadAxis(0, parts=2), "fc1.bias": HeadAxis(0, parts=2)}
_SPLIT = {
    "fc1_g.weight": HeadAxis(0),
    "fc1_g.bias": HeadAxis(0),
    "fc1_x.weight": HeadAxis(0),
    "fc1_x.bias": HeadAxis(0),
    "norm.weight": HeadAxis(0),
    "norm.bias": HeadAxis(0),
    "fc2.weight": HeadAxis(1),
}
_SEQUENTIAL = {"0.weight": HeadAxis(0), "0.bias": HeadAxis(0), "3.weight": HeadAxis(1)}
_GATED = {
    "gate_proj.weight": HeadAxis(0),
    "gate_proj.bias": HeadAxis(0),
    "up_proj.weight": HeadAxis(0),
    "up_proj.bias": HeadAxis(0),
    "down_proj.weight": HeadAxis(1),
}
# Axes and last projection of every MLP class whose hidden units can be removed.
MLPS: dict[str, tuple[Mapping[str, HeadAxis], str]] = {
    "timm.layers.mlp.Mlp": (_PLAIN, "fc2"),
    "timm.layers.mlp.GluMlp": (_PACKED, "fc2"),
    "timm.layers.mlp.SwiGLU": (_SPLIT, "fc2"),
    "torchvision.models.vision_transformer.MLPBlock": (_SEQUENTIAL, "3"),
    **{
        f"transformers.models.{path}MLP": (_PLAIN, "fc2")
        for path in (
            "vit.modeling_vit.ViT",
            "deit.modeling_deit.DeiT",
            "dinov2.modeling_dinov2.Dinov2",
            "dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegisters",
            "clip.modeling_clip.CLIP",
            "siglip.modeling_siglip.Siglip",
            "siglip2.modeling_siglip2.Siglip2",
            "ijepa.modeling_ijepa.IJepa",
            "vit_mae.modeling_vit_mae.ViTMAE",
        )
    },
    "transformers.models.dinov2.modeling_dinov2.Dinov2SwiGLUFFN": (_GATED, "down_proj"),
    "transformers.models.dinov3_vit.modeling_dinov3_vit.DINOv3ViTMLP": (_GATED, "down_proj"),
    "transformers.models.dinov3_vit.modeling_dinov3_vit.DINOv3ViTGatedMLP": (_GATED, "down_proj"),
}


def mlp_sites(model: nn.Module, attentions: Sequence[Site]) -> list[Site]:
    """The MLP beside each attention; empty unless every attention has one that can be pruned."""
    sites = []
    for attention in attentions:
        prefix = attention.name.rpartition(".")[0]
        block = model.get_submodule(prefix)
        found = [
            site
            for leaf, module in block.named_children()
            if (site := _mlp_site(f"{prefix}.{leaf}".lstrip("."), module)) is not None
        ]
        if len(found) != 1:
            return []
        sites += found
    return sites


def _mlp_site(name: str, module: nn.Module) -> Site | None:
    if qualified_name(module) not in MLPS:
        return None
    axes, last = MLPS[qualified_name(module)]
    projection: Any = module.get_submodule(last)
    norm: nn.Module | None = getattr(module, "norm", None)
    if not isinstance(projection, nn.Linear) and not hasattr(projection, "base_layer"):
        return None
    if isinstance(norm, nn.Identity):
        norm = None
    if norm is not None and not hasattr(norm, "normalized_shape"):
        return None
    return Site(name, module, axes, 1, list(range(width_of(projection))), projection, norm=norm)


def meta_copy(model: nn.Module) -> Any:
    """A deep copy whose parameters and buffers have no memory; gradients are left out."""
    caches = (module.__dict__.get("attention_bias_cache") for module in model.modules())
    # timm computes anew what it keeps there, in tensors that may have a graph: no copy of these.
    memo: dict[int, Any] = {id(cache): {} for cache in caches if cache is not None}
    for tensor in model.parameters():
        memo[id(tensor)] = nn.Parameter(tensor.detach().to("meta"), tensor.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    for module in model.modules():
        for value in module.__dict__.values():
            # Hooks of torch.nn.utils keep a weight that they computed, which cannot be copied.
            if isinstance(value, Tensor) and id(value) not in memo:
                memo[id(value)] = value.detach().to("meta")
    return copy.deepcopy(model, memo)


@torch.no_grad()
def narrow(site: Site, count: int) -> None:
    """Resizes the site's tensors to ``count`` slices; their values are undefined."""
    if count == len(site.held):
        return
    for name, axis in site.axes.items():
        slot = find_tensor(site.module, name)
        if slot is not None:
            shape = list(slot.tensor.shape)
            shape[axis.dim] = shape[axis.dim] // len(site.held) * count
            resize(slot, slot.tensor.new_empty(shape))


def counted_flops(
    family: str, model: nn.Module, sites: Sequence[Site], image_size: tuple[int, int]
) -> tuple[list[BlockFlops], int]:
    """FLOPs of every block and of the rest, from one forward pass on the meta device.

    FLOPs of a block follow from the shapes of its layers and the number of tokens that they see;
    the rest is torch's count for the whole model minus the blocks.

    Args:
        family: Name of the family, for messages.
        model: A model on the meta device, in which ``sites`` run as modules of their own.
        sites: The attentions of the model.
        image_size: (height, width).

    Raises:
        ValueError: The model does not run on such an image.
    """
    tokens: dict[str, tuple[int, int]] = {}
    linears: dict[str, int] = {site.name: 0 for site in sites}
    handles = []
    for site in sites:

        def see(module: nn.Module, args: Any, kwargs: Any, name: str = site.name) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            tokens[name] = hidden.shape[:2]
            if isinstance(module, FusedAttention):
                tokens[name] = module.sequences(hidden)

        handles.append(site.module.register_forward_pre_hook(see, with_kwargs=True))
        # All other linear layers of the attention's block count as its MLP.
        prefix = site.name.rpartition(".")[0]
        inside = set(site.module.modules())
        for layer in model.get_submodule(prefix).modules():
            if isinstance(layer, nn.Linear) and layer not in inside:

                def add(m: Any, _: Any, out: Tensor, name: str = site.name) -> None:
                    linears[name] += 2 * out.numel() * m.in_features

                handles.append(layer.register_forward_hook(add))
    # The first convolution, which makes the patches, tells the channels of an image.
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    like = next(model.parameters())
    channels = 3 if first is None else first.in_channels
    image = torch.empty((1, channels, *image_size), dtype=like.dtype, device="meta")
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(image)
    except (RuntimeError, AssertionError, ValueError, TypeError, NotImplementedError) as error:
        raise ValueError(
            f"{family}: the model must run on an image of {image_size} on the meta device, "
            f"got {type(error).__name__}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    blocks = [_block_flops(site, tokens[site.name], linears[site.name]) for site in sites]
    inside_flops = sum(block.gemm + block.attention + block.mlp for block in blocks)
    return blocks, counter.get_total_flops() - inside_flops


def _block_flops(site: Site, shape: tuple[int, int], mlp: int) -> BlockFlops:
    sequences, tokens = shape
    matrices = sum(t.numel() for _, t in site.tensors().values() if t.dim() == 2)
    gemm = 2 * sequences * tokens * matrices
    attention = 4 * len(site.held) * site.size * sequences * tokens**2
    window = math.isqrt(tokens) if sequences > 1 else 0
    return BlockFlops(window, gemm, attention, gemm, attention, mlp)
