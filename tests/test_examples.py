# SPDX-License-Identifier: Apache-2.0
"""The parts that the examples share, their data, and their documents."""

import copy
import importlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import kdfast
from kdfast.configs.fields import ConfigError

pictures = importlib.import_module("examples.pictures")
training = importlib.import_module("examples.training")
distil = importlib.import_module("examples.distil")
results = importlib.import_module("examples.results")
documents = importlib.import_module("examples.documents")
cifar_data = importlib.import_module("examples.cifar10.data")
cifar_model = importlib.import_module("examples.cifar10.model")
cifar_config = importlib.import_module("examples.cifar10.config")

TINY = cifar_config.ModelConfig(width=16, depth=2, heads=4)


def class_folder(root: Path, splits: dict[str, int], side: int = 32) -> Path:
    """Pictures of noise: so many of each of ten classes in every split."""
    for number, (split, count) in enumerate(splits.items()):
        draws = np.random.default_rng(number)
        for label in range(10):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = draws.integers(0, 255, (side, side, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


def test_batches_are_whole_shuffled_and_replayable() -> None:
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 2, 2)
    seen: list[tuple[list[int], int]] = []

    def augment(some: Tensor, index: Any, epoch: int) -> Tensor:
        seen.append((index.tolist(), epoch))
        return some.float() / 255

    made = pictures.Pictures(images, torch.arange(5), augment)
    feed = pictures.training_feed(made, 2, 0, (0.0, 0.0, 0.0), (1 / 255,) * 3)
    assert feed.steps == 2
    first, again, other = ([*feed.batches(epoch)] for epoch in (0, 0, 1))
    assert [b.index for b in first] == [b.index for b in again] != [b.index for b in other]
    for batch in first:
        assert batch.labels.tolist() == batch.index
        torch.testing.assert_close(batch.images[:, 0, 0, 0], torch.tensor(batch.index).float())
    assert [epoch for _, epoch in seen] == [0] * 4 + [1] * 2
    (later,) = feed.batches(0, done=1)
    assert later.index == first[1].index


def test_the_learning_rate_rises_and_falls() -> None:
    got = [training.factor(step, 10, 0.2) for step in (0, 1, 2, 6, 10)]
    assert got == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0])


def problem(seed: int = 0) -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    images = torch.randint(0, 255, (8, 3, 2, 2), dtype=torch.uint8)
    made = pictures.Pictures(images, torch.arange(8) % 2, lambda x, index, epoch: x / 255)
    return model, pictures.training_feed(made, 2, 0, (0.0,) * 3, (1.0,) * 3)


def test_a_training_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    recipe = training.Recipe(epochs=2, lr=1e-2, batch=2)
    calls: list[int] = []

    def stop() -> dict[str, float]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return {"metric": 0.0}

    def run(folder: str, evaluate: Any, meta: int = 0) -> tuple[Tensor, tuple[float, float]]:
        model, feed = problem()
        module = training.Supervised(model, 0.0)
        path = tmp_path / folder
        took = training.train("t", module, feed, recipe, path, {"a": meta}, evaluate, "fp32")
        return model[1].weight.detach(), took

    whole, _ = run("whole", None)
    with pytest.raises(KeyboardInterrupt):
        run("parts", stop)
    resumed, took = run("parts", lambda: {"metric": 0.0})
    assert torch.equal(whole, resumed)
    # Nothing is left to do, and what was done before still counts.
    same, again = run("parts", None)
    assert torch.equal(same, resumed) and again == took and min(took) > 0
    with pytest.raises(ConfigError, match="was made with a 0, got 1"):
        run("parts", None, meta=1)


def test_a_signal_ends_a_program_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(SystemExit) as stop:
        training.command(main)
    assert stop.value.code == 130
    assert "stopped by SIGINT; the same command goes on" in capsys.readouterr().err


def pruned() -> tuple[nn.Module, nn.Module]:
    whole = cifar_model.build(TINY, 0).eval()
    return whole, kdfast.prune_heads(whole, [[1, 3], []], mlp=[[0, 5], [7]])


def test_a_copy_of_the_teacher_has_nothing_to_learn() -> None:
    whole, _ = pruned()
    images = torch.randn(2, 3, 32, 32)
    student = copy.deepcopy(whole)
    module = distil.Distiller(student, whole, mean_square, feature=1.0, attention=1.0)
    losses = module.eval()(images, None, 0)
    assert list(losses) == ["total", "output", "feature", "attention"]
    for value in losses.values():
        assert abs(value.item()) < 1e-6


def mean_square(mine: Tensor, goal: Tensor, _: Tensor | None) -> Tensor:
    return (mine - goal).square().mean()


def test_heads_are_paired_by_what_was_kept() -> None:
    whole, small = pruned()
    module = distil.Distiller(small, whole, mean_square, feature=1.0, attention=1.0)
    assert module.heads == {"blocks.0.attn": [1, 3]}  # the second block lost all
    losses = module(torch.randn(2, 3, 32, 32), None, 0)
    # In the first block nothing stands before the attention: the kept heads' maps are the same.
    assert abs(losses["attention"].item()) < 1e-6 < losses["feature"].item()
    losses["total"].backward()
    assert all(p.grad is None for p in whole.parameters())
    assert any(p.grad is not None for p in small.parameters())
    swapped = distil.Distiller(
        small, whole, mean_square, feature=0.0, attention=1.0, heads=[[0, 2], []]
    )
    again = swapped(torch.randn(2, 3, 32, 32), None, 0)
    assert again["attention"].item() > 1e-6 and "feature" not in again


def test_results_are_added_and_settings_are_held(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "results.json"
    results.add(path, {"lr": 1}, "seed 1", {"accuracy": 0.5})
    results.add(path, {"lr": 1}, "seed 0", {"accuracy": 0.6})
    results.add(path, {"lr": 1}, "seed 1", {"accuracy": 0.7})
    found = json.loads(path.read_text())
    assert found["runs"] == {"seed 0": {"accuracy": 0.6}, "seed 1": {"accuracy": 0.7}}
    assert list(found["runs"]) == ["seed 0", "seed 1"]
    with pytest.raises(ValueError, match="must hold results of these settings"):
        results.add(path, {"lr": 2}, "seed 2", {})


def test_cifar_is_read_by_split(tmp_path: Path) -> None:
    root = class_folder(tmp_path / "data", {"train": 2, "val": 1})
    learn, test = cifar_data.load(root)
    assert learn.images.shape == (20, 3, 32, 32) and test.labels.tolist() == list(range(10))
    crops = cifar_data.Crops(0)
    index = np.arange(20)
    first, second = (crops(learn.images, index, epoch) for epoch in (0, 1))
    assert torch.equal(first, crops(learn.images, index, 0)) and not torch.equal(first, second)
    assert first.shape == learn.images.shape and 0 <= first.min() and first.max() <= 1
    with pytest.raises(ValueError, match="must hold train/ and test/ or val/"):
        cifar_data.load(class_folder(tmp_path / "one", {"train": 1}))
    with pytest.raises(ValueError, match=r"must be \(3, 32, 32\), got \(3, 16, 16\)"):
        cifar_data.load(class_folder(tmp_path / "small", {"train": 1, "val": 1}, side=16))


def test_the_cifar_model_is_small_and_trained_as_it_is_pruned() -> None:
    model = cifar_model.build(cifar_config.Config().model, 0).eval()
    assert sum(p.numel() for p in model.parameters()) <= 500_000
    report = kdfast.pruning_report(model, (0.5,), mlp_keep=0.5)
    assert report.pruned[0].heads == report.full.heads // 2
    again = cifar_model.build(cifar_config.Config().model, 0)
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))


def test_pages_hold_the_committed_results() -> None:
    for name, text in documents.contents().items():
        page = (documents.ROOT / "docs" / "use" / f"{name}.md").read_text(encoding="utf-8")
        assert f"<!-- {name} -->\n{text}\n<!-- end -->" in page, "python -m examples.documents"
