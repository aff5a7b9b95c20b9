# SPDX-License-Identifier: Apache-2.0
"""EVAViT: separate q, k and v projections, biases on q and v, windows with live pads."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.models.eva import EVAViT
from kdfast.nn.attention import width_of
from kdfast.nn.heads import AttentionCall, HeadAxis
from kdfast.ops.geometry import Window
from kdfast.pruning.adapter import BlockFlops, HeadWeights, Site
from kdfast.pruning.effective import effective

HEAD_AXES = {
    "q_proj.weight": HeadAxis(0),
    "k_proj.weight": HeadAxis(0),
    "v_proj.weight": HeadAxis(0),
    "q_bias": HeadAxis(0),
    "v_bias": HeadAxis(0),
    "proj.weight": HeadAxis(1),
}
MLP_AXES = {
    "w1.weight": HeadAxis(0),
    "w1.bias": HeadAxis(0),
    "w2.weight": HeadAxis(0),
    "w2.bias": HeadAxis(0),
    "ffn_ln.weight": HeadAxis(0),
    "ffn_ln.bias": HeadAxis(0),
    "w3.weight": HeadAxis(1),
}


@dataclass(frozen=True)
class EvaAdapter:
    """ORION's backbone, which is built anew with fewer heads and hidden units."""

    family: str = "EVAViT"

    def fits(self, model: nn.Module) -> bool:
        return isinstance(model, EVAViT)

    def why_not(self, model: nn.Module, attentions: Sequence[Site]) -> str | None:
        return None

    def blocks(self, model: Any, attentions: Sequence[Site]) -> list[nn.Module]:
        return list(model.blocks)

    def attentions(self, model: Any) -> list[Site]:
        return [
            Site(
                f"blocks.{i}.attn",
                block.attn,
                HEAD_AXES,
                block.attn.head_dim,
                list(block.attn.heads),
                block.attn.proj,
            )
            for i, block in enumerate(model.blocks)
        ]

    def mlps(self, model: Any, attentions: Sequence[Site]) -> list[Site]:
        return [
            Site(
                f"blocks.{i}.mlp",
                block.mlp,
                MLP_AXES,
                1,
                list(range(width_of(block.mlp.w3))),
                block.mlp.w3,
                norm=block.mlp.ffn_ln,
            )
            for i, block in enumerate(model.blocks)
        ]

    def weights(self, site: Site) -> HeadWeights:
        attention: Any = site.module
        size = (len(site.held), site.size)

        def rows(name: str, bias: Tensor | None) -> Tensor:
            weight = effective(f"{site.name}.{name}", attention.get_submodule(name))[0]
            if bias is not None:
                weight = torch.cat((weight, bias.detach()[:, None]), 1)
            return weight.unflatten(0, size)

        return HeadWeights(
            rows("q_proj", attention.q_bias),
            rows("k_proj", None),
            rows("v_proj", attention.v_bias),
            site.weight().unflatten(1, size).transpose(0, 1),
        )

    def call(
        self, site: Site, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> AttentionCall:
        attention: Any = site.module
        _, grid, rope, *_ = args
        _, q, k, _ = output
        window = None
        if attention.window_size:
            # What a pad's value is does not matter for probabilities, only that it is a live key.
            pad = q.new_zeros(q.shape[1], q.shape[3])
            window = Window(grid, attention.window_size, pad)
        return AttentionCall(q, k, rope, window, None)

    def pads(self, site: Site, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        return None  # pads of windows are never computed

    def running(self, model: nn.Module, attentions: Sequence[Site]) -> AbstractContextManager[None]:
        return nullcontext()

    def empty(self, model: Any, heads: Sequence[Sequence[int]], widths: Sequence[int]) -> nn.Module:
        changed = {
            "with_cp": model.with_cp,
            "frozen": model.frozen,
            "heads": [list(kept) for kept in heads],
            "mlp_hidden": list(widths),
        }
        with torch.device("meta"):
            return EVAViT(**{**model.config, **changed})

    def refresh(self, student: Any) -> None:
        student.fill_rope()

    def image_size(self, model: Any) -> tuple[int, int]:
        side = model.config["img_size"] // model.patch_size * model.patch_size
        return side, side

    def flops(self, model: Any, image_size: tuple[int, int]) -> tuple[list[BlockFlops], int]:
        patch = model.patch_size
        if min(image_size) < patch or image_size[0] % patch or image_size[1] % patch:
            raise ValueError(
                f"EVAViT: image_size must be positive multiples of {patch}, got {image_size}"
            )
        grid = (image_size[0] // patch, image_size[1] // patch)
        blocks = [_block_flops(block, grid) for block in model.blocks]
        return blocks, 2 * grid[0] * grid[1] * model.patch_embed.proj.weight.numel()


def _block_flops(block: Any, grid: tuple[int, int]) -> BlockFlops:
    attn, size = block.attn, block.attn.window_size
    spans = [grid[0] * grid[1]]
    if size:
        window = Window(grid, size)
        spans = [size**2 - window.pads(span) for span in window.spans()]
    full = [size**2 or span for span in spans]
    own, width = _linear(attn), 4 * len(attn.heads) * attn.head_dim
    return BlockFlops(
        window=size,
        gemm=2 * sum(spans) * own,
        attention=width * sum(span**2 for span in spans),
        gemm_padded=2 * sum(full) * own,
        attention_padded=width * sum(span**2 for span in full),
        mlp=2 * sum(spans) * (_linear(block) - own),
    )


def _linear(module: nn.Module) -> int:
    """Weights of all linear layers: multiply-adds per token."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
