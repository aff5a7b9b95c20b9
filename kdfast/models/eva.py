# SPDX-License-Identifier: Apache-2.0
"""ORION's EVA-ViT backbone with any set of kept attention heads. See docs/use/eva.md.

B batch, K kept heads, N tokens, D head dim, C channels.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kdfast.models.axial_rope import AxialRope
from kdfast.models.eva_config import checked_config
from kdfast.models.eva_layers import Attention, Block, PatchEmbed
from kdfast.models.trace import AttentionTarget, BlockTarget, Trace
from kdfast.ops.geometry import Rope


class EVAViT(nn.Module):
    """Plain ViT with windowed and global blocks, rotary positions and SwiGLU, as ORION runs it.

    Parameter names, shapes and results are ORION's. Padded window tokens are never computed, any
    input size works, and every block holds only the heads named in ``heads``.

    Args:
        img_size: Side of the square image that ORION's rotary tables are stored for; an input may
            have any size that is a multiple of ``patch_size``.
        patch_size: Side of a patch.
        in_chans: Channels of the image.
        embed_dim: C.
        depth: Number of blocks.
        num_heads: Heads per block before pruning; D is always ``embed_dim // num_heads``.
        mlp_ratio: Hidden width of the MLP is ``int(embed_dim * mlp_ratio)``.
        qkv_bias: Whether queries and values have a bias; keys never have one.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0 at the first.
        norm_layer: Only None or ORION's own value: LayerNorm with eps 1e-6.
        act_layer: Only None or ORION's own value, GELU; the MLP is SwiGLU either way.
        use_abs_pos: Whether to add a learned position embedding, resized to the grid.
        use_rel_pos: Only False.
        rope: Only True.
        pt_hw_seq_len: Number of rotary positions that a side of the grid or window spans.
        intp_freq: Whether rotary positions are rescaled to that span.
        window_size: Side of the windows, in tokens.
        global_window_size: Only 0.
        window_block_indexes: Blocks that attend within windows.
        residual_block_indexes: Only empty.
        pretrain_img_size: Image side that the position embedding belongs to.
        pretrain_use_cls_token: Whether the position embedding has a leading CLS row, not used.
        out_feature: Only "last_feat".
        subln: Only False: no LayerNorm before the attention's output projection.
        flash_attn: No effect; the attention op chooses its kernel, all of them agree.
        with_cp: Recompute the blocks in the backward; only in training mode.
        frozen: No parameter requires grad and the model never leaves eval mode.
        heads: Original indices of the kept heads, ascending: a list per block, or one list for
            all; None keeps every head. A block may keep none: its attention is then the bias of
            ``proj``.
        mlp_hidden: Hidden units that the MLPs hold: a width per block, or one for all; None is the
            full width of ``mlp_ratio``.

    Raises:
        TypeError: ``heads`` or ``mlp_hidden`` are not integers.
        ValueError: A value does not fit; the message names the argument.
        NotImplementedError: An argument that ORION takes but does not use has another value.
    """

    pos_embed: nn.Parameter | None

    def __init__(
        self,
        *,
        img_size: int = 1024,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4 * 2 / 3,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
        act_layer: Callable[..., nn.Module] | None = None,
        use_abs_pos: bool = True,
        use_rel_pos: bool = False,
        rope: bool = True,
        pt_hw_seq_len: int = 16,
        intp_freq: bool = True,
        window_size: int = 0,
        global_window_size: int = 0,
        window_block_indexes: Sequence[int] = (),
        residual_block_indexes: Sequence[int] = (),
        pretrain_img_size: int = 224,
        pretrain_use_cls_token: bool = True,
        out_feature: str = "last_feat",
        subln: bool = False,
        flash_attn: bool = True,
        with_cp: bool = True,
        frozen: bool = False,
        heads: Sequence[Sequence[int]] | Sequence[int] | None = None,
        mlp_hidden: Sequence[int] | int | None = None,
    ) -> None:
        # Every argument, and nothing else: this must stay the first statement.
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.config = checked_config(arguments)
        self.frozen = frozen
        self.with_cp = with_cp
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.pretrain_use_cls_token = pretrain_use_cls_token
        self.pretrain_side = pretrain_img_size // patch_size
        self.window_size = window_size
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        rows = self.pretrain_side**2 + pretrain_use_cls_token
        pos = nn.init.normal_(torch.empty(1, rows, embed_dim), std=0.02)
        self.pos_embed = nn.Parameter(pos) if use_abs_pos else None
        head_dim = embed_dim // num_heads
        self.rope = AxialRope(head_dim, pt_hw_seq_len, intp_freq)
        self.blocks = nn.ModuleList()
        for i, kept in enumerate(self.config["heads"]):
            size = window_size if i in window_block_indexes else 0
            attn = Attention(embed_dim, kept, head_dim, qkv_bias, size)
            rate = drop_path_rate * i / max(depth - 1, 1)
            self.blocks.append(Block(attn, embed_dim, self.config["mlp_hidden"][i], rate))
        self.fill_rope()
        if frozen:
            self.requires_grad_(False)
            self.eval()

    @property
    def heads(self) -> list[list[int]]:
        """Original indices of the heads that every block holds."""
        return [list(block.attn.heads) for block in self._blocks()]

    @property
    def mlp_hidden(self) -> list[int]:
        """Hidden units that every block's MLP holds."""
        return [block.mlp.w1.out_features for block in self._blocks()]

    def train(self, mode: bool = True) -> "EVAViT":
        """Sets training mode; a frozen model stays in eval mode."""
        return super().train(mode and not self.frozen)

    def _apply(self, *args: Any, **kwargs: Any) -> "EVAViT":
        super()._apply(*args, **kwargs)
        self.fill_rope()
        return self

    def fill_rope(self) -> None:
        """Makes the rotary tables of the configured image size where the parameters are.

        A compiled graph reads them instead of computing them. Called by ``to`` and its kind;
        needed only after parameters were replaced by other means.
        """
        side = self.config["img_size"] // self.patch_size
        window = self.window_size
        grids = [(side, side)] + ([(window, window)] if window else [])
        self.rope.refill(grids, self.patch_embed.proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Features of the last block, the raw residual stream.

        Args:
            x: (B, in_chans, H, W) normalised images; H and W are multiples of the patch size.

        Returns:
            (B, C, H / patch, W / patch), channels-last in memory.

        Raises:
            TypeError: ``x`` is not floating.
            ValueError: The shape does not fit.
        """
        tokens, grid = self._embed(x)
        ropes = self._ropes(grid, tokens)
        for block, rope in zip(self._blocks(), ropes, strict=True):
            tokens = self._run(block, tokens, grid, rope, False, None)[0]
        return _image(tokens, grid)

    def trace(
        self,
        x: Tensor,
        *,
        features: Collection[int] = (),
        qk: bool = False,
        target: AttentionTarget | None = None,
    ) -> Trace:
        """The forward together with what a distillation loss needs, gradients included.

        Args:
            x: As in ``forward``.
            features: Blocks after which to keep the residual stream.
            qk: Whether to keep every block's queries and keys.
            target: Teacher attention; each block that has one runs ``attention_distill`` in place
                of ``pruned_attention`` and gives its loss.

        Raises:
            TypeError: ``x`` is not floating.
            ValueError: The shape, a feature index or the target does not fit.
        """
        depth = len(self.blocks)
        if not all(0 <= i < depth for i in features):
            raise ValueError(f"trace: features must be in [0, {depth}), got {sorted(features)}")
        if target is not None:
            target.check(depth)
        tokens, grid = self._embed(x)
        ropes = self._ropes(grid, tokens)
        kept: dict[int, Tensor] = {}
        pairs: list[tuple[Tensor, Tensor] | None] = []
        losses: dict[int, Tensor] = {}
        for i, (block, rope) in enumerate(zip(self._blocks(), ropes, strict=True)):
            goal = None if target is None else target.block(i)
            tokens, q, k, loss = self._run(block, tokens, grid, rope, qk, goal)
            if i in features:
                kept[i] = tokens
            pairs.append(None if q is None or k is None else (q, k))
            if loss is not None:
                losses[i] = loss
        return Trace(_image(tokens, grid), kept, pairs, losses)

    def _blocks(self) -> list[Block]:
        return [cast(Block, block) for block in self.blocks]

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens (B, N, C), contiguous, with their positions; and the grid."""
        patch, chans = self.patch_size, self.in_chans
        if not x.is_floating_point():
            raise TypeError(f"EVAViT: x must be floating, got {x.dtype}")
        fits = x.dim() == 4 and x.shape[1] == chans and min(x.shape[2:]) >= patch
        if not fits or x.shape[2] % patch or x.shape[3] % patch:
            raise ValueError(
                f"EVAViT: x must be (B, {chans}, H, W) with H and W positive multiples of {patch}, "
                f"got {tuple(x.shape)}"
            )
        image = self.patch_embed(x)
        grid = (image.shape[2], image.shape[3])
        tokens = image.flatten(2).transpose(1, 2).contiguous()
        if self.pos_embed is not None:
            tokens = tokens + self._positions(self.pos_embed, grid).to(tokens.dtype)
        return tokens, grid

    def _positions(self, pos: Tensor, grid: tuple[int, int]) -> Tensor:
        """Position embedding (1, N, C) of the grid."""
        side, dtype = self.pretrain_side, pos.dtype
        if self.pretrain_use_cls_token:
            pos = pos[:, 1:]
        if grid == (side, side):
            return pos
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        image = pos.reshape(1, side, side, -1).permute(0, 3, 1, 2).to(wide)
        image = F.interpolate(image, size=grid, mode="bicubic", align_corners=False)
        return image.flatten(2).transpose(1, 2).to(dtype)

    def _ropes(self, grid: tuple[int, int], like: Tensor) -> list[Rope]:
        """Rotary tables of every block; blocks of one kind share theirs."""
        window = (self.window_size, self.window_size)
        shapes = [window if block.attn.window_size else grid for block in self._blocks()]
        tables = {shape: self.rope(shape, like) for shape in set(shapes)}
        return [tables[shape] for shape in shapes]

    def _run(
        self,
        block: Block,
        tokens: Tensor,
        grid: tuple[int, int],
        rope: Rope,
        qk: bool,
        target: BlockTarget | None,
    ) -> Any:
        """``Block.forward``, recomputed in the backward where the model was built for that."""
        if self.with_cp and self.training and torch.is_grad_enabled():
            return checkpoint(block, tokens, grid, rope, qk, target, use_reentrant=False)
        return block(tokens, grid, rope, qk, target)


def _image(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    return tokens.view(tokens.shape[0], *grid, -1).permute(0, 3, 1, 2)


def eva_vit_l_orion(**overrides: Any) -> EVAViT:
    """The backbone of every ORION config: 303,388,608 parameters with all 16 heads.

    Args:
        **overrides: Arguments of ``EVAViT`` to change. Windows follow the pattern window, window,
            global for whatever ``depth`` is given.
    """
    depth = overrides.get("depth", 24)
    config: dict[str, Any] = {
        "img_size": 640,
        "patch_size": 16,
        "in_chans": 3,
        "embed_dim": 1024,
        "depth": depth,
        "num_heads": 16,
        "mlp_ratio": 4 * 2 / 3,
        "window_size": 16,
        "window_block_indexes": [i for i in range(depth) if i % 3 != 2],
        "qkv_bias": True,
        "drop_path_rate": 0.3,
        "flash_attn": True,
        "with_cp": True,
        "frozen": False,
    }
    return EVAViT(**{**config, **overrides})
