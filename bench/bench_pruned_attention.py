# SPDX-License-Identifier: Apache-2.0
"""pruned_attention against eager, SDPA and torch.compile, at ViT shapes with head dim 64.

On a GPU also against FlexAttention, SDPA's backends one by one and flash-attn, as far as they are
installed.

The limit counts the matrix products (4 N^2 D a head forward, 14 N^2 D forward and backward, scores
recomputed) at the rate of a large matmul of the same dtype in the same session; exponentials and
memory come on top.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast
from bench import gpu_rivals, session
from bench.compare import Compare
from kdfast import Rope, Window
from kdfast.testing import DRY_RUN

D = 64
HAS_CUDA = torch.cuda.is_available()
# On a GPU those that fill it come first, in case that time runs out.
SHAPES = session.sized(
    [
        *([(64, 16, 257), (8, 16, 1600)] if HAS_CUDA else []),
        (8, 12, 197),
        (8, 3, 197),
        (8, 8, 257),
        (9, 8, 256),
        (4, 8, 577),
        (1, 8, 1600),
        (1, 16, 1600),
        (1, 3, 197),
    ],
    [(1, 2, 20)],
)
# Timed also where fp32 may be multiplied in bf16.
LOWERED = [(8, 12, 197), (8, 8, 257), (1, 8, 1600)]
# Compiling takes a good part of the time of bench.gpu, so there it is for the first shapes alone.
COMPILED = SHAPES[: 2 if HAS_CUDA else None]
DTYPES = session.DTYPES
# ORION: a grid of 40 x 40 tokens in windows of 16, padded to 48.
HEADS, SIDE, SIZE, PADDED = session.sized((16, 40, 16, 48), (1, 3, 2, 4))
# Images or windows, heads, tokens, head dim, biases: Swin-T's first stage and BEiT-B, 8 images.
BIASED = session.sized(
    {"swin stage 1": (512, 3, 49, 32, 64), "beit": (8, 12, 197, 64, 1)},
    {"swin stage 1": (4, 1, 9, 16, 2), "beit": (2, 1, 20, 16, 1)},
)
TORCH = ("kdfast", "eager", "sdpa", "compile")
LIBRARIES = gpu_rivals.NAMES if HAS_CUDA or DRY_RUN else ()
Attention = Callable[..., Tensor]


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What people write without a fused kernel, in the dtype of the inputs."""
    return ((q * D**-0.5) @ k.transpose(-1, -2)).softmax(-1) @ v


def packed(
    batch: int, heads: int, tokens: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """q, k, v as views of one projection (B, N, 3, H, D), as most ViTs make them."""
    qkv = torch.randn(batch, tokens, 3, heads, D).to(device, dtype).requires_grad_()
    return list(qkv.permute(2, 0, 3, 1, 4).unbind(0))


def with_backward(call: Attention, inputs: list[Tensor], weight: Tensor) -> Callable[[], object]:
    """``call`` and its gradients for all three inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    return session.gradients(partial(call, *leaves), leaves, weight)


def forward(call: Attention, inputs: list[Tensor]) -> Callable[[], Tensor]:
    """``call`` without a graph."""
    return session.inference(partial(call, *(x.detach() for x in inputs)))


def time_phase(
    compare: Compare,
    phase: str,
    what: str,
    candidates: dict[str, Attention],
    inputs: list[Tensor],
    exact: Tensor,
    *,
    low: bool = False,
    **options: Any,
) -> None:
    """Compares "fwd", or "fwd+bwd" with the gradients of all inputs; checks the output of both.

    ``low``: fp32 may be multiplied in bf16.
    """
    near = session.near(exact, 2e-2 if low or inputs[0].dtype == torch.bfloat16 else 1e-4)
    weight = torch.randn(exact.shape).to(inputs[0])
    compare(
        "pruned_attention",
        f"{phase} {what}",
        {
            name: forward(call, inputs) if phase == "fwd" else with_backward(call, inputs, weight)
            for name, call in candidates.items()
        },
        check=lambda name, _: near(name, forward(candidates[name], inputs)),
        memory=phase != "fwd",
        **options,
    )


@pytest.mark.candidates(*TORCH, *LIBRARIES)
@pytest.mark.parametrize("phase", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_attention(
    compare: Compare,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    phase: str,
) -> None:
    batch, heads, tokens = shape
    inputs = packed(*shape, dtype, compare.device)
    candidates: dict[str, Attention] = {
        "kdfast": lambda q, k, v: kdfast.pruned_attention(q, k, v, backend="fused"),
        "eager": eager,
        "sdpa": F.scaled_dot_product_attention,
        "compile": session.compiled(eager),
    }
    missing: dict[str, str] = {}
    if LIBRARIES:
        ones = torch.ones_like(inputs[0])
        found, missing = gpu_rivals.attention(
            dtype, lambda call: with_backward(call, inputs, ones)(), shape in COMPILED
        )
        candidates |= found
        if shape not in COMPILED:
            del candidates["compile"]
            missing["compile"] = gpu_rivals.SLOW
    exact = eager(*(x.detach().double() for x in inputs))
    products = 4 if phase == "fwd" else 14
    time_phase(
        compare,
        phase,
        f"{batch}x{heads}x{tokens} {dtype}",
        candidates,
        inputs,
        exact,
        missing=missing,
        flops=products * batch * heads * tokens**2 * D,
        dtype=dtype,
    )


@pytest.fixture
def precision() -> Iterator[Callable[[str, Attention], Attention]]:
    """Makes a call that sets torch's precision of fp32 products before it runs."""

    def under(name: str, call: Attention) -> Attention:
        def run(*inputs: Tensor) -> Tensor:
            torch.set_float32_matmul_precision(name)
            return call(*inputs)

        return run

    yield under
    torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(DRY_RUN or HAS_CUDA, reason="a setting of the CPU's products")
@pytest.mark.candidates(*TORCH, *(f"{name} fp32" for name in TORCH))
@pytest.mark.parametrize("phase", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize("shape", LOWERED, ids=str)
def bench_medium(
    compare: Compare, precision, device: torch.device, shape: tuple[int, int, int], phase: str
) -> None:
    """fp32 under set_float32_matmul_precision("medium"), against every candidate with and without.

    torch may leave its own products in fp32 where bf16 would not be faster for it.
    """
    inputs = packed(*shape, torch.float32, compare.device)
    compiled = {name: session.compiled(eager) for name in ("medium", "highest")}
    candidates: dict[str, Attention] = {}
    for name, suffix in (("medium", ""), ("highest", " fp32")):
        calls: dict[str, Attention] = {
            "kdfast": lambda q, k, v: kdfast.pruned_attention(q, k, v, backend="fused"),
            "eager": eager,
            "sdpa": F.scaled_dot_product_attention,
            "compile": compiled[name],
        }
        candidates |= {label + suffix: precision(name, call) for label, call in calls.items()}
    exact = eager(*(x.detach().double() for x in inputs))
    flops = (4 if phase == "fwd" else 14) * shape[0] * shape[1] * shape[2] ** 2 * D
    what = f"{'x'.join(map(str, shape))} fp32 medium"
    options = {"flops": flops, "dtype": torch.bfloat16, "low": True}
    time_phase(compare, phase, what, candidates, inputs, exact, **options)


@pytest.mark.candidates("kdfast", "eager", "sdpa")
@pytest.mark.parametrize("phase", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def bench_orion_windows(compare: Compare, dtype: torch.dtype, phase: str) -> None:
    """16 x 16 windows with zero-padded keys and RoPE on a 40 x 40 grid, 16 heads."""
    tokens, across, device = SIDE**2, PADDED // SIZE, compare.device
    inputs = packed(1, HEADS, tokens, dtype, device)
    cos, sin = (torch.randn(SIZE**2, D).to(device) for _ in range(2))
    pad = torch.randn(HEADS, D).to(device, dtype)
    rope, window = Rope(cos, sin), Window((SIDE, SIDE), SIZE, pad)

    def partition(x: Tensor, value: Tensor | None) -> Tensor:
        x = x.view(1, HEADS, SIDE, SIDE, D)
        if value is None:
            x = F.pad(x, (0, 0, 0, PADDED - SIDE, 0, PADDED - SIDE))
        else:
            full = value.view(1, HEADS, 1, 1, D).expand(1, HEADS, PADDED, PADDED, D).clone()
            full[:, :, :SIDE, :SIDE] = x
            x = full
        x = x.view(HEADS, across, SIZE, across, SIZE, D).permute(1, 3, 0, 2, 4, 5)
        return x.reshape(across**2, HEADS, SIZE**2, D)

    def rotate(x: Tensor) -> Tensor:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        return (x * cos + turned * sin).to(x.dtype)

    def by_tensor_ops(attention: Attention) -> Attention:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.reshape(1, HEADS, SIDE, SIDE, D) for x in (q, k, v))
            out = attention(
                rotate(partition(q, None)), rotate(partition(k, None)), partition(v, pad)
            )
            out = out.view(across, across, HEADS, SIZE, SIZE, D).permute(2, 0, 3, 1, 4, 5)
            out = out.reshape(1, HEADS, PADDED, PADDED, D)[:, :, :SIDE, :SIDE]
            return out.reshape(1, HEADS, tokens, D)

        return run

    candidates: dict[str, Attention] = {
        "kdfast": lambda q, k, v: kdfast.pruned_attention(
            q, k, v, rope=rope, window=window, backend="fused"
        ),
        "eager": by_tensor_ops(eager),
        "sdpa": by_tensor_ops(F.scaled_dot_product_attention),
    }
    exact = kdfast.pruned_attention(
        *(x.detach().double() for x in inputs),
        rope=Rope(cos.double(), sin.double()),
        window=Window((SIDE, SIDE), SIZE, pad.double()),
        backend="reference",
    )
    time_phase(compare, phase, f"ORION windows {dtype}", candidates, inputs, exact)


@pytest.mark.candidates("kdfast", "native half", "all")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def bench_kept_heads(compare: Compare, dtype: torch.dtype) -> None:
    """8 of 16 heads by index against 8 heads that are alone, and against all 16."""
    heads, batch, tokens = session.sized((16, 8, 257), (2, 1, 20))
    wide = packed(batch, heads, tokens, dtype, compare.device)
    narrow = packed(batch, heads // 2, tokens, dtype, compare.device)
    kept = list(range(0, heads, 2))
    fused = partial(kdfast.pruned_attention, backend="fused")
    compare(
        "pruned_attention",
        f"fwd 8 of 16 heads {dtype}",
        {"kdfast": forward(partial(fused, heads=kept), wide)},
        check=session.near(eager(*(x.detach().double()[:, kept] for x in wide)), 2e-2),
        yardsticks={"native half": forward(fused, narrow), "all": forward(fused, wide)},
    )


def with_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Eager, the images taking the biases in turn, as timm's Swin does."""
    scores = (q * q.shape[3] ** -0.5) @ k.transpose(-1, -2)
    scores = scores.unflatten(0, (-1, bias.shape[0])) + bias
    return scores.flatten(0, 1).softmax(-1) @ v


def sdpa_with_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """torch's function, whose mask has an entry for every image or is the same for all."""
    turns = q.shape[0] // bias.shape[0] if bias.shape[0] > 1 else 1
    return F.scaled_dot_product_attention(q, k, v, bias.repeat(turns, 1, 1, 1))


@pytest.mark.candidates(*TORCH)
@pytest.mark.parametrize("phase", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BIASED)
def bench_bias(compare: Compare, name: str, dtype: torch.dtype, phase: str) -> None:
    """Swin's windows with their shift masks, and BEiT's one bias; the bias gets its gradient."""
    (batch, heads, tokens, dim, biases), device = BIASED[name], compare.device
    qkv = torch.randn(batch, tokens, 3, heads, dim).to(device, dtype).permute(2, 0, 3, 1, 4)
    bias = torch.randn(biases, heads, tokens, tokens).to(device, dtype)
    inputs = [*qkv.unbind(0), bias]
    if biases > 1:
        bias[-1, ..., : tokens // 2] = -100
    candidates: dict[str, Attention] = {
        "kdfast": lambda q, k, v, b: kdfast.pruned_attention(q, k, v, bias=b, backend="fused"),
        "eager": with_bias,
        "sdpa": sdpa_with_bias,
        "compile": session.compiled(with_bias),
    }
    flops = (4 if phase == "fwd" else 14) * batch * heads * tokens**2 * dim
    exact = with_bias(*(x.double() for x in inputs))
    what, options = f"{name} {dtype}", {"flops": flops, "dtype": dtype}
    time_phase(compare, phase, what, candidates, inputs, exact, **options)
