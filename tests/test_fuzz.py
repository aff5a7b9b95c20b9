# SPDX-License-Identifier: Apache-2.0
"""A few of the random calls of ``make fuzz``, and that it finds what it looks for."""

from typing import Any

import pytest
import torch

from kdfast.testing.fuzz.__main__ import Fuzz, check
from kdfast.testing.fuzz.draw import Call
from kdfast.testing.fuzz.raw import Recorder, changed


def test_random_calls(compiled: None) -> None:
    fuzz = Fuzz(seed=11, log=None)
    for index in range(40):
        fuzz.run(index)
    assert not fuzz.faults, fuzz.faults
    assert fuzz.counts["refused"] > 100 and fuzz.counts["accepted"] > 20


def test_every_op_is_drawn_and_recorded(compiled: None) -> None:
    fuzz, seen = Fuzz(seed=0, log=None), set()
    real = fuzz.raw

    def spy(index: int, func: Any, args: list[Any], text: str) -> None:
        seen.add(func._schema.name.removeprefix("kdfast::"))
        real(index, func, args, text)

    fuzz.raw = spy  # type: ignore[method-assign]
    for index in range(200):
        fuzz.run(index)
    names = torch._C._dispatch_get_all_op_names()
    ours = {x.removeprefix("kdfast::") for x in names if x.startswith("kdfast::")}
    # A dispatch mode is shown torch's own linear layer, and parts of other ops are for none.
    assert seen == ours - {"linear", "tensor_state", "layer_norm", "transpose_sum"}


def test_faults_are_found(compiled: None, capsys: pytest.CaptureFixture[str]) -> None:
    def off(x: torch.Tensor, backend: str) -> torch.Tensor:
        return x * (2 if backend == "fused" else 1)

    def writes(x: torch.Tensor, backend: str) -> torch.Tensor:
        if backend == "fused":
            x.data.add_(1)
        return x * 1

    x = torch.ones(3)
    for function, text in ((off, "is off by"), (writes, "was changed")):
        found = check(Call("op", function, [x.clone()]), torch.float32, Recorder())
        assert any(text in line for line in found), found
    fuzz = Fuzz(seed=0, log=None)
    for function, text in (
        (lambda: torch.full((2,), float("nan")), "NaN in a result"),
        (lambda: [][0].missing, ""),
        (lambda: {}["key"], "raised KeyError"),
    ):
        fuzz.faults.clear()
        fuzz.raw(0, lambda *_, run=function: run(), [], "call")
        assert not text or text in fuzz.faults[0]
    assert "FAULT (--only 0 --seed 0)" in capsys.readouterr().out


def test_changes_are_those_of_the_seed(compiled: None) -> None:
    import random

    args = [torch.ones(2, 3), torch.ones(2, 3), None, 1.0, 0.5, "sum", 0.0, -100, True]
    func = torch.ops.kdfast.kd_loss.default
    first = [changed(func, args, random.Random(3))[1] for _ in range(2)]
    assert first[0] == first[1] and first[0].startswith("kdfast::kd_loss ")
