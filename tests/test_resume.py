# SPDX-License-Identifier: Apache-2.0
"""A run that is killed, stopped or split gives the weights of an uninterrupted one, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kdfast.configs import Config, load
from kdfast.machine.signals import Signals
from kdfast.train import main
from kdfast.trainer.commits import load_checkpoint, newest, save_checkpoint
from kdfast.trainer.logs import Table, read_rows
from kdfast.trainer.state import rng_state, set_rng_state

pytestmark = pytest.mark.usefixtures("quick")

STEPS = 40  # two epochs of 20; drop path draws random numbers in each


def words(folder: Path, teachers: Path, *changes: str) -> list[str]:
    sets = [
        f"output={folder}",
        f"teacher.cache={teachers}",
        "run.device=cpu",
        "run.batch_size=3",
        "data.frames=10",
        "distill.drop_path=0.2",
        "run.save_every=3",
        "run.log_every=3",
        *changes,
    ]
    return ["--config", "smoke", *(word for change in sets for word in ("--set", change))]


@pytest.fixture(scope="module")
def whole(teachers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    torch.set_num_threads(1)
    assert main(words(folder, teachers)) == 0
    assert load_checkpoint(folder / "last.pt")["step"] == STEPS
    return folder


def same_run(a: Path, b: Path) -> None:
    """Asserts that both runs ended with the same weights and the same records."""
    first, second = (load_file(folder / "student.safetensors") for folder in (a, b))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    one, two = (load_checkpoint(folder / "last.pt") for folder in (a, b))
    for key in one["optimizer"]["state"]:
        for name, value in one["optimizer"]["state"][key].items():
            assert torch.equal(value, two["optimizer"]["state"][key][name])
    assert torch.equal(one["ranks"][0]["rng"]["torch"], two["ranks"][0]["rng"]["torch"])
    keep = ("step", "epoch", "total", "task", "kd", "alpha", "lr", "grad_norm")
    logs = [
        [[row[name] for name in keep] for row in read_rows(folder / "steps.csv")]
        for folder in (a, b)
    ]
    assert logs[0] == logs[1]


def launch(arguments: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, "-m", "kdfast.train", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 120) -> None:
    """Waits until a file exists; fails if the process ends first."""
    end = time.monotonic() + seconds
    while not path.is_file():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "timed out"
        time.sleep(0.005)


def test_kill_in_mid_epoch(whole: Path, teachers: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = launch(words(folder, teachers))
    wait_for(folder / "last.pt", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    at = load_checkpoint(newest(folder) or folder)["step"]
    assert 0 < at < STEPS and at % 20, "the process must die in mid-epoch"
    assert main([*words(folder, teachers), "--resume"]) == 0
    same_run(whole, folder)


def test_sigterm_saves_and_exits(whole: Path, teachers: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = launch(words(folder, teachers, "run.save_every=1000"))
    wait_for(folder / "steps.csv", process)
    process.send_signal(signal.SIGTERM)
    out = process.communicate()[0]
    assert process.returncode == 128 + signal.SIGTERM, out
    assert "stopped by SIGTERM; what was done is saved, go on with --resume" in out
    assert 0 < load_checkpoint(folder / "last.pt")["step"] < STEPS
    assert main([*words(folder, teachers), "--resume"]) == 0
    same_run(whole, folder)


def test_two_parts(whole: Path, teachers: Path, tmp_path: Path) -> None:
    """``max_steps`` splits a run without changing it; a finished run resumes to its report."""
    folder = tmp_path / "run"
    assert main(words(folder, teachers, "run.max_steps=23")) == 0
    assert load_checkpoint(folder / "last.pt")["step"] == 23  # where a log row ends
    assert main([*words(folder, teachers), "--resume"]) == 0
    same_run(whole, folder)
    assert main([*words(folder, teachers), "--resume"]) == 0
    same_run(whole, folder)


def test_resume_takes_the_newest_run(teachers: Path, tmp_path: Path) -> None:
    stop = ("run.max_steps=2", "run.epochs=1")
    assert main(words(tmp_path / "run", teachers, *stop)) == 0
    assert main(words(tmp_path / "run", teachers, *stop)) == 0
    assert main([*words(tmp_path / "run", teachers, "run.max_steps=4", stop[1]), "--resume"]) == 0
    steps = [load_checkpoint(tmp_path / name / "last.pt")["step"] for name in ("run", "run-2")]
    assert steps == [2, 4]


def test_refuses_another_recipe(
    teachers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert main([*words(folder, teachers), "--resume"]) == 2
    assert f"--resume: there is no run in {folder}" in capsys.readouterr().err
    assert main(words(folder, teachers, "run.max_steps=1")) == 0
    assert main([*words(folder, teachers, "optim.lr=1e-5", "run.epochs=3"), "--resume"]) == 2
    error = capsys.readouterr().err
    assert "was made with config.optim.lr 0.001, got 1e-05" in error
    assert "was made with config.run.epochs 2, got 3" in error
    saved = load(str(folder / "config.yaml"))  # still that of the run
    assert isinstance(saved, Config) and (saved.optim.lr, saved.run.epochs) == (1e-3, 2)
    assert saved.run.max_steps == 1
    assert error.rstrip().endswith(f"--config {folder / 'config.yaml'} --resume")
    assert main([*words(folder, teachers, "run.max_steps=2"), "--resume"]) == 0
    saved = load(str(folder / "config.yaml"))
    assert isinstance(saved, Config) and saved.run.max_steps == 2
    # The command of the error needs nothing else, wherever the folder is, and runs to the end.
    moved = folder.rename(tmp_path / "moved")
    assert main(["--config", str(moved / "config.yaml"), "--resume"]) == 0
    saved = load(str(moved / "config.yaml"))
    assert isinstance(saved, Config)
    assert (saved.output, saved.run.max_steps) == (str(moved), None)
    assert (moved / "report.html").is_file() and not folder.exists()


def test_second_signal_ends_at_once() -> None:
    """In a process of its own: the first signal is noted, the second one is the end."""
    code = (
        "import os, signal, time\n"
        "from kdfast.machine.signals import noting\n"
        "with noting() as signals:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print(signals.caught, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{int(signal.SIGINT)}\n"
    assert done.returncode == -signal.SIGTERM


def test_signals_are_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        assert signal.getsignal(signal.SIGTERM) == signals._handle
    assert signal.getsignal(signal.SIGTERM) == before


def test_checkpoint_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, {"step": 1})
    save_checkpoint(tmp_path, {"step": 2})
    assert load_checkpoint(tmp_path / "last.pt") == {"format": 1, "step": 2}
    assert load_checkpoint(tmp_path / "previous.pt")["step"] == 1
    original = torch.save

    def dies(state: Any, file: Any) -> None:
        original({"half": 1}, file)
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path, {"step": 3})
    names = ["last.pt", "manifest.json", "previous.pt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 2
    (tmp_path / "last.pt").unlink()
    assert newest(tmp_path) == tmp_path / "previous.pt"
    (tmp_path / "previous.pt").unlink()
    assert newest(tmp_path) is None


def test_broken_checkpoint(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, {"step": 1})
    (tmp_path / "manifest.json").unlink()
    for content in (path.read_bytes()[:100], b"", b"junk", b"\x80\x02junk"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="must be a whole file of torch.save"):
            load_checkpoint(path)
    torch.save([1], path)
    with pytest.raises(ValueError, match="must have format 1, got None"):
        load_checkpoint(path)
    torch.save({"format": 0}, path)
    with pytest.raises(ValueError, match="must have format 1, got 0"):
        load_checkpoint(path)


def test_rng_state(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float]:
        return torch.rand(()).item(), float(np.random.rand()), random.random()

    np.random.standard_normal()  # leaves a cached second value behind
    path = save_checkpoint(tmp_path, {"rng": rng_state()})
    first = [draw(), np.random.standard_normal()]
    draw()
    set_rng_state(load_checkpoint(path)["rng"])
    assert [draw(), np.random.standard_normal()] == first


def test_table_forgets_later_rows(tmp_path: Path) -> None:
    table = Table(tmp_path / "steps.csv", None)
    for step in (1, 2, 3):
        table.add({"step": step, "total": step / 2})
    with (tmp_path / "steps.csv").open("a") as file:
        file.write("4")  # a row cut off by a crash
    again = Table(tmp_path / "steps.csv", 2)
    assert [row["step"] for row in read_rows(tmp_path / "steps.csv")] == ["1", "2"]
    again.add({"step": 3, "total": 9})
    assert read_rows(tmp_path / "steps.csv")[-1] == {"step": "3", "total": "9"}
    with pytest.raises(ValueError, match="columns must be"):
        again.add({"step": 4, "loss": 1})
