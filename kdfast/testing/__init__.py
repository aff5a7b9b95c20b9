# SPDX-License-Identifier: Apache-2.0
"""Shapes, inputs and the tolerance rule that tests/ and bench/ share."""

import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any
from unittest import SkipTest

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kdfast.ops.geometry import Rope, Window
from kdfast.ops.pruned_attention import pruned_attention

if TYPE_CHECKING:
    from kdfast.models import EVAViT

# (B, H, N, D): smallest, nothing a multiple of anything, one token, and a real ViT-S row count.
SHAPES = {
    "tiny": (1, 2, 4, 16),
    "odd": (2, 3, 37, 24),
    "one": (1, 1, 1, 16),
    "vit": (1, 3, 197, 64),
}


# With this set, checks that are written for a GPU run small on the CPU, in Triton's interpreter.
DRY_RUN = os.environ.get("KDFAST_DRY_RUN", "0") == "1"
TRITON_OPS = (
    "pruned_attention",
    "attention_distill",
    "kd_loss",
    "feature_loss",
    "swiglu_norm",
)


def assert_no_worse(
    name: str, fused: Tensor, exact: Tensor, eager: Tensor, *, eps: float | None = None
) -> None:
    """Raises AssertionError unless ``fused`` is finite and at most twice as wrong as ``eager``.

    The rule, in the maximum and in the root mean square: err(fused) <= 2 * err(eager) + eps *
    size(exact), with eps of the dtype under test. It needs no tolerance chosen by hand: the eager
    result in the same dtype says what rounding costs.

    Args:
        name: Printed in the message.
        fused: Result under test, any shape, low precision or fp32.
        exact: The same result of the reference in fp64.
        eager: The same result of the reference in the dtype under test.
        eps: In place of the dtype's own.
    """
    if fused.shape != exact.shape:
        raise AssertionError(f"{name}: shape {tuple(fused.shape)}, want {tuple(exact.shape)}")
    if not torch.isfinite(fused).all():
        raise AssertionError(f"{name}: not finite")
    if fused.numel() == 0:
        return
    eps = torch.finfo(eager.dtype).eps if eps is None else eps
    norms: dict[str, Callable[[Tensor], Tensor]] = {
        "max": lambda x: x.abs().max(),
        "rms": lambda x: x.square().mean().sqrt(),
    }
    for kind, norm in norms.items():
        error = norm(fused.double() - exact).item()
        limit = 2 * norm(eager.double() - exact).item() + eps * norm(exact).item()
        if error > limit:
            raise AssertionError(f"{name}: {kind} error {error:.3e} is above {limit:.3e}")


def assert_right(name: str, fused: Tensor, exact: Tensor, eager: Tensor) -> None:
    """``assert_no_worse``, or close to ``exact`` where ``eager`` is no yardstick.

    That is in fp64, which is its own reference, and for a single number, of which the eager error
    is a matter of luck. Arguments as in ``assert_no_worse``.
    """
    if fused.dtype == torch.float64:
        torch.testing.assert_close(fused, exact, rtol=1e-12, atol=1e-13, msg=name)
    elif fused.dim() == 0:
        torch.testing.assert_close(fused.double(), exact, rtol=5e-7, atol=1e-7, msg=name)
    else:
        assert_no_worse(name, fused, exact, eager)


def relative(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over that of ``want``."""
    return ((got - want).norm() / want.norm()).item()


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of ``loss`` by every parameter, by name."""
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def run(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor], *, seed: int = 0
) -> list[Tensor]:
    """Outputs of ``function(*inputs)`` and the gradients of a random projection of them.

    The projection is drawn in fp64 and rounded, so runs in several dtypes see the same one.
    Integer and boolean inputs get no gradient; a missing gradient comes back as zeros.
    """
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = function(*leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros((), dtype=torch.float64, device=leaves[0].device)
    for out in outputs:
        weight = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
        total = total + (out * weight).sum().double()
    total.backward()
    grads = [
        torch.zeros_like(x) if x.grad is None else x.grad for x in leaves if x.is_floating_point()
    ]
    return [*(out.detach() for out in outputs), *grads]


def rotary(rows: int, dim: int, layout: str = "interleaved", prefix: int = 0) -> Rope:
    """Tables (rows, dim) whose columns all differ, so that a swapped pair or a wrong row shows."""
    angle = torch.arange(rows)[:, None] * (0.3 + torch.arange(dim) / 7)
    return Rope(angle.cos(), angle.sin(), prefix, layout)


@dataclass(frozen=True)
class AttentionCase:
    """One call of ``pruned_attention``, with inputs that are the same in every dtype but rounding.

    Attributes:
        shape: (B, H, N, D).
        heads: Kept heads; all if None.
        layout: Of the rotary tables; None: no rotation.
        prefix: Tokens in front that are not rotated; their rows are left out of the tables.
        grid: (h, w) of windows; None: every token sees every token.
        size: Side of a window.
        padded: Whether the windows have pad values, (H, D), as the last input.
        biases: G of a bias (G, H, N, N), the last input; 0: none.
        masked: Whether some entries of the bias are -inf, one row of head 0 is all of them, and the
            last key of the last head -100.
        scale: As in ``pruned_attention``.
    """

    shape: tuple[int, int, int, int]
    heads: tuple[int, ...] | None = None
    _: KW_ONLY
    layout: str | None = None
    prefix: int = 0
    grid: tuple[int, int] | None = None
    size: int = 0
    padded: bool = False
    biases: int = 0
    masked: bool = False
    scale: float | None = None

    def inputs(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """q, k, v, and the pad values or the bias if the call has them."""
        _, heads, tokens, dim = self.shape
        shapes: list[tuple[int, ...]] = [self.shape] * 3
        shapes += [(heads, dim)] * self.padded
        shapes += [(self.biases, heads, tokens, tokens)] * (self.biases > 0)
        draw = torch.Generator().manual_seed(7)
        # In fp64 and then rounded, so that runs in several dtypes see the same numbers.
        inputs = [torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes]
        if self.masked:
            bias = inputs[3]
            bias.masked_fill_(torch.rand(bias.shape, generator=draw) < 0.3, -math.inf)
            bias[:, 0, tokens // 2] = -math.inf
            bias[:, -1, :, -1] = -100.0
        return [x.to(dtype) for x in inputs]

    def call(self, backend: str) -> Callable[..., Tensor]:
        """The function of the inputs."""

        def attention(q: Tensor, k: Tensor, v: Tensor, extra: Tensor | None = None) -> Tensor:
            window = rope = None
            if self.grid is not None:
                window = Window(self.grid, self.size, extra if self.padded else None)
            if self.layout is not None:
                rows = self.size**2 if self.grid else q.shape[2] - self.prefix
                rope = rotary(rows, q.shape[3], self.layout, self.prefix)
            return pruned_attention(
                *(q, k, v),
                heads=self.heads,
                rope=rope,
                scale=self.scale,
                window=window,
                bias=extra if self.biases else None,
                backend=backend,
            )

        return attention


class _Bf16Product(torch.autograd.Function):
    """a @ b and its gradients by products of bf16 summed in fp32."""

    @staticmethod
    def multiply(a: Tensor, b: Tensor, terms: int) -> Tensor:
        left, right = _bf16_parts(a, terms), _bf16_parts(b, terms)
        pairs = [(i, j) for i in range(terms) for j in range(terms - i)]
        return torch.stack([left[i] @ right[j] for i, j in pairs]).sum(0)

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, terms: int) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.terms = terms
        return _Bf16Product.multiply(a, b, terms)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        a, b = ctx.saved_tensors
        da = _Bf16Product.multiply(grad, b.mT, ctx.terms)
        return da, _Bf16Product.multiply(a.mT, grad, ctx.terms), None


def _bf16_parts(x: Tensor, terms: int) -> list[Tensor]:
    """bf16 numbers that sum up to about x, the largest first."""
    parts = []
    for _ in range(terms):
        parts.append(x.bfloat16().float())
        x = x - parts[-1]
    return parts


class Bf16Products(TorchFunctionMode):
    """Inside it, matrix products of fp32 are made of ``terms`` bf16 for every value.

    What torch's CPU products may do under ``set_float32_matmul_precision("medium")``, on any CPU:
    the yardstick for kernels that do it.
    """

    def __init__(self, terms: int) -> None:
        super().__init__()
        self.terms = terms

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.matmul, Tensor.matmul, Tensor.__matmul__):
            return _Bf16Product.apply(*args, self.terms)
        return func(*args, **(kwargs or {}))


def interpreted_kernels(op: str) -> ModuleType:
    """``kdfast.kernels.<op>`` in Triton's interpreter, which runs it on CPU tensors.

    Triton decides when a function is decorated, so this must be the first import of triton in the
    process: call it where a test file is imported. It sets TRITON_INTERPRET for the rest of the
    process; code that compiles kernels needs a process of its own without it.

    Raises:
        SkipTest: triton is not installed, or was imported without the interpreter before.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        kernels = importlib.import_module(f"kdfast.kernels.{op}")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise SkipTest("triton is not installed") from error
    language = sys.modules["triton.language"]
    if type(language.max).__name__ != "InterpretedFunction":
        raise SkipTest("triton was imported before, without its interpreter")
    return kernels


def launch_on_cpu() -> torch.library.Library:
    """From now on ``backend="fused"`` on CPU tensors means the Triton kernels, interpreted.

    Returns:
        What holds the registration: keep it for as long as that shall last.

    Raises:
        SkipTest: As ``interpreted_kernels``.
    """
    library = torch.library.Library("kdfast", "IMPL")
    for name in TRITON_OPS:
        interpreted_kernels(name)
        op: Any = importlib.import_module(f"kdfast.ops.{name}")
        library.impl(name, op._cuda, "CPU")
        if hasattr(op, "_cuda_bwd"):
            library.impl(f"{name}_bwd", op._cuda_bwd, "CPU")
        if hasattr(op, "_cuda_inplace"):
            library.impl(f"{name}_", op._cuda_inplace, "CPU")
            op.INPLACE_ON = op.INPLACE_ON | {"cpu"}
        op.FUSED_ON = op.FUSED_ON | {"cpu"}
    return library


def tiny_eva(std: float, **overrides: Any) -> "EVAViT":
    """A seeded fp64 EVAViT of three blocks (window, window, global) with 4 heads of 16 channels.

    Args:
        std: Of every parameter: none is zero, so that none can be forgotten unnoticed.
        **overrides: Arguments of ``EVAViT`` to change.
    """
    from kdfast.models import EVAViT  # which imports timm: not for the tests of ops

    config: dict[str, Any] = {
        "img_size": 20,
        "patch_size": 4,
        "embed_dim": 64,
        "depth": 3,
        "num_heads": 4,
        "mlp_ratio": 2.0,
        "window_size": 3,
        "window_block_indexes": (0, 1),
        "pretrain_img_size": 12,
        "with_cp": False,
    }
    torch.manual_seed(1)
    model = EVAViT(**{**config, **overrides}).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std)
    return model


def small_eva(**overrides: Any) -> "EVAViT":
    """A seeded fp32 EVAViT of three blocks (window, window, global) with 3 heads of 16 channels.

    Biases are not zero.

    Args:
        **overrides: Arguments of ``EVAViT`` to change.
    """
    from kdfast.models import EVAViT

    config: dict[str, Any] = {
        "img_size": 96,
        "embed_dim": 48,
        "depth": 3,
        "num_heads": 3,
        "window_size": 4,
        "window_block_indexes": (0, 1),
        "with_cp": False,
    }
    torch.manual_seed(1)
    model = EVAViT(**{**config, **overrides})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
    return model
