# SPDX-License-Identifier: Apache-2.0
"""Chains end to end on a few digits: files, resume, recovery, cache, and the other tasks."""

import csv
import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from kdfast.chain import run as chain_run
from kdfast.chain.links import LinkModel
from kdfast.chain.objective import Objective
from kdfast.data.labelled import Classification, build_classification
from kdfast.resolve.link_file import weights_of
from kdfast.train import main
from kdfast.trainer.commits import load_checkpoint
from kdfast.trainer.loop import Loop
from kdfast.trainer.processes import make_accelerator

DOCUMENTED = (
    "epoch,train_loss,train_accuracy,train_precision,train_recall,train_f1_score,val_loss,"
    "val_accuracy,val_precision,val_recall,val_f1_score,learning_rate,epoch_time_sec,gpu_memory_mb"
).split(",")
MEASURED = ("epoch_time_sec", "gpu_memory_mb", "images_per_s", "gpu_reserved_mb", "host_memory_mb")


def args(dim: int, depth: int = 1) -> str:
    return f"{{img_size: 16, patch_size: 8, embed_dim: {dim}, depth: {depth}, num_heads: 2}}"


def words(folder: Path, *changes: str) -> list[str]:
    sets = [
        f"output={folder}",
        "device=cpu",
        "twin=false",
        "seeds=[3]",
        "epochs=2",
        "batch=8",
        "data.size=16",
        "data.limit=48",
        "optim.warmup_epochs=1",
        f"model_args=[{args(24, 2)}, {args(16)}, {args(8)}]",
        *changes,
    ]
    return ["--config", "vit_chain_digits", *(word for s in sets for word in ("--set", s))]


@pytest.fixture(scope="module")
def small() -> Classification:
    """The digits with few held-out ones."""
    whole = build_classification("digits", size=16, seed=3, val_fraction=0.05, test_fraction=0.05)
    return whole


@pytest.fixture(autouse=True)
def quick(
    monkeypatch: pytest.MonkeyPatch, small: Classification, request: pytest.FixtureRequest
) -> None:
    """Reads the digits once for all tests, and draws pictures in the test about files only."""
    monkeypatch.setattr(chain_run, "read_data", lambda config, seed: small)
    monkeypatch.setattr("kdfast.trainer.loop.draw_curves", lambda folder: None)
    if "files" not in request.node.name:
        drawn = ("draw_curves", "draw_confusion", "draw_attention")
        for name in (*(f"summary.{n}" for n in drawn), "compare.draw_comparison"):
            monkeypatch.setattr(f"kdfast.chain.{name}", lambda *_: None)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def weights(folder: Path, role: str, name: str = "best.pt") -> dict[str, Tensor]:
    (path,) = folder.glob(f"**/{role}/checkpoints/{name}")
    return weights_of(load_checkpoint(path))


def test_files_of_a_chain(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert main(words(folder, "twin=true")) == 0
    roles = ("teacher", "assistant", "student", "student_ce")
    for role, model in zip(roles, ("base", "small", "tiny", "tiny"), strict=True):
        link = folder / "from_scratch/digits" / role
        name = f"vit_{model}_patch16_224_{role}"
        table = rows(link / f"logs/{name}_log.csv")
        assert list(table[0])[:14] == DOCUMENTED
        assert [row["epoch"] for row in table] == ["1", "2"]
        assert float(table[0]["host_memory_mb"]) > 50 and float(table[0]["images_per_s"]) > 0
        # The rate of the epoch that the row is about: the end of the warm-up, and of the cosine.
        assert float(table[0]["learning_rate"]) == pytest.approx(1e-3 * (0.01 + 0.99 * 5 / 6))
        best = json.loads((link / f"logs/{name}_best_metrics.json").read_text())
        top = max(table, key=lambda row: float(row["val_accuracy"]))
        assert best["best_val_accuracy"] == pytest.approx(float(top["val_accuracy"]), rel=1e-5)
        assert best["best_val_accuracy_epoch"] == int(top["epoch"])
        assert set(best["test_per_class"]) == {str(i) for i in range(10)}
        assert np.sum(best["test_confusion"]) == 90
        recipe = json.loads((link / f"logs/{name}_config.json").read_text())
        assert recipe["config"]["distill"]["temperature"] == 4.0
        assert list((link / "logs/tensorboard").iterdir())
        assert {p.name for p in (link / "checkpoints").iterdir()} >= {"last.pt", "best.pt"}
        looks = [f"attention{i}_{what}.png" for i in range(2) for what in ("rollout", "heads")]
        for picture in ("curves.png", "confusion.png", *looks):
            with Image.open(link / "visualizations" / picture) as image:
                assert image.width > 300 and len(np.unique(np.asarray(image))) > 20
    compared = rows(folder / "comparison.csv")
    assert [row["role"] for row in compared] == list(roles)
    report = json.loads((folder / "comparison.json").read_text())
    assert report["gain"]["beats"] is None and report["config"]["seeds"] == [3]
    assert "student with distillation minus its twin" in (folder / "comparison.txt").read_text()
    assert (folder / "comparison.png").stat().st_size > 5000
    # The comparison, and of every link curves, confusion and two looks at two images.
    assert (folder / "report.html").read_text().count("<img ") == 1 + 4 * (1 + 1 + 4)
    # The student and its twin start from the same weights.
    states = [
        json.loads((folder / f"from_scratch/digits/{r}/summary.json").read_text()) for r in roles
    ]
    assert states[2]["params"] == states[3]["params"] < states[1]["params"] < states[0]["params"]
    gc.collect()
    alive = [x for x in gc.get_objects() if type(x) is LinkModel]
    assert not alive, "models must be free after the run"


def test_stages_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert main(words(folder, "stage=assistant")) == 2
    assert "stage: assistant needs an earlier run" in capsys.readouterr().err
    assert main(words(folder, "stage=teacher")) == 0
    assert main(words(folder, "stage=student")) == 2
    assert "train it first: stage=assistant" in capsys.readouterr().err
    assert main(words(folder, "stage=assistant")) == 0
    assert main(words(folder, "stage=student")) == 0
    assert [row["role"] for row in rows(folder / "comparison.csv")] == [
        *("teacher", "assistant", "student")
    ]
    assert main(words(tmp_path / "whole")) == 0
    one, two = (weights(x, "student") for x in (folder, tmp_path / "whole"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    # Another architecture than that of the checkpoint is refused.
    other = f"model_args=[{args(24, 2)}, {args(32)}, {args(8)}]"
    assert main(words(folder, "stage=student", other)) == 2
    assert "must have args" in capsys.readouterr().err
    # A link that is trained again keeps the earlier one aside.
    assert main(words(folder, "stage=student")) == 0
    assert (folder / "from_scratch/digits/student.old1/logs").is_dir()


@pytest.mark.parametrize("role", [pytest.param("teacher", marks=pytest.mark.slow), "student"])
def test_resume_in_mid_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str) -> None:
    """Mixup, drop path and averaged weights: the generators must come back too."""
    changes = ["optim.mixup=0.4", "optim.ema=0.9", "save_every=4", "twin=true"]
    drop = args(8)[:-1] + ", drop_path_rate: 0.3}"
    changes.append(f"model_args=[{args(16, 2)[:-1]}, drop_path_rate: 0.2}}, {drop}]")
    changes.append("chain=[vit_base_patch16_224, vit_tiny_patch16_224]")
    assert main(words(tmp_path / "whole", *changes)) == 0
    step = Loop._train_step

    def dies(self: Loop, batches: Any, epoch: int) -> float:
        if self.job.title == role and self.step == 9:
            raise KeyboardInterrupt
        return step(self, batches, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_train_step", dies)
        assert main(words(tmp_path / "cut", *changes)) == 130
    (last,) = (tmp_path / "cut").glob(f"**/{role}/checkpoints/last.pt")
    assert load_checkpoint(last)["step"] == 8, "must have died in mid-epoch, after a checkpoint"
    assert main([*words(tmp_path / "cut", *changes), "--resume"]) == 0
    for name in ("teacher", "student", "student_ce"):
        for kind in ("best.pt", "last.pt"):
            one, two = (weights(tmp_path / x, name, kind) for x in ("whole", "cut"))
            assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    logs = []
    for folder in ("whole", "cut"):
        (path,) = (tmp_path / folder).glob(f"**/{role}/logs/vit_*_log.csv")
        logs.append([{k: v for k, v in r.items() if k not in MEASURED} for r in rows(path)])
    assert logs[0] == logs[1]
    # A finished run resumes to its table; another recipe is refused.
    assert main([*words(tmp_path / "cut", *changes), "--resume"]) == 0
    assert main([*words(tmp_path / "cut", *changes, "distill.alpha=0.5"), "--resume"]) == 2


def test_every_link_has_its_own_loss_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of fp16, which trains on a GPU only: here a scaler of the CPU, in an fp32 run."""

    def scaling(precision: str, device: str, shard: str) -> Accelerator:
        accelerator = make_accelerator(precision, device, shard)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=5)
        return accelerator

    monkeypatch.setattr("kdfast.train.make_accelerator", scaling)
    changes = ["chain=[vit_base_patch16_224, vit_tiny_patch16_224]"]
    changes.append(f"model_args=[{args(16)}, {args(8)}]")
    assert main(words(tmp_path / "whole", *changes)) == 0
    # 12 steps each, two growths; the next would come three steps later.
    for role in ("teacher", "student"):
        (last,) = (tmp_path / "whole").glob(f"**/{role}/checkpoints/last.pt")
        state = load_checkpoint(last)
        assert (state["step"], state["scaler"]["scale"]) == (12, 32.0), role
        assert state["scaler"]["_growth_tracker"] == 2
    # In parts, of which one ends in the middle of a link, the scale is that of the whole run.
    folder = tmp_path / "parts"
    assert main(words(folder, *changes, "stage=teacher", "max_steps=7")) == 0
    assert main([*words(folder, *changes), "--resume"]) == 0
    for role in ("teacher", "student"):
        one, two = (
            load_checkpoint(next(x.glob(f"**/{role}/checkpoints/last.pt")))
            for x in (tmp_path / "whole", folder)
        )
        assert one["scaler"] == two["scaler"]
        assert all(torch.equal(x, two["module"][name]) for name, x in one["module"].items())


def test_out_of_memory_halves_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = ("stage=teacher", "epochs=2", "optim.clip=null")
    assert main(words(tmp_path / "whole", *stage)) == 0
    forward = Objective.forward
    seen: list[int] = []

    def limited(self: Objective, images: Tensor, *rest: Any) -> Any:
        seen.append(len(images))
        if len(images) > 3:
            raise torch.OutOfMemoryError("simulated")
        return forward(self, images, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "forward", limited)
        assert main(words(tmp_path / "small", *stage)) == 0
    out = capsys.readouterr().out
    assert "out of memory: the batch of 8 goes on in 4 pieces of 2 or less" in out
    assert "the effective batch stays 8" in out
    assert seen[:4] == [8, 4, 2, 2] and set(seen[2:]) == {2}
    one, two = (weights(tmp_path / x, "teacher", "last.pt") for x in ("whole", "small"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)
    (path,) = (tmp_path / "small").glob("**/*_teacher_log.csv")
    assert [row["parts"] for row in rows(path)] == ["4", "4"]

    def always(self: Objective, images: Tensor, *rest: Any) -> Any:
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(Objective, "forward", always)
    with pytest.raises(RuntimeError, match="out of memory with single images"):
        main(words(tmp_path / "never", *stage))


def test_cache_replaces_the_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = ["chain=[vit_base_patch16_224, vit_tiny_patch16_224]", "seeds=[3, 4]", "vary=student"]
    changes += [f"model_args=[{args(16)}, {args(8)}]", "data.limit=32", "twin=true"]
    assert main(words(tmp_path / "plain", *changes)) == 0
    ran: list[int] = []
    run_teacher = Objective._run_teacher

    def counted(self: Objective, images: Tensor) -> Any:
        ran.append(len(images))
        return run_teacher(self, images)

    monkeypatch.setattr(Objective, "_run_teacher", counted)
    folder = f"cache_dir={tmp_path / 'cache'}"
    assert main(words(tmp_path / "kept", *changes, "cache=true", folder)) == 0
    assert not ran and len(list((tmp_path / "cache").iterdir())) == 1
    one, two = (rows(tmp_path / x / "comparison.csv") for x in ("plain", "kept"))
    assert [(row["role"], row["seed"]) for row in one] == [
        *(("teacher", "3"), ("student", "3"), ("student", "4")),
        *(("student_ce", "3"), ("student_ce", "4")),
    ]
    assert len(one) == len(two)
    for seed in (3, 4):
        a, b = (weights(tmp_path / x / f"seed{seed}", "student") for x in ("plain", "kept"))
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-2, atol=2e-3)


def test_early_stopping(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    still = ("optim.lr=1e-30", "optim.sched=none", "optim.warmup_epochs=0", "stage=teacher")
    assert main(words(tmp_path / "run", *still, "epochs=9", "patience=2")) == 0
    assert "no better epoch for 2, stopping early" in capsys.readouterr().out
    (path,) = (tmp_path / "run").glob("**/*_teacher_log.csv")
    assert len(rows(path)) == 3
    assert main([*words(tmp_path / "run", *still, "epochs=9", "patience=2"), "--resume"]) == 0
    assert len(rows(path)) == 3


def test_best_is_there_before_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All processes read the best weights at the end, which only the first one writes."""
    folder, original = tmp_path / "run", Accelerator.wait_for_everyone
    seen: list[bool] = []

    def wait(self: Accelerator) -> None:
        seen.extend(path.with_name("best.pt").is_file() for path in folder.glob("**/last.pt"))
        original(self)

    monkeypatch.setattr(Accelerator, "wait_for_everyone", wait)
    assert main(words(folder, "stage=teacher", "epochs=1", "optim.warmup_epochs=0")) == 0
    assert seen and all(seen)


def test_processes_stop_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Early stopping judges what the first process found: with batch norm others find something
    else, and one that stops alone leaves the rest waiting."""
    first = iter([50.0, 60.0, 55.0, 70.0])

    def receive(values: list[dict[str, float]]) -> None:
        values[0] = {**values[0], "accuracy": next(first)}

    monkeypatch.setattr("kdfast.chain.watch.broadcast_object_list", receive)
    folder = tmp_path / "run"
    assert main(words(folder, "stage=teacher", "epochs=4", "patience=1")) == 0
    (log,) = folder.glob("**/teacher/logs/*_log.csv")
    assert [row["val_accuracy"] for row in rows(log)] == ["50", "60", "55"]


def test_non_finite_loss_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "kdfast.chain.objective.task_loss", lambda logits, *_: (logits * float("nan")).sum()
    )
    assert main(words(tmp_path / "run", "stage=teacher")) == 1
    error = capsys.readouterr().err
    assert "teacher step 1: loss and gradient must be finite" in error and "item " in error


def test_convolutional_chain_with_every_option(tmp_path: Path) -> None:
    """ResNet teaches ResNet teaches ViT: schedules, projection, accelerate, bf16, checkpointing."""
    net = "{channels: [8, 8, 16, 16], layers: [1, 1, 1, 1]}"
    changes = [
        "chain=[resnet34, resnet18]",
        f"model_args=[{net}]",
        "distill.feature=0.5",
        "distill.schedule=cosine",
        "optim.opt=sgd",
        "optim.sched=step",
    ]
    assert main(words(tmp_path / "cnn", *changes)) == 0
    assert len(rows(tmp_path / "cnn/comparison.csv")) == 2
    changes = ["distill.attention=1", "distill.attention_map=relation", "distill.relation_heads=4"]
    changes += ["distill.feature=1", "checkpointing=true", "optim.layer_decay=0.8"]
    changes += ["precision=bf16", "accelerate=true"]
    assert main(words(tmp_path / "vit", *changes)) == 0
    (path,) = (tmp_path / "vit").glob("**/student/logs/steps.csv")
    assert {"kd", "task", "attention", "feature", "alpha"} <= set(rows(path)[0])


def test_several_labels_per_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: Classification
) -> None:
    """Even, large, prime: three labels of a digit."""

    def labelled(part: Any) -> Any:
        y = part.targets
        labels = torch.stack([y % 2 == 0, y > 4, (y == 2) | (y == 3) | (y == 5) | (y == 7)], 1)
        clone = type(part)(part.store, labels.float(), part.size)
        return clone

    data = Classification(
        name="labels",
        task="multilabel",
        class_names=["even", "large", "prime"],
        train=labelled(small.train),
        val=labelled(small.val),
        test=labelled(small.test),
        facts=dict(small.facts),
    )
    monkeypatch.setattr(chain_run, "read_data", lambda config, seed: data)
    assert main(words(tmp_path / "run", "twin=true")) == 0
    (path,) = (tmp_path / "run").glob("**/*_student_best_metrics.json")
    best = json.loads(path.read_text())
    assert set(best["test_per_class"]) == {"even", "large", "prime"}
    assert 0 < best["test_auc"] <= 100 and np.asarray(best["test_confusion"]).shape == (3, 2, 2)


def test_planned_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = ("stage=teacher", "batch=auto", "data.limit=20", "epochs=1", "optim.warmup_epochs=0")
    assert main(words(tmp_path / "run", *stage, "vram_gib=16")) == 0
    (path,) = (tmp_path / "run").glob("**/summary.json")
    assert json.loads(path.read_text())["batch"] == 16  # the largest power of two of 20 images
    assert main(words(tmp_path / "run", *stage)) == 2
    assert "vram_gib: batch auto needs it where there is no GPU" in capsys.readouterr().err
    assert main(words(tmp_path / "run", *stage, "vram_gib=1e-4")) == 2
    assert "batch: teacher: " in capsys.readouterr().err
