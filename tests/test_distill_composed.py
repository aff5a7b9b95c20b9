# SPDX-License-Identifier: Apache-2.0
"""The KL of attention maps from stock attention calls: an oracle for long sequences."""

import pytest
import torch

import kdfast
from kdfast import Rope
from kdfast.machine.memory import peak_bytes, saved_bytes
from kdfast.ops import _distill_composed as composed
from kdfast.ops import attention_distill as op
from kdfast.testing import assert_no_worse, run


def test_rows_against_maps() -> None:
    q, k = (torch.randn(2, 3, 21, 16, dtype=torch.float64) for _ in range(2))
    tq, tk = (torch.randn(2, 3, 21, 24, dtype=torch.float64) for _ in range(2))

    def by_maps(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return op.row_distance(0.3 * q @ k.mT, 0.2 * tq @ tk.mT, "kl")

    def by_calls(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return composed.row_kl(q, k, tq, tk, 0.3, 0.2)

    for got, want in zip(run(by_calls, [q, k]), run(by_maps, [q, k]), strict=True):
        torch.testing.assert_close(got, want)
    equal = composed.row_kl(tq, tk, tq, tk, 0.2, 0.2)
    torch.testing.assert_close(equal, torch.zeros_like(equal))


@pytest.mark.parametrize("dims", [(16, 16), (16, 24), (24, 16)])
def test_no_map_is_held(dims: tuple[int, int]) -> None:
    tokens = 2048
    q, k = (torch.randn(1, 1, tokens, dims[0], requires_grad=True) for _ in range(2))
    tq, tk = (torch.randn(1, 1, tokens, dims[1]) for _ in range(2))

    def distance() -> torch.Tensor:
        return composed.row_kl(q, k, tq, tk, 0.25, 0.2).sum()

    # A few tensors of the size of q, and while it runs the scores of 256 rows.
    assert saved_bytes(distance) < 10 * 24 * tokens * 4
    peak = peak_bytes(lambda: torch.autograd.grad(distance(), (q, k)))
    assert peak < 4 * (3 * composed.ROWS + 16 * 24) * tokens < 4 * tokens**2


def test_auto_takes_it_where_maps_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "FUSED_ON", frozenset())
    monkeypatch.setattr(composed, "MOST_ELEMENTS", 100)
    monkeypatch.setattr(composed, "ROWS", 5)
    angle = torch.rand(12, 16)
    rope = Rope(angle.cos(), angle.sin())
    tq, tk = (torch.randn(1, 2, 12, 16) for _ in range(2))

    def call(backend: str) -> object:
        return lambda q, k, v: kdfast.attention_distill(
            *(q, k, v, tq.to(q), tk.to(q)),
            heads=[2, 0],
            teacher_heads=[1, 1],
            temperature=2.0,
            rope=rope,
            backend=backend,
        )

    inputs = [torch.randn(1, 3, 12, 16) for _ in range(3)]
    used = []
    monkeypatch.setattr(
        op, "composed", lambda *args, inner=op.composed: used.append(1) or inner(*args)
    )
    auto = run(call("auto"), inputs)
    assert used == [1]
    exact = run(call("reference"), [x.double() for x in inputs])
    eager = run(call("reference"), inputs)
    assert used == [1]
    names = ("out", "loss", "dq", "dk", "dv")
    for name, *triple in zip(names, auto, exact, eager, strict=True):
        # The value is a difference of sums, each of the size of a log-sum-exp.
        assert_no_worse(name, *triple, eps=2.0**-19)


def test_oracle_of_the_fused_op_at_1600_tokens(compiled: None) -> None:
    q, k, v, tq, tk = (torch.randn(1, 1, 1600, 16) for _ in range(5))
    fused = run(lambda q, k: kdfast.attention_distill(q, k, v, tq, tk, backend="fused")[1], [q, k])
    calls = [x.double() for x in (tq, tk)]
    exact = run(
        lambda q, k: composed.row_kl(q, k, *calls, 0.25, 0.25).mean(), [q.double(), k.double()]
    )
    for got, want in zip(fused, exact, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-8)
