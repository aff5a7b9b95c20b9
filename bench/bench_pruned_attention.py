# SPDX-License-Identifier: Apache-2.0
"""pruned_attention against eager, SDPA and torch.compile, at ViT shapes with head dim 64.

The limit counts the matrix products (4 N^2 D a head forward, 14 N^2 D forward and backward, scores
recomputed) at the rate of a large matmul of the same dtype in the same session; exponentials and
memory come on top.
"""

import importlib.util
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast
from bench import session
from bench.compare import Compare
from kdfast import Rope, Window
from kdfast.testing import DRY_RUN

D = 64
SHAPES = session.sized(
    [
        (8, 12, 197),
        (8, 3, 197),
        (8, 8, 257),
        (9, 8, 256),
        (4, 8, 577),
        (1, 8, 1600),
        (1, 16, 1600),
        (1, 3, 197),
        *([(64, 16, 257), (8, 16, 1600)] if torch.cuda.is_available() else []),
    ],
    [(1, 2, 20)],
)
# Timed also where fp32 may be multiplied in bf16.
LOWERED = [(8, 12, 197), (8, 8, 257), (1, 8, 1600)]
DTYPES = session.sized([torch.float32, torch.bfloat16], [torch.float32])
# ORION: a grid of 40 x 40 tokens in windows of 16, padded to 48.
HEADS, SIDE, SIZE, PADDED = session.sized((16, 40, 16, 48), (1, 3, 2, 4))
# Images or windows, heads, tokens, head dim, biases: Swin-T's first stage and BEiT-B, 8 images.
BIASED = session.sized(
    {"swin stage 1": (512, 3, 49, 32, 64), "beit": (8, 12, 197, 64, 1)},
    {"swin stage 1": (4, 1, 9, 16, 2), "beit": (2, 1, 20, 16, 1)},
)
TORCH = ("kdfast", "eager", "sdpa", "compile")
LIBRARIES = ("flex", "flash-attn") if torch.cuda.is_available() or DRY_RUN else ()
Attention = Callable[..., Tensor]


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What people write without a fused kernel, in the dtype of the inputs."""
    return ((q * D**-0.5) @ k.transpose(-1, -2)).softmax(-1) @ v


def libraries(
    dtype: torch.dtype, inputs: list[Tensor]
) -> tuple[dict[str, Attention], dict[str, str]]:
    """FlexAttention and flash-attn where they run, and the reason where not."""
    if dtype == torch.float32 and not DRY_RUN:
        return {}, {"flex": "in fp32 it is for TF32", "flash-attn": "has no fp32"}
    from torch.nn.attention.flex_attention import flex_attention

    found: dict[str, Attention] = {"flex": session.compiled(flex_attention)}
    missing: dict[str, str] = {}
    if importlib.util.find_spec("flash_attn") is None:
        missing["flash-attn"] = "not installed"
    else:
        from flash_attn import flash_attn_func

        def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

        found["flash-attn"] = flash
    for name in list(found):
        try:
            with_backward(found[name], inputs, torch.ones_like(inputs[0]))()
        except Exception as error:  # whatever a library says is the reason
            missing[name] = f"{error!r:.200}"
            del found[name]
    return found, missing


def packed(
    batch: int, heads: int, tokens: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """q, k, v as views of one projection (B, N, 3, H, D), as most ViTs make them."""
    qkv = torch.randn(batch, tokens, 3, heads, D).to(device, dtype).requires_grad_()
    return list(qkv.permute(2, 0, 3, 1, 4).unbind(0))


def with_backward(call: Attention, inputs: list[Tensor], weight: Tensor) -> Callable[[], object]:
    """``call`` and its gradients for all three inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    return lambda: torch.autograd.grad(call(*leaves), leaves, weight)


def forward(call: Attention, inputs: list[Tensor]) -> Callable[[], Tensor]:
    """``call`` without a graph."""
    leaves = [x.detach() for x in inputs]

    def run() -> Tensor:
        with torch.no_grad():
            return call(*leaves)

    return run


def checking(
    candidates: dict[str, Attention], inputs: list[Tensor], exact: Tensor, low: bool = False
) -> session.Check:
    """Of the output, also where the gradients are timed; ``low``: products may be made in bf16."""
    near = session.near(exact, 2e-2 if low or inputs[0].dtype == torch.bfloat16 else 1e-4)
    return lambda name, _: near(name, forward(candidates[name], inputs))


@pytest.mark.candidates(*TORCH, *LIBRARIES)
@pytest.mark.parametrize("phase", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_attention(
    compare: Compare,
    device: torch.device,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    phase: str,
) -> None:
    batch, heads, tokens = shape
    inputs = packed(*shape, dtype, device)
    candidates: dict[str, Attention] = {
        "kdfast": lambda q, k, v: kdfast.pruned_attention(q, k, v, backend="fused"),
        "eager": eager,
        "sdpa": F.scaled_dot_product_attention,
        "compile": session.compiled(eager),
    }
    missing: dict[str, str] = {}
    if LIBRARIES:
        found, missing = libraries(dtype, inputs)
        candidates |= found
    exact = eager(*(x.detach().double() for x in inputs))
    weight = torch.randn(batch, heads, tokens, D).to(device, dtype)
    calls = {
        name: forward(call, inputs) if phase == "fwd" else with_backward(call, inputs, weight)
        for name, call in candidates.items()
    }
    products = 4 if phase == "fwd" else 14
    flops = products * batch * heads * tokens**2 * D
    compare(
        "pruned_attention",
        f"{phase} {batch}x{heads}x{tokens} {dtype}",
        calls,
        check=checking(candidates, inputs, exact),
        missing=missing,
        flops=flops,
        dtype=dtype,
        memory=phase != "fwd",
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


@pytest.mark.skipif(DRY_RUN or torch.cuda.is_available(), reason="a setting of the CPU's products")
@pytest.mark.candidates(*TORCH, *(f"{name} fp32" for name in TORCH))
@pytest.mark.parametrize("phase", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize("shape", LOWERED, ids=str)
def bench_medium(
    compare: Compare, precision, device: torch.device, shape: tuple[int, int, int], phase: str
) -> None:
    """fp32 under set_float32_matmul_precision("medium"), against every candidate with and without.

    torch may leave its own products in fp32 where bf16 would not be faster for it.
    """
    inputs = packed(*shape, torch.float32, device)
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
    weight = torch.randn(shape[0], shape[1], shape[2], D).to(device)
    timed = {
        name: forward(call, inputs) if phase == "fwd" else with_backward(call, inputs, weight)
        for name, call in candidates.items()
    }
    flops = (4 if phase == "fwd" else 14) * shape[0] * shape[1] * shape[2] ** 2 * D
    compare(
        "pruned_attention",
        f"{phase} {'x'.join(map(str, shape))} fp32 medium",
        timed,
        check=checking(candidates, inputs, exact, low=True),
        flops=flops,
        dtype=torch.bfloat16,
    )


@pytest.mark.candidates("kdfast", "eager", "sdpa")
@pytest.mark.parametrize("phase", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def bench_orion_windows(
    compare: Compare, device: torch.device, dtype: torch.dtype, phase: str
) -> None:
    """16 x 16 windows with zero-padded keys and RoPE on a 40 x 40 grid, 16 heads."""
    tokens, across = SIDE**2, PADDED // SIZE
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
    weight = torch.randn(1, HEADS, tokens, D).to(device, dtype)
    calls = {
        name: forward(call, inputs) if phase == "fwd" else with_backward(call, inputs, weight)
        for name, call in candidates.items()
    }
    compare(
        "pruned_attention",
        f"{phase} ORION windows {dtype}",
        calls,
        check=checking(candidates, inputs, exact),
        memory=phase != "fwd",
    )


@pytest.mark.candidates("kdfast", "native half", "all")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def bench_kept_heads(compare: Compare, device: torch.device, dtype: torch.dtype) -> None:
    """8 of 16 heads by index against 8 heads that are alone, and against all 16."""
    heads, batch, tokens = session.sized((16, 8, 257), (2, 1, 20))
    wide = packed(batch, heads, tokens, dtype, device)
    narrow = packed(batch, heads // 2, tokens, dtype, device)
    kept = list(range(0, heads, 2))
    by_index = forward(
        lambda q, k, v: kdfast.pruned_attention(q, k, v, heads=kept, backend="fused"), wide
    )
    yardsticks = {
        "native half": forward(
            lambda q, k, v: kdfast.pruned_attention(q, k, v, backend="fused"), narrow
        ),
        "all": forward(lambda q, k, v: kdfast.pruned_attention(q, k, v, backend="fused"), wide),
    }
    compare(
        "pruned_attention",
        f"fwd 8 of 16 heads {dtype}",
        {"kdfast": by_index},
        check=session.near(eager(*(x.detach().double()[:, kept] for x in wide)), 2e-2),
        yardsticks=yardsticks,
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
def bench_bias(
    compare: Compare, device: torch.device, name: str, dtype: torch.dtype, phase: str
) -> None:
    """Swin's windows with their shift masks, and BEiT's one bias; the bias gets its gradient."""
    batch, heads, tokens, dim, biases = BIASED[name]
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
    weight = torch.randn(batch, heads, tokens, dim).to(device, dtype)
    calls = {
        label: forward(call, inputs) if phase == "fwd" else with_backward(call, inputs, weight)
        for label, call in candidates.items()
    }
    flops = (4 if phase == "fwd" else 14) * batch * heads * tokens**2 * dim
    compare(
        "pruned_attention",
        f"{phase} {name} {dtype}",
        calls,
        check=checking(candidates, inputs, with_bias(*(x.double() for x in inputs))),
        flops=flops,
        dtype=dtype,
        memory=phase != "fwd",
    )
