# SPDX-License-Identifier: Apache-2.0
"""Every op on a CUDA device, against the fp64 reference on the CPU; `python -m bench.gpu` runs it.

With KDFAST_DRY_RUN=1 the same tests run on the CPU, the Triton kernels in the interpreter, where
they show that the tests themselves are right.
"""

import importlib
from collections.abc import Callable
from typing import Any
from unittest import SkipTest

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kdfast
from kdfast import Rope, Window
from kdfast.ops._library import fused_devices, not_compiled
from kdfast.ops.attention_entropy import attention_entropy
from kdfast.testing import DRY_RUN, SHAPES, assert_no_worse, launch_on_cpu, rotary, run

HAS_CUDA = torch.cuda.is_available()
if not (HAS_CUDA or DRY_RUN):
    raise SkipTest("no CUDA device; KDFAST_DRY_RUN=1 runs these tests in Triton's interpreter")
DEVICE = torch.device("cpu" if DRY_RUN else "cuda")
if DRY_RUN:
    REGISTERED = launch_on_cpu()
else:
    # Before any test file asks for the interpreter, which holds for the whole process.
    importlib.import_module("triton")
only_cuda = pytest.mark.skipif(DRY_RUN, reason="dry run: there is no CUDA device")
# CUDA C++, which an install without a CUDA compiler has not.
NO_GATHER = not_compiled("head_gather", DEVICE, fused_devices("head_gather"))
gathers = pytest.mark.skipif(NO_GATHER is not None, reason=str(NO_GATHER))
# The interpreter multiplies bf16 wrongly.
DTYPES = [torch.float32, torch.float16, *([] if DRY_RUN else [torch.bfloat16])]
LOW = DTYPES[-1]
NAMES = ["tiny"] if DRY_RUN else list(SHAPES)
Call = Callable[..., Any]


def on(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A floating x in ``dtype`` and everything else as it is, on the device."""
    return x.to(DEVICE, dtype if x.is_floating_point() else x.dtype)


def compare(call: Call, inputs: list[Tensor], dtype: torch.dtype) -> None:
    """``call(backend, *inputs)``: results and gradients, fused and eager on the device, exact."""
    rounded = [x.to(dtype).double() if x.is_floating_point() else x for x in inputs]
    exact = run(lambda *xs: call("reference", *xs), rounded)
    low = [on(x, dtype) for x in rounded]
    fused = run(lambda *xs: call("fused", *xs), low)
    eager = run(lambda *xs: call("reference", *xs), low)
    # Three TF32 products in place of one of fp32 drop what is below 2^-21 of a product.
    eps = 2.0**-21 if dtype == torch.float32 and not DRY_RUN else None
    for i, triple in enumerate(zip(fused, exact, eager, strict=True)):
        # The error of a single number may be 0 by luck.
        limit = 2.0**-17 if triple[0].numel() == 1 else eps
        assert_no_worse(f"result {i}", *(x.cpu() for x in triple), eps=limit)


def packed(shape: tuple[int, int, int, int]) -> Tensor:
    batch, heads, tokens, dim = shape
    return torch.randn(batch, tokens, 3, heads, dim)


def heads_first(packed: Tensor) -> tuple[Tensor, ...]:
    """q, k and v (B, H, N, D) as views of the projection (B, N, 3, H, D)."""
    return tuple(x.transpose(1, 2) for x in packed.unbind(2))


def placed(rope: Rope | None, like: Tensor) -> Rope | None:
    if rope is None:
        return None
    return Rope(rope.cos.to(like.device), rope.sin.to(like.device), rope.prefix, rope.layout)


def attention(
    packed: Tensor,
    pad: Tensor,
    *,
    backend: str = "fused",
    heads: list[int] | None = None,
    rope: Rope | None = None,
    window: tuple[tuple[int, int], int] | None = None,
) -> Tensor:
    q, k, v = heads_first(packed)
    here = None if window is None else Window(*window, pad)
    return kdfast.pruned_attention(
        q, k, v, heads=heads, rope=placed(rope, q), window=here, backend=backend
    )


def distillation(
    packed: Tensor,
    pad: Tensor,
    teacher: Tensor,
    *,
    backend: str = "fused",
    kind: str = "kl",
    temperature: float = 1.0,
    rope: Rope | None = None,
    window: tuple[tuple[int, int], int] | None = None,
) -> tuple[Tensor, Tensor]:
    q, k, v = heads_first(packed)
    tq, tk, _ = heads_first(teacher)
    here = None if window is None else Window(*window, pad)
    out, loss = kdfast.attention_distill(
        *(q, k, v, tq, tk),
        heads=[q.shape[1] - 1],
        teacher_heads=[0],
        rope=placed(rope, q),
        window=here,
        kind=kind,
        temperature=temperature,
        backend=backend,
    )
    return out, 100 * loss


@pytest.mark.parametrize("dtype", DTYPES[-1:] if DRY_RUN else DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_attention(name: str, dtype: torch.dtype) -> None:
    shape = SHAPES[name]
    kept = list(range(0, shape[1], 2))[::-1]

    def call(backend: str, packed: Tensor) -> Tensor:
        return attention(packed, packed, backend=backend, heads=kept)

    compare(call, [packed(shape)], dtype)


ROTATIONS = {
    "interleaved, prefix": ((2, 2, 21, 40), rotary(20, 40, prefix=1), None),
    "half, head dim 72": ((1, 2, 197, 72), rotary(197, 72, "half"), None),
    "windows": ((1, 2, 6, 40), rotary(4, 40), ((2, 3), 2)),
    "orion windows": ((1, 2, 1600, 64), rotary(256, 64), ((40, 40), 16)),
}


@pytest.mark.parametrize("case", list(ROTATIONS)[:: 2 if DRY_RUN else 1])
def test_rotation_and_windows(case: str) -> None:
    shape, rope, window = ROTATIONS[case]

    def call(backend: str, packed: Tensor, pad: Tensor) -> Tensor:
        return attention(packed, pad, backend=backend, heads=[1], rope=rope, window=window)

    compare(call, [packed(shape), torch.randn(shape[1], shape[3])], LOW)


BIASES = {
    "swin's windows": ((8, 3, 49, 32), 4, [2, 0]),
    "beit": ((4, 2, 197, 64), 1, None),
    "head dim 80": ((2, 2, 33, 80), 2, [1]),
}


@pytest.mark.parametrize("dtype", DTYPES[-1:] if DRY_RUN else DTYPES, ids=str)
@pytest.mark.parametrize("case", list(BIASES)[2 if DRY_RUN else 0 :])
def test_bias(case: str, dtype: torch.dtype) -> None:
    shape, biases, heads = BIASES[case]
    bias = torch.randn(biases, shape[1], shape[2], shape[2])
    bias[:, -1, 1] = -torch.inf
    bias[-1, :, 2:, ::3] = -100.0

    def call(backend: str, packed: Tensor, bias: Tensor) -> Tensor:
        q, k, v = heads_first(packed)
        return kdfast.pruned_attention(q, k, v, heads=heads, bias=bias, backend=backend)

    compare(call, [packed(shape), bias], dtype)


def compare_distillation(
    shape: tuple[int, int, int, int], dtype: torch.dtype, **options: Any
) -> None:
    teacher = packed(shape).to(dtype).double()

    def call(backend: str, packed: Tensor, pad: Tensor) -> Any:
        goal = teacher.to(packed)
        return distillation(packed, pad, goal, backend=backend, **options)

    compare(call, [packed(shape), torch.randn(shape[1], shape[3])], dtype)


@pytest.mark.parametrize("name", NAMES)
def test_distill(name: str) -> None:
    compare_distillation(SHAPES[name], LOW)


KINDS = ["cosine", "reverse_kl", "jsd", "mse", "logit_mse"][: 1 if DRY_RUN else None]


@pytest.mark.parametrize("kind", KINDS)
def test_distill_kinds(kind: str) -> None:
    compare_distillation(SHAPES["tiny" if DRY_RUN else "odd"], LOW, kind=kind, temperature=2.0)


@only_cuda
def test_distill_in_full_precision() -> None:
    compare_distillation(SHAPES["odd"], torch.float32)


def test_distill_windows() -> None:
    rope, window = rotary(4, 16), ((2, 3), 2)
    compare_distillation((1, 2, 6, 16), LOW, rope=rope, window=window, temperature=0.5)


@pytest.mark.parametrize("dtype", DTYPES[: 1 if DRY_RUN else None], ids=str)
@pytest.mark.parametrize("target", ["none", "indices", "probabilities"])
@pytest.mark.parametrize("classes", [33] if DRY_RUN else [33, 1000, 21841])
def test_kd_loss(classes: int, target: str, dtype: torch.dtype) -> None:
    labels = torch.randint(0, classes, (7,))
    labels[2] = -100
    soft = torch.rand(7, classes).softmax(-1)
    teacher = (3 * torch.randn(7, classes)).to(dtype).double()

    def call(backend: str, student: Tensor) -> Tensor:
        goals = {"indices": labels.to(student.device), "probabilities": soft.to(student)}
        goal = goals.get(target)
        loss: Tensor = kdfast.kd_loss(
            student, teacher.to(student), goal, label_smoothing=0.1, backend=backend
        )[0]
        return loss

    compare(call, [3 * torch.randn(7, classes)], dtype)


@pytest.mark.parametrize("classes", [33] if DRY_RUN else [33, 1000, 21841])
def test_kd_loss_in_place(classes: int) -> None:
    hidden, weight, teacher = (
        torch.randn(s, device=DEVICE) for s in ((7, 16), (16, classes), (7, classes))
    )
    target = torch.arange(7, device=DEVICE)

    def call(**choice: Any) -> Call:
        return lambda x: kdfast.kd_loss(x @ weight, teacher, target, **choice)[0]

    want = run(call(backend="fused"), [hidden])
    for got, exact in zip(run(call(inplace=True), [hidden]), want, strict=True):
        torch.testing.assert_close(got, exact)


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_linear_kd_loss(reduction: str) -> None:
    teacher = torch.randn(9, 40).double()
    labels = torch.arange(9)

    def call(backend: str, hidden: Tensor, weight: Tensor) -> Tensor:
        target = labels.to(hidden.device)
        options: dict[str, Any] = {"reduction": reduction, "backend": backend}
        if backend == "fused":
            options["chunk"] = 4
        loss: Tensor = kdfast.linear_kd_loss(hidden, weight, teacher.to(hidden), target, **options)[
            0
        ]
        return loss

    compare(call, [torch.randn(9, 16), torch.randn(40, 16)], torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[: 1 if DRY_RUN else None], ids=str)
@pytest.mark.parametrize("normalize", [None, "layer", "channel"])
@pytest.mark.parametrize("kind", ["mse", "cosine", "smooth_l1"])
def test_feature_loss(kind: str, normalize: str | None, dtype: torch.dtype) -> None:
    shape = (5, 24) if DRY_RUN else (150, 1000)
    teacher = (1 + torch.randn(shape)).to(dtype).double()

    def call(backend: str, student: Tensor) -> Tensor:
        return kdfast.feature_loss(
            student, teacher.to(student), kind=kind, normalize=normalize, backend=backend
        )

    compare(call, [torch.randn(shape)], dtype)


# Rows with and without 16 bytes for a thread, and padded ones.
WIDTHS = [(24, 24), (40, 37)] if DRY_RUN else [(2048, 2048), (2736, 2730), (24, 24), (37, 37)]


@pytest.mark.parametrize("dtype", DTYPES[: 1 if DRY_RUN else None], ids=str)
@pytest.mark.parametrize(("width", "channels"), WIDTHS)
def test_swiglu_norm(width: int, channels: int, dtype: torch.dtype) -> None:
    scale = 1 + torch.randn(channels) / 4

    def call(backend: str, packed: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return kdfast.swiglu_norm(*packed.chunk(2, -1), weight, bias, backend=backend)

    compare(call, [torch.randn(3, 50, 2 * width), scale, torch.randn(channels)], dtype)


@gathers
@pytest.mark.parametrize("heads", [[0], [3, 1]])
def test_head_gather_block(heads: list[int]) -> None:
    shapes, dims = [(32, 10), (32, 24), (32,), (10, 32), (2, 3, 32)], [0, 0, 0, 1, -1]
    tensors = [torch.randn(shape) for shape in shapes]
    keep: dict[str, Any] = {"head_dim": 8, "dims": dims}
    for dtype in (torch.float32, torch.bfloat16):
        made = [on(x, dtype) for x in tensors]
        made[1] = made[1][:, ::2]
        got = kdfast.head_gather_block(made, heads, backend="fused", **keep)
        for x, y, dim in zip(made, got, dims, strict=True):
            want = kdfast.head_gather(x.cpu(), heads, head_dim=8, dim=dim, backend="reference")
            assert torch.equal(y.cpu(), want)


@pytest.mark.parametrize("window", [None, ((4, 5), 3)])
def test_attention_entropy(window: tuple[tuple[int, int], int] | None) -> None:
    """The pruning score, in tiles of the scores; there is no kernel of its own on CUDA."""
    q, k = torch.randn(2, 2, 3, 20, 16).unbind()
    rope = rotary(9 if window else 20, 16)
    pad = torch.randn(3, 16)

    def entropy(*xs: Tensor) -> Tensor:
        here = None if window is None else Window(*window, pad.to(xs[0]))
        return attention_entropy(*xs, rope=placed(rope, xs[0]), window=here, backend="reference")[0]

    exact = entropy(q.double(), k.double())
    got = entropy(q.to(DEVICE), k.to(DEVICE))
    assert_no_worse("entropy", got.cpu(), exact, entropy(q, k), eps=2.0**-20)


@gathers
@pytest.mark.parametrize(("shape", "dim"), [((64, 40), 0), ((40, 64), 1), ((64,), 0)])
def test_head_gather(shape: tuple[int, ...], dim: int) -> None:

    def call(backend: str) -> Call:
        keep = {"head_dim": 8, "dim": dim, "backend": backend}
        return lambda x: kdfast.head_gather(x, [3, 0], **keep)

    x = torch.randn(shape)
    for dtype in (torch.float32, torch.bfloat16):
        got, want = run(call("fused"), [on(x, dtype)]), run(call("reference"), [x.to(dtype)])
        for fused, exact in zip(got, want, strict=True):
            assert torch.equal(fused.cpu(), exact)


def losses() -> dict[str, tuple[Call, list[Tensor]]]:
    """A differentiable call of every Triton op, and its inputs on the device."""
    shape = SHAPES["tiny" if DRY_RUN else "vit"]
    pad = torch.zeros(shape[1], shape[3], dtype=LOW, device=DEVICE)
    labels = torch.arange(6, device=DEVICE)
    goal, teacher = on(torch.randn(6, 40), LOW), on(packed(shape), LOW)
    scale = on(torch.randn(40), LOW)
    return {
        "pruned_attention": (lambda x: attention(x, pad), [on(packed(shape), LOW)]),
        "attention_distill": (
            lambda x: distillation(x, pad, teacher),
            [on(packed(shape), LOW)],
        ),
        "kd_loss": (
            lambda x: kdfast.kd_loss(x, goal, labels, backend="fused")[0],
            [on(torch.randn(6, 40), LOW)],
        ),
        "feature_loss": (
            lambda x: kdfast.feature_loss(x, goal, backend="fused"),
            [on(torch.randn(6, 40), LOW)],
        ),
        "swiglu_norm": (
            lambda x: kdfast.swiglu_norm(*x.chunk(2, -1), scale, scale, backend="fused"),
            [on(torch.randn(6, 80), LOW)],
        ),
        "linear_kd_loss": (
            lambda x: kdfast.linear_kd_loss(x, goal.t(), goal, labels, chunk=4)[0],
            [on(torch.randn(6, 6), LOW)],
        ),
    }


OPS = ["pruned_attention", "attention_distill", "kd_loss", "feature_loss", "linear_kd_loss"]
OPS += ["swiglu_norm"]


# The interpreter takes seconds for each op, and tests of the ops themselves compile them all.
@pytest.mark.parametrize("op", OPS[2:3] if DRY_RUN else OPS)
def test_compile(op: str) -> None:
    call, inputs = losses()[op]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager" if DRY_RUN else "inductor")
    for got, want in zip(run(compiled, inputs), run(call, inputs), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("op", OPS[1:3] if DRY_RUN else OPS)
def test_checkpointing_gives_the_same_bits(op: str) -> None:
    call, inputs = losses()[op]

    def saved(*xs: Tensor) -> Any:
        return checkpoint(call, *xs, use_reentrant=False)

    for got, want in zip(run(saved, inputs), run(call, inputs), strict=True):
        assert torch.equal(got, want)


def test_autocast() -> None:
    x = on(packed(SHAPES["tiny"]), torch.float32)
    pad = torch.zeros(2, 16, device=DEVICE)
    with torch.autocast(DEVICE.type, dtype=LOW):
        out = attention(x, pad)
        again, loss = distillation(x, pad, x)
    assert out.dtype == again.dtype == LOW
    assert loss.dtype == torch.float32
    assert torch.equal(out, attention(x.to(LOW), pad))


@only_cuda
@pytest.mark.parametrize("op", OPS)
def test_cuda_graph(op: str) -> None:
    call, (x,) = losses()[op]
    x.requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        out = call(x)
        out = out[0].sum() + out[1] if isinstance(out, tuple) else out.sum()
        return out.detach(), torch.autograd.grad(out, x)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        for got, want in zip(captured, step(), strict=True):
            assert torch.equal(got, want)


@only_cuda
def test_compile_into_cuda_graphs() -> None:
    """The graphs own what is allocated while they warm up, which the table of new heads is not."""
    heads, pad = [1, 2, 0], torch.zeros(3, 64, dtype=LOW, device=DEVICE)
    x = on(packed(SHAPES["vit"]), LOW)

    def call(x: Tensor) -> Tensor:
        return attention(x, pad, heads=heads)

    compiled = torch.compile(call, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        got = [y.clone() for y in run(compiled, [x])]
    for y, want in zip(got, run(call, [x]), strict=True):
        torch.testing.assert_close(y, want)


@only_cuda
@pytest.mark.parametrize("op", OPS)
def test_other_stream(op: str) -> None:
    call, inputs = losses()[op]
    want = run(call, inputs)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # Work in front of the call, so that a launch on another stream would come too early.
        late = [torch.zeros_like(x) for x in inputs]
        torch.cuda._sleep(20_000_000)
        for x, y in zip(late, inputs, strict=True):
            x.copy_(y)
        got = run(call, late)
    stream.synchronize()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@only_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_device(dtype: torch.dtype) -> None:
    x = packed(SHAPES["odd"]).to(dtype)
    pad = torch.zeros(3, 24, dtype=dtype)
    results = [
        run(lambda y, d=device: attention(y, pad.to(d)), [x.to(device)])
        for device in ("cuda:0", "cuda:1")
    ]
    for a, b in zip(*results, strict=True):
        assert b.device.index == 1
        assert torch.equal(a.cpu(), b.cpu())
