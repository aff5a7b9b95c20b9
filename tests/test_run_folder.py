# SPDX-License-Identifier: Apache-2.0
"""Folders of runs: which one is taken, and what is said where one cannot be read or written."""

import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from kdfast.chain import links
from kdfast.chain.links import Link, build_link
from kdfast.configs import ConfigError
from kdfast.recovery import report
from kdfast.testing.ranks import in_ranks
from kdfast.train import main
from kdfast.trainer import loop, runs
from kdfast.trainer.commits import load_checkpoint, newest

MAIN: Any = SimpleNamespace(is_main_process=True)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One process, which lets go of its folder after the test."""
    monkeypatch.setattr(runs, "broadcast_object_list", lambda values: values)
    yield
    runs.release_folder()


def hold(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("")


def test_next_folder(tmp_path: Path) -> None:
    output = tmp_path / "läufe [1] äöü" / "run [a]*"
    assert runs.run_folder(output, MAIN, None) == output
    # A config that was refused before anything was computed does not use the name up.
    hold(output, "config.yaml")
    assert runs.run_folder(output, MAIN, None) == output
    hold(output, "steps.csv")
    second = output.with_name("run [a]*-2")
    assert runs.run_folder(output, MAIN, None) == second
    hold(second, "config.yaml", "last.pt")
    assert runs.run_folder(output, MAIN, None).name == "run [a]*-3"
    os.utime(output / "config.yaml", (1, 1))
    assert runs.run_folder(output, MAIN, "--resume: ") == second


@pytest.mark.parametrize("missing", [None, "--resume: "])
def test_a_folder_that_one_process_does_not_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str | None
) -> None:
    """As on nodes that have no file system in common: that process would begin anew."""
    monkeypatch.setattr(runs, "broadcast_object_list", dist.broadcast_object_list)
    (tmp_path / "1").mkdir()
    hold(tmp_path / "0" / "run", "config.yaml", "last.pt")

    def work(rank: int) -> None:
        accelerator: Any = SimpleNamespace(is_main_process=rank == 0)
        os.chdir(tmp_path)
        runs.run_folder(Path("0/run"), accelerator, missing)
        os.chdir(tmp_path / str(rank // 2))
        with pytest.raises(ConfigError, match="output: must be a folder that all processes see"):
            runs.run_folder(Path("run"), accelerator, missing)

    assert in_ranks(3, work) == [""] * 3


def test_resume_leaves_a_refused_start_out(tmp_path: Path) -> None:
    output, refused = tmp_path / "run", tmp_path / "run-2"
    hold(refused, "config.yaml", "train.log")
    assert runs.run_folder(output, MAIN, "--resume: ") == refused  # nothing else is there
    hold(output, "config.yaml", "last.pt")
    os.utime(output / "config.yaml", (1, 1))
    assert runs.run_folder(output, MAIN, "--resume: ") == output


def test_a_refused_run_leaves_no_folder_of_its_own(tmp_path: Path) -> None:
    def refused(output: Path, *names: str) -> None:
        folder = runs.run_folder(output, MAIN, None)
        hold(folder, "config.yaml", *names)
        runs.discard_folder()
        runs.release_folder()

    refused(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    refused(tmp_path / "begun", "steps.csv")
    assert (tmp_path / "begun" / "steps.csv").is_file()
    (tmp_path / "mine").mkdir()
    refused(tmp_path / "mine")
    assert (tmp_path / "mine" / "config.yaml").is_file()
    runs.discard_folder()  # no run has one now


def test_train_leaves_no_folder_where_a_checkpoint_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": {"img_backbone.odd": torch.zeros(1)}}, tmp_path / "orion.pth")
    output = tmp_path / "runs" / "refused"
    argv = ["--config", "smoke", "--set", f"output={output}", "--set", "run.device=cpu"]
    assert main([*argv, "--set", f"teacher.checkpoint={tmp_path / 'orion.pth'}"]) == 2
    assert "must fit the model" in capsys.readouterr().err
    assert not output.exists()


def test_nothing_to_resume(tmp_path: Path) -> None:
    hold(tmp_path / "run", "steps.csv")
    with pytest.raises(
        ConfigError, match="--resume: there is no run in .*run; --config RUN/config.yaml names"
    ):
        runs.run_folder(tmp_path / "run", MAIN, "--resume: ")


def test_two_runs_never_share_a_folder(tmp_path: Path) -> None:
    output = tmp_path / "run"
    hold(output, "config.yaml", "last.pt", "train.log")
    with (output / "train.log").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process is still writing to .*run"):
            runs.run_folder(output, MAIN, "--resume: ")
        (output / "last.pt").unlink()  # the other one has just begun
        assert runs.run_folder(output, MAIN, None).name == "run-2"
    assert runs.run_folder(output, MAIN, "--resume: ") == output
    with (output / "train.log").open("a") as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        runs.release_folder()
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: Any, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="has no locks"):
        assert runs.run_folder(tmp_path / "run", MAIN, None) == tmp_path / "run"


def test_all_processes_hear_of_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def receive(values: list[Any]) -> None:
        values[0] = ["output: no"]

    monkeypatch.setattr(runs, "broadcast_object_list", receive)
    other: Any = SimpleNamespace(is_main_process=False)
    with pytest.raises(ConfigError, match="output: no"):
        runs.run_folder(tmp_path / "run", other, None)
    assert not (tmp_path / "run").exists()


def words(folder: Path, *changes: str) -> list[str]:
    sets = [
        f"output={folder}",
        f"teacher.cache={folder.parent / 'teachers'}",
        "run.device=cpu",
        "data.frames=2",
        "prune.batches=1",
        "run.epochs=1",
        "run.save_every=1",
        *changes,
    ]
    return ["--config", "smoke", *(word for change in sets for word in ("--set", change))]


def test_output_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(words(tmp_path / "file")) == 2
    assert "output: " in (error := capsys.readouterr().err) and "cannot be written" in error


def test_full_disk_and_broken_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run whose disk fills up ends with one line; broken checkpoints name the way on."""
    monkeypatch.setattr(
        report, "interleave", lambda calls, **_: {name: [(1e-3, True)] for name in calls}
    )
    monkeypatch.setattr(loop, "draw_curves", lambda folder: None)
    folder = tmp_path / "mit Leerzeichen é"
    assert main(words(folder, "run.max_steps=1")) == 0
    capsys.readouterr()

    def full(state: Any, file: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        assert main([*words(folder), "--resume"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {folder / 'last.pt'}: no space left, it needs more than ")
    assert error.count("\n") == 1
    last = folder / "last.pt"
    assert newest(folder) == last and load_checkpoint(last)["step"] == 1
    assert main([*words(folder, "run.max_steps=2"), "--resume"]) == 0
    last.write_bytes(b"junk")
    capsys.readouterr()
    assert main([*words(folder), "--resume"]) == 2
    error = capsys.readouterr().err
    assert f"{last} is damaged: it has 4 bytes instead of" in error
    assert f"delete it, and {folder / 'previous.pt'} is taken" in error
    last.unlink()
    assert main([*words(folder), "--resume"]) == 0
    assert load_checkpoint(last)["step"] == 3


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04 cut off"])
def test_link_from_a_file_that_is_no_checkpoint(content: bytes, tmp_path: Path) -> None:
    for name in ("weights.pth", "weights.safetensors"):
        (tmp_path / name).write_bytes(content)
        args = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 2}
        init = str(tmp_path / name)
        link = Link(0, "teacher", "vit_tiny_patch16_224", args, init, 1, False)
        with pytest.raises(ConfigError, match=f"init: .*{name} is no checkpoint"):
            build_link(link, 10)


def test_teacher_whose_checkpoint_is_cut_off(tmp_path: Path) -> None:
    (tmp_path / "best.pt").write_bytes(b"PK\x03\x04 cut off")
    link = Link(0, "teacher", "resnet18", {}, "scratch", 1, False)
    data: Any = None
    with pytest.raises(ConfigError, match="teacher: checkpoint: .*best.pt must be a whole file"):
        links.load_teacher(tmp_path / "best.pt", link, data)
