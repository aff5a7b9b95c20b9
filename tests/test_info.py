# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
import torch

from kdfast import info, needs
from kdfast.configs import load
from kdfast.models import EVAViT
from kdfast.ops._library import EXTENSION


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_report_names_every_op_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main([]) == 0
    out = capsys.readouterr().out
    for op in info.OPS:
        assert op in out
    assert f"torch                   {torch.__version__.split('+')[0]}" in out
    assert ("kdfast._C               built by" in out) == (EXTENSION is not None)
    assert ("not built: pure Python" in out) == (EXTENSION is None)


def test_embedded_default_needs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main(["--config", "orion50"]) == 0
    out = capsys.readouterr().out
    assert "EMBEDDED DEFAULT" in out and "scenes" in out
    assert "MISSING" not in out


def test_missing_inputs_say_what_to_do(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = ["--config", "orion50", "--set", "teacher.checkpoint=gone.pth"]
    assert info.main([*argv, "--set", f"data.root={tmp_path / 'gone'}"]) == 1
    lines = capsys.readouterr().out.splitlines()
    for key, fix in (("teacher.checkpoint", "Orion.pth"), ("data.root", "data.kind=images")):
        at = next(i for i, line in enumerate(lines) if f"MISSING {key}" in line)
        assert "gone" in lines[at] and "to do:" in lines[at + 1] and fix in lines[at + 1]


def test_unusable_inputs_are_reported_together(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bad = tmp_path / "orion.pth"
    torch.save({"state_dict": {"img_backbone.odd": torch.zeros(1)}}, bad)
    (tmp_path / "pictures").mkdir()
    argv = ["--config", "orion50", "--set", f"teacher.checkpoint={bad}"]
    argv += ["--set", "data.kind=images", "--set", f"data.root={tmp_path / 'pictures'}"]
    assert info.main(argv) == 1
    out = capsys.readouterr().out
    assert "MISSING checkpoint" in out and "MISSING data" in out


def test_too_little_memory_and_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs.torch.cuda, "is_available", lambda: False)
    config = load("orion50")
    memory = type("Memory", (), {"available": 1 << 20})
    disk = type("Disk", (), {"free": 1 << 20})
    monkeypatch.setattr(needs.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(needs.shutil, "disk_usage", lambda _: disk)
    fixes = {need.name: need.fix for need in needs.run_needs(config)}
    assert "run.batch_size=1" in fixes["memory"] and "output=FOLDER" in fixes["disk"]
    assert not fixes["checkpoint"] and not fixes["data"]


def test_memory_counts_weights_once_and_grows_with_the_batch() -> None:
    with torch.device("meta"):
        model = EVAViT(
            img_size=64, patch_size=16, embed_dim=32, depth=2, num_heads=2, window_size=0
        )
    tree = ["data.size=[64, 64]"]
    one, two = (
        needs.needed_memory(load("orion50", [*tree, f"run.batch_size={b}"]), model, 1000, 500)
        for b in (1, 2)
    )
    weights = 4 * 1000 + 16 * 500
    assert two - weights == 2 * (one - weights) > 0


def test_chain_names_its_images_and_what_is_missing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert info.main(["--config", "vit_chain_digits"]) == 0
    out = capsys.readouterr().out
    assert "digits: 1,259 train, 179 val, 359 test; 10 classes, multiclass" in out
    assert "MISSING" not in out
    argv = ["--config", "vit_chain_digits", "--set", "data.kind=octmnist"]
    assert info.main([*argv, "--set", f"data.root={tmp_path}"]) == 1
    out = capsys.readouterr().out
    assert "MISSING data" in out and "download https://zenodo.org/" in out
