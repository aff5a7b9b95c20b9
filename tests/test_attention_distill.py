# SPDX-License-Identifier: Apache-2.0
"""The reference of attention_distill, its errors, and what holds for every backend."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import kdfast
from kdfast import Rope, Window
from kdfast.ops import attention_distill as op
from kdfast.testing import rotary, run

KINDS = tuple(op.STATS)
# Distances of P = (1/2, 1/2) from R = (3/4, 1/4), by hand.
LITERAL = {
    "kl": 0.130812,
    "reverse_kl": 0.143841,
    "jsd": 0.033822,
    "mse": 0.125,
    "cosine": 0.105573,
    "logit_mse": 0.322427,
}


def make(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.fixture(params=["reference", "fused"])
def backend(request: pytest.FixtureRequest) -> str:
    """Both backends, where the compiled one exists."""
    if request.param == "fused":
        request.getfixturevalue("compiled")
        if "cpu" not in op.FUSED_ON:
            pytest.skip("attention_distill has no compiled CPU kernel in this build")
    return request.param


def literal_case(kind: str, temperature: float, backend: str) -> float:
    """One query with the rows of LITERAL at this temperature; a second query with equal maps."""
    column = lambda *x: torch.tensor(x, dtype=torch.float64).view(1, 1, 2, 1)  # noqa: E731
    q, k = column(temperature, 0), column(math.log(0.5), math.log(0.5))
    teacher_k = column(math.log(0.75), math.log(0.25))
    _, loss = kdfast.attention_distill(
        *(q, k, column(1, 1), q, teacher_k),
        **{"kind": kind, "temperature": temperature, "scale": 1.0, "teacher_scale": 1.0},
        backend=backend,
    )
    return 2 * loss.item()


def test_each_result_alone_has_its_gradients(backend: str) -> None:
    leaves = [make(1, 2, 5, 4).requires_grad_() for _ in range(3)]
    weight, *teacher = (make(1, 2, 5, 4) for _ in range(3))

    def gradients(name: str) -> tuple[Tensor, ...]:
        out, loss = kdfast.attention_distill(*leaves, *teacher, backend=backend)
        value = {"out": (out * weight).sum(), "loss": loss}
        total = sum(value.values()) if name == "both" else value[name]
        return torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)

    for a, b, both in zip(*map(gradients, ("out", "loss", "both")), strict=True):
        torch.testing.assert_close(a + b, both)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
def test_literal(kind: str, temperature: float, backend: str) -> None:
    assert literal_case(kind, temperature, backend) == pytest.approx(LITERAL[kind], rel=1e-5)


def test_pads_literal(backend: str) -> None:
    # A 1 x 1 grid in a 2 x 2 window: one real key and three pads of logit 0. Student logit 0:
    # P = 1/4 each; teacher logit ln 9: R = 3/4 for the key and 1/12 for each pad.
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    window = Window((1, 1), 2, torch.zeros(1, 1, dtype=torch.float64))
    p, r = [1 / 4] * 4, [3 / 4] + [1 / 12] * 3
    pairs = list(zip(p, r, strict=True))
    dot = sum(x * y for x, y in pairs)
    norms = math.sqrt(sum(x * x for x in p) * sum(y * y for y in r))
    middle = [(x + y) / 2 for x, y in pairs]
    want = {
        "kl": sum(y * math.log(y / x) for x, y in pairs),
        "reverse_kl": sum(x * math.log(x / y) for x, y in pairs),
        "jsd": sum(
            (x * math.log(x / m) + y * math.log(y / m)) / 2
            for (x, y), m in zip(pairs, middle, strict=True)
        ),
        "mse": sum((x - y) ** 2 for x, y in pairs),
        "cosine": 1 - dot / norms,
        "logit_mse": math.log(9) ** 2,
    }
    for kind in KINDS:
        args = {"kind": kind, "scale": 1.0, "teacher_scale": 1.0, "backend": backend}
        call = lambda w, a=args: kdfast.attention_distill(  # noqa: E731
            *(one * 0, one, one, one, one * math.log(9)), window=w, **a
        )[1].item()
        assert call(window) == pytest.approx(want[kind], rel=1e-12)
        bare = call(Window((1, 1), 2))
        assert bare == pytest.approx(want[kind] if kind == "logit_mse" else 0.0, abs=1e-15)


def oracle_distance(a: Tensor, b: Tensor, real: Tensor, kind: str) -> Tensor:
    """Sum over rows from plain probabilities; real marks the columns of real keys."""
    p, r = a.softmax(-1), b.softmax(-1)
    if kind == "logit_mse":
        return ((a - b) ** 2)[..., real].mean(-1).sum()
    terms = {
        "kl": lambda: r * (r / p).log(),
        "reverse_kl": lambda: p * (p / r).log(),
        "jsd": lambda: (p * (2 * p / (p + r)).log() + r * (2 * r / (p + r)).log()) / 2,
        "mse": lambda: p * p - 2 * p * r + r * r,
        "cosine": lambda: (
            1 / p.shape[-1]
            - torch.nn.functional.normalize(p, dim=-1) * torch.nn.functional.normalize(r, dim=-1)
        ),
    }
    return terms[kind]().sum()


def padded_oracle(
    q: Tensor,
    k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    temperature: float,
    kind: str,
    grid: tuple[int, int],
    size: int,
    ropes: tuple[Rope, Rope],
) -> Tensor:
    """The long way: q, k padded by zero tokens, every window whole, padded queries left out."""
    (h, w), count = grid, q.shape[0] * q.shape[1] * q.shape[2]
    rows, cols = -(-h // size), -(-w // size)

    def windows(x: Tensor, rope: Rope, r: int, c: int) -> Tensor:
        full = x.new_zeros(*x.shape[:2], rows * size, cols * size, x.shape[3])
        full[:, :, :h, :w] = x.unflatten(2, grid)
        here = full[:, :, r * size : r * size + size, c * size : c * size + size]
        return op.attention.rotated(here.flatten(2, 3), rope, None)

    total = q.new_zeros(())
    for r, c in itertools.product(range(rows), range(cols)):
        real = torch.zeros(rows * size, cols * size, dtype=torch.bool)
        real[:h, :w] = True
        real = real[r * size : r * size + size, c * size : c * size + size].flatten()
        scores = [
            windows(x, rope, r, c) @ windows(y, rope, r, c).mT / x.shape[3] ** 0.5 / temperature
            for x, y, rope in ((q, k, ropes[0]), (teacher_q, teacher_k, ropes[1]))
        ]
        total = total + oracle_distance(*(s[:, :, real] for s in scores), real, kind)
    return total / count


@pytest.mark.parametrize(("grid", "size"), [((5, 7), 3), ((2, 3), 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_windows_match_padding(kind: str, grid: tuple[int, int], size: int, backend: str) -> None:
    n = grid[0] * grid[1]
    qkv, pad = [make(2, 3, n, 6) for _ in range(3)], make(3, 6)
    teacher = [make(2, 4, n, 4) for _ in range(2)]
    ropes = rotary(size**2, 6), rotary(size**2, 4)
    heads, mapped = [2, 0], [1, 3]

    def loss(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        return kdfast.attention_distill(
            *(q, k, v, *teacher),
            **{"heads": heads, "teacher_heads": mapped, "temperature": 1.7, "kind": kind},
            **{"rope": ropes[0], "teacher_rope": ropes[1], "window": Window(grid, size, p)},
            backend=backend,
        )[1]

    def oracle(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        picked = [x[:, heads] for x in (q, k)] + [x[:, mapped] for x in teacher]
        return padded_oracle(*picked, 1.7, kind, grid, size, ropes)

    got, want = (run(f, [*qkv, pad]) for f in (loss, oracle))
    for name, a, b in zip("loss dq dk dv dpad".split(), got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    assert not got[1][:, 1].any()
    assert not got[3].any() and not got[4].any()


def test_out_is_pruned_attention(backend: str) -> None:
    q, k, v, teacher_q, teacher_k = (make(2, 3, 12, 8) for _ in range(5))
    args: dict[str, Any] = {
        "heads": [2, 1],
        "rope": rotary(4, 8),
        "window": Window((3, 4), 2, make(3, 8)),
        "scale": 0.4,
    }
    out, loss = kdfast.attention_distill(
        *(q, k, v, teacher_q, teacher_k), teacher_heads=[0, 2], **args, backend=backend
    )
    want = kdfast.pruned_attention(q, k, v, **args, backend="reference")
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    assert out.stride() == want.stride()
    assert loss.shape == () and loss.dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_zero_at_the_teacher(kind: str, backend: str) -> None:
    q, k, v = (make(1, 2, 9, 8).requires_grad_() for _ in range(3))
    _, loss = kdfast.attention_distill(
        *(q, k, v, q, k), kind=kind, temperature=2.0, rope=rotary(9, 8), backend=backend
    )
    assert abs(loss.item()) < 1e-14
    for grad in torch.autograd.grad(loss, (q, k)):
        assert grad.abs().max() < 1e-14
    args = {"kind": kind, "temperature": 2.0, "backend": backend}
    assert kdfast.attention_distill(q, k, v, q * 1.1, k, **args)[1].item() > 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, backend: str) -> None:
    leaves = [make(1, 2, 6, 4).requires_grad_() for _ in range(3)]
    pad = make(2, 4).requires_grad_()
    teacher = [make(1, 3, 6, 2).requires_grad_() for _ in range(2)]

    def call(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        return kdfast.attention_distill(
            *(q, k, v, *teacher),
            **{"heads": [1], "teacher_heads": [2], "temperature": 0.8, "kind": kind},
            **{"rope": rotary(4, 4), "teacher_rope": rotary(4, 2)},
            **{"window": Window((2, 3), 2, p), "backend": backend},
        )

    assert torch.autograd.gradcheck(call, (*leaves, pad))
    (call(*leaves, pad)[0].sum() + call(*leaves, pad)[1]).backward()
    assert all(x.grad is None for x in teacher)
    for x in (*(leaf.grad for leaf in leaves), pad.grad[None]):
        assert not x[:, 0].any()
        assert x[:, 1].any()


@pytest.mark.parametrize("kind", KINDS)
def test_temperature_divides_the_scores(kind: str, backend: str) -> None:
    x = [make(1, 2, 7, 8) for _ in range(5)]
    args = {"kind": kind, "backend": backend}
    _, warm = kdfast.attention_distill(*x, temperature=3.0, scale=0.6, teacher_scale=0.9, **args)
    _, same = kdfast.attention_distill(*x, scale=0.2, teacher_scale=0.3, **args)
    torch.testing.assert_close(warm, same, rtol=1e-12, atol=0)


def test_teacher_heads(backend: str) -> None:
    q, k, v = (make(1, 3, 7, 8) for _ in range(3))
    teacher = [make(1, 4, 7, 16) for _ in range(2)]
    call = lambda *t, **a: kdfast.attention_distill(q, k, v, *t, **a, backend=backend)[1]  # noqa: E731
    mapped = call(*teacher, teacher_heads=[3, 0, 3])
    spelt = [x[:, [3, 0, 3]] for x in teacher]
    assert torch.equal(mapped, call(*spelt))
    assert torch.equal(mapped, call(*teacher, teacher_heads=torch.tensor([3, 0, 3])))
    single = [call(*teacher, heads=[i], teacher_heads=[t]) for i, t in enumerate((3, 0, 3))]
    torch.testing.assert_close(mapped, torch.stack(single).mean())


def test_teacher_rope_defaults_to_rope(backend: str) -> None:
    x = [make(1, 2, 9, 8) for _ in range(5)]
    rope, plain = rotary(9, 8), Rope(torch.ones(9, 8), torch.zeros(9, 8))
    call = lambda **a: kdfast.attention_distill(*x, **a, backend=backend)[1]  # noqa: E731
    assert torch.equal(call(rope=rope), call(rope=rope, teacher_rope=rope))
    turned = [*x[:3], *(op.attention.rotated(t, rope, None) for t in x[3:])]
    want = kdfast.attention_distill(*turned, rope=rope, teacher_rope=plain, backend=backend)[1]
    torch.testing.assert_close(call(rope=rope), want)
    assert not torch.isclose(call(rope=rope), call(rope=rope, teacher_rope=plain), rtol=1e-3)


def test_empty_batch(backend: str) -> None:
    x = [make(0, 2, 5, 8).requires_grad_() for _ in range(5)]
    out, loss = kdfast.attention_distill(*x, backend=backend)
    assert out.shape == (0, 2, 5, 8) and loss.item() == 0
    (out.sum() + loss).backward()
    assert x[0].grad is not None and x[0].grad.shape == (0, 2, 5, 8)


def test_teacher_dtype_and_autocast(backend: str) -> None:
    q, k, v, teacher_q, teacher_k = (make(1, 2, 9, 16).float() for _ in range(5))
    args = {"backend": backend}
    low = [teacher_q.bfloat16(), teacher_k.bfloat16()]
    _, loss = kdfast.attention_distill(q, k, v, *low, **args)
    want = kdfast.attention_distill(q, k, v, *(x.float() for x in low), **args)[1]
    torch.testing.assert_close(loss, want)
    assert loss.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, loss = kdfast.attention_distill(q, k, v, teacher_q, low[1], **args)
    x = [t.bfloat16() for t in (q, k, v, teacher_q, teacher_k)]
    want_out, want = kdfast.attention_distill(*x, **args)
    assert out.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert torch.equal(out, want_out) and torch.equal(loss, want)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"kind": "l1"}, ValueError, "kind must be one of .*got 'l1'"),
        ({"temperature": 0.0}, ValueError, "temperature must be above 0, got 0.0"),
        ({"temperature": math.nan}, ValueError, "temperature must be above 0"),
        ({"heads": [2]}, ValueError, r"heads must be in \[0, 2\)"),
        ({"heads": [1, 1]}, ValueError, "heads must not repeat"),
        ({"teacher_heads": [2, 2, 2]}, ValueError, "each of the 2 kept student heads, got 3"),
        ({"teacher_heads": [0, 4]}, ValueError, r"teacher_heads must be in \[0, 3\)"),
        ({"teacher_heads": [0.5, 1]}, TypeError, "teacher_heads must hold ints"),
        ({"teacher_heads": None}, ValueError, "each of the 2 kept student heads, got 3"),
        ({"k": make(1, 2, 5, 8).float()}, TypeError, "k must be torch.float64 like q"),
        ({"teacher_k": make(1, 3, 5, 7)}, ValueError, "teacher_k must be .* like teacher_q"),
        ({"teacher_q": make(1, 3, 6, 6), "teacher_k": make(1, 3, 6, 6)}, ValueError, "B, N = 1, 5"),
        ({"teacher_q": torch.ones(1, 3, 5, 6).int()}, TypeError, "teacher_q must be one of"),
        ({"rope": rotary(5, 8)}, ValueError, "teacher_rope must be given when Dt differs"),
        (
            {"rope": rotary(5, 8), "teacher_rope": rotary(5, 8)},
            ValueError,
            r"\(teacher\): rope.cos must be \(5, 6\)",
        ),
        ({"window": Window((2, 2), 2)}, ValueError, "window.grid must hold N = 5"),
        ({"backend": "fast"}, ValueError, "backend must be one of"),
    ],
)
def test_rejects(change: dict[str, Any], error: type[Exception], match: str) -> None:
    args: dict[str, Any] = {name: make(1, 2, 5, 8) for name in ("q", "k", "v")}
    args |= {name: make(1, 3, 5, 6) for name in ("teacher_q", "teacher_k")}
    args |= {"teacher_heads": [0, 2]} | change
    with pytest.raises(error, match=match):
        kdfast.attention_distill(**args)
