# SPDX-License-Identifier: Apache-2.0
"""Commands under torchrun: killed and started again, or gone on with by other numbers of processes.

Every worker writes down which pictures each finished step had.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from kdfast.machine.ranks import Ranks
from kdfast.trainer import launches, runs
from kdfast.trainer.commits import load_checkpoint
from kdfast.trainer.launches import Launch, Life
from kdfast.trainer.logs import read_rows
from kdfast.trainer.processes import warn_of_shared_store
from tests.test_chain_run import words as chain_of_digits
from tests.test_resume import words as recovery

# A death, which happens once: rank, step, and whether in the step or in the writing of its state.
WORKER = """
import io, json, os, signal, sys, time
from pathlib import Path

import torch

from kdfast.recovery import report
from kdfast.train import main
from kdfast.trainer import commits, loop

torch.set_num_threads(1)
notes, deaths = Path(sys.argv[1]), json.loads(sys.argv[2])
pause = float(os.environ.get("PAUSE", 0))
rank = int(os.environ.get("RANK", 0))
step_of, book, save = loop.Loop._train_step, loop.Loop._book, torch.save


def dies(step, where):
    mark = notes / f"died-{step}-{where}"
    if [rank, step, where] not in deaths or mark.exists():
        return False
    mark.touch()
    return True


def train_step(self, batches, epoch):
    time.sleep(pause if self.job.title == "distil" else 0)
    if self.job.title == "distil" and dies(self.step, "step"):
        os.kill(os.getpid(), signal.SIGKILL)
    return step_of(self, batches, epoch)


def booked(self, result, *rest):
    book(self, result, *rest)
    index = [i for batch in result.batches for i in batch.index]
    with (notes / f"seen-{os.getpid()}.jsonl").open("a") as file:
        file.write(json.dumps([self.job.title, self.step, self.world, index]) + "\\n")


def half_saved(state, file, **options):
    if isinstance(state, dict) and "ranks" in state and dies(state["step"], "write"):
        whole = io.BytesIO()
        save(state, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(state, file, **options)


loop.Loop._train_step, loop.Loop._book = train_step, booked
commits.torch.save = half_saved
loop.draw_curves = lambda job: None
report.interleave = lambda calls, **_: {name: [(1e-3, True)] for name in calls}
sys.exit(main(sys.argv[3:]))
"""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
# Else processes that are started again may read addresses of those before (pytorch issue 135712).
ENVIRONMENT["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"


def command(folder: Path, words: list[str], *options: str, deaths: Any = ()) -> list[str]:
    """One process without ``options``, else torchrun with them."""
    folder.mkdir(exist_ok=True)
    script = folder / "worker.py"
    script.write_text(WORKER)
    launcher = ["-m", "torch.distributed.run", *options] if options else []
    return [sys.executable, *launcher, str(script), str(folder), json.dumps(deaths), *words]


def launch(folder: Path, words: list[str], *options: str, deaths: Any = ()) -> None:
    done = subprocess.run(
        command(folder, words, *options, deaths=deaths),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]


def processes(count: int) -> list[str]:
    return [] if count == 1 else ["--standalone", f"--nproc-per-node={count}"]


def chain(folder: Path, *changes: str) -> list[str]:
    """Two epochs of 48 digits for each of two links."""
    return chain_of_digits(folder, "save_every=3", *changes)


def lines(folder: Path) -> Iterator[tuple[str, int, int, list[int]]]:
    for path in folder.glob("seen-*.jsonl"):
        for line in path.read_text().splitlines():
            title, step, world, index = json.loads(line)
            yield title, step, world, index


def seen(folder: Path, title: str) -> dict[int, list[int]]:
    """Pictures of each step of a training, sorted, where no step was taken twice."""
    steps: dict[int, list[int]] = {}
    for name, step, _, index in lines(folder):
        if name == title:
            steps[step] = sorted(steps.get(step, []) + index)
    return steps


def each_once(steps: dict[int, list[int]], *, epochs: int, images: int, together: int) -> None:
    """Asserts that all steps are there, and that each epoch has each picture once."""
    per_epoch = images // together
    assert sorted(steps) == list(range(1, epochs * per_epoch + 1))
    for first in range(1, epochs * per_epoch + 1, per_epoch):
        every = [i for step in range(first, first + per_epoch) for i in steps[step]]
        assert len(every) == len(set(every)) == images


def same_run(a: Path, b: Path) -> None:
    """Asserts the same weights and the same log, to the bit."""
    one, two = (load_file(folder / "student.safetensors") for folder in (a, b))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    keep = ("step", "epoch", "total", "lr", "grad_norm")
    logs = [[[r[k] for k in keep] for r in read_rows(x / "steps.csv")] for x in (a, b)]
    assert logs[0] == logs[1]


@pytest.fixture(scope="module")
def whole(teachers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of two processes that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    launch(folder, recovery(folder / "run", teachers), *processes(2))
    each_once(seen(folder, "distil"), epochs=2, images=60, together=6)
    return folder


@pytest.mark.slow
def test_killed_ranks(whole: Path, teachers: Path, tmp_path: Path) -> None:
    """torchrun starts all again; the run goes on, without --resume, to the same bits."""
    deaths = [(1, 7, "step"), (0, 12, "write")]
    options = [*processes(2), "--max-restarts=3"]
    words = recovery(tmp_path / "run", teachers)
    launch(tmp_path, words, *options, deaths=deaths)
    assert {path.name for path in tmp_path.glob("died-*")} == {"died-7-step", "died-12-write"}
    assert not (tmp_path / "run-2").exists()
    log = (tmp_path / "run/train.log").read_text()
    # The last state before each death.
    assert "continues after step 6 of 20" in log and "continues after step 10 of 20" in log
    same_run(whole / "run", tmp_path / "run")
    # Steps that were taken twice had the same pictures.
    wanted = seen(whole, "distil")
    for title, step, _, index in lines(tmp_path):
        assert title == "distil" and set(index) <= set(wanted[step])
    # Another launch has a run of its own.
    launch(tmp_path, [*words, "--set", "run.max_steps=1"], *processes(2))
    assert load_checkpoint(tmp_path / "run-2/last.pt")["step"] == 1


@pytest.mark.slow
def test_recovery_one_two_three_one(teachers: Path, tmp_path: Path) -> None:
    """The steps have the pictures that they would have had in one process."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    steady = ("run.batch_size=6", "distill.drop_path=0")
    launch(whole, recovery(whole / "run", teachers, *steady))
    for world, stop in ((1, 4), (2, 7), (3, 12), (1, None)):
        words = recovery(parts / "run", teachers, *steady, f"run.max_steps={stop or 'null'}")
        launch(parts, [*words, *(["--resume"] if world > 1 or not stop else [])], *processes(world))
    one, two = seen(whole, "distil"), seen(parts, "distil")
    each_once(two, epochs=2, images=60, together=6)
    assert one == two
    worlds = {step: world for title, step, world, _ in lines(parts) if title == "distil"}
    assert [worlds[step] for step in (4, 7, 12, 20)] == [1, 2, 3, 1]


@pytest.mark.slow
def test_chain_one_two_three_one(tmp_path: Path) -> None:
    """The same of a link that is taught, whose weights are then those of one process."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    steady = ("optim.mixup=0", "optim.cutmix=0")
    launch(whole, chain(whole / "run", *steady, "stage=teacher"))
    launch(whole, chain(whole / "run", *steady, "stage=assistant"))
    launch(parts, chain(parts / "run", *steady, "stage=teacher"))
    for world, stop in ((1, 2), (2, 4), (3, 8), (1, None)):
        words = chain(parts / "run", *steady, "stage=assistant", f"max_steps={stop or 'null'}")
        launch(parts, [*words, *(["--resume"] if world > 1 or not stop else [])], *processes(world))
    one, two = seen(whole, "assistant"), seen(parts, "assistant")
    each_once(two, epochs=2, images=48, together=8)
    assert one == two
    worlds = {step: world for title, step, world, _ in lines(parts) if title == "assistant"}
    assert [worlds[step] for step in (2, 4, 8, 12)] == [1, 2, 3, 1]
    states = [
        load_checkpoint(next(folder.glob("run/**/assistant/checkpoints/last.pt")))["module"]
        for folder in (whole, parts)
    ]
    torch.testing.assert_close(*states, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_machine_that_leaves(teachers: Path, whole: Path, tmp_path: Path) -> None:
    """Two agents stand for two machines; one dies with its worker, and the other goes on alone."""
    end = ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port()}"]
    options = ["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-id=one", *end]
    options.append("--rdzv-conf=last_call_timeout=20,keep_alive_interval=1,is_host=")
    words = recovery(tmp_path / "run", teachers)
    agents = []
    for number in range(2):
        mine = [o + str(number == 0).lower() if o.endswith("is_host=") else o for o in options]
        agents.append(
            subprocess.Popen(
                command(tmp_path, words, *mine),
                env={**ENVIRONMENT, "PAUSE": "0.5"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        wait_for(tmp_path / "run/last.pt", agents)
        for process in (*psutil.Process(agents[1].pid).children(), agents[1]):
            process.send_signal(signal.SIGKILL)
        out = agents[0].communicate(timeout=300)[0]
        assert agents[0].returncode == 0, out[-3000:]
    finally:
        for agent in agents:
            agent.kill()
    assert not (tmp_path / "run-2").exists()
    state = load_checkpoint(tmp_path / "run/last.pt")
    assert (state["world"], state["together"], state["step"]) == (1, 6, 20)
    assert (
        "goes on with other processes, 1 instead of 2" in (tmp_path / "run/train.log").read_text()
    )
    wanted = seen(whole, "distil")
    for _, step, _, index in lines(tmp_path):
        assert set(index) <= set(wanted[step])


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        port: int = listening.getsockname()[1]
        return port


def wait_for(path: Path, running: list[subprocess.Popen[str]], seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not path.is_file():
        assert all(process.poll() is None for process in running), running[0].communicate()[0]
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Says which agents and which main process there are from now on."""
    monkeypatch.setattr(runs, "broadcast_object_list", lambda values: values)

    def now(main: int, *agents: int) -> None:
        found = Launch([Life("here", pid, 1000.0 * pid) for pid in agents], Life("here", main, 5.0))
        monkeypatch.setattr(launches, "launch_of", lambda ranks: found)

    yield now
    runs.release_folder()


MAIN: Any = SimpleNamespace(is_main_process=True)


def begin(output: Path, missing: str | None = None) -> tuple[bool, str]:
    again = runs.started_again(output, MAIN)
    folder = runs.run_folder(output, MAIN, missing)
    for name in ("config.yaml", "steps.csv"):
        (folder / name).touch()
    return again, folder.name


def test_folders_of_a_launch(tmp_path: Path, launched: Any) -> None:
    output = tmp_path / "run"
    launched(1, 70, 71)
    assert begin(output) == (False, "run")
    assert begin(output) == (False, "run-2"), "a second run of one process"
    launched(2, 71, 72)  # an agent left, another one came
    assert begin(output) == (True, "run")
    assert begin(output) == (True, "run-2")
    assert begin(output) == (False, "run-3")
    launched(3, 80)
    assert begin(output) == (False, "run-4"), "another launch"
    launched(4)
    assert begin(output) == (False, "run-5"), "without a launcher"
    launched(5)
    assert begin(output) == (False, "run-6")
    # A launch with --resume goes on with the newest, and after that with the same one.
    launched(6, 90)
    newest = begin(output, "--resume: ")[1]
    launched(7, 90)
    assert begin(output, "--resume: ") == (True, newest)


def test_a_start_that_computed_nothing_is_made_again(tmp_path: Path, launched: Any) -> None:
    launched(1, 70)
    runs.run_folder(tmp_path / "run", MAIN, None)
    launched(2, 70)
    assert not runs.started_again(tmp_path / "run", MAIN)
    assert runs.run_folder(tmp_path / "run", MAIN, None).name == "run"
    (tmp_path / "run/steps.csv").touch()
    (tmp_path / "run/config.yaml").touch()
    (tmp_path / "run/launch.json").write_text('{"agents": 5}')
    with pytest.warns(UserWarning, match=r"launch.json cannot be read, so its run does not go on"):
        assert not runs.started_again(tmp_path / "run", MAIN)


def test_launch_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent is the parent of a process that torchrun started."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    alone = launches.launch_of(Ranks())
    assert alone.agents == [] and alone.main.pid == os.getpid()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    (agent,) = launches.launch_of(Ranks()).agents
    assert agent.pid == os.getppid() and not agent.is_same(alone.main)
    assert agent.is_same(agent._replace(began=agent.began + 1))
    assert not agent.is_same(agent._replace(began=agent.began + 60))


@pytest.mark.parametrize("restarts", ["0", "3"])
@pytest.mark.parametrize("shared", ["True", "False", None])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_store_that_may_break_restarts_is_named(
    rank: str, shared: str | None, restarts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    if shared is None:
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    else:
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", shared)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_shared_store()
    expected = rank == "0" and restarts == "3" and shared == "True"
    assert [str(w.message)[:14] for w in caught] == ["torchrun may f"] * expected
