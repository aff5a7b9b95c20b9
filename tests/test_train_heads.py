# SPDX-License-Identifier: Apache-2.0
"""Which heads a recovery run keeps by number, list or file, and a teacher that is a folder."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from kdfast.configs import Config, ConfigError, load
from kdfast.models.checkpoint import save_backbone
from kdfast.models.eva import EVAViT
from kdfast.pruning import prune_heads
from kdfast.pruning.saving import save_pretrained
from kdfast.recovery.planning import recovery_step
from kdfast.resolve.backbone import load_eva
from kdfast.train import main
from kdfast.trainer.commits import load_checkpoint

HEADS = [[0], [1, 3], [], [0, 1, 2, 3]]


def planned(*changes: str) -> list[int]:
    """Heads of the student that the planner builds."""
    config = load("smoke", changes, files=False)
    assert isinstance(config, Config)
    with torch.device("meta"):
        student = recovery_step(config).build(False).module.student
    return [len(heads) for heads in student.heads]


def run(folder: Path, teachers: Path, *changes: str) -> int:
    sets = [f"output={folder}", f"teacher.cache={teachers}", "run.device=cpu", *changes]
    return main(["--config", "smoke", *(word for x in sets for word in ("--set", x))])


def test_the_plan_knows_every_kind_of_keep(tmp_path: Path) -> None:
    (tmp_path / "h.json").write_text(json.dumps({"kept": HEADS}))
    assert planned("prune.keep=0.5") == [2] * 4
    assert planned("prune.keep=1") == [1] * 4 and planned("prune.keep=1.0") == [4] * 4
    assert planned("prune.keep=[1,2,3,4]") == [1, 2, 3, 4]
    assert planned(f"prune.heads={tmp_path / 'h.json'}") == [1, 2, 0, 4]
    with pytest.raises(ValueError, match="prune.keep: keep must have one entry per block"):
        planned("prune.keep=[1,2]")


def test_titles_of_plans(tmp_path: Path) -> None:
    for change, text in (
        ("prune.keep=0.5", "50% of the heads"),
        ("prune.keep=3", "3 heads a block"),
        ("prune.keep=[1,2,3,4]", "heads by block"),
        ("prune.heads=h.json", "the heads of h.json"),
    ):
        config = load("smoke", [change], files=False)
        assert isinstance(config, Config)
        assert f"distil into {text}" in recovery_step(config).title


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (["prune.heads=gone.json"], "prune.heads: no such file: gone.json"),
        (["prune.keep=[1,2]", "prune.scope=global"], "prune.keep: a number for each block needs"),
        (["prune.keep=many"], "prune.keep: must be an integer or must be a number or must be"),
    ],
)
def test_bad_keys(changes: list[str], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load("smoke", changes)
    assert any(line.startswith(text) for line in caught.value.problems)


def test_a_run_keeps_the_heads_of_a_file(tmp_path: Path, teachers: Path, quick: None) -> None:
    (tmp_path / "h.json").write_text(json.dumps(HEADS))
    short = ["run.max_steps=1", "prune.calibration_views=8", "run.eval_images=4"]
    assert run(tmp_path / "run", teachers, f"prune.heads={tmp_path / 'h.json'}", *short) == 0
    assert load_checkpoint(tmp_path / "run/last.pt")["meta"]["heads"] == HEADS
    assert not (tmp_path / "run/head_scores.json").exists()
    (tmp_path / "h.json").write_text("[[0], [0]]")
    assert run(tmp_path / "bad", teachers, f"prune.heads={tmp_path / 'h.json'}", *short) == 2


def test_a_run_draws_its_scores(tmp_path: Path, teachers: Path, quick: None) -> None:
    short = ["run.max_steps=1", "prune.keep=[1,2,3,4]", "prune.compensate=false"]
    assert run(tmp_path / "run", teachers, *short, "run.eval_images=4") == 0
    heads = load_checkpoint(tmp_path / "run/last.pt")["meta"]["heads"]
    assert [len(row) for row in heads] == [1, 2, 3, 4]
    with Image.open(tmp_path / "run/head_scores.png") as picture:
        assert picture.width > 100


def test_a_teacher_that_is_a_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = EVAViT(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3).eval()
    save_pretrained(prune_heads(whole, [[0, 2], [1]]), tmp_path / "small")
    save_backbone(whole, tmp_path / "whole.safetensors")
    found = load_eva(tmp_path / "small", "teacher.checkpoint", drop_path_rate=0.2, with_cp=False)
    assert found.heads == [[0, 2], [1]] and found.config["drop_path_rate"] == 0.2
    image = torch.rand(1, 3, 32, 32)
    want = prune_heads(whole, [[0, 2], [1]]).eval()(image)
    assert torch.equal(found.eval()(image), want)
    assert load_eva(tmp_path / "whole.safetensors", "x", with_cp=False).heads == whole.heads
    named = f"teacher.checkpoint={tmp_path / 'small'}"
    assert load("smoke", [named]).teacher.checkpoint == str(tmp_path / "small")  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="must be a file or a saved model, got the folder"):
        load("smoke", [f"teacher.checkpoint={tmp_path}"])


def test_a_teacher_of_another_kind(tmp_path: Path) -> None:
    import timm

    save_pretrained(timm.create_model("test_vit"), tmp_path)
    with pytest.raises(ValueError, match="teacher.checkpoint: .* must be a backbone of ORION, got"):
        load_eva(tmp_path, "teacher.checkpoint")
