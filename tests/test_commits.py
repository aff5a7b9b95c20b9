# SPDX-License-Identifier: Apache-2.0
"""Commits of checkpoints: what belongs together, damage, and what a killed process leaves."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kdfast.machine import files
from kdfast.machine.files import clear_partials, replacing, replacing_files, write_text
from kdfast.trainer.commits import (
    changed,
    check_file,
    load_checkpoint,
    newest,
    read_manifest,
    save_checkpoint,
    settle,
    step_of,
)

NAMES = ("last.pt", "previous.pt", "best.pt")


def steps(folder: Path) -> tuple[int | None, ...]:
    """Steps of last, previous and best; None where there is none."""
    paths = [folder / name for name in NAMES]
    found = tuple(load_checkpoint(p)["step"] if p.is_file() else None for p in paths)
    manifest = read_manifest(folder / "manifest.json")
    assert found == tuple(manifest[n].step if n in manifest else None for n in NAMES)
    return found


def test_names_of_a_commit(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"step": 1})
    assert steps(tmp_path) == (1, None, None)
    save_checkpoint(tmp_path, {"step": 2}, best=True)
    assert steps(tmp_path) == (2, 1, 2)
    save_checkpoint(tmp_path, {"step": 3})
    assert steps(tmp_path) == (3, 2, 2)
    assert step_of(tmp_path / "best.pt") == 2
    (tmp_path / "last.pt").unlink()  # as the message about a damaged one advises
    assert newest(tmp_path) == tmp_path / "previous.pt"
    save_checkpoint(tmp_path, {"step": 4})
    assert steps(tmp_path) == (4, 2, 2)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("at", ["before the manifest", "after the manifest", "after best"])
def test_killed_in_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    """Either commit is whole: the older one, or the newer with its best checkpoint."""
    save_checkpoint(tmp_path, {"step": 1}, best=True)
    names = {"before the manifest": "manifest.json", "after the manifest": "best.pt"}
    original = os.replace

    def dies(source: Path, target: Path) -> None:
        if Path(target).name == names.get(at, "previous.pt"):
            raise SystemExit
        original(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        with pytest.raises(SystemExit):
            save_checkpoint(tmp_path, {"step": 2}, best=True)
        staged = (tmp_path / "next.pt").is_file()
    assert staged == (at != "before the manifest")
    settle(tmp_path)
    assert steps(tmp_path) == ((2, 1, 2) if staged else (1, None, 1))
    settle(tmp_path)
    assert not (tmp_path / "next.pt").exists()


def test_half_a_checkpoint_is_no_commit(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"step": 1})
    (tmp_path / "next.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:100])
    settle(tmp_path)
    assert steps(tmp_path) == (1, None, None) and not (tmp_path / "next.pt").exists()


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("last.pt", "delete it, and .*previous.pt is taken"),
        ("best.pt", "delete it, and --resume takes the best epoch of those that are still to come"),
        ("previous.pt", "delete it and train again"),
    ],
)
def test_damage_is_one_line_with_the_way_back(tmp_path: Path, name: str, way: str) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, {"step": step, "x": torch.arange(99.0)}, best=step == 2)
    path = tmp_path / name
    content = bytearray(path.read_bytes())
    # Every flipped bit is seen, wherever it is.
    for place in range(0, len(content), 97):
        content[place] ^= 4
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is damaged: its bytes are not .*; {way}$"):
            load_checkpoint(path)
        content[place] ^= 4
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"{name} is damaged: it has .* bytes instead of"):
        load_checkpoint(path)
    path.write_bytes(content)
    assert load_checkpoint(path)["step"] in (1, 2, 3)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"format": 0}', '{"format": 1, "files": {"a": 1}}', "\x00"]
)
def test_damaged_manifest(tmp_path: Path, content: str) -> None:
    path = save_checkpoint(tmp_path, {"step": 1})
    manifest = tmp_path / "manifest.json"
    manifest.write_text(content)
    with pytest.raises(ValueError, match="manifest.json is damaged: .*; delete it to take"):
        load_checkpoint(path)
    manifest.unlink()
    assert load_checkpoint(path)["step"] == 1


def test_files_beside_a_commit(tmp_path: Path) -> None:
    """Logs may grow; a file that changed, shrank or went is known as such."""
    (tmp_path / "logs").mkdir()
    log, fixed = tmp_path / "logs/steps.csv", tmp_path / "fixed.json"
    log.write_text("step\n1\n")
    fixed.write_text("{}")
    save_checkpoint(tmp_path, {"step": 1}, beside=(log, fixed, tmp_path / "absent"))
    assert set(read_manifest(tmp_path / "manifest.json")) == {
        *("last.pt", "logs/steps.csv", "fixed.json")
    }
    with log.open("a") as file:
        file.write("2\n")
    assert not changed(tmp_path, log) and not changed(tmp_path, fixed)
    assert not changed(tmp_path, tmp_path / "absent")
    log.write_text("step\n3\n2\n")
    fixed.unlink()
    assert changed(tmp_path, log) and changed(tmp_path, fixed)
    check_file(tmp_path / "absent")


def dead_process() -> int:
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                          capture_output=True, text=True)  # fmt: skip
    return int(done.stdout)


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    """By the pattern of our own names, and not while the writer may live."""
    inner = tmp_path / "seed1/checkpoints"
    inner.mkdir(parents=True)
    node, dead, old = files._NODE, dead_process(), time.time() - 2 * files.ABANDONED
    gone = [
        inner / f".last.{node}-{dead}.kdfast.pt",
        tmp_path / f".LICENSE.{node}-{dead}.kdfast",
        tmp_path / f".x.{node}-{os.getpid()}.kdfast.json",
        tmp_path / f".far.0123abcd-{dead}.kdfast.json",
    ]
    stays = [
        inner / f".last.{node}-{os.getppid()}.kdfast.pt",
        tmp_path / f".near.0123abcd-{dead}.kdfast.json",
        tmp_path / f".x.{dead}.kdfast.json",
        tmp_path / f"x.{node}-{dead}.kdfast.json",
        *(tmp_path / name for name in (".tmp", ".notes.kdfast", ".a.tmp", "last.pt", ".kdfast.py")),
    ]
    for path in (*gone, *stays):
        path.write_text("x")
    os.utime(gone[-1], (old, old))
    folder = tmp_path / f".files.{node}-{dead}.kdfast"
    folder.mkdir()
    (folder / "model.safetensors").write_text("x")
    link = tmp_path / f".link.{node}-{dead}.kdfast"
    link.symlink_to(stays[-1])
    assert set(clear_partials(tmp_path)) == {*gone, folder}
    assert all(path.exists() for path in stays) and link.is_symlink()


def test_files_that_replace_others_together(tmp_path: Path) -> None:
    """The last one appears last; without an end nothing changes."""
    write_text(tmp_path / "config.json", "old")
    write_text(tmp_path / "weights", "old")
    (tmp_path / "mine").write_text("a user's")
    with pytest.raises(OSError, match="disk"), replacing_files(tmp_path, "config.json") as folder:
        (folder / "weights").write_text("new")
        raise OSError("disk full")
    assert (tmp_path / "weights").read_text() == (tmp_path / "config.json").read_text() == "old"
    with replacing_files(tmp_path, "config.json") as folder:
        (folder / "weights").write_text("new")
        (folder / "config.json").write_text("new")
    assert (tmp_path / "weights").read_text() == (tmp_path / "config.json").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "mine", "weights"]


def test_partial_names_keep_the_suffix(tmp_path: Path) -> None:
    """Libraries read the format off it."""
    with replacing(tmp_path / "a.b.png") as partial:
        assert partial.suffix == ".png" and partial.parent == tmp_path
        partial.write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["a.b.png"]
    assert len(files._NODE) == 8 and socket.gethostname()


def test_manifest_is_plain_json(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"step": 5}, best=True)
    content = json.loads((tmp_path / "manifest.json").read_text())
    assert content["format"] == 1
    entry = content["files"]["best.pt"]
    assert entry["step"] == 5 and entry["bytes"] == (tmp_path / "best.pt").stat().st_size
    assert len(entry["sha256"]) == 64
