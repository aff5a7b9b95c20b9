# SPDX-License-Identifier: Apache-2.0
"""Class weights, weights of positives and focal terms of a chain's task."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast.chain import run as chain_run
from kdfast.chain.objective import Objective, distill_loss, task_loss
from kdfast.chain.weights import TaskWeights, described, planned_weights, task_weights
from kdfast.configs import ConfigError, load
from kdfast.configs.chain import ChainDistillConfig
from kdfast.data.labelled import Classification, build_classification
from kdfast.plan import steps_of
from kdfast.train import main
from kdfast.trainer.logs import read_rows

NAMES = ["cat", "dog", "owl"]
SINGLE = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2])
SEVERAL = torch.tensor([[1.0, 0, 0], [1, 1, 0], [1, 0, 0], [0, 0, 1]])


def config(**changes: Any) -> ChainDistillConfig:
    return ChainDistillConfig(**changes)


def weights(task: str = "multiclass", **changes: Any) -> TaskWeights:
    targets = SEVERAL if task == "multilabel" else SINGLE
    return task_weights(config(**changes), task, targets, NAMES)


def test_balanced_weights() -> None:
    """Those of scikit-learn: the mean over images is 1, and every class weighs the same."""
    found = weights(class_weights="balanced")
    assert found.classes is not None and found.positives is None
    torch.testing.assert_close(found.classes, torch.tensor([8 / 12, 8 / 9, 8 / 3]))
    assert found.classes[SINGLE].mean().item() == pytest.approx(1)
    found = weights("multilabel", pos_weights="balanced")
    assert found.classes is None and found.positives is not None
    assert found.positives.tolist() == pytest.approx([1 / 3, 3, 3])


def test_given_weights() -> None:
    assert weights() == (None, None)
    assert weights(class_weights=(1.0, 0.0, 2.5)).classes.tolist() == [1, 0, 2.5]  # type: ignore[union-attr]
    both = weights("multilabel", class_weights=(1.0, 1.0, 2.0), pos_weights=(1.0, 2.0, 3.0))
    assert [x.tolist() for x in both if x is not None] == [[1, 1, 2], [1, 2, 3]]


@pytest.mark.parametrize(
    ("task", "changes", "match"),
    [
        ("multiclass", {"class_weights": (1.0,)}, r"for each of the 3 classes \(cat, dog, owl.*1$"),
        ("multilabel", {"pos_weights": (1.0,) * 4}, "pos_weights: must have one number .* got 4"),
        ("multiclass", {"pos_weights": "balanced"}, "pos_weights: is for several labels per image"),
        (
            "binary",
            {"focal_gamma": 1.0, "focal_alpha": 0.5},
            "focal_alpha: is for several labels .* got data of 'binary'",
        ),
        ("multilabel", {"class_weights": "balanced"}, "class_weights: balanced is for one label"),
    ],
)
def test_rejects(task: str, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        weights(task, **changes)


def test_a_class_without_images_cannot_be_balanced() -> None:
    balanced = config(class_weights="balanced")
    with pytest.raises(ValueError, match="balanced needs a training image of every class, owl has"):
        task_weights(balanced, "multiclass", SINGLE[:6], NAMES)
    with pytest.raises(ValueError, match="pos_weights: balanced needs .*, dog, owl has none"):
        several = config(pos_weights="balanced")
        task_weights(several, "multilabel", SEVERAL[:1], NAMES)


def test_log_names_the_ends() -> None:
    given = config(class_weights="balanced", focal_gamma=2.0)
    text = described(given, task_weights(given, "multiclass", SINGLE, NAMES), NAMES)
    assert text == "class weights 0.6667 (cat) to 2.667 (owl); focal gamma 2"
    assert described(config(), TaskWeights(), NAMES) == ""
    several = config(pos_weights=(1.0, 2.0, 1.0), focal_gamma=1.0, focal_alpha=0.25)
    text = described(several, task_weights(several, "multilabel", SEVERAL, NAMES), NAMES)
    assert text == "pos weights 1 (cat) to 2 (dog); focal gamma 1, alpha 0.25"


def test_losses_of_a_task() -> None:
    s, t = torch.randn(8, 3), torch.randn(8, 3)
    weight = torch.tensor([0.5, 1.0, 4.0])
    some, smooth = TaskWeights(weight), config(label_smoothing=0.1)
    want = F.cross_entropy(s, SINGLE, weight, label_smoothing=0.1)
    torch.testing.assert_close(task_loss(s, SINGLE, "multiclass", smooth, some), want)
    _, _, ce = distill_loss(s, t, SINGLE, "multiclass", smooth, 0.5, some)
    torch.testing.assert_close(ce, want)
    focal = config(focal_gamma=2.0)
    _, _, ce = distill_loss(s, t, SINGLE, "multiclass", focal, 0.5, some)
    torch.testing.assert_close(task_loss(s, SINGLE, "multiclass", focal, some), ce)
    assert ce < F.cross_entropy(s, SINGLE, weight)

    y, s, t = SEVERAL, s[:4], t[:4]
    both = TaskWeights(weight, torch.tensor([1.0, 3.0, 2.0]))
    want = F.binary_cross_entropy_with_logits(s, y, weight, pos_weight=both.positives)
    torch.testing.assert_close(task_loss(s, y, "multilabel", config(), both), want)
    _, _, bce = distill_loss(s, t, y, "multilabel", config(), 0.5, both)
    torch.testing.assert_close(bce, want)
    focal = config(focal_gamma=2.0, focal_alpha=0.25)
    _, _, bce = distill_loss(s, t, y, "multilabel", focal, 0.5, both)
    torch.testing.assert_close(task_loss(s, y, "multilabel", focal, both), bce)


class Scores(nn.Module):
    """Stands for a link: a linear model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("distilled", [True, False])
def test_objective_uses_them(distilled: bool) -> None:
    student: Any = Scores()
    given = TaskWeights(torch.tensor([0.0, 1.0, 1.0]))
    objective = Objective(
        student, None, "multiclass", config(), epochs=1, distilled=distilled, weights=given
    )
    assert not [name for name in objective.state_dict() if "student" not in name]
    logits = torch.zeros(8, 3) if distilled else None
    losses, _ = objective(torch.randn(8, 4), torch.zeros(8, dtype=torch.int64), 0, logits)
    assert losses["task"].isnan()  # no image has weight
    losses, _ = objective(torch.randn(8, 4), SINGLE, 0, logits)
    assert losses["total"].isfinite()
    assert objective.double().weights.classes.dtype == torch.float64  # type: ignore[union-attr]


def test_memory_of_focal_terms_is_planned() -> None:
    assert planned_weights(config(class_weights="balanced"), "multiclass", 3).classes is not None

    def saved(*changes: str) -> int:
        step = steps_of(load("vit_chain_digits", changes, files=False), classes=1000)[1]
        return step.plan(32, False).tensors

    assert saved("distill.focal_gamma=2") >= saved()
    assert saved("distill.class_weights=balanced") >= saved()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("distill.class_weights=equal", "distill.class_weights: must be one of none, balanced"),
        ("distill.class_weights=[1,-1]", "distill.class_weights: "),
        ("distill.class_weights=[0,0]", "distill.class_weights: must have a number above 0"),
        ("distill.focal_gamma=-1", "distill.focal_gamma: must be at least 0, got -1"),
        ("distill.focal_alpha=0.5", "distill.focal_alpha: needs a distill.focal_gamma, got 0.5"),
    ],
)
def test_keys_are_checked(change: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load("vit_chain_digits", [change])
    assert len(caught.value.problems) == 1 and caught.value.problems[0].startswith(message)


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> Classification:
    data = build_classification("digits", size=16, seed=3, val_fraction=0.05, test_fraction=0.05)
    monkeypatch.setattr(chain_run, "read_data", lambda config, seed: data)
    monkeypatch.setattr("kdfast.trainer.loop.draw_curves", lambda folder: None)
    for name in ("summary.draw_curves", "summary.draw_confusion", "summary.draw_attention"):
        monkeypatch.setattr(f"kdfast.chain.{name}", lambda *_: None)
    monkeypatch.setattr("kdfast.chain.compare.draw_comparison", lambda *_: None)
    return data


def words(folder: Path, *changes: str) -> list[str]:
    tiny = "{img_size: 16, patch_size: 8, embed_dim: 8, depth: 1, num_heads: 2}"
    sets = [f"output={folder}", "device=cpu", "twin=false", "seeds=[3]", "epochs=1", "batch=8"]
    sets += ["chain=[vit_tiny_patch16_224,vit_tiny_patch16_224]", f"model_args=[{tiny}]"]
    sets += ["data.size=16", "data.limit=32", "optim.warmup_epochs=0", "log_every=1", *changes]
    return ["--config", "vit_chain_digits", *(word for s in sets for word in ("--set", s))]


def test_a_chain_with_weights(
    tmp_path: Path, digits: Classification, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training uses them, and the log says so."""
    numbers = ",".join(map(str, [5, *[1] * 9]))
    sets = (f"distill.class_weights=[{numbers}]", "distill.focal_gamma=2")
    assert main(words(tmp_path / "weighted", *sets)) == 0
    out = capsys.readouterr().out
    for role in ("teacher", "student"):
        assert f"{role}: loss of the task: class weights 1 (1) to 5 (0); focal gamma 2" in out
    assert main(words(tmp_path / "plain")) == 0
    assert "loss of the task" not in capsys.readouterr().out
    first = [
        read_rows(next((tmp_path / name).glob("**/teacher/logs/steps.csv")))[0]["task"]
        for name in ("weighted", "plain")
    ]
    assert float(first[0]) < float(first[1])
    changed = words(tmp_path / "plain", "distill.focal_gamma=1")
    assert main([*changed, "--resume"]) == 2
    assert main(words(tmp_path / "few", "distill.class_weights=[1,2]")) == 2
    error = capsys.readouterr().err
    assert "class_weights: must have one number for each of the 10 classes (0, 1, 2, ...)" in error
