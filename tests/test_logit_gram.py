# SPDX-License-Identifier: Apache-2.0
"""logit_mse of attention_distill by Gram matrices, which it takes for long windows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kdfast
from kdfast import Window
from kdfast.machine.memory import peak_bytes
from kdfast.ops import _logit_gram as gram
from kdfast.ops import attention_distill as op
from kdfast.testing import assert_no_worse, rotary, run

pytestmark = pytest.mark.skipif(
    "cpu" not in op.FUSED_ON, reason="attention_distill has no compiled CPU kernel in this build"
)
# Tokens, (D, Dt), heads, teacher heads, window (grid, size), whether its pads are keys, rope.
CASES: dict[str, tuple[Any, ...]] = {
    "plain": (37, (8, 8), None, None, None, False, False),
    "wider teacher": (37, (6, 10), [2, 0], [3, 3], None, False, True),
    "narrower teacher": (37, (10, 6), [1], [0], None, False, True),
    "windows": (63, (8, 8), [2, 1], [0, 2], ((7, 9), 4), True, True),
    "cropped windows": (63, (8, 4), None, [0, 1, 1], ((7, 9), 4), False, False),
    "one window": (12, (8, 8), None, [0, 1, 1], ((3, 4), 5), True, False),
}


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gram matrices for any length, and several images at a time and in parts."""
    monkeypatch.setattr(gram, "TOKENS_PER_DIM", 0)
    monkeypatch.setattr(gram, "TILE", 5000)


def distance(teacher: list[Tensor], backend: str, **options: Any) -> Callable[..., Any]:
    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        sides = q, k, v, *(x.to(q.dtype) for x in teacher)
        return kdfast.attention_distill(*sides, kind="logit_mse", backend=backend, **options)

    return call


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case: str) -> None:
    tokens, (dim, teacher_dim), heads, mapped, window, live, rope = CASES[case]
    x = [torch.randn(3, 3, tokens, dim, dtype=torch.float64) for _ in range(3)]
    count = 4 if mapped is not None else 3
    teacher = [torch.randn(3, count, tokens, teacher_dim, dtype=torch.float64) for _ in range(2)]
    rows = tokens if window is None else window[1] ** 2
    options: dict[str, Any] = {
        **{"heads": heads, "teacher_heads": mapped, "temperature": 1.7},
        **{"scale": -0.3, "teacher_scale": 0.4},
    }
    if window is not None:
        pad = torch.randn(3, dim, dtype=torch.float64) if live else None
        options["window"] = Window(window[0], window[1], pad)
    if rope:
        options |= {"rope": rotary(rows, dim), "teacher_rope": rotary(rows, teacher_dim)}
    got, want = (run(distance(teacher, b, **options), x) for b in ("fused", "reference"))
    for name, a, b in zip("out loss dq dk dv".split(), got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("near", [False, True])
def test_no_worse_than_the_reference(near: bool, dtype: torch.dtype) -> None:
    """Also where the scores of both sides share most of their digits."""
    x = [torch.randn(2, 2, 300, 16).to(dtype) for _ in range(3)]
    teacher = [torch.randn(2, 2, 300, 16) for _ in range(2)]
    if near:
        teacher = [t.float() + 1e-3 * torch.randn(t.shape) for t in x[:2]]
    teacher = [t.to(dtype) for t in teacher]
    fused, eager = (run(distance(teacher, b), x) for b in ("fused", "reference"))
    exact = run(distance(teacher, "reference"), [t.double() for t in x])
    for name, *triple in zip("out loss dq dk dv".split(), fused, exact, eager, strict=True):
        assert_no_worse(name, *triple)


def test_zero_at_the_teacher_and_never_below() -> None:
    q, k, v = (torch.randn(1, 2, 300, 16, requires_grad=True) for _ in range(3))
    _, loss = distance([q, k], "fused")(q, k, v)
    assert loss.item() == 0
    assert not any(g.any() for g in torch.autograd.grad(loss, (q, k)))
    # The same scores from another basis: digits of the loss are lost then, not its sign.
    for seed in range(4):
        torch.manual_seed(seed)
        turn = torch.linalg.qr(torch.randn(16, 16))[0]
        _, loss = distance([q @ turn, k @ turn], "fused")(q, k, v)
        assert 0 <= loss.item() < 1e-6


def test_keeps_and_holds_no_map() -> None:
    def tensors(tokens: int) -> list[Tensor]:
        return [torch.randn(1, 1, tokens, 8, requires_grad=True) for _ in range(5)]

    def extra_bytes(tokens: int) -> int:
        x = tensors(tokens)
        inputs = {t.data_ptr() for t in x}
        saved: dict[int, Tensor] = {}
        hooks = torch.autograd.graph.saved_tensors_hooks
        with hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
            distance(x[3:], "fused")(*x[:3])
        return sum(t.nbytes for pointer, t in saved.items() if pointer not in inputs)

    # out and the log-sum-exp of the attention; twice 2 W x D for the distance.
    assert extra_bytes(256) == 4 * (256 * (8 + 1) + 2 * 16 * 8)
    assert extra_bytes(512) == 4 * (512 * (8 + 1) + 2 * 16 * 8)
    x = tensors(4096)

    def step() -> None:
        out, loss = distance(x[3:], "fused")(*x[:3])
        (out.sum() + loss).backward()

    assert peak_bytes(step) < 4096**2 * 4 / 8


def test_short_windows_take_tiles_of_scores() -> None:
    assert not gram.pays(16 * 64, 64, 32, None) and gram.pays(16 * 64 + 1, 64, 32, None)
    assert not gram.pays(1600, 64, 128, None)
    assert not gram.pays(1600, 64, 64, Window((40, 40), 16))
    assert not gram.pays(1600, 8, 8, Window((40, 40), 10))
    assert gram.pays(1600, 8, 8, Window((40, 40), 12))
    # A grid that is narrower than its windows.
    assert gram.pays(36, 2, 2, Window((4, 9), 9)) and not gram.pays(36, 4, 2, Window((4, 9), 9))


def operands(window: bool) -> tuple[Any, ...]:
    q, k = (torch.randn(2, 2, 6, 4, requires_grad=True) for _ in range(2))
    teacher = [torch.randn(2, 2, 6, 3) for _ in range(2)]
    return (q, k, *teacher, 0.5, 0.7, [2, 3] if window else None, 2 if window else 0)


@pytest.mark.parametrize("window", [False, True])
def test_registration(window: bool) -> None:
    arguments, ops = operands(window), torch.ops.kdfast
    torch.library.opcheck(ops.attention_logit_mse.default, arguments)
    plain = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    _, factors = ops.attention_logit_mse.default(*plain)
    torch.library.opcheck(
        ops.attention_logit_mse_bwd.default, (torch.randn(()), factors.detach(), *plain)
    )


@pytest.mark.usefixtures("always")
def test_compile() -> None:
    x = [torch.randn(2, 2, 20, 8) for _ in range(5)]
    call = distance(x[3:], "fused", rope=rotary(20, 8))
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(call, x[:3]), run(compiled, x[:3]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("always")
def test_second_derivative() -> None:
    x = [torch.randn(1, 2, 6, 8, dtype=torch.float64, requires_grad=True) for _ in range(5)]
    for window in (None, Window((2, 3), 2)):
        results = []
        for backend in ("fused", "reference"):
            _, loss = distance(x[3:], backend, window=window)(*x[:3])
            first = torch.autograd.grad(loss, x[:2], create_graph=True)
            results.append(torch.autograd.grad(sum(g.sin().sum() for g in first), x[:2]))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("always")
def test_scale_zero_and_empty_batch() -> None:
    x = [torch.randn(1, 2, 9, 8) for _ in range(5)]
    results = [run(distance(x[3:], b, scale=0.0), x[:3]) for b in ("fused", "reference")]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    x = [torch.randn(0, 2, 9, 8) for _ in range(5)]
    assert run(distance(x[3:], "fused"), x[:3])[1].item() == 0
