# SPDX-License-Identifier: Apache-2.0
"""What a user of ORION gives and gets: its checkpoint where it lies, its heads, its keys."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from kdfast import evaluate, info
from kdfast.configs import ConfigError, load
from kdfast.configs.orion50 import CHECKPOINT, checkpoint_here
from kdfast.models.checkpoint import load_backbone
from kdfast.models.eva import EVAViT
from kdfast.recovery.planning import recovery_step
from kdfast.train import main
from kdfast.trainer.commits import load_checkpoint

SHAPE = {"img_size": 32, "window_size": 3, "window_block_indexes": [0, 2]}


def argv(folder: Path, teachers: Path, *changes: str) -> list[str]:
    sets = [f"output={folder}", f"teacher.cache={teachers}", "run.device=cpu", "data.frames=2"]
    sets += ["run.max_steps=1", "run.eval_images=2", "prune.calibration_views=4", *changes]
    return ["--config", "smoke", *(word for change in sets for word in ("--set", change))]


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A backbone's state dict without rotary buffers and without our metadata."""
    config = load("smoke").teacher.fit
    assert config is not None
    torch.manual_seed(0)
    model = EVAViT(**{**vars(config.model), **SHAPE})
    path = tmp_path / "bare.pth"
    torch.save(
        {"state_dict": {f"img_backbone.{n}": x for n, x in model.state_dict().items()}}, path
    )
    return path


@pytest.mark.parametrize("place", ["ckpts/orion/orion.pth", "ckpts/Orion.pth", "ckpt/orion.pth"])
def test_the_checkpoint_is_looked_for(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert checkpoint_here() == CHECKPOINT
    (tmp_path / place).parent.mkdir(parents=True)
    (tmp_path / place).touch()
    (tmp_path / "data" / "bench2drive").mkdir(parents=True)
    assert load("orion50").teacher.checkpoint == place


def test_a_file_without_rotary_buffers_is_described_by_keys(
    bare: Path, tmp_path: Path, teachers: Path, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = [f"teacher.checkpoint={bare}", "teacher.head_dim=16"]
    folder = tmp_path / "run"
    assert main(argv(folder, teachers, *changes)) == 2
    text = capsys.readouterr().err
    assert "pass img_size, window_size, window_block_indexes (in a run teacher.img_size" in text
    assert not folder.exists()
    changes += [f"teacher.{name}={value}" for name, value in SHAPE.items()]
    assert main(argv(folder, teachers, *changes, "data.kind=scenes")) == 0
    student = load_backbone(folder / "student.safetensors")
    assert student.config["window_block_indexes"] == [0, 2] and student.config["img_size"] == 32


def test_the_shape_of_no_checkpoint_is_refused() -> None:
    with pytest.raises(ConfigError, match="teacher.img_size: describe a teacher.checkpoint"):
        load("smoke", ["teacher.img_size=64"])


def test_info_tells_absent_from_unfit(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--config", "smoke", "--set", f"teacher.checkpoint={bare}"]
    assert info.main(argv) == 1
    out = capsys.readouterr().out
    assert "DOES NOT FIT  checkpoint" in out and "MISSING" not in out
    assert info.main([*argv[:3], "teacher.checkpoint=gone.pth"]) == 1
    assert "MISSING       teacher.checkpoint" in capsys.readouterr().out
    assert info.main(["--config", "smoke", "--set", "prune.keep=1.5"]) == 1
    assert "WRONG         prune.keep" in capsys.readouterr().out


def test_heads_of_a_file_are_kept_and_scores_are_drawn(
    tmp_path: Path, teachers: Path, quick: None
) -> None:
    heads = tmp_path / "heads.json"
    heads.write_text(json.dumps({"1": [3, 0], "3": []}))
    folder = tmp_path / "named"
    assert main(argv(folder, teachers, f"prune.heads={heads}", "run.orion_keys=true")) == 0
    kept = [[0, 1, 2, 3], [0, 3], [0, 1, 2, 3], []]
    assert load_backbone(folder / "student.safetensors").heads == kept
    assert load_checkpoint(folder / "last.pt")["meta"]["heads"] == kept
    assert not (folder / "head_scores.png").exists()  # nothing was scored
    names = load_file(folder / "student.safetensors")
    assert all(name.startswith("img_backbone.") for name in names)
    assert "img_backbone.rope_win.freqs_cos" in names

    folder = tmp_path / "scored"
    assert main(argv(folder, teachers)) == 0
    assert Image.open(folder / "head_scores.png").size[0] > 300
    assert "head_scores.png" in (folder / "train.log").read_text()
    assert all("img_backbone" not in name for name in load_file(folder / "student.safetensors"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "prune.heads: no such file"),
        ("[[0], [1]]", r"prune.heads: .*heads.json must have one list per block \(4\), got 2"),
        ('{"0": [4]}', "prune.heads: .*block 0 must be a list of different heads of 0 to 3"),
    ],
)
def test_heads_that_do_not_fit(
    content: str | None, message: str, tmp_path: Path, teachers: Path, quick: None,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = tmp_path / "heads.json"
    if content is not None:
        path.write_text(content)
    assert main(argv(tmp_path / "run", teachers, f"prune.heads={path}")) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists() or content is not None


def test_the_plan_knows_the_heads_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    path.write_text("[[0], [0], [0], [0]]")
    config = load("smoke")
    few = replace(config, prune=replace(config.prune, heads=str(path)))
    plans = [recovery_step(c).configured_plan("cpu") for c in (few, config)]
    assert plans[0].peak_bytes < plans[1].peak_bytes


def test_a_refused_evaluation_leaves_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("data.root: no frames")

    monkeypatch.setattr("kdfast.recovery.orion.feed.build_frames", refuse)
    (tmp_path / "student.safetensors").touch()
    words = ["--config", "orion50_mini", "--checkpoint", str(tmp_path / "student.safetensors")]
    words += ["--out", str(tmp_path / "out"), "--set", f"data.root={tmp_path / 'sample'}"]
    assert evaluate.main([*words, "--set", "run.device=cpu"]) == 2
    assert "data.root: no frames" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
