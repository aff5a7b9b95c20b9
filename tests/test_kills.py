# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed at file operations and go on as if nothing had been."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kdfast.testing.kills.shim import KILLED, Shim
from kdfast.testing.kills.state import difference


def kills(*words: str) -> str:
    """Output of the command, in a fresh process: forks of one that ran a backward cannot train."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "kdfast.testing.kills", *words],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# How many operations are left out between two kills: a few seconds each.
@pytest.mark.parametrize(
    ("name", "every"), [("cache", 6), ("prune", 9), ("recovery", 40), ("chain", 80)]
)
def test_some_kills(name: str, every: int) -> None:
    out = kills("--only", name, "--every", str(every), "--first", str(every // 2))
    assert re.search(rf"{name}: \d+ operations, [1-9]\d* kills, 0 faults", out), out


# All operations of a chain take 40 minutes.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "every"), [("cache", 1), ("prune", 1), ("recovery", 1), ("chain", 4)]
)
def test_a_kill_at_every_file_operation(name: str, every: int) -> None:
    out = kills("--only", name, "--every", str(every))
    operations, done = (int(x) for x in re.findall(r"(\d+) (?:operations|kills)", out))
    assert done == -(-operations // every) and "0 faults" in out


def test_the_shim_sees_and_kills(tmp_path: Path) -> None:
    """What is not counted would not be tried."""
    process = os.fork()
    if not process:
        try:
            shim = Shim(tmp_path, 11)
            path = tmp_path / "file.csv"
            with path.open("w") as file:
                file.write("step,loss\n")
                os.fsync(file.fileno())
            with (tmp_path / "file.bin").open("wb") as other:
                os.fsync(other.fileno())
            os.replace(path, tmp_path / "other.csv")
            (tmp_path / "folder").mkdir()
            os.link(tmp_path / "other.csv", tmp_path / "folder/link")
            (tmp_path / "folder/link").unlink()
            (tmp_path / "folder").rmdir()
            Path("/dev/null").open("w").close()  # not below the folder
            with open(tmp_path / "last", "w") as file:
                print(*(line.split(" ")[0] for line in shim.done), sep="\n", file=file)
            (tmp_path / "other.csv").open("a").close()
        finally:
            os._exit(1)
    status = os.waitpid(process, 0)[1]
    assert os.waitstatus_to_exitcode(status) == KILLED
    assert (tmp_path / "last").read_text().split("\n")[:-1] == [
        *(
            "open",
            "fsync",
            "open",
            "half",
            "fsync",
            "os.rename",
            "os.mkdir",
            "os.link",
            "os.remove",
            "os.rmdir",
        ),
        "open",
    ]
    # Killed before the append, with half a row on the way.
    assert (tmp_path / "other.csv").read_text() == "step,loss\n7,0."


def test_differences_are_named() -> None:
    one = {"a.json": {"x": [1, {"y": 2}]}, "b": "0"}
    assert difference(one, one) == ""
    assert difference(one, {**one, "a.json": {"x": [1, {"y": 3}]}}) == (
        "a.json: .x[1].y must be 2, got 3"
    )
    assert difference(one, {"b": "0", ".b.tmp": ""}) == ("missing ['a.json'], left over ['.b.tmp']")
