# SPDX-License-Identifier: Apache-2.0
"""What training does on GPUs and with several processes, shown without either."""

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kdfast.configs import ConfigError, load
from kdfast.machine import memory
from kdfast.recovery import heads
from kdfast.trainer import state
from kdfast.trainer.loop import Loop
from kdfast.trainer.processes import make_accelerator


def test_no_context_on_a_gpu_that_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """``device=cpu`` on a machine with a GPU: asking for its generator would take memory there."""
    asked: list[None] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: asked.append(None) or torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert state.rng_state()["cuda"] == [] and not asked
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert len(state.rng_state()["cuda"]) == 1


def test_processes_wait_for_each_other() -> None:
    """NCCL's default of ten minutes would end the others where one reads much more slowly."""
    handler = make_accelerator("fp32", "cpu").init_handler
    assert handler is not None and handler.timeout >= timedelta(hours=1)


@pytest.mark.parametrize(("world", "expected"), [(1, 2), (2, 15)])
def test_a_signal_of_one_process_stops_all(
    world: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may come in the last evaluation, after the last step in which processes compare."""
    monkeypatch.setattr("torch.distributed.all_reduce", lambda x, op: x.fill_(15))
    signals = SimpleNamespace(caught=2)
    loop: Any = SimpleNamespace(signals=signals, world=world, device=torch.device("cpu"))
    assert Loop._caught(loop) == expected


def test_precision_that_the_device_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(**_: Any) -> None:
        raise ValueError("bf16 mixed precision requires a supported device")

    monkeypatch.setattr("kdfast.trainer.processes.Accelerator", refuses)
    with pytest.raises(ConfigError, match="bf16 mixed precision requires"):
        make_accelerator("bf16", "auto")


@pytest.mark.parametrize(("precision", "expected"), [("fp16", False), ("bf16", True)])
def test_heads_are_never_scored_in_fp16(
    precision: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their gradients have no loss scale: a mean over 640 x 640 pixels would round to 0."""
    seen: list[bool] = []

    def scores(*_: Any, **__: Any) -> None:
        seen.append(torch.is_autocast_enabled("cpu"))

    monkeypatch.setattr(heads, "head_scores", scores)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    accelerator: Any = SimpleNamespace(
        mixed_precision=precision,
        is_main_process=False,
        autocast=lambda: torch.autocast("cpu", dtype),
    )
    images: Any = None
    teacher: Any = torch.nn.Linear(1, 1)
    config = load("smoke").prune
    heads.score_heads(teacher, None, images, config, accelerator, seed=0)
    assert seen == [expected]


def test_peak_is_of_the_device_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model on the CPU of a machine with a GPU allocates nothing that CUDA counts."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    peak = memory.peak_bytes(lambda: torch.zeros(1 << 18), torch.device("cpu"))
    assert peak >= 1 << 20
