# SPDX-License-Identifier: Apache-2.0
"""Pruning runs with ORION's heads, end to end on a tiny synthetic set."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from kdfast import evaluate
from kdfast.configs import Config, ConfigError, load
from kdfast.data.orion.prepare import new_sample
from kdfast.data.orion.sample import SampleOptions
from kdfast.recovery.orion.feed import build_frames
from kdfast.recovery.orion.objective import SHOWN, TaskDistiller
from kdfast.recovery.orion.teacher import get_frame_teacher
from kdfast.train import main
from kdfast.trainer.commits import load_checkpoint, newest

pytestmark = pytest.mark.usefixtures("quick")

ROOT = Path(__file__).resolve().parents[1]
FRAMES = 6


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("b2d") / "data"
    new_sample(out, SampleOptions(clips=4, val_clips=1, frames=FRAMES, size=(96, 160)))
    return out


def changes(root: Path, teachers: Path, *more: str) -> list[str]:
    return [
        f"data.root={root}",
        f"data.split_file={root}/splits/bench2drive_base_train_val_split.json",
        f"teacher.cache={teachers}",
        "data.size=[64, 64]",
        "data.sequence=3",
        "run.device=cpu",
        "run.epochs=1",
        "run.log_every=1",
        "prune.batches=2",
        "prune.calibration_views=36",
        "teacher.fit.epochs=1",
        "teacher.fit.model={img_size: 64, embed_dim: 32, depth: 3, num_heads: 4, window_size: 4}",
        "teacher.fit.model.window_block_indexes=[0]",
        "teacher.fit.heads={dim: 16, layers: 1, ffn: 16, queries: 6, lanes: 4, dn_groups: 1}",
        *more,
    ]


def words(folder: Path, root: Path, teachers: Path, *more: str) -> list[str]:
    sets = [f"output={folder}", *changes(root, teachers, *more)]
    return ["--config", "orion50_mini", *(word for one in sets for word in ("--set", one))]


@pytest.fixture(scope="module")
def whole(root: Path, teachers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    # As in the tests: sums of another number of threads differ in the last bit.
    torch.set_num_threads(1)
    assert main(words(folder, root, teachers)) == 0
    return folder


def test_a_run_reports_boxes_lanes_and_features(whole: Path) -> None:
    held = json.loads((whole / "frames.json").read_text())
    assert held["frames"] == FRAMES
    assert set(held["models"]) == {"teacher", "pruned", "compensated", "distilled"}
    teacher = held["models"]["teacher"]
    assert [row["cosine"] for row in teacher["blocks"]] == pytest.approx([1, 1, 1])
    with (whole / "steps.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * FRAMES // 2
    for row in rows:
        task = float(row["detection"]) + float(row["map"])
        assert float(row["task"]) == pytest.approx(task, rel=1e-4)
        alpha, kd = float(row["alpha"]), float(row["kd"])
        assert float(row["total"]) == pytest.approx(
            (1 - alpha) * float(row["task"]) + alpha * kd, rel=1e-4
        )
        assert all(name in row for name in SHOWN)
    assert (whole / "predictions.png").stat().st_size > 10_000


def test_a_run_that_goes_on_remembers_what_its_heads_had_seen(
    whole: Path, root: Path, teachers: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    more = ("run.save_every=2", "distill.vl=0")
    assert main(words(folder, root, teachers, *more, "run.max_steps=4")) == 0
    path = newest(folder)
    assert path is not None
    held = load_checkpoint(path)["ranks"][0]["feed"]["streams"]["student"]
    assert held["detection.embedding"].abs().sum() > 0
    assert main([*words(folder, root, teachers, *more), "--resume"]) == 0
    got, wanted = (load_file(f / "student.safetensors") for f in (folder, whole))
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def parts(
    root: Path, teachers: Path, folder: Path, *more: str
) -> tuple[TaskDistiller, list[tuple[torch.Tensor, object]]]:
    config = load("orion50_mini", changes(root, teachers, *more))
    assert isinstance(config, Config)
    accelerator = Accelerator(cpu=True)
    data = build_frames(config, accelerator)
    teacher, heads = get_frame_teacher(config, accelerator, data, folder, resume=False)
    from kdfast.pruning import prune_heads

    student = prune_heads(teacher, [[0, 1]] * 3).requires_grad_(True)
    distiller = TaskDistiller(student, teacher, heads, config.distill, data.streams)
    return distiller, [(b.images, b.labels) for b in data.train.batches(0, limit=4)]


def test_gradients_reach_the_student_alone(root: Path, teachers: Path, tmp_path: Path) -> None:
    distiller, batches = parts(root, teachers, tmp_path)
    frozen = [*distiller.teacher.parameters(), *distiller.heads.parameters()]
    before = [parameter.clone() for parameter in frozen]
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    assert set(distiller.parameters()) == set(distiller.student.parameters())
    distiller.train()
    for images, labels in batches:
        distiller(images, labels, 0)["total"].backward()
        assert all(p.grad is not None for p in distiller.student.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in frozen)
    assert all(torch.equal(a, b) for a, b in zip(frozen, before, strict=True))
    assert not distiller.heads.training and not distiller.teacher.training


def test_tokens_for_a_language_model_are_a_term(root: Path, teachers: Path, tmp_path: Path) -> None:
    distiller, batches = parts(root, teachers, tmp_path, "distill.vl=0.1")
    losses = distiller(*batches[0], 0)
    named = {"feature": 0.5, "attention": 0.3, "output": 0.2, "vl": 0.1}
    kd = sum(weight * losses[name] for name, weight in named.items())
    torch.testing.assert_close(losses["kd"], kd)
    assert losses["vl"] > 0
    # A student that is the teacher has nothing to learn from it.
    same = TaskDistiller(
        distiller.teacher, distiller.teacher, distiller.heads, distiller.config, distiller.streams
    )
    distiller.streams.load_state_dict({})
    assert same(*batches[0], 0)["kd"] < 1e-6


def test_evaluate_measures_a_student(
    whole: Path, root: Path, teachers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", str(whole / "config.yaml"), "--out", str(tmp_path / "out")]
    arguments += ["--checkpoint", str(whole / "student.safetensors"), "--frames", "3"]
    assert evaluate.main(arguments) == 0
    said = capsys.readouterr().out
    assert "teacher" in said and str(tmp_path / "out" / "frames.png") in said
    held = json.loads((tmp_path / "out" / "frames.json").read_text())
    assert held["frames"] == 3 and len(held["models"]) == 2


def test_what_evaluate_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    none = ["--checkpoint", str(tmp_path / "none")]
    assert evaluate.main(["--config", "smoke", *none]) == 2
    assert "data.kind frames" in capsys.readouterr().err
    assert evaluate.main(["--config", "orion50_mini", *none]) == 2
    assert "no such file" in capsys.readouterr().err


def test_configs_that_do_not_fit(root: Path, teachers: Path, tmp_path: Path) -> None:
    plain = changes(root, teachers)
    with pytest.raises(ConfigError, match=r"teacher\.fit\.heads"):
        load("orion50_mini", [*plain, "teacher.fit.heads=null"])
    with pytest.raises(ConfigError, match=r"data\.cache"):
        load("orion50_mini", [*plain, "data.cache=true"])
    with pytest.raises(ConfigError, match=r"distill\.vl"):
        load("smoke", ["distill.vl=0.1"])
    bare = Path(shutil.copytree(root / "v1", tmp_path / "bare" / "v1")).parent
    with pytest.raises(ConfigError, match=r"kdfast data infos --root"):
        load("orion50_mini", [*plain, f"data.root={bare}"])
    with pytest.raises(ConfigError, match=r"kdfast data infos"):
        load("orion50_mini", [*plain, "data.sample=false", f"data.root={tmp_path}/absent"])


def test_too_many_streams_are_named(root: Path, teachers: Path, tmp_path: Path) -> None:
    sets = words(tmp_path / "run", root, teachers, "run.batch_size=50")
    assert main(sets) == 2


@pytest.mark.slow
def test_two_processes(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    """Each has streams of its own; one reports while the other waits."""
    root = tmp_path_factory.mktemp("two") / "data"
    new_sample(root, SampleOptions(clips=6, val_clips=2, frames=FRAMES, size=(96, 160)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command = [*launch, "-m", "kdfast.train", *words(tmp_path / "run", root, tmp_path / "teachers")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    held = json.loads((tmp_path / "run" / "frames.json").read_text())
    assert held["frames"] == 2 * FRAMES
