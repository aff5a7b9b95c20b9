# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
import torch

import kdfast
from kdfast import info
from kdfast.chain.needs import chain_needs
from kdfast.configs import Config, load, plain
from kdfast.machine import needs
from kdfast.machine.needs import gib
from kdfast.models import EVAViT, save_backbone
from kdfast.ops import OPS, TRITON_OPS
from kdfast.ops._library import EXTENSION
from kdfast.plan import steps_of
from kdfast.recovery.needs import recovery_needs


@pytest.fixture(autouse=True)
def _empty_folder_and_known_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # pytest-xdist sets the columns of its own terminal in every worker.
    monkeypatch.setenv("COLUMNS", "100000")
    rates = {"torch": 50.4e9, "oneDNN": 150e9}
    monkeypatch.setattr(info, "library_rates", lambda dtype: rates)
    peaks = {torch.float32: 200e9, torch.bfloat16: 400.4e9}
    monkeypatch.setattr(info, "peak_flops", peaks.__getitem__)


def test_report_names_every_op_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main([]) == 0
    out = capsys.readouterr().out
    for op in OPS:
        assert op in out
    assert f"torch                   {torch.__version__.split('+')[0]}" in out
    assert "Block sizes of attention on GPUs" in out
    assert ("kdfast._C               built by" in out) == (EXTENSION is not None)
    assert ("not built: pure Python" in out) == (EXTENSION is None)


def test_limits_beside_the_best_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "timed_sample", lambda call, _: (call(), True))
    monkeypatch.setattr(info._library, "EXTENSION", object())
    assert info.limits() == [
        ("float32", "peak 200 GFLOP/s, best library 150 GFLOP/s (oneDNN), 75% of it"),
        ("bfloat16", "peak 400 GFLOP/s, best library 150 GFLOP/s (oneDNN), 37% of it"),
    ]
    monkeypatch.setattr(info._library, "EXTENSION", None)
    monkeypatch.setattr(info, "timed_sample", lambda call, _: (call(), False))
    library = "best library 150 GFLOP/s (oneDNN)"
    busy = ("busy", "others used the cores meanwhile: libraries can reach more")
    assert info.limits() == [("float32", library), ("bfloat16", library), busy]


def test_embedded_default_needs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main(["--config", "orion50"]) == 0
    out = capsys.readouterr().out
    assert "EMBEDDED DEFAULT" in out and "scenes" in out
    assert "MISSING" not in out


def test_without_the_train_extra_info_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = needs.importlib.util.find_spec
    monkeypatch.setattr(
        needs.importlib.util, "find_spec", lambda name: None if name == "yaml" else find(name)
    )
    assert info.main(["--config", "smoke"]) == 1
    out = capsys.readouterr().out
    assert "MISSING       packages            missing: yaml" in out and '".[train]"' in out


def test_missing_inputs_say_what_to_do(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = ["--config", "orion50", "--set", "teacher.checkpoint=gone.pth"]
    assert info.main([*argv, "--set", f"data.root={tmp_path / 'gone'}"]) == 1
    lines = capsys.readouterr().out.splitlines()
    for key, fix in (("teacher.checkpoint", "Orion.pth"), ("data.root", "data.kind=images")):
        at = next(i for i, line in enumerate(lines) if f"MISSING       {key}" in line)
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
    assert "DOES NOT FIT  checkpoint" in out and "MISSING       data" in out
    assert "... and " in out and " more\n" in out


def test_the_list_of_ops_is_that_of_the_files() -> None:
    package = Path(kdfast.__file__).parent
    files = {
        path.stem
        for path in (package / "ops").glob("[!_]*.py")
        if "\nFUSED_ON = " in path.read_text(encoding="utf-8")
    }
    assert set(OPS) == files
    sources = [file for file in OPS.values() if file is not None]
    assert all((package.parent / file).is_file() for file in sources)
    kernels = {path.stem for path in (package.parent / "kernels").glob("[!_]*.py")}
    assert set(TRITON_OPS) == kernels


@pytest.mark.parametrize("name", ["orion50", "vit_chain_digits"])
def test_too_little_memory_and_disk(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = load(name)
    ram = type("Memory", (), {"available": 1 << 20})
    disk = type("Disk", (), {"free": 1 << 20})
    monkeypatch.setattr("psutil.virtual_memory", lambda: ram)
    monkeypatch.setattr(needs.shutil, "disk_usage", lambda _: disk)
    found = chain_needs(config) if name == "vit_chain_digits" else recovery_needs(config)
    fixes = {need.name: need.fix for need in found}
    assert "checkpointing=true" in fixes.pop("memory")
    assert "output=FOLDER" in fixes.pop("disk")
    if name == "orion50":
        assert "prune.sequential to false" in fixes.pop("start")
    assert not any(fixes.values())


@pytest.mark.parametrize("name", ["orion50_scenes", "vit_chain_digits"])
def test_memory_is_what_the_planner_predicts(name: str) -> None:
    config = load(name)
    plans = [step.plan(step.batch, step.checkpointing, "cpu") for step in steps_of(config)]
    peak = max(plan.peak_bytes for plan in plans)
    found = chain_needs(config) if name == "vit_chain_digits" else recovery_needs(config)
    (need,) = [need for need in found if need.name == "memory"]
    assert f"predicted to need {gib(peak)} of tensors" in need.found


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
    assert "MISSING       data" in out and "download https://zenodo.org/" in out


def test_long_lines_are_broken_beside_their_names(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--config", "orion50", "--set", "teacher.checkpoint=nowhere/of/all.pth"]
    assert info.main(words) == 1
    plain = capsys.readouterr().out.partition("A run of")[2].splitlines()
    assert max(map(len, plain)) > 100, "what fits is one line"
    monkeypatch.setenv("COLUMNS", "80")
    assert info.main(words) == 1
    lines = capsys.readouterr().out.partition("A run of")[2].splitlines()
    assert len(lines) > len(plain) and max(map(len, lines)) < 80
    assert any(line.startswith(" " * info.INDENT) and line.strip() for line in lines)


def test_frames_need_a_file_with_the_heads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    words = ["--config", "orion50_frames", "--set", f"teacher.checkpoint={folder}"]
    assert info.main(words) == 1
    out = capsys.readouterr().out
    assert "WRONG         teacher.checkpoint  must be a file with ORION's heads, got" in out
    backbone = tmp_path / "backbone.safetensors"
    config = load("orion50_mini")
    assert isinstance(config, Config) and config.teacher.fit is not None
    save_backbone(EVAViT(**plain(config.teacher.fit.model)), backbone)
    config = load("orion50_mini", [f"teacher.checkpoint={backbone}"])
    assert isinstance(config, Config)
    (need,) = [need for need in recovery_needs(config) if need.name == "checkpoint"]
    assert need.problem == "DOES NOT FIT" and need.fix and "must fit the heads" in need.found
