# SPDX-License-Identifier: Apache-2.0
"""Layers of ORION's EVA-ViT, with its parameter names. See docs/use/eva.md.

B batch, K kept heads, N tokens, D head dim, C channels.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from torch import Tensor, nn

from kdfast.models.trace import BlockTarget
from kdfast.ops._layer_norm import normed
from kdfast.ops._matmul import choice
from kdfast.ops._no_heads import no_heads
from kdfast.ops._packed import (
    Layer,
    Product,
    forget,
    free_in_training,
    hooked,
    inferring,
    is_plain_linear,
    packed,
    tracked,
)
from kdfast.ops._torch_private import exporting
from kdfast.ops.attention_distill import attention_distill
from kdfast.ops.geometry import Rope, Window
from kdfast.ops.linear import linear
from kdfast.ops.pruned_attention import pruned_attention
from kdfast.ops.swiglu_norm import swiglu_norm

NORM_EPS = 1e-6
# fp32 on CPUs: hidden widths that MKL's products are fast at, and rows from which that pays.
PAD_MULTIPLE, PAD_ROWS = 32, 256


def apply_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """A linear layer on the faster library, or, where it is more than its weight, by itself."""
    if is_plain_linear(layer):
        return linear(x, layer.weight, layer.bias)  # type: ignore[arg-type]
    out: Tensor = layer(x)
    return out


class PatchEmbed(nn.Module):
    """Non-overlapping patches to channels."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, h * patch, w * patch), cast to the weight's dtype, to (B, C, h, w)."""
        out: Tensor = self.proj(x.to(self.proj.weight.dtype))
        return out


class GatedNorm(nn.LayerNorm):
    """LayerNorm of ``silu(gate) * value``."""

    def forward(self, gate: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        """(B, N, P), of which the first C elements of a row count, to the same, padded with 0."""
        # An exported graph must run where kdfast is not installed.
        backend = "reference" if exporting() else None
        return swiglu_norm(gate, value, self.weight, self.bias, eps=self.eps, backend=backend)


class _PaddedLinear(torch.autograd.Function):
    """A linear layer whose weight gets rows and columns of zeros for the time of the product.

    The graph keeps the weight itself: copies of all of them would cost more than the activations.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, rows: int, cols: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rows, ctx.cols = rows, cols
        return F.linear(x, F.pad(weight, (0, cols, 0, rows)), F.pad(bias, (0, rows)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = grad @ F.pad(weight, (0, ctx.cols, 0, ctx.rows))
        if ctx.needs_input_grad[1]:
            dweight = (flat.t() @ x.flatten(0, -2))[: weight.shape[0], : weight.shape[1]]
        if ctx.needs_input_grad[2]:
            dbias = flat.sum(0)[: weight.shape[0]]
        return dx, dweight, dbias, None, None


class SwiGLU(nn.Module):
    """Gated MLP with a LayerNorm before the output projection."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        with warnings.catch_warnings():
            # Without units there is nothing to initialise, which torch finds suspicious.
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            self.w1 = nn.Linear(dim, hidden_dim)
            self.w2 = nn.Linear(dim, hidden_dim)
            self.ffn_ln = GatedNorm(hidden_dim, eps=NORM_EPS)
            self.w3 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C); without hidden units the bias of ``w3``."""
        out: Tensor
        if self.w1.out_features == 0:
            out = self.w3(x.new_zeros(*x.shape[:-1], 0))
            return out
        pad = self._pad(x)
        if pad == 0:
            gate, value = apply_linear(self.w1, x), apply_linear(self.w2, x)
            return apply_linear(self.w3, self.ffn_ln(gate, value))
        gate, value = (_PaddedLinear.apply(x, w.weight, w.bias, pad, 0) for w in (self.w1, self.w2))
        out = _PaddedLinear.apply(self.ffn_ln(gate, value), self.w3.weight, self.w3.bias, 0, pad)
        return out

    def _pad(self, x: Tensor) -> int:
        """Columns of zeros that make the projections faster than they cost. See docs/use/eva.md."""
        linears = (self.w1, self.w2, self.w3)
        worthwhile = (
            not choice(x.dtype).forward
            and x.device.type == "cpu"
            and x.dtype == self.w1.weight.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and x.numel() // x.shape[-1] >= PAD_ROWS
        )
        # Only what nobody has replaced or hooked may be bypassed.
        if not worthwhile or not all(map(is_plain_linear, linears)):
            return 0
        return -self.w1.out_features % PAD_MULTIPLE


class Attention(nn.Module):
    """Self-attention over the kept heads of a block, on the real tokens of its windows only.

    Attributes:
        heads: Original indices of the K heads whose slices the projections hold, ascending; may be
            empty, then the output is the bias of ``proj``.
        head_dim: D; does not change when heads are removed.
        window_size: Side of the windows; 0: one window over the whole grid.
    """

    q_bias: nn.Parameter | None
    v_bias: nn.Parameter | None

    def __init__(
        self, dim: int, heads: Sequence[int], head_dim: int, qkv_bias: bool, window_size: int
    ) -> None:
        super().__init__()
        self.heads = list(heads)
        self.head_dim = head_dim
        self.window_size = window_size
        width = len(self.heads) * head_dim
        with warnings.catch_warnings():
            # Without heads there is nothing to initialise, which torch finds suspicious.
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            self.q_proj = nn.Linear(dim, width, bias=False)
            self.k_proj = nn.Linear(dim, width, bias=False)
            self.v_proj = nn.Linear(dim, width, bias=False)
            self.proj = nn.Linear(width, dim)
        self.q_bias = nn.Parameter(torch.zeros(width)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(width)) if qkv_bias else None

    def _split(self, x: Tensor, proj: nn.Linear, bias: Tensor | None) -> Tensor:
        if bias is not None:
            bias = bias.to(proj.weight.dtype)
        y = linear(x, proj.weight, bias)
        return self.heads_of(y)

    def _window(self, grid: tuple[int, int], v: Tensor) -> Window | None:
        if self.window_size == 0:
            return None
        shape = (len(self.heads), self.head_dim)
        if self.v_bias is None:
            pad = v.new_zeros(shape)
        else:
            pad = self.v_bias.to(v.dtype).view(shape)
        return Window(grid, self.window_size, pad)

    def forward(
        self, x: Tensor, grid: tuple[int, int], rope: Rope, target: BlockTarget | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Attends within windows, or over the whole grid.

        Args:
            x: (B, N, C), N = h * w tokens, row-major.
            grid: (h, w).
            rope: Tables of the grid, or of one window where there are windows.
            target: Teacher attention to compare with.

        Returns:
            Output (B, N, C); queries and keys before the rotation, (B, K, N, D); the loss against
            ``target``, or None, also where there are no heads to compare.
        """
        q = self._split(x, self.q_proj, self.q_bias)
        k = self._split(x, self.k_proj, None)
        v = self._split(x, self.v_proj, self.v_bias)
        out, loss = self.attend(q, k, v, grid, rope, target)
        return apply_linear(self.proj, out), q, k, loss

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: tuple[int, int],
        rope: Rope,
        target: BlockTarget | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The heads' outputs, (B, N, K * D), and the loss of ``forward``."""
        window = self._window(grid, v)
        loss = None
        if not self.heads:
            out = no_heads(self, v)
        elif target is None:
            # An exported graph must run where kdfast is not installed.
            backend = "reference" if exporting() else None
            out = pruned_attention(q, k, v, rope=rope, window=window, backend=backend)
        else:
            out, loss = attention_distill(
                q,
                k,
                v,
                target.q,
                target.k,
                teacher_heads=target.heads,
                temperature=target.temperature,
                kind=target.kind,
                rope=rope,
                window=window,
            )
        return out.transpose(1, 2).flatten(2), loss

    def heads_of(self, y: Tensor) -> Tensor:
        """(B, K, N, D) of a projection (B, N, K * D)."""
        return y.unflatten(2, (len(self.heads), self.head_dim)).transpose(1, 2)


class Block(nn.Module):
    """Pre-norm transformer block with stochastic depth per image."""

    def __init__(self, attn: Attention, dim: int, hidden_dim: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = attn
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = SwiGLU(dim, hidden_dim)

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int],
        rope: Rope,
        want_qk: bool = False,
        target: BlockTarget | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Updates the residual stream.

        Everything leaves by the return value, so that the block can run inside a checkpoint.

        Args:
            x: (B, N, C) residual stream.
            grid: (h, w), N = h * w.
            rope: Tables for the block's attention.
            want_qk: Whether to return queries and keys.
            target: Teacher attention to compare with.

        Returns:
            Residual stream (B, N, C); queries and keys (B, K, N, D) or None; loss or None.
        """
        if not want_qk and target is None and self.adds_constant and not torch.is_grad_enabled():
            return x + (self.attn.proj.bias + self.mlp.w3.bias), None, None, None
        if (products := self._products(x, rope, target)) is not None:
            x, q, k, loss = self._infer(products, x, grid, rope, target)
        else:
            y, q, k, loss = self.attn(self.norm1(x), grid, rope, target)
            x = x + self.drop_path(y)
            x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x, q if want_qk else None, k if want_qk else None, loss

    @property
    def adds_constant(self) -> bool:
        """Whether there are no heads and no hidden units, so that inference is one addition.

        Not while something watches the layers, or drops branches.
        """
        attn, mlp = self.attn, self.mlp
        if attn.heads or mlp.w1.out_features or self.training:
            return False
        return not any(map(hooked, (attn, mlp, self.drop_path))) and all(
            map(is_plain_linear, (attn.proj, mlp.w3))
        )

    def _products(
        self, x: Tensor, rope: Rope, target: BlockTarget | None
    ) -> tuple[Product, ...] | None:
        """The packed projections of q, k, v, output, gate, value and MLP; None in training."""
        free_in_training(self)
        if not inferring(self, x) or tracked(self, rope.cos, rope.sin, *(target or ())):
            return None
        attn, mlp = self.attn, self.mlp
        projections = (attn.q_proj, attn.k_proj, attn.v_proj, attn.proj, mlp.w1, mlp.w2, mlp.w3)
        dropping = self.drop_path.training and type(self.drop_path) is not nn.Identity
        # Only what nobody has replaced or hooked may be bypassed.
        if hooked(attn) or hooked(mlp) or hooked(self.drop_path) or dropping or not attn.heads:
            return None
        if not all(map(is_plain_linear, projections)):
            return None
        biases = (attn.q_bias, None, attn.v_bias, *(p.bias for p in projections[3:]))
        pairs = zip(projections, biases, strict=True)
        products = packed(self, x, [Layer((p.weight,), (bias,)) for p, bias in pairs])
        if products is None:
            forget(self)
        return products

    def _infer(
        self,
        products: tuple[Product, ...],
        x: Tensor,
        grid: tuple[int, int],
        rope: Rope,
        target: BlockTarget | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """``forward`` on packed weights: a residual is added by the product in front of it."""
        *project, out, gate, value, last = products
        y = normed(self.norm1, x)
        q, k, v = (self.attn.heads_of(product(y)) for product in project)
        context, loss = self.attn.attend(q, k, v, grid, rope, target)
        x = out.onto(context, x)
        y = normed(self.norm2, x)
        return last.onto(self.mlp.ffn_ln(gate(y), value(y)), x), q, k, loss
