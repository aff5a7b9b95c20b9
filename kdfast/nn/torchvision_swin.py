# SPDX-License-Identifier: Apache-2.0
"""torchvision's shifted windows, Swin v1 and v2, on the fused kernel.

B batch, H heads, N tokens of a window, D head dim, C channels, G windows of an image.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast.nn.attention import qualified_name
from kdfast.nn.heads import AttentionCall, HeadAxis
from kdfast.nn.linear import is_weights_alone
from kdfast.nn.timm_bias import as_read, cosines, indexed, masked
from kdfast.nn.timm_grid import TimmPlainAttention
from kdfast.ops._no_heads import no_heads
from kdfast.ops._remembered import remembered
from kdfast.ops.linear import linear


class TorchvisionSwinAttention(TimmPlainAttention):
    """``torchvision.models.swin_transformer.ShiftedWindowAttention``, of a whole map."""

    axes: ClassVar[Mapping[str, HeadAxis]] = {
        **TimmPlainAttention.axes,
        "relative_position_bias_table": HeadAxis(1),
    }

    @classmethod
    def why_not(cls, original: nn.Module) -> str | None:
        for name in ("qkv", "proj"):
            layer = original.get_submodule(name)
            if not is_weights_alone(layer):
                return f"its {name} is a {qualified_name(layer)}, which it never calls"
        return None

    def _configure(self) -> None:
        super()._configure()
        self.scale = self.head_dim**-0.5

    def dropout_p(self) -> float:
        return float(self.attention_dropout)

    def bias_source(self) -> tuple[list[Tensor], nn.Module | None]:
        """What ``position_bias`` reads: tensors, and a network that it calls."""
        return [self.relative_position_bias_table, self.relative_position_index], None

    def position_bias(self) -> Tensor:
        """(H, N, N)."""
        return indexed(self.relative_position_bias_table, self.relative_position_index)

    def windows_bias(self, x: Tensor) -> Tensor:
        """(1 or G, H, N, N) of a map (B, h, w, C), with the mask of shifted windows."""
        key = x.shape[1:3], x.dtype, tuple(self.window_size), tuple(self.shift_size)
        tensors, network = self.bias_source()
        return remembered(
            *(self, x, tensors, lambda: masked(self.position_bias(), self.mask(x))),
            key=key,
            network=network,
            keep=as_read,
        )

    def grid(self, x: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
        """Windows of a map (B, h, w, C) in height and width, and how far they are shifted."""
        (h, w), (high, wide) = x.shape[1:3], self.window_size
        # Not -(-h // high): ONNX divides towards zero.
        grid = (h + high - 1) // high, (w + wide - 1) // wide
        down, right = self.shift_size
        return grid, (down if grid[0] > 1 else 0, right if grid[1] > 1 else 0)

    def sequences(self, x: Tensor) -> tuple[int, int]:
        (rows, columns), _ = self.grid(x)
        return x.shape[0] * rows * columns, self.window_size[0] * self.window_size[1]

    def pads(self, x: Tensor) -> Tensor | None:
        return self.windows(torch.ones_like(x[..., :1]))[..., 0] == 0

    def windows(self, x: Tensor) -> Tensor:
        """(B * G, N, C) of a map (B, h, w, C): padded, shifted, cut."""
        (rows, columns), shift = self.grid(x)
        high, wide = self.window_size
        x = F.pad(x, (0, 0, 0, columns * wide - x.shape[2], 0, rows * high - x.shape[1]))
        x = x.roll((-shift[0], -shift[1]), (1, 2)) if any(shift) else x
        tall = x.unflatten(2, (columns, wide)).unflatten(1, (rows, high)).transpose(2, 3)
        return tall.flatten(3, 4).flatten(0, 2)

    def unwindowed(self, y: Tensor, x: Tensor) -> Tensor:
        """A map like x, but with the channels of windows y (B * G, N, C')."""
        grid, shift = self.grid(x)
        tall = y.unflatten(0, (-1, *grid)).unflatten(3, tuple(self.window_size))
        y = tall.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        y = y.roll(shift, (1, 2)) if any(shift) else y
        return y[:, : x.shape[1], : x.shape[2]].contiguous()

    def mask(self, x: Tensor) -> Tensor | None:
        """(G, N, N), -100 between tokens that a shift made neighbours; None without a shift."""
        grid, shift = self.grid(x)
        if not any(shift):
            return None
        regions = []
        for count, side, by in zip(grid, self.window_size, shift, strict=True):
            place = torch.arange(count * side, device=x.device)
            part = (place >= (count - 1) * side).long() + (place >= count * side - by)
            regions.append((part if by else torch.zeros_like(part)).unflatten(0, (count, side)))
        tall = 3 * regions[0][:, None, :, None] + regions[1][None, :, None, :]
        label = tall.flatten(2).flatten(0, 1)
        apart = label[:, :, None] != label[:, None, :]
        return torch.zeros(apart.shape, dtype=x.dtype, device=x.device).masked_fill(apart, -100.0)

    def project(self, x: Tensor, *args: Any, **kwargs: Any) -> AttentionCall:
        return super().project(self.windows(x))._replace(bias=self.windows_bias(x))

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) to (B, h, w, C)."""
        if self.num_heads:
            context = self.attend(self.project(x))
        else:
            context = no_heads(self, x.new_zeros(*self.sequences(x), 0), x)
        out = F.dropout(self.finish(context), self.dropout, self.training)
        return self.unwindowed(out, x)


class TorchvisionSwinV2Attention(TorchvisionSwinAttention):
    """``torchvision.models.swin_transformer.ShiftedWindowAttentionV2``."""

    cosine: ClassVar[bool] = True

    axes: ClassVar[Mapping[str, HeadAxis]] = {
        **TimmPlainAttention.axes,
        "logit_scale": HeadAxis(0),
        "cpb_mlp.2.weight": HeadAxis(0),
    }

    def _packed(self, x: Tensor) -> Tensor:
        if self.qkv.bias is None:
            return super()._packed(x)
        q, k, v = self.qkv.bias.chunk(3)
        # The bias of keys is there, but counts as zero.
        return linear(x, self.qkv.weight, torch.cat((q, torch.zeros_like(k), v)))

    def bias_source(self) -> tuple[list[Tensor], nn.Module | None]:
        return [self.relative_coords_table, self.relative_position_index], self.cpb_mlp

    def position_bias(self) -> Tensor:
        table = self.cpb_mlp(self.relative_coords_table).flatten(0, -2)
        return 16 * torch.sigmoid(indexed(table, self.relative_position_index))

    def project(self, x: Tensor, *args: Any, **kwargs: Any) -> AttentionCall:
        return cosines(super().project(x), self.logit_scale)
