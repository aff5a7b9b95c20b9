# SPDX-License-Identifier: Apache-2.0
"""``kdfast train --dry-run``: a step of each training on noise, and no files."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kdfast.memory.measure import Step
from kdfast.memory.steps import PlannedStep
from kdfast.memory.trial import try_step
from kdfast.train import main


def test_dry_run_of_a_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--config", "vit_chain_digits", "--batch-size", "4", "--dry-run"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "data: digits, 10 classes; 1,259 images to train on" in said
    assert said.count("one step: loss ") == 3 and said.count("batch 4 of 32 x 32") == 3
    assert "a run writes to runs/vit_chain; nothing was written" in said
    assert not list(tmp_path.iterdir())


def test_dry_run_of_a_pruning_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--config", "smoke", "--dry-run"]) == 0
    assert "smoke: distil into 50% of the heads\n  batch 4 of 32 x 32" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_dry_run_finds_what_a_run_would(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", "vit_chain_digits", "--set", "chain=[vit_tiny_patch16_224,vit_tiny]"]
    assert main([*words, "--dry-run"]) == 2
    assert "vit_tiny" in capsys.readouterr().err


class Lossy(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.weight, self.factor = nn.Parameter(torch.ones(1000)), factor

    def loss(self, images: Tensor, _: Tensor) -> Tensor:
        return (images.mean() + self.weight).square().mean() * self.factor


def step(factor: float, batch: int | None = None) -> PlannedStep:
    def build(_: bool) -> Step:
        module = Lossy(factor)
        return Step(module, module.loss)

    return PlannedStep("a step", build, batch, (2, 3), None, False)


def test_what_a_trial_says() -> None:
    trial = try_step(step(1.0), torch.device("cpu"))
    # The gradient and both moments of AdamW.
    assert trial.batch == 1 and trial.peak >= 3 * 4000 and trial.loss > 0
    assert "batch 1 of 2 x 3 (the config leaves the batch open)" in str(trial)


def test_a_loss_that_is_not_finite() -> None:
    with pytest.raises(FloatingPointError, match="a step: the loss of one step on noise is inf"):
        try_step(step(float("inf"), 2), torch.device("cpu"))
