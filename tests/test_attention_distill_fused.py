# SPDX-License-Identifier: Apache-2.0
"""The compiled attention_distill against its reference, and how it is registered."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kdfast
from kdfast import Window
from kdfast.ops import attention_distill as op
from kdfast.ops._library import EXTENSION
from kdfast.testing import assert_no_worse, rotary, run

pytestmark = pytest.mark.skipif(
    "cpu" not in op.FUSED_ON, reason="attention_distill has no compiled CPU kernel in this build"
)
KINDS = tuple(op.STATS)
# name: (B, H, N, D), (Ht, Dt), temperature, heads, teacher heads, window (grid, size), rope layout
CASES: dict[str, tuple[Any, ...]] = {
    "plain": ((2, 2, 37, 16), (2, 16), 1.0, None, None, None, None),
    "odd": ((2, 3, 37, 24), (4, 40), 2.5, [2, 0], [3, 3], None, None),
    "windows": ((3, 2, 63, 16), (2, 16), 1.0, [1], [0], ((7, 9), 4), "interleaved"),
    "cropped": ((3, 2, 12, 8), (1, 8), 1.5, [0, 1], [0, 0], ((3, 4), 3), "half"),
}


@pytest.fixture(autouse=True)
def _restore_isa() -> Iterator[None]:
    before = EXTENSION.cpu_isa()
    yield
    EXTENSION.set_cpu_isa(before)


def make_case(name: str, dtype: torch.dtype) -> tuple[Callable[..., Any], list[Tensor]]:
    """A function (q, k, v, pad, backend) -> (out, loss), and its tensors."""
    shape, (teacher_heads, teacher_dim), temperature, heads, mapped, window, layout = CASES[name]
    (batch, count, tokens, dim), live = shape, name == "windows"
    rows = tokens if window is None else window[1] ** 2
    inputs = [torch.randn(shape) for _ in range(3)] + [torch.randn(count, dim)] * live
    teacher = [torch.randn(batch, teacher_heads, tokens, teacher_dim).to(dtype) for _ in range(2)]
    rope = None if layout is None else rotary(rows, dim, layout)

    def call(backend: str, kind: str) -> Callable[..., Any]:
        def function(q: Tensor, k: Tensor, v: Tensor, *pad: Tensor) -> tuple[Tensor, Tensor]:
            return kdfast.attention_distill(
                *(q, k, v, *(x.to(q.dtype) for x in teacher)),
                **{"heads": heads, "teacher_heads": mapped, "temperature": temperature},
                **{"kind": kind, "rope": rope, "backend": backend},
                window=None if window is None else Window(*window, *pad),
            )

        return function

    return call, [x.to(dtype) for x in inputs]


def compare(call: Callable[..., Any], inputs: list[Tensor], kinds: Sequence[str] = KINDS) -> None:
    """assert_no_worse per result, over all kinds at once: one scalar alone says little."""
    pools: dict[str, list[list[Tensor]]] = {}
    for kind in kinds:
        fused, eager = (run(call(b, kind), inputs) for b in ("fused", "reference"))
        exact = run(call("reference", kind), [x.double() for x in inputs])
        names = ("out", "loss", "dq", "dk", "dv", "dpad")
        for name, *triple in zip(names, fused, exact, eager, strict=False):
            size = float(triple[1].square().mean().sqrt())
            # A power of two makes the kinds of one size without rounding.
            unit = 2.0 ** -round(math.log2(size)) if size > 0 else 1.0
            pools.setdefault(name, []).append([x.flatten() * unit for x in triple])
    for name, triples in pools.items():
        fused, exact, eager = (torch.cat(x) for x in zip(*triples, strict=True))
        assert_no_worse(name, fused, exact, eager)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_forward_backward(case: str, dtype: torch.dtype) -> None:
    call, inputs = make_case(case, dtype)
    compare(call, inputs)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("teacher_dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_teacher_of_another_dtype(teacher_dtype: torch.dtype) -> None:
    x = [torch.randn(1, 2, 37, 20) for _ in range(5)]
    teacher = [t.to(teacher_dtype) for t in x[3:]]

    def call(backend: str, kind: str) -> Callable[..., Any]:
        return lambda *t: kdfast.attention_distill(
            *t, *teacher, kind=kind, temperature=1.5, backend=backend
        )

    compare(call, x[:3])
    out, _ = kdfast.attention_distill(*(t.half() for t in x[:3]), *teacher, backend="fused")
    assert out.dtype == torch.float16


def test_products_in_bf16_need_bf16_on_both_sides() -> None:
    isa = "avx512_bf16"
    if isa not in EXTENSION.available_isas():
        pytest.skip(f"this CPU cannot run {isa}")
    student = [torch.randn(1, 2, 37, 20).bfloat16() for _ in range(3)]
    for dtype, same in ((torch.bfloat16, False), (torch.float32, True)):
        teacher = [torch.randn(1, 2, 37, 24, dtype=dtype) for _ in range(2)]
        results = []
        for name in ("avx512", isa):
            EXTENSION.set_cpu_isa(name)
            call = partial(kdfast.attention_distill, backend="fused")
            results.append(run(lambda *x, c=call, t=teacher: c(*x, *t), student))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)) == same


@pytest.mark.parametrize("scale", [0.3, -0.25])
def test_scales_in_bf16(scale: float) -> None:
    """A scale that is not a power of two cannot ride on the rounded queries; nor a sign on keys."""
    x = [torch.randn(2, 2, 50, 32) for _ in range(5)]

    def call(backend: str, kind: str) -> Callable[..., Any]:
        return lambda *t: kdfast.attention_distill(
            *t,
            *(y.to(torch.bfloat16).to(t[0].dtype) for y in x[3:]),
            **{"kind": kind, "scale": scale, "teacher_scale": -1.1 * scale, "backend": backend},
        )

    compare(call, [t.bfloat16() for t in x[:3]])


@pytest.mark.parametrize("tokens", [385, 800])
def test_several_blocks(tokens: int) -> None:
    """More keys than a tile of the backward has; more than the forward's taller blocks take."""
    x = [torch.randn(1, 1, tokens, 16) for _ in range(5)]

    def call(backend: str, kind: str) -> Callable[..., Any]:
        return lambda *t: kdfast.attention_distill(
            *t, *(y.to(t[0].dtype) for y in x[3:]), kind=kind, temperature=1.5, backend=backend
        )

    compare(call, x[:3], ["kl", "cosine"])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(0, 2), st.integers(1, 3), st.integers(1, 70), st.integers(1, 40)),
    st.integers(1, 40),
    st.sampled_from(KINDS),
    st.floats(0.5, 8),
)
def test_any_shape(
    shape: tuple[int, int, int, int], teacher_dim: int, kind: str, temperature: float
) -> None:
    x = [torch.randn(shape) for _ in range(3)]
    teacher = [torch.randn(*shape[:3], teacher_dim) for _ in range(2)]
    args = {"kind": kind, "temperature": temperature}
    fused, eager = (
        run(lambda *t, b=b: kdfast.attention_distill(*t, *teacher, **args, backend=b), x)
        for b in ("fused", "reference")
    )
    for a, b in zip(fused, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits(kind: str) -> None:
    """Scores up to +-1e5 and one-hot maps; gradients would be some 1e4 if they did not vanish."""
    x = [torch.randn(1, 2, 40, 16) * 64 for _ in range(5)]

    def call(*tensors: Tensor, backend: str) -> Any:
        return kdfast.attention_distill(*tensors, kind=kind, scale=1.0, backend=backend)

    fused = run(lambda *t: call(*t, backend="fused"), x)
    exact = run(lambda *t: call(*t, backend="reference"), [t.double() for t in x])
    for name, a, b in zip("out loss dq dk dv".split(), fused, exact, strict=False):
        torch.testing.assert_close(
            a.double(), b, rtol=1e-4, atol=0.1, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_chunks(dtype: torch.dtype) -> None:
    """Chunks of queries, pads, two head dims, signs of both scales."""
    rope, teacher_rope = rotary(16, 40, "interleaved"), rotary(16, 24, "half")
    window = Window((5, 6), 4, torch.randn(3, 40).to(dtype))
    windowed = {"rope": rope, "teacher_rope": teacher_rope, "window": window}
    for tokens, options, kinds in (
        (350, {}, ["kl", "jsd"]),
        (30, windowed, KINDS),
        (30, {**windowed, "temperature": 3.0}, KINDS),
    ):
        x = [torch.randn(2, 3, tokens, 40).to(dtype) for _ in range(3)]
        teacher = [torch.randn(2, 2, tokens, 24).to(dtype) for _ in range(2)]

        def call(backend: str, kind: str, teacher=teacher, options=options) -> Callable[..., Any]:  # type: ignore[no-untyped-def]
            return lambda *t: kdfast.attention_distill(
                *(*t, *(y.to(t[0].dtype) for y in teacher)),
                **{"kind": kind, "backend": backend, "heads": [2, 0], "teacher_heads": [1, 1]},
                **{"scale": -0.2, "teacher_scale": 0.3, **options},
            )

        compare(call, x, kinds)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kind", KINDS)
def test_student_at_the_teacher(kind: str) -> None:
    """The same rows on both sides have the same bits, and the gradient is what rounding leaves."""
    for dtype in (torch.float32, torch.bfloat16):
        for temperature in (1.0, 1.7):
            q, k, v = (torch.randn(1, 2, 50, 16).to(dtype).requires_grad_() for _ in range(3))
            args = {"kind": kind, "temperature": temperature, "backend": "fused"}
            _, loss = kdfast.attention_distill(q, k, v, q, k, **args)
            bounds = {"mse": 1e-15, "jsd": 2e-7, "cosine": 2e-7}
            assert abs(loss.item()) <= bounds.get(kind, 0)
            assert all(g.abs().max() < 1e-7 for g in torch.autograd.grad(loss, (q, k)))


def test_layouts() -> None:
    packed = torch.randn(2, 9, 3, 2, 16, dtype=torch.float64)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    strided = torch.randn(2, 2, 16, 9, dtype=torch.float64).mT
    expanded = torch.randn(1, 1, 9, 16, dtype=torch.float64).expand(2, 2, 9, 16)
    call = lambda b: lambda *x: kdfast.attention_distill(*x, strided, expanded, backend=b)  # noqa: E731
    fused, eager = (
        run(call(b), [t.contiguous() for t in (q, k, v)]) for b in ("fused", "reference")
    )
    for a, b in zip(fused, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    for got, want in zip(call("fused")(q, k, v), fused[:2], strict=True):
        assert torch.equal(got, want)
    assert torch.equal(call("fused")(strided, k, v)[0], call("fused")(strided.clone(), k, v)[0])


@pytest.mark.parametrize("pick", [0, 1])
def test_either_result_alone(pick: int) -> None:
    x = [torch.randn(1, 2, 7, 8, dtype=torch.float64) for _ in range(5)]
    fused, eager = (
        run(lambda *t, b=b: kdfast.attention_distill(*t, *x[3:], backend=b)[pick], x[:3])
        for b in ("fused", "reference")
    )
    for a, b in zip(fused, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("isa")
def test_tiny_temperature() -> None:
    """Maps are one-hot; the last vector of queries has lanes without one."""
    x = [torch.randn(1, 1, 37, 16) for _ in range(5)]
    for kind in ("mse", "cosine"):
        call = partial(kdfast.attention_distill, kind=kind, backend="fused")
        fused, warm = (
            run(lambda *t, c=call, s=s: c(*t, *x[3:], temperature=s), x[:3]) for s in (1e-6, 1.0)
        )
        hit = (x[0] @ x[1].mT).argmax(-1) == (x[3] @ x[4].mT).argmax(-1)
        want = (~hit).float().mean() * (2 if kind == "mse" else 1)
        torch.testing.assert_close(fused[1], want, rtol=1e-6, atol=1e-6)
        assert all(t.isfinite().all() for t in fused)
        assert torch.equal(fused[4], warm[4])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_threads(dtype: torch.dtype, kind: str) -> None:
    call, inputs = make_case("windows", dtype)
    results = []
    for threads in (1, 1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(1)  # of the upstream gradients
        results.append(run(call("fused", kind), inputs))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_saves_only_rows(kind: str) -> None:
    def extra_bytes(tokens: int) -> int:
        """Bytes kept for the backward that are not inputs."""
        x = [torch.randn(1, 1, tokens, 8, requires_grad=True) for _ in range(5)]
        inputs, saved = {t.data_ptr() for t in x}, []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            kdfast.attention_distill(*x, kind=kind, backend="fused")
        return sum(t.nbytes for t in saved if t.data_ptr() not in inputs)

    # out, D values per row, and the statistics.
    assert extra_bytes(64) == 4 * 64 * (8 + op.STATS[kind])
    assert extra_bytes(128) == 2 * extra_bytes(64)


def operands(kind: str, window: bool) -> tuple[Any, ...]:
    """Arguments of the registered op itself."""
    q, k, v = (torch.randn(1, 2, 6, 4, requires_grad=True) for _ in range(3))
    teacher = [torch.randn(1, 3, 6, 2) for _ in range(2)]
    table = torch.randn(4, 4)
    small = torch.randn(4, 2)
    pad = torch.randn(2, 4, requires_grad=True)
    student = (table, table, 0, True, 0.5, [2, 3], 2, pad)
    side = (small, small, 0, False, 0.7)
    if not window:
        student, side = (None, None, 0, True, 0.5, None, 0, None), (None, None, 0, True, 0.7)
    return (q, k, v, *teacher, [1], [2], *student, *side, 1.3, kind, 0)


@pytest.mark.parametrize("window", [False, True])
def test_registration(window: bool) -> None:
    arguments = operands("cosine", window)
    ops = torch.ops.kdfast
    torch.library.opcheck(ops.attention_distill.default, arguments)
    out, loss, stats = (x.detach() for x in ops.attention_distill.default(*arguments))
    plain = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    backward = (torch.randn_like(out), torch.randn(()), out, stats, *plain)
    torch.library.opcheck(ops.attention_distill_bwd.default, backward)


def test_compile() -> None:
    call, inputs = make_case("windows", torch.float32)
    eager = run(call("fused", "kl"), inputs)
    torch._dynamo.reset()
    compiled = torch.compile(call("fused", "kl"), fullgraph=True, backend="aot_eager")
    for a, b in zip(eager, run(compiled, inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_second_derivative() -> None:
    x = [torch.randn(1, 2, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(5)]
    pad = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    table = rotary(9, 8)
    results = []
    for backend in ("fused", "reference"):
        out, loss = kdfast.attention_distill(
            *x, backend=backend, rope=table, window=Window((2, 2), 3, pad), kind="jsd"
        )
        wanted = [*x[:3], pad]
        first = torch.autograd.grad(out.sin().sum() + loss, wanted, create_graph=True)
        results.append(torch.autograd.grad(sum(g.sin().sum() for g in first), wanted))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_kernel_rejects_what_would_read_outside() -> None:
    call = torch.ops.kdfast.attention_distill.default
    good = [x.detach() if isinstance(x, Tensor) else x for x in operands("kl", True)]
    bad = {
        1: (torch.randn(1, 2, 5, 4), "of one shape and dtype"),
        2: (torch.randn(1, 2, 6, 4).half(), "of one shape and dtype"),
        3: (torch.randn(1, 3, 6, 3), "of one shape and dtype"),
        5: ([2], r"head must be in \[0, 2\)"),
        6: ([3], r"head must be in \[0, 3\)"),
        7: (torch.randn(3, 4), "cos and sin must be"),
        12: ([2, 4], "grid must hold 6 tokens"),
        14: (torch.randn(1, 4), r"pad_value must be \(2, 4\)"),
        21: ("l1", "kind is unknown"),
        22: (3, "products must be 0, 1 or 2"),
    }
    call(*good)
    for index, (value, match) in bad.items():
        with pytest.raises(ValueError, match=match):
            call(*good[:index], value, *good[index + 1 :])
