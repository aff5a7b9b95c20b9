# SPDX-License-Identifier: Apache-2.0
"""flash-attn in the place of our kernel: taken where a table says so, and nowhere else."""

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import kdfast
from kdfast import Rope, Window
from kdfast.ops import _flash
from kdfast.testing import assert_right, run

blocks: Any = importlib.import_module("kdfast.kernels._blocks")
WIN = blocks.Flash("float32", 16, 4, 40, 6)
VERSION = "2.8.3"


class Fake(ModuleType):
    """As much of flash-attn as is called, on a CPU."""

    def __init__(self) -> None:
        super().__init__("flash_attn")
        self.calls: list[tuple[int, ...]] = []

    def flash_attn_func(
        self, q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, deterministic: bool
    ) -> Tensor:
        """q, k and v (B, N, H, D)."""
        assert deterministic
        self.calls.append(tuple(q.shape))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = (softmax_scale * q @ k.transpose(-1, -2)).softmax(-1) @ v
        return out.transpose(1, 2).contiguous()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, compiled: None) -> Iterator[Fake]:
    """flash-attn is installed, and the CPU takes the place of a GPU with a measured table."""
    module = Fake()
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(_flash, "takes", lambda q: _flash.covers(WIN, q))
    yield module


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    batch, tokens, heads, dim = shape
    packed = torch.randn(batch, tokens, 3, heads, dim, dtype=dtype)
    return list(packed.permute(2, 0, 3, 1, 4).unbind())


def test_it_is_taken_where_it_was_measured(fake: Fake) -> None:
    given = inputs(2, 20, 3, 16)
    exact = run(
        lambda *x: kdfast.pruned_attention(*x, backend="reference"), [x.double() for x in given]
    )
    eager = run(lambda *x: kdfast.pruned_attention(*x, backend="reference"), given)
    fused = run(kdfast.pruned_attention, given)
    assert fake.calls == [(2, 20, 3, 16)]
    for i, triple in enumerate(zip(fused, exact, eager, strict=True)):
        assert_right(f"result {i}", *triple)
    with torch.no_grad():
        out = kdfast.pruned_attention(*given, scale=0.3)
    assert out.transpose(1, 2).is_contiguous()
    right = kdfast.pruned_attention(*given, scale=0.3, backend="reference")
    torch.testing.assert_close(out, right)


OTHERS: dict[str, dict[str, Any]] = {
    "heads": {"heads": [0, 2]},
    "rope": {"rope": Rope(torch.ones(20, 16), torch.zeros(20, 16))},
    "window": {"window": Window((4, 5), 4)},
    "bias": {"bias": torch.zeros(1, 3, 20, 20)},
    "fused": {"backend": "fused"},
    "reference": {"backend": "reference"},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_calls_are_ours(fake: Fake, name: str) -> None:
    kdfast.pruned_attention(*inputs(2, 20, 3, 16), **OTHERS[name])
    assert not fake.calls


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 3, 3, 16), torch.float32),  # too short
        ((2, 41, 3, 16), torch.float32),  # too long
        ((1, 20, 3, 16), torch.float32),  # too few
        ((2, 20, 3, 32), torch.float32),  # another head dim
        ((2, 20, 3, 16), torch.bfloat16),
    ],
)
def test_other_sizes_are_ours(fake: Fake, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    kdfast.pruned_attention(*inputs(*shape, dtype=dtype))
    assert not fake.calls


def test_second_derivatives_are_those_of_the_reference(fake: Fake) -> None:
    given = [x.double().requires_grad_() for x in inputs(1, 4, 6, 16)]

    def penalty(backend: str) -> list[Tensor]:
        out = kdfast.pruned_attention(*given, backend=backend)
        (first,) = torch.autograd.grad(out.square().sum(), given[:1], create_graph=True)
        return list(torch.autograd.grad(first.square().sum(), given))

    wide = blocks.Flash("float64", 16, 4, 40, 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_flash, "takes", lambda q: _flash.covers(wide, q))
        got = penalty("auto")
    assert fake.calls
    for mine, right in zip(got, penalty("reference"), strict=True):
        torch.testing.assert_close(mine, right)


def test_a_graph_may_be_walked_twice(fake: Fake) -> None:
    given = [x.requires_grad_() for x in inputs(2, 20, 3, 16)]
    out = kdfast.pruned_attention(*given).sum()
    one = torch.autograd.grad(out, given, retain_graph=True)
    for first, again in zip(one, torch.autograd.grad(out, given), strict=True):
        assert torch.equal(first, again)


@pytest.mark.parametrize(
    ("version", "flash", "found"),
    [(VERSION, (WIN,), (WIN,)), ("2.7.0", (WIN,), ()), (None, (WIN,), ()), (VERSION, (), ())],
)
def test_the_installed_version_must_be_the_measured_one(
    monkeypatch: pytest.MonkeyPatch, version: str | None, flash: tuple[Any, ...], found: Any
) -> None:
    table = blocks.Table(blocks.BLOCKS, "test", VERSION, flash)
    monkeypatch.setattr(blocks, "table", lambda arch: table)
    monkeypatch.setattr(_flash, "installed", lambda: version)
    _flash.wins.cache_clear()
    assert _flash.wins(torch.device("cpu")) == found
    _flash.wins.cache_clear()


def test_without_a_table_it_is_never_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(blocks.VARIABLE, raising=False)
    blocks.table.cache_clear()
    assert all(not blocks.table(arch).flash for arch in ("", "sm_75"))
    assert not _flash.takes(torch.zeros(1, 6, 20, 16))
