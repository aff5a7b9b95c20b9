# SPDX-License-Identifier: Apache-2.0
"""What scoring, surgery and accounting have to know about a model family.

To support another family, implement ``Adapter`` and add it to ``ADAPTERS``.
B batch, H heads, N tokens, D head dim, C channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from kdfast.models.eva import EVAViT
from kdfast.ops.geometry import Rope, Window


class HeadAxis(NamedTuple):
    """Where a tensor of the attention holds its heads.

    Attributes:
        dim: The dimension with H blocks of D.
        parts: How many times the H blocks repeat along ``dim``: 3 for a fused qkv.
    """

    dim: int
    parts: int = 1


class HeadWeights(NamedTuple):
    """The slices of every head of one attention; C' is C, or C + 1 with a bias as last column.

    Attributes:
        q: (H, D, C').
        k: (H, D, C').
        v: (H, D, C').
        proj: (H, C, D), the columns of the output projection.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    proj: Tensor


class AttentionCall(NamedTuple):
    """What one attention computed its probabilities from.

    Attributes:
        q: (B, H, N, D) before the rotation.
        k: (B, H, N, D) before the rotation.
        rope: Rotary tables of the call.
        window: Windows of the call.
        scale: Factor of the logits; D ** -0.5 if None.
    """

    q: Tensor
    k: Tensor
    rope: Rope | None
    window: Window | None
    scale: float | None


@dataclass(frozen=True)
class BlockSpec:
    """A block as the accounting sees it.

    Attributes:
        block: The module that holds everything of the block.
        attention: The attention inside it.
        heads: Number of heads that it holds.
        head_dim: D.
        spans: Real tokens of each window; one entry, N, for global attention.
        window: Side of the windows, in tokens; 0 for global attention.
    """

    block: nn.Module
    attention: nn.Module
    heads: int
    head_dim: int
    spans: list[int]
    window: int


@dataclass(frozen=True)
class ModelSpec:
    """A model as the accounting sees it.

    Attributes:
        blocks: In the order of execution.
        embed_flops: FLOPs before the first block.
    """

    blocks: list[BlockSpec]
    embed_flops: int


class Adapter(Protocol):
    """Everything that differs between model families.

    Attributes:
        family: Name of the model class, for messages.
        axes: For each tensor of an attention that holds heads, by its name there, where they lie.
            Tensors that are absent from a model are skipped.
    """

    @property
    def family(self) -> str: ...

    @property
    def axes(self) -> Mapping[str, HeadAxis]: ...

    def fits(self, model: nn.Module) -> bool:
        """Whether the model is of this family."""

    def attentions(self, model: nn.Module) -> dict[str, nn.Module]:
        """The attention of every block by its name in the state dict, in the order of execution."""

    def heads(self, model: nn.Module) -> list[list[int]]:
        """Original indices of the heads that every block holds."""

    def head_dim(self, model: nn.Module) -> int:
        """D."""

    def projection(self, attention: nn.Module) -> nn.Module:
        """The module whose input (B, N, H * D) is the heads' outputs side by side."""

    def weights(self, attention: nn.Module) -> HeadWeights:
        """The heads' slices, detached."""

    def call(self, attention: nn.Module, args: tuple[Any, ...], output: Any) -> AttentionCall:
        """Reads a forward call of ``attention`` from its arguments and its output."""

    def empty(self, model: nn.Module, heads: Sequence[Sequence[int]]) -> nn.Module:
        """The same architecture with these original heads per block, on the meta device."""

    def refresh(self, model: nn.Module) -> None:
        """Rebuilds what a model derives from its parameters, after they were put in place."""

    def image_size(self, model: nn.Module) -> tuple[int, int]:
        """(height, width) that the model was configured for."""

    def spec(self, model: nn.Module, image_size: tuple[int, int]) -> ModelSpec:
        """Blocks and token counts for one image; ValueError if the size does not fit."""


@dataclass(frozen=True)
class EvaAdapter:
    """EVAViT: separate q, k and v projections, biases on q and v, windows with live pads."""

    family: str = "EVAViT"
    axes: Mapping[str, HeadAxis] = field(
        default_factory=lambda: {
            "q_proj.weight": HeadAxis(0),
            "k_proj.weight": HeadAxis(0),
            "v_proj.weight": HeadAxis(0),
            "q_bias": HeadAxis(0),
            "v_bias": HeadAxis(0),
            "proj.weight": HeadAxis(1),
        }
    )

    def fits(self, model: nn.Module) -> bool:
        return isinstance(model, EVAViT)

    def attentions(self, model: Any) -> dict[str, nn.Module]:
        return {f"blocks.{i}.attn": block.attn for i, block in enumerate(model.blocks)}

    def heads(self, model: Any) -> list[list[int]]:
        return model.heads

    def head_dim(self, model: Any) -> int:
        return model.blocks[0].attn.head_dim

    def projection(self, attention: Any) -> nn.Module:
        return attention.proj

    def weights(self, attention: Any) -> HeadWeights:
        def rows(proj: nn.Linear, bias: Tensor | None) -> Tensor:
            weight = proj.weight.detach()
            if bias is not None:
                weight = torch.cat((weight, bias.detach()[:, None]), 1)
            return weight.unflatten(0, (-1, attention.head_dim))

        columns = attention.proj.weight.detach().unflatten(1, (-1, attention.head_dim))
        return HeadWeights(
            rows(attention.q_proj, attention.q_bias),
            rows(attention.k_proj, None),
            rows(attention.v_proj, attention.v_bias),
            columns.transpose(0, 1),
        )

    def call(self, attention: Any, args: tuple[Any, ...], output: Any) -> AttentionCall:
        _, grid, rope, *_ = args
        _, q, k, _ = output
        window = None
        if attention.window_size:
            # What a pad's value is does not matter for probabilities, only that it is a live key.
            pad = q.new_zeros(q.shape[1], q.shape[3])
            window = Window(grid, attention.window_size, pad)
        return AttentionCall(q, k, rope, window, None)

    def empty(self, model: Any, heads: Sequence[Sequence[int]]) -> nn.Module:
        flags = {"with_cp": model.with_cp, "frozen": model.frozen}
        with torch.device("meta"):
            return EVAViT(**{**model.config, **flags, "heads": [list(kept) for kept in heads]})

    def refresh(self, model: Any) -> None:
        model.fill_rope()

    def image_size(self, model: Any) -> tuple[int, int]:
        side = model.config["img_size"] // model.patch_size * model.patch_size
        return side, side

    def spec(self, model: Any, image_size: tuple[int, int]) -> ModelSpec:
        patch = model.patch_size
        if min(image_size) < patch or image_size[0] % patch or image_size[1] % patch:
            raise ValueError(
                f"EVAViT: image_size must be positive multiples of {patch}, got {image_size}"
            )
        grid = (image_size[0] // patch, image_size[1] // patch)
        blocks = []
        for block in model.blocks:
            attn = block.attn
            size, spans = attn.window_size, [grid[0] * grid[1]]
            if size:
                window = Window(grid, size)
                spans = [size**2 - window.pads(span) for span in window.spans()]
            blocks.append(BlockSpec(block, attn, len(attn.heads), attn.head_dim, spans, size))
        weight = model.patch_embed.proj.weight
        return ModelSpec(blocks, 2 * grid[0] * grid[1] * weight.numel())


ADAPTERS: tuple[Adapter, ...] = (EvaAdapter(),)


def adapter_of(function: str, model: nn.Module) -> Adapter:
    """The adapter of the model's family.

    Args:
        function: Name of the caller, for the message.
        model: Any module.

    Raises:
        TypeError: No adapter knows the model; the message names its class.
    """
    for adapter in ADAPTERS:
        if adapter.fits(model):
            return adapter
    known = ", ".join(adapter.family for adapter in ADAPTERS)
    got = f"{type(model).__module__}.{type(model).__qualname__}"
    raise TypeError(f"{function}: model must be one of {known}, got {got}")
