# SPDX-License-Identifier: Apache-2.0
"""ORION's EVA-ViT with pruned heads and MLPs, for ORION's own code: PyTorch alone, no kdfast.

`kdfast.export_orion` puts this file beside the weights that it writes. In ORION, copy it to
``mmcv/models/backbones/``, add to the ``__init__.py`` there

    from .kdfast_orion import PrunedEVAViT, register
    register(BACKBONES)

(with ``from ..builder import BACKBONES``), and set in the config

    img_backbone=dict(type='PrunedEVAViT', pruned='out.pth', with_cp=True)
    load_from='out.pth'

Flash-attention is not needed: `attention` below is PyTorch's own. `PETRAttention` takes the place
of the class of that name which asks for it in ORION's and StreamPETR's heads, with the same
parameters.

B images, K kept heads, N tokens, D channels of a head, C channels.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Softmax attention of (B, K, N, D) with keys and values (B, K, M, D)."""
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)


def rotary_table(side: tuple[int, int], dim: int, span: int) -> Tensor:
    """Angles (h * w, D): rows turn the first half of the channels, columns the second."""
    half = dim // 2
    rates = 10000.0 ** -(torch.arange(0, half, 2, dtype=torch.float64) / half)
    rates = rates.repeat_interleave(2)
    rows, columns = (torch.arange(n, dtype=torch.float64) * span / n for n in side)
    grid = side + (half,)
    by_row = (rows[:, None] * rates)[:, None].expand(grid)
    by_column = (columns[:, None] * rates)[None].expand(grid)
    return torch.cat((by_row, by_column), -1).flatten(0, 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbouring pairs of channels turned by the angles of a table."""
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack((-odd, even), -1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)


class Attention(nn.Module):
    """The kept heads of one block."""

    def __init__(self, dim: int, heads: int, head_dim: int, bias: bool) -> None:
        super().__init__()
        self.heads, width = heads, heads * head_dim
        self.q_proj = nn.Linear(dim, width, bias=False)
        self.k_proj = nn.Linear(dim, width, bias=False)
        self.v_proj = nn.Linear(dim, width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.v_bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.proj = nn.Linear(width, dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        if not self.heads:
            return self.proj.bias.to(x.dtype).expand_as(x)
        q = F.linear(x, self.q_proj.weight, self.q_bias)
        k = self.k_proj(x)
        v = F.linear(x, self.v_proj.weight, self.v_bias)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        out = attention(rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype), v)
        return self.proj(out.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """The MLP of one block."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(dim, hidden), nn.Linear(dim, hidden)
        self.ffn_ln = nn.LayerNorm(hidden, eps=1e-6)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        if not self.w1.out_features:
            return self.w3.bias.to(x.dtype).expand_as(x)
        return self.w3(self.ffn_ln(F.silu(self.w1(x)) * self.w2(x)))


class Block(nn.Module):
    """One block; its windows are padded with zeros that are attended, as ORION does it."""

    def __init__(self, attn: Attention, dim: int, hidden: int, window: int, drop: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = attn, SwiGLU(dim, hidden)
        self.window, self.drop = window, drop

    def _dropped(self, x: Tensor) -> Tensor:
        if not self.drop or not self.training:
            return x
        keep = x.new_empty(x.shape[0], *(1,) * (x.dim() - 1)).bernoulli_(1 - self.drop)
        return x * keep / (1 - self.drop)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, h, w, C) to (B, h, w, C)."""
        h, w = x.shape[1:3]
        y = self.norm1(x)
        if self.window:
            side = self.window
            y = F.pad(y, (0, 0, 0, -w % side, 0, -h % side))
            rows, columns = y.shape[1] // side, y.shape[2] // side
            y = y.unflatten(2, (columns, side)).unflatten(1, (rows, side)).transpose(2, 3)
            y = self.attn(y.reshape(-1, side * side, y.shape[-1]), cos, sin)
            y = y.view(x.shape[0], rows, columns, side, side, -1).transpose(2, 3)
            y = y.reshape(x.shape[0], rows * side, columns * side, -1)[:, :h, :w]
        else:
            y = self.attn(y.flatten(1, 2), cos, sin).view_as(x)
        x = x + self._dropped(y)
        return x + self._dropped(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Patches to channels."""

    def __init__(self, patch: int, chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(chans, dim, patch, patch)


class PrunedEVAViT(nn.Module):
    """The backbone; results are those of kdfast's `EVAViT`.

    Args:
        pruned: File of `kdfast.export_orion`, whose ``meta`` says how many heads and hidden units
            each block has.
        with_cp: Recompute the blocks in the backward.
        load: Take the weights of the file at once; not needed where ``load_from`` names it.
    """

    def __init__(self, pruned: str, with_cp: bool = True, load: bool = False) -> None:
        super().__init__()
        held = torch.load(pruned, map_location="cpu", weights_only=True, mmap=True)
        config: dict[str, Any] = json.loads(held["meta"]["kdfast"])
        dim, patch = config["embed_dim"], config["patch_size"]
        head_dim = dim // config["num_heads"]
        self.with_cp, self.config = with_cp, config
        self.patch_embed = PatchEmbed(patch, config["in_chans"], dim)
        side = config["pretrain_img_size"] // patch
        count = side * side + int(config["pretrain_use_cls_token"])
        self.pos_embed = nn.Parameter(torch.zeros(1, count, dim)) if config["use_abs_pos"] else None
        self.blocks = nn.ModuleList()
        for i, (heads, hidden) in enumerate(
            zip(config["heads"], config["mlp_hidden"], strict=True)
        ):
            attn = Attention(dim, len(heads), head_dim, config["qkv_bias"])
            window = config["window_size"] if i in config["window_block_indexes"] else 0
            drop = config["drop_path_rate"] * i / max(config["depth"] - 1, 1)
            self.blocks.append(Block(attn, dim, hidden, window, drop))
        # ORION's checkpoints hold rotary tables; here they are made, and those are not read.
        self._register_load_state_dict_pre_hook(_without_tables)
        if load:
            prefix = "img_backbone."
            state = held["state_dict"].items()
            self.load_state_dict({k[len(prefix) :]: v for k, v in state if k.startswith(prefix)})

    def init_weights(self) -> None:
        """Called by mmcv; the weights come from the checkpoint."""

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W), normalised, to a list of one map (B, C, H / patch, W / patch)."""
        x = self.patch_embed.proj(x.to(self.patch_embed.proj.weight.dtype)).permute(0, 2, 3, 1)
        grid = (x.shape[1], x.shape[2])
        if self.pos_embed is not None:
            x = x + self._positions(self.pos_embed, grid).to(x.dtype)
        side = self.config["window_size"]
        kinds = {bool(block.window) for block in self.blocks}
        tables = {kind: self._table((side, side) if kind else grid, x) for kind in kinds}
        for block in self.blocks:
            cos, sin = tables[bool(block.window)]
            if self.with_cp and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, use_reentrant=False)
            else:
                x = block(x, cos, sin)
        return [x.permute(0, 3, 1, 2)]

    def _table(self, grid: tuple[int, int], like: Tensor) -> Any:
        config = self.config
        head_dim = config["embed_dim"] // config["num_heads"]
        angles = rotary_table(grid, head_dim, config["pt_hw_seq_len"])
        dtype = torch.promote_types(like.dtype, torch.float32)
        return angles.cos().to(like.device, dtype), angles.sin().to(like.device, dtype)

    def _positions(self, pos: Tensor, grid: tuple[int, int]) -> Tensor:
        side = self.config["pretrain_img_size"] // self.config["patch_size"]
        pos = pos[:, int(self.config["pretrain_use_cls_token"]) :]
        image = pos.view(1, side, side, -1).permute(0, 3, 1, 2)
        if grid != (side, side):
            image = F.interpolate(image.float(), size=grid, mode="bicubic", align_corners=False)
        return image.to(pos.dtype).permute(0, 2, 3, 1)


def _without_tables(state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for name in [key for key in state if key.startswith(prefix) and "freqs_" in key]:
        del state[name]


class PETRAttention(nn.Module):
    """Multi-head attention with the parameters of ``PETRMultiheadFlashAttention``.

    Its module ``attn`` has ``in_proj_weight``, ``in_proj_bias`` and ``out_proj``; biases are left
    out where ``bias`` is false, as that class does it without dropout.

    Args:
        embed_dims: Width.
        num_heads: Heads.
        attn_drop: Dropout of the attention, in training.
        proj_drop: Dropout of the output.
        bias: Whether the projections have biases.
        batch_first: Whether batches come first.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        bias: bool = True,
        batch_first: bool = True,
        **_: Any,
    ) -> None:
        super().__init__()
        self.embed_dims, self.num_heads, self.batch_first = embed_dims, num_heads, batch_first
        self.attn_drop = attn_drop
        self.attn = _Projections(embed_dims, bias)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_pos: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """``identity`` plus the attention; arguments as mmcv's attention layers have them."""
        key = query if key is None else key
        value = key if value is None else value
        identity = query if identity is None else identity
        if key_pos is None and query_pos is not None and query_pos.shape == key.shape:
            key_pos = query_pos
        q = query if query_pos is None else query + query_pos
        k = key if key_pos is None else key + key_pos
        if not self.batch_first:
            q, k, value = (x.transpose(0, 1) for x in (q, k, value))
        weights = self.attn.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.attn.in_proj_bias is None else self.attn.in_proj_bias.chunk(3)
        rows = [F.linear(x, w, b) for x, w, b in zip((q, k, value), weights, biases, strict=True)]
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in rows)
        out = attention(q, k, v, self.attn_drop if self.training else 0.0)
        out = self.attn.out_proj(out.transpose(1, 2).flatten(2))
        return identity + self.proj_drop(out if self.batch_first else out.transpose(0, 1))


class _Projections(nn.Module):
    def __init__(self, dim: int, bias: bool) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim)) if bias else None
        self.out_proj = nn.Linear(dim, dim, bias=bias)
        nn.init.xavier_uniform_(self.in_proj_weight)


def register(backbones: Any, attention_layers: Any = None) -> None:
    """Add the classes to mmcv's registries: backbones, and attention layers where given."""
    backbones.register_module()(PrunedEVAViT)
    if attention_layers is not None:
        attention_layers.register_module()(PETRAttention)
