# SPDX-License-Identifier: Apache-2.0
"""A pruning run starts from a compensated student, unless its config says otherwise."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import kdfast
from kdfast.configs import load
from kdfast.models.checkpoint import load_backbone, load_orion_backbone
from kdfast.models.eva import EVAViT
from kdfast.pruning import HeadScores
from kdfast.recovery import run
from kdfast.recovery.data import build_data
from kdfast.recovery.evaluate import Evaluator
from kdfast.train import main
from kdfast.trainer.commits import load_checkpoint
from kdfast.trainer.processes import make_accelerator

pytestmark = pytest.mark.usefixtures("quick")


def words(folder: Path, teachers: Path, *changes: str, name: str = "smoke") -> list[str]:
    sets = [f"output={folder}", f"teacher.cache={teachers}", "run.device=cpu", *changes]
    return ["--config", name, *(word for change in sets for word in ("--set", change))]


def teacher_of(teachers: Path) -> EVAViT:
    (path,) = (p for p in teachers.glob("teacher-*.safetensors") if ".head." not in p.name)
    return load_orion_backbone(path, with_cp=False).eval()


def kept(folder: Path) -> list[list[int]]:
    heads: list[list[int]] = load_checkpoint(folder / "last.pt")["meta"]["heads"]
    return heads


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Stopped(Exception):
    """The distillation would start now."""


def first_weights(
    argv: list[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, torch.Tensor], list[list[int]]]:
    """Weights of the student that a run would train, and its heads."""
    seen: list[Any] = []

    def stop(self: run.Run, distiller: Any, kept: Any, evaluate: Any) -> None:
        seen.extend([distiller.student.state_dict(), kept.heads])
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "job", stop)
        with pytest.raises(Stopped):
            main(argv)
    weights, heads = seen
    return {name: value.clone() for name, value in weights.items()}, heads


def test_embedded_default_in_small(tmp_path: Path) -> None:
    """On held-out views the compensated student is nearer to the teacher than the cut one.

    So short a training leaves no mIoU that could tell them apart; likeness to the teacher does.
    """
    teachers, folder = tmp_path / "teachers", tmp_path / "run"
    small = ["data.frames=16", "data.val_frames=4", "teacher.fit.epochs=2", "run.max_steps=1"]
    small += ["prune.batches=2", "prune.calibration_views=32", "run.eval_images=8"]
    assert main(words(folder, teachers, *small, name="orion50_scenes")) == 0
    result = json.loads((folder / "report.json").read_text())
    lines = {line["model"]: line for line in result["models"]}
    assert list(lines) == ["teacher", "pruned", "compensated", "distilled"]
    for fact in ("heads", "params", "gmac"):
        assert lines["pruned"][fact] == lines["compensated"][fact] == lines["distilled"][fact]

    teacher = teacher_of(teachers)
    students = {
        "cut": kdfast.prune_heads(teacher, kept(folder)),
        "compensated": load_backbone(folder / "compensated.safetensors").eval(),
    }
    accelerator = make_accelerator("fp32", "cpu")
    held_out = build_data(load("orion50_scenes", small), accelerator).held_out
    measure = Evaluator(accelerator, held_out, None, teacher, 24)
    lost = {name: 1 - measure(student) for name, student in students.items()}
    assert lost["compensated"] < lost["cut"] / 3


def test_without_compensation_the_student_is_the_cut_teacher(
    teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    off = words(tmp_path / "run", teachers, "prune.compensate=false")
    monkeypatch.setattr(
        run, "calibrate_teacher", lambda *_, **__: pytest.fail("needs no calibration")
    )
    found, heads = first_weights(off, monkeypatch)
    cut = kdfast.prune_heads(teacher_of(teachers), heads)
    assert same(found, dict(cut.state_dict()))
    assert main([*off, "--set", "run.max_steps=1"]) == 0
    folder = tmp_path / "run-2"
    names = [x["model"] for x in json.loads((folder / "report.json").read_text())["models"]]
    assert names == ["teacher", "pruned", "distilled"]
    assert not (folder / "compensated.safetensors").exists()


@pytest.mark.parametrize(
    "changes",
    [["prune.sequential=false"], ["prune.ridge=0.1"], ["run.precision=bf16"]],
    ids=["at_once", "ridge", "bf16"],
)
def test_student_is_that_of_prune_heads(
    changes: list[str], teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer adds nothing of its own: same views, same calibration, same fit."""
    common = ["seed=3", "prune.calibration_views=24", "run.max_steps=1", *changes]
    cache = tmp_path / "teachers"
    found, heads = first_weights(words(tmp_path / "run", cache, *common), monkeypatch)
    config = load("smoke", [*common, "run.device=cpu"])
    feed = build_data(config, make_accelerator("fp32", "cpu")).calibration
    views = [batch.images for batch in feed.batches(0, limit=24)]
    assert sum(map(len, views)) == 24
    options: dict[str, Any] = {"data": views, "sequential": True} if config.prune.sequential else {}
    teacher = teacher_of(cache)
    with torch.autocast("cpu", enabled=config.run.precision == "bf16"):
        calibration = kdfast.calibrate(teacher, views, mlps=False)
        student = kdfast.prune_heads(
            teacher, heads, compensate=calibration, ridge=config.prune.ridge, **options
        )
    assert same(found, dict(student.state_dict()))


def test_heads_by_reconstruction(
    teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One calibration serves the scores and the fit."""
    calls: list[None] = []
    original = run.calibrate_teacher

    def counted(*args: Any, **more: Any) -> Any:
        calls.append(None)
        return original(*args, **more)

    monkeypatch.setattr(run, "calibrate_teacher", counted)
    method = "prune.method=reconstruction"
    _, heads = first_weights(words(tmp_path / "run", teachers, method), monkeypatch)
    assert len(calls) == 1
    scores = HeadScores.load(tmp_path / "run/head_scores.json")
    assert scores.method == "reconstruction" and kdfast.select_heads(scores, 0.5) == heads
    cut = words(tmp_path / "run", teachers, method, "prune.compensate=false")
    assert first_weights(cut, monkeypatch)[1] == heads


def test_resume_keeps_what_training_started_from(
    teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is calibrated again; only where the file is gone it is made once more, the same."""
    folder = tmp_path / "run"
    whole = words(tmp_path / "whole", teachers, "run.max_steps=6")
    assert main(whole) == 0
    assert main(words(folder, teachers, "run.max_steps=2")) == 0
    before = load_file(folder / "compensated.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(
            run, "calibrate_teacher", lambda *_, **__: pytest.fail("was calibrated already")
        )
        assert main([*words(folder, teachers, "run.max_steps=4"), "--resume"]) == 0
    (folder / "compensated.safetensors").unlink()
    assert main([*words(folder, teachers, "run.max_steps=6"), "--resume"]) == 0
    assert same(load_file(folder / "compensated.safetensors"), before)
    for name in ("student.safetensors", "compensated.safetensors"):
        assert same(load_file(folder / name), load_file(tmp_path / "whole" / name))
    reports = [json.loads((x / "report.json").read_text()) for x in (folder, tmp_path / "whole")]
    first, second = ([line["quality"] for line in x["models"]] for x in reports)
    assert first == second


def test_resume_refuses_another_compensation(
    teachers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(tmp_path / "run", teachers, "run.max_steps=1")) == 0
    changed = words(tmp_path / "run", teachers, "prune.sequential=false", "run.max_steps=2")
    assert main([*changed, "--resume"]) == 2
    assert "config.prune.sequential True, got False" in capsys.readouterr().err
    # Nor does a refused run leave its own student behind.
    (tmp_path / "run/compensated.safetensors").unlink()
    assert main([*changed, "--resume"]) == 2
    assert not (tmp_path / "run/compensated.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("prune.compensate=1", "prune.compensate: must be true or false, got 1"),
        ("prune.calibration_views=0", "prune.calibration_views: must be at least 1, got 0"),
        ("prune.ridge=0", "prune.ridge: must be above 0"),
        ("prune.method=recon", "prune.method: must be one of"),
    ],
)
def test_keys_are_checked(
    change: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(tmp_path / "run", tmp_path, change)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("scope", ["block", "global"])
def test_hidden_units_go_too(scope: str, teachers: Path, tmp_path: Path) -> None:
    changes = ("prune.mlp_keep=0.5", f"prune.scope={scope}", "run.epochs=1", "run.save_every=1")
    whole = tmp_path / "whole"
    assert main(words(whole, teachers, *changes)) == 0
    student, teacher = load_backbone(whole / "student.safetensors"), teacher_of(teachers)
    assert sum(student.mlp_hidden) == pytest.approx(sum(teacher.mlp_hidden) / 2, abs=4)
    if scope == "block":
        assert len(set(student.mlp_hidden)) == 1
    rows = json.loads((whole / "report.json").read_text())["models"]
    assert [row["model"] for row in rows] == ["teacher", "pruned", "compensated", "distilled"]
    assert rows[1]["params"] == rows[3]["params"] < 0.75 * rows[0]["params"]
    parts = tmp_path / "parts"
    assert main(words(parts, teachers, *changes, "run.max_steps=2")) == 0
    assert main([*words(parts, teachers, *changes), "--resume"]) == 0
    files = [load_file(folder / "student.safetensors") for folder in (whole, parts)]
    assert same(*files)


def test_hidden_units_without_compensation(teachers: Path, tmp_path: Path) -> None:
    changes = ("prune.mlp_keep=0.25", "prune.compensate=false", "run.max_steps=1")
    assert main(words(tmp_path / "run", teachers, *changes)) == 0
    student = load_backbone(tmp_path / "run" / "student.safetensors")
    (width,) = set(student.mlp_hidden)
    assert width == pytest.approx(teacher_of(teachers).mlp_hidden[0] / 4, abs=1)


def test_half_of_everything_is_half_of_the_backbone() -> None:
    from kdfast.plan import steps_of

    (step,) = steps_of(load("orion50_mlp", files=False))
    parameters = step.plan(1, True).categories["parameters"] / 4
    assert parameters == pytest.approx(152e6, rel=0.01)
