# SPDX-License-Identifier: Apache-2.0
"""Blocks of shifted windows that run fused in inference, and where each keeps its parts.

B batch, h, w height and width of a map, G windows of an image, N tokens of a window, C channels.
"""

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

from kdfast.nn.attention import FusedAttention
from kdfast.nn.block import Branches, Mlp, Reader, WindowOrder, inert, window_order
from kdfast.nn.timm_bias import TimmSwinAttention
from kdfast.nn.torchvision_swin import TorchvisionSwinAttention
from kdfast.ops._layer_norm import is_layer_norm
from kdfast.ops._packed import Layer, hooked, is_plain_linear

# What a report adds to what these blocks do; timm's know the size of their map.
CONDITIONS = {
    "torchvision.models.swin_transformer.SwinTransformerBlock": " where windows fill the map"
}
MlpOf = Callable[[nn.Module, Tensor | None], Mlp | None]


def readers(read_mlp: MlpOf) -> dict[str, Reader]:
    """Those of blocks by qualified name, given what reads their MLPs."""

    def timm_swin(block: Any, x: Tensor | None) -> Branches | None:
        """``timm.models.swin_transformer.SwinTransformerBlock``."""
        mask = block.attn_mask
        # A mask that follows the input is made by the block's own code.
        if x is None and unfilled(block):
            return None
        if block.dynamic_mask or not inert(block.drop_path1, block.drop_path2):
            return None
        order = _order(x, block.window_size, block.shift_size)
        if order is not None and mask is not None and len(mask) * order.tokens != len(order.places):
            return None  # of another size of image, which the block's own code refuses

        def bias(y: Tensor) -> Tensor:
            made: Tensor = block.attn.windows_bias(y, mask)
            return made

        return _branches(block, TimmSwinAttention, bias, order, x)

    def torchvision_swin(block: Any, x: Tensor | None) -> Branches | None:
        """``torchvision.models.swin_transformer.SwinTransformerBlock``."""
        attn = block.attn
        if type(attn) is not TorchvisionSwinAttention or not inert(block.stochastic_depth):
            return None
        if attn.training and attn.dropout:
            return None
        shift = (0, 0) if x is None or x.dim() != 4 else attn.grid(x)[1]
        order = _order(x, attn.window_size, shift)

        def bias(_: Tensor) -> Tensor:
            return attn.windows_bias(cast(Tensor, x))

        return _branches(block, TorchvisionSwinAttention, bias, order, x)

    def _branches(
        block: Any,
        kind: type[FusedAttention],
        bias: Callable[[Tensor], Tensor],
        order: WindowOrder | None,
        x: Tensor | None,
    ) -> Branches | None:
        attn: Any = block.attn
        norms = block.norm1, block.norm2
        if type(attn) is not kind or not attn.heads or hooked(attn) or attn.own_code():
            return None
        if not inert(*_drops(attn)) or not is_plain_linear(attn.proj):
            return None
        # Norms see windows and not the map: they must be of single tokens, and not be watched.
        if not all(map(is_layer_norm, norms)) or (x is not None and order is None):
            return None
        mlp = read_mlp(block.mlp, None)
        if mlp is None:
            return None
        plain = is_plain_linear(attn.qkv)
        project = Layer((attn.qkv.weight,), (attn.qkv.bias,)) if plain else None

        def attend(y: Tensor) -> Tensor:
            packed = attn.qkv(y) if project is None else y
            out: Tensor = attn.attend(attn.split(packed)._replace(bias=bias(packed)))
            return out

        out = Layer((attn.proj.weight,), (attn.proj.bias,))
        return Branches(norms[0], project, attend, out, norms[1], mlp, order)

    return {
        "timm.models.swin_transformer.SwinTransformerBlock": timm_swin,
        "torchvision.models.swin_transformer.SwinTransformerBlock": torchvision_swin,
    }


def unfilled(block: Any) -> str | None:
    """Why a block of timm's runs its own code on maps of the size that it was made for, or None."""
    if not hasattr(block, "input_resolution") or not hasattr(block, "window_size"):
        return None
    (h, w), (high, wide) = block.input_resolution, block.window_size
    if h % high == 0 and w % wide == 0:
        return None
    return f"windows of {high} x {wide} do not fill its map of {h} x {w}"


def _drops(attn: Any) -> list[nn.Module]:
    drop = attn._modules.get("proj_drop")
    return [] if drop is None else [drop]


def _order(x: Tensor | None, window: tuple[int, int], shift: tuple[int, int]) -> WindowOrder | None:
    """That of a map (B, h, w, C), None where there is none."""
    if x is None or x.dim() != 4:
        return None
    high, wide = window
    down, right = shift
    return window_order((x.shape[1], x.shape[2]), (high, wide), (down, right))
