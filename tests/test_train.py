# SPDX-License-Identifier: Apache-2.0
"""The trainer end to end on tiny runs, and its parts against literals."""

import csv
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from kdfast.configs import load
from kdfast.configs.recovery import OptimConfig
from kdfast.data.scenes import Scenes
from kdfast.models.checkpoint import load_backbone
from kdfast.models.eva import EVAViT
from kdfast.recovery.evaluate import confusion, mean_iou, similarity
from kdfast.recovery.optim import block_depth, param_groups, schedule
from kdfast.train import main
from kdfast.trainer.commits import load_checkpoint


def smoke(folder: Path, teachers: Path, *changes: str) -> list[str]:
    """Command line of the smoke config with its output in ``folder``."""
    sets = [f"output={folder}", f"teacher.cache={teachers}", "run.device=cpu", *changes]
    return ["--config", "smoke", *(word for change in sets for word in ("--set", change))]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student.safetensors")


def test_whole_run(tmp_path: Path, teachers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert main(smoke(folder, teachers)) == 0
    out = capsys.readouterr().out
    steps, epochs = rows(folder / "steps.csv"), rows(folder / "epochs.csv")
    # 48 images in batches of 4, 2 epochs; rows after step 1, every fourth and each epoch.
    assert [int(row["step"]) for row in steps] == [1, 5, 9, 12, 16, 20, 24]
    assert list(steps[0]) == (
        "step epoch total task kd feature attention output alpha lr grad_norm images_per_s "
        "time data_time memory_mib".split()
    )
    assert [float(row["alpha"]) for row in steps] == pytest.approx([0.8] * 4 + [0.6] * 3)
    assert all(0 < float(row["data_time"]) < float(row["time"]) for row in steps)
    for row in steps[:4]:
        value = {name: float(text) for name, text in row.items()}
        kd = 0.5 * value["feature"] + 0.3 * value["attention"] + 0.2 * value["output"]
        assert value["kd"] == pytest.approx(kd, rel=1e-4)
        assert value["total"] == pytest.approx(0.2 * value["task"] + 0.8 * kd, rel=1e-4)
    assert [row["step"] for row in epochs] == ["12", "24"]

    result = json.loads((folder / "report.json").read_text())
    names = [line["model"] for line in result["models"]]
    assert names == ["teacher", "pruned", "compensated", "distilled"]
    assert [line["heads"] for line in result["models"]] == [16, 8, 8, 8]
    teacher, pruned, _, distilled = result["models"]
    assert teacher["params"] > pruned["params"] == distilled["params"]
    assert teacher["gmac"] > pruned["gmac"] == distilled["gmac"]
    assert teacher["peak_mib"] > pruned["peak_mib"] > 0
    assert result["metric"] == "mIoU" and 0 < teacher["quality"] < 1
    assert distilled["quality"] == pytest.approx(float(epochs[1]["mIoU"]), abs=1e-6)
    for name in ("curves.png", "predictions.png"):
        assert Image.open(folder / name).size[0] > 300
    assert list((folder / "tensorboard").iterdir())
    for text in ("ms / image", "peak MiB", "predictions.png", "student.safetensors", "eta"):
        assert text in out
    assert out.splitlines()[-1].endswith(f"page         {folder / 'report.html'}")
    assert out.count("tensorboard --logdir") == 1
    # Scores of heads, predictions, curves of both trainings, the four models.
    page = (folder / "report.html").read_text()
    assert page.count("<img ") == 4 and "distilled" in page
    assert "\x1b" not in (folder / "report.txt").read_text() + (folder / "train.log").read_text()
    assert "training a teacher" in (folder / "train.log").read_text()

    saved = load(str(folder / "config.yaml"))
    assert saved.name == "smoke" and saved.output == str(folder)
    student = load_backbone(folder / "student.safetensors")
    assert [len(kept) for kept in student.heads] == [2, 2, 2, 2]
    checkpoint = load_checkpoint(folder / "last.pt")
    assert checkpoint["step"] == 24 and checkpoint["meta"]["heads"] == student.heads
    assert all(name.startswith("student.") for name in checkpoint["module"])
    # The frozen head: what the run hands out is what the teacher was trained with.
    kept = next(teachers.glob("*.head.safetensors"))
    head = load_file(folder / "head.safetensors")
    assert all(torch.equal(head[name], value) for name, value in load_file(kept).items())

    assert main(["--config", str(folder / "config.yaml")]) == 0
    again = tmp_path / "run-2"
    assert "teacher of an earlier run" in (again / "train.log").read_text()
    assert all(torch.equal(weights(folder)[n], w) for n, w in weights(again).items())


def test_teacher_cache_depends_on_the_recipe(tmp_path: Path, teachers: Path, quick: None) -> None:
    before = set(teachers.iterdir())
    changes = ["seed=5", "run.max_steps=1", "data.frames=2"]
    assert main(smoke(tmp_path / "a", teachers, *changes)) == 0
    new = set(teachers.iterdir()) - before
    assert len(new) == 3  # backbone, head, and the manifest of both
    assert main(smoke(tmp_path / "b", teachers, *changes, "optim.lr=1e-5")) == 0
    assert set(teachers.iterdir()) - before == new


@pytest.mark.parametrize("change", ["run.checkpointing=true", "run.accumulate=2"])
def test_same_result_another_way(change: str, tmp_path: Path, teachers: Path, quick: None) -> None:
    """Recomputation changes nothing; two halves of a batch give the gradient of the whole."""
    common = ["run.max_steps=2", "run.epochs=1", "run.save_every=1"]
    assert main(smoke(tmp_path / "a", teachers, *common)) == 0
    halves = ["run.batch_size=2"] if "accumulate" in change else []
    assert main(smoke(tmp_path / "b", teachers, *common, change, *halves)) == 0
    a, b = (load_checkpoint(tmp_path / name / "last.pt") for name in "ab")
    assert a["step"] == b["step"] == 2
    for name, value in a["module"].items():
        tolerance = {"rtol": 0, "atol": 0} if not halves else {"rtol": 0, "atol": 2e-4}
        torch.testing.assert_close(b["module"][name], value, **tolerance)
    first, second = (rows(tmp_path / name / "steps.csv")[0] for name in "ab")
    for name in ("total", "grad_norm"):
        assert float(first[name]) == pytest.approx(float(second[name]), rel=2e-3)


def test_bf16(tmp_path: Path, teachers: Path, quick: None) -> None:
    assert main(smoke(tmp_path / "run", teachers, "run.precision=bf16", "run.max_steps=2")) == 0
    row = rows(tmp_path / "run/steps.csv")[-1]
    assert math.isfinite(float(row["total"])) and float(row["grad_norm"]) > 0


def test_non_finite_loss(
    tmp_path: Path,
    teachers: Path,
    quick: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run stops before the step, with its state saved and the batch named."""
    folder = tmp_path / "run"
    assert main(smoke(folder, teachers, "run.max_steps=3")) == 0
    good = load_checkpoint(folder / "last.pt")
    original = Scenes.load

    def poisoned(self: Scenes, index: int) -> Any:
        item = original(self, index)
        if self.split == "train" and index == bad:
            item["image"][0, 0, 0] = math.nan
        return item

    # The fourth batch of the epoch: found by its order, which the seed fixes.
    from kdfast.data.sampler import EpochSampler

    bad = list(EpochSampler(48, seed=0))[13]
    monkeypatch.setattr(Scenes, "load", poisoned)
    monkeypatch.setattr(
        "kdfast.recovery.run.score_heads", lambda *_, **__: pytest.fail("heads come from the run")
    )
    words = smoke(folder, teachers, "run.max_steps=6") + ["--resume"]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "distil step 4: loss and gradient must be finite" in error
    assert f"{bad}" in error and "scenes/train/0/" in error
    named = json.loads((folder / "nonfinite-rank0.json").read_text())
    assert named["step"] == 4 and bad in named["batches"][0]["index"]
    assert len(named["batches"][0]["path"]) == 4
    saved = load_checkpoint(folder / "last.pt")
    assert saved["step"] == 3
    assert all(torch.equal(saved["module"][n], v) for n, v in good["module"].items())


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of 20 pictures and one broken one."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    noise = np.random.default_rng(0)
    for i in range(20):
        small = noise.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize((64, 48)).save(folder / f"{i:02d}.jpg")
    (folder / "05.jpg").write_bytes(b"\xff\xd8 broken")
    return folder


@pytest.fixture
def orion_file(tmp_path: Path) -> Path:
    """A small checkpoint in the form of ORION's: container, prefix, other modules."""
    model = EVAViT(
        img_size=64,
        patch_size=16,
        embed_dim=128,
        depth=4,
        num_heads=2,
        window_size=3,
        window_block_indexes=[0, 2],
        pretrain_img_size=64,
    )
    from kdfast.models import save_backbone

    save_backbone(model, tmp_path / "x.safetensors", orion_keys=True)
    state = {**load_file(tmp_path / "x.safetensors"), "map_head.weight": torch.zeros(3)}
    torch.save({"meta": {"epoch": 6}, "state_dict": state}, tmp_path / "orion.pth")
    return tmp_path / "orion.pth"


def test_orion_file_on_a_picture_folder(
    tmp_path: Path,
    pictures: Path,
    orion_file: Path,
    quick: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No labels: no task term, likeness to the teacher as the metric, one broken picture."""
    folder = tmp_path / "run"
    changes = {
        "output": folder,
        "teacher.checkpoint": orion_file,
        "data.kind": "images",
        "data.root": pictures,
        "data.size": [64, 64],
        "data.workers": 0,
        "run.device": "cpu",
        "run.batch_size": 2,
        "run.log_every": 1,
        "run.max_steps": 3,
        "prune.batches": 2,
        "teacher.cache": tmp_path,
    }
    words = [w for key, value in changes.items() for w in ("--set", f"{key}={value}")]
    assert main(["--config", "orion50", *words]) == 0
    steps = rows(folder / "steps.csv")
    assert "task" not in steps[0] and len(steps) == 3
    first = {name: float(text) for name, text in steps[0].items()}
    assert first["total"] == pytest.approx(0.8 * first["kd"], rel=2e-3)
    result = json.loads((folder / "report.json").read_text())
    assert result["metric"] == "similarity"
    assert result["models"][0]["quality"] == pytest.approx(1.0, abs=1e-5)
    teacher, pruned, compensated, _ = (line["quality"] for line in result["models"])
    assert pruned < compensated < teacher
    assert Image.open(folder / "predictions.png").size[0] > 300
    out = capsys.readouterr().out
    # Under DropPath 0 and bf16 the recipe's GridMask and photometric distortion still run.
    assert "05.jpg" in out or load_checkpoint(folder / "last.pt")["ranks"][0]["feed"]["bad"] == 0

    words = [w if "max_steps" not in w else "run.max_steps=5" for w in words]
    assert main(["--config", "orion50", *words, "--resume"]) == 0
    assert [row["step"] for row in rows(folder / "steps.csv")] == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["distil.alpha=1"], "did you mean distill.alpha?"),
        (["teacher.checkpoint=gone.pth"], "teacher.checkpoint: no such file: gone.pth"),
        (["run.batch_size=100"], "run.batch_size: 48 training images on 1 process"),
        (["run.accumulate=13"], "run.accumulate: an epoch has "),
        (["distill.feature_layers=[3]"], r"distill.feature_layers: must be different blocks"),
    ],
)
def test_one_clear_error(
    changes: list[str],
    message: str,
    tmp_path: Path,
    teachers: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(smoke(tmp_path / "run", teachers, *changes)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: config: 1 problem\n") and message in error


def test_schedule() -> None:
    config = OptimConfig(warmup=500, warmup_ratio=0.1, min_ratio=0.01)
    factor = schedule(config, 5502)
    wave = lambda step: 0.505 + 0.495 * math.cos(math.pi * step / 5502)  # noqa: E731
    assert factor(0) == pytest.approx(0.1)
    assert factor(250) == pytest.approx(0.55 * wave(250))
    assert factor(500) == pytest.approx(wave(500))
    assert factor(2751) == pytest.approx(0.505)
    assert factor(5502) == pytest.approx(0.01)
    # A run of 100 steps warms up in 10.
    assert schedule(config, 100)(10) > schedule(config, 100)(11)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("student.blocks.0.attn.q_bias", 24),
        ("blocks.23.mlp.w1.weight", 1),
        ("student.patch_embed.proj.weight", 25),
        ("pos_embed", 25),
        ("head.mix.weight", 0),
    ],
)
def test_block_depth(name: str, expected: int) -> None:
    assert block_depth(name, 24) == expected


def test_param_groups() -> None:
    model = EVAViT(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    model.blocks[1].norm2.weight.requires_grad_(False)
    config = OptimConfig(weight_decay=0.05, layer_decay=0.5)
    groups = param_groups(model, config, 2)
    found = {n: (g["weight_decay"], g["factor"]) for g in groups for n in g["names"]}
    assert "blocks.1.norm2.weight" not in found
    assert len(found) == len(list(model.parameters())) - 1
    assert found["blocks.1.attn.q_proj.weight"] == (0.05, 0.5)
    assert found["blocks.0.attn.q_proj.weight"] == (0.05, 0.25)
    assert found["blocks.0.attn.v_bias"] == (0.0, 0.25)
    assert found["blocks.0.norm1.weight"] == (0.0, 0.25)
    assert found["patch_embed.proj.bias"] == (0.0, 0.125)
    assert found["patch_embed.proj.weight"] == (0.05, 0.125)
    plain = param_groups(model, replace(config, layer_decay=None), 2)
    assert {g["factor"] for g in plain} == {1.0}


def test_mean_iou() -> None:
    logits = torch.tensor([[[5.0, 0, 0, 0]], [[0, 5.0, 5.0, 0]], [[0, 0, 0, 5.0]]])[None]
    labels = torch.tensor([[[0, 1, 0, -100]]])
    counts = confusion(logits, labels, 3)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert mean_iou(counts) == pytest.approx(0.5)  # class 2 occurs nowhere
    with pytest.raises(ValueError, match="must hold a pixel"):
        mean_iou(torch.zeros(3, 3))


def test_similarity() -> None:
    a = torch.tensor([1.0, 2, 3, 4]).view(1, 4, 1, 1).expand(2, 4, 1, 3)
    assert similarity(2 * a + 7, a).item() == pytest.approx(6)
    assert similarity(-a, a).item() == pytest.approx(-6)
    assert similarity(a.flip(1)[:, [1, 0, 3, 2]], a).item() == pytest.approx(6 * -0.6)


WORKER = """
import sys, torch
from kdfast.train import main
torch.set_num_threads(1)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_processes_give_the_gradient_of_one(
    tmp_path: Path, teachers: Path, quick: None
) -> None:
    """Two ranks with half a batch each take the step of one process with the whole batch."""
    common = ["run.epochs=1", "run.max_steps=2", "run.save_every=1"]
    assert main(smoke(tmp_path / "one", teachers, *common, "run.batch_size=4")) == 0
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    words = smoke(tmp_path / "two", teachers, *common, "run.batch_size=2")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launch, str(script), *words], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_checkpoint(tmp_path / name / "last.pt") for name in ("one", "two"))
    assert (one["world"], two["world"], two["step"]) == (1, 2, 2)
    for name, value in one["module"].items():
        torch.testing.assert_close(two["module"][name], value, rtol=0, atol=2e-4)
    first, second = (rows(tmp_path / name / "steps.csv")[0] for name in ("one", "two"))
    for name in ("total", "task", "feature", "grad_norm"):
        assert float(first[name]) == pytest.approx(float(second[name]), rel=2e-3)
    assert done.stdout.count("starting smoke") == 1
    # The calibration's sums are those of all processes: they share the same images.
    first, second = (load_file(tmp_path / x / "compensated.safetensors") for x in ("one", "two"))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=1e-4)
    logs = [(tmp_path / name / "train.log").read_text() for name in ("one", "two")]
    assert all("calibration: 48 views" in log for log in logs)
