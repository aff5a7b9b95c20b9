# SPDX-License-Identifier: Apache-2.0
"""Whole distillations: files, resume, labels, pictures and processes."""

import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import kdfast
from kdfast.configs import ConfigError
from kdfast.configs.distil import DistilConfig
from kdfast.data.files import CorruptDataError
from kdfast.distill import fit_classes
from kdfast.distillation.pictures import build_pictures, class_numbers, list_pictures
from kdfast.machine.signals import Interrupted
from kdfast.nn.attention import FusedAttention
from kdfast.resolve import class_count, load_model
from kdfast.trainer.logs import read_rows

SIZES: dict[str, Any] = {
    **{"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3},
    "num_classes": 3,
}
CLASSES = ("cat", "dog", "emu")

pytestmark = pytest.mark.usefixtures("quick")


def noise_pictures(root: Path, count: int) -> Path:
    """Pictures of three classes, of different colours."""
    for index in range(count):
        label = index % len(CLASSES)
        pixels = numpy.random.default_rng(index).integers(0, 100, (36, 40, 3))
        pixels[..., label] += 120
        folder = root / CLASSES[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(numpy.uint8)).save(folder / f"{index}.png")
    return root


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return noise_pictures(tmp_path / "pictures", 30)


def teacher_of(**more: Any) -> Any:
    torch.manual_seed(0)
    net: Any = timm.create_model("vit_tiny_patch16_224", **{**SIZES, **more}).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * (0.1 if p.dim() > 1 else 0.05))
    return net


def pair() -> tuple[nn.Module, nn.Module]:
    teacher = teacher_of()
    return kdfast.prune_heads(teacher, [[0, 2], [1]]), teacher


SHORT: dict[str, Any] = {"epochs": 2, "batch_size": 4, "lr": 1e-3, "log_every": 1}


def test_a_run_and_everything_that_it_leaves(tmp_path: Path, pictures: Path) -> None:
    student, teacher = pair()
    teacher.train()
    weights = {key: value.clone() for key, value in teacher.state_dict().items()}
    result = kdfast.distil(
        student, teacher, pictures, output=str(tmp_path / "run"), **{**SHORT, "epochs": 4}
    )
    assert result is not None
    assert all(torch.equal(weights[k], v) for k, v in teacher.state_dict().items())
    assert teacher.training and all(p.requires_grad for p in teacher.parameters())
    assert result.student is student and not student.training
    names = {path.name for path in result.folder.iterdir()}
    assert names >= {
        *("attention.png", "config.yaml", "epochs.csv", "last.pt", "quality.png", "report.json"),
        "report.html",
        *("report.txt", "steps.csv", "student", "tensorboard", "train.log"),
    }
    again = kdfast.load_pretrained(result.saved)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(again(images), student(images))
    report = json.loads((result.folder / "report.json").read_text())
    teacher_row, before, after = report["models"]
    assert [row["model"] for row in report["models"]] == ["teacher", "student before", "distilled"]
    assert teacher_row["quality"] == pytest.approx({"cosine": 1, "agreement": 1})
    assert after["quality"]["cosine"] > before["quality"]["cosine"]
    assert report["cut"] and report["terms"] == {"logits": 1.0, "feature": 0.5, "attention": 0.1}
    assert (after["heads"], teacher_row["heads"]) == (3, 6) and after["gmac"] > 0
    rows = read_rows(result.folder / "epochs.csv")
    assert len(rows) == 4 and float(rows[-1]["cosine"]) == pytest.approx(
        after["quality"]["cosine"], rel=1e-5
    )
    assert float(read_rows(result.folder / "steps.csv")[0]["attention"]) > 0
    log = (result.folder / "train.log").read_text()
    assert "attention, weight 0.1: 3 heads with those they were, in 2 of 2 attentions" in log
    text = (result.folder / "report.txt").read_text()
    assert max(map(len, text.splitlines())) <= 80 and "\x1b" not in text
    assert "of the cosine that was lost" in text


def test_labels_are_learned_and_measured(tmp_path: Path, pictures: Path) -> None:
    student, teacher = pair()
    result = kdfast.distil(
        student,
        teacher,
        pictures,
        labels=True,
        alpha=0.2,
        output=str(tmp_path / "run"),
        **{**SHORT, "epochs": 6},
    )
    assert result is not None
    quality = [line.quality for line in result.lines]
    assert quality[2]["accuracy"] > quality[0]["accuracy"]
    rows = read_rows(result.folder / "steps.csv")
    assert float(rows[-1]["task"]) < float(rows[0]["task"])


def without(log: str) -> str:
    return re.sub(r"eta.*|\d\d:\d\d:\d\d|images_per_s.*", "", log)


@pytest.mark.parametrize("at", [3, 7])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, pictures: Path, at: int) -> None:
    """In the middle of an epoch, and between two; with dropout, so that generators matter."""
    ends = []
    for parts in ([None], [at, None]):
        output = tmp_path / f"run{len(parts)}"
        for number, stop in enumerate(parts):
            teacher = teacher_of(proj_drop_rate=0.1, drop_path_rate=0.1)
            student = kdfast.prune_heads(teacher, [[0, 2], [1]])
            result = kdfast.distil(
                *(student, teacher, pictures),
                output=str(output),
                resume=number > 0,
                max_steps=stop,
                **SHORT,
            )
            assert (result is None) == (stop is not None)
        ends.append((student.state_dict(), json.loads((output / "report.json").read_text())))
    (a, one), (b, two) = ends
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert [x["quality"] for x in one["models"]] == [x["quality"] for x in two["models"]]
    steps = [read_rows(tmp_path / f"run{n}" / "steps.csv") for n in (1, 2)]
    assert [row["total"] for row in steps[0]] == [row["total"] for row in steps[1]]


def test_a_run_goes_on_only_as_it_began(tmp_path: Path, pictures: Path) -> None:
    common: dict[str, Any] = {**SHORT, "output": str(tmp_path / "run"), "max_steps": 2}
    kdfast.distil(*pair(), pictures, **common)
    with pytest.raises(ConfigError, match="was made with config.lr 0.001, got 0.01"):
        kdfast.distil(*pair(), pictures, resume=True, **{**common, "lr": 0.01})
    student, teacher = pair()
    with torch.no_grad():
        teacher.head.bias.add_(1)  # type: ignore[union-attr, operator]
    with pytest.raises(ConfigError, match="was made with teacher"):
        kdfast.distil(student, teacher, pictures, resume=True, **common)
    with pytest.raises(ConfigError, match="--resume: there is no run in"):
        kdfast.distil(*pair(), pictures, resume=True, **{**common, "output": str(tmp_path / "no")})


def test_an_interrupted_evaluation_is_done_again(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[None] = []

    def stops() -> None:
        calls.append(None)
        if len(calls) == 3:  # after both models were measured before the training
            raise Interrupted(15)

    monkeypatch.setattr("kdfast.distillation.evaluate.check", stops)
    common: dict[str, Any] = {**SHORT, "output": str(tmp_path / "run")}
    with pytest.raises(Interrupted):
        kdfast.distil(*pair(), pictures, **common)
    result = kdfast.distil(*pair(), pictures, resume=True, **common)
    assert result is not None and len(read_rows(result.folder / "epochs.csv")) == 2


def test_refused_runs_leave_no_folder(tmp_path: Path, pictures: Path) -> None:
    output = tmp_path / "run"
    calls: list[tuple[str, Callable[[], object]]] = [
        ("there is no folder", lambda: kdfast.distil(*pair(), "nowhere", output=str(output))),
        (
            "batch_size: must be at most the 27 training pictures",
            lambda: kdfast.distil(*pair(), pictures, batch_size=64, output=str(output)),
        ),
        (
            "folders must be the 4 classes of the student.*got 3: cat, dog, emu",
            lambda: kdfast.distil(
                *(teacher_of(num_classes=4), teacher_of(num_classes=4), pictures),
                labels=True,
                output=str(output),
            ),
        ),
        ("epochs: must be at least 1", lambda: kdfast.distil(*pair(), pictures, epochs=0)),
    ]
    for reason, call in calls:
        with pytest.raises(ConfigError, match=reason):
            call()
    assert not output.exists()


def test_models_stay_as_they_are_without_accelerate(tmp_path: Path, pictures: Path) -> None:
    teacher = teacher_of()
    student = teacher_of(depth=1)
    kdfast.distil(
        *(student, teacher, pictures),
        accelerate=False,
        augment=False,
        output=str(tmp_path / "run"),
        **{**SHORT, "epochs": 1},
    )
    assert not any(isinstance(m, FusedAttention) for n in (student, teacher) for m in n.modules())


class Own(nn.Module):
    """A model that no library knows."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, 8, 8)
        self.unused = nn.Linear(2, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.body(images).mean((2, 3))


def test_models_of_ones_own_are_saved_as_weights(tmp_path: Path, pictures: Path) -> None:
    student, teacher = Own(), Own()
    before = student.unused.weight.clone()
    result = kdfast.distil(
        *(student, teacher, pictures), size=32, output=str(tmp_path / "run"), **SHORT
    )
    assert result is not None and result.saved.name == "student.pt"
    state = torch.load(result.saved, weights_only=True)
    assert torch.equal(state["body.weight"], student.body.weight)
    log = (result.folder / "train.log").read_text()
    assert "no term depends on unused.weight, unused.bias: left as it is" in log
    assert torch.equal(before, student.unused.weight) and student.unused.weight.requires_grad
    assert "the student will be saved as weights alone" in log
    assert result.lines[0].heads is None


def test_pictures_of_folders_archives_and_splits(tmp_path: Path, pictures: Path) -> None:
    config = DistilConfig(val_fraction=0.2)
    listed = list_pictures(pictures, config)
    assert (len(listed.train), len(listed.held), listed.classes) == (24, 6, None)
    assert not set(listed.train.rows) & set(listed.held.rows)
    labelled = list_pictures(pictures, DistilConfig(labels=True, val_fraction=0.2, limit=6))
    assert labelled.classes == list(CLASSES)
    assert labelled.train.targets.bincount().tolist() == [2, 2, 2]
    assert labelled.held.targets.bincount().tolist() == [2, 2, 2]
    archive = tmp_path / "set.tar"
    with tarfile.open(archive, "w") as file:
        file.add(pictures, "set/train")
        file.add(pictures / "cat", "set/test/cat")
    listed = list_pictures(archive, config)
    assert (len(listed.train), len(listed.held)) == (30, 10)
    flat = tmp_path / "flat"
    flat.mkdir()
    for index, path in enumerate(pictures.rglob("*.png")):
        path.rename(flat / f"{index}.png")
    assert len(list_pictures(flat, config).train) == 24
    with pytest.raises(ValueError, match="data: must hold <class>/<picture>"):
        list_pictures(flat, DistilConfig(labels=True))
    for path in list(flat.iterdir())[1:]:
        path.unlink()
    with pytest.raises(ValueError, match="must hold pictures to train on and to measure on, got 1"):
        list_pictures(flat, config)
    next(flat.iterdir()).unlink()
    with pytest.raises(FileNotFoundError, match="must hold pictures"):
        list_pictures(flat, config)


def test_held_out_pictures_are_preprocessed_as_the_models_own(pictures: Path) -> None:
    from kdfast.models.prepared import PreparedModel, input_config
    from kdfast.sources import transform_of

    net = teacher_of()
    listed = list_pictures(pictures, DistilConfig())
    made = build_pictures(listed, DistilConfig(), 32, input_config(net), [0])
    row = int(listed.held.rows[0])
    with Image.open(pictures / listed.held.source.names[row]) as file:  # type: ignore[attr-defined]
        want = transform_of(net)(file.convert("RGB"))
    got = PreparedModel(net).prepared(made.held[0]["image"][None])[0]
    # Both resize bytes, by two libraries.
    assert (got - want).abs().max() < 0.1 and (got - want).abs().mean() < 0.01
    made.train.set_epoch(1)
    assert not torch.equal(made.train[0]["image"], made.train[0, 0]["image"])  # type: ignore[index]


def test_class_folders_get_the_models_numbers() -> None:
    net = teacher_of()
    assert class_numbers(net, CLASSES, 3) == [0, 1, 2]
    net.config = type("Config", (), {"label2id": {"emu": 0, "cat": 1, "dog": 2}})()
    assert class_numbers(net, CLASSES, 3) == [1, 2, 0]
    assert class_numbers(net, ["n01440764", "n01484850"], 1000) == [0, 2]
    del net.config
    with pytest.raises(ValueError, match="must be the 1000 classes .* got 3: cat, dog, emu"):
        class_numbers(net, CLASSES, 1000)


def test_a_student_of_any_library_gets_the_classes_of_any_teacher() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=3)
    teacher = transformers.ViTForImageClassification(config)
    for name in ("test_vit", "torchvision:resnet18"):
        student = load_model(name)
        fit_classes(student, teacher, name)
        assert class_count(student) == 3


def test_a_run_that_is_refused_leaves_no_folder(tmp_path: Path, pictures: Path) -> None:
    next(pictures.rglob("*.png")).write_bytes(b"no picture")
    student, teacher = pair()
    with pytest.raises(CorruptDataError):
        kdfast.distil(student, teacher, pictures, output=str(tmp_path / "run"), batch_size=4)
    assert not (tmp_path / "run").exists()


WORKER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_distillation_run as t
import kdfast
student, teacher = t.pair()
result = kdfast.distil(student, teacher, {pictures!r}, output={output!r}, epochs=2, batch_size=4,
                       lr=1e-3, device="cpu", log_every=1)
assert result is not None
print("done", sum(float(p.double().sum()) for p in student.parameters()))
"""


@pytest.mark.slow
def test_two_processes_train_one_student(tmp_path: Path, pictures: Path) -> None:
    output = tmp_path / "run"
    script = tmp_path / "worker.py"
    tests = str(Path(__file__).parent)
    script.write_text(WORKER.format(tests=tests, pictures=str(pictures), output=str(output)))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command, str(script)], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]
    sums = re.findall(r"done (\S+)", done.stdout)
    assert len(sums) == 2 and sums[0] == sums[1]
    assert len(read_rows(output / "steps.csv")) == 6  # 27 pictures, two times four a step
    assert not (tmp_path / "run-2").exists()
    assert "2 x cpu" in (output / "train.log").read_text()
