# SPDX-License-Identifier: Apache-2.0
"""SIGINT and SIGTERM end a command wherever it is: in order, with a line, and never with 0."""

import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import kdfast.attention
import kdfast.compare
import kdfast.data.__main__
import kdfast.evaluate
import kdfast.info
import kdfast.plan
import kdfast.prune
from kdfast.chain.teacher_cache import TeacherCache
from kdfast.machine.signals import CAUGHT, Interrupted, check, handled, noting, run_command
from kdfast.pruning.saving import save_pretrained
from kdfast.recovery import report, run
from kdfast.recovery.evaluate import EvaluateEpochs, Evaluator
from kdfast.train import main
from kdfast.trainer import loop
from kdfast.trainer.commits import load_checkpoint

BOTH = pytest.mark.parametrize("signum", CAUGHT, ids=lambda number: number.name)


def send(signum: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), signum)


def wait(seconds: float = 20) -> None:
    """Work in Python that lasts until the signal is raised again."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    pytest.fail("the signal was lost")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = [signal.getsignal(number) for number in (*CAUGHT, signal.SIGALRM)]
    hook = sys.unraisablehook
    yield
    assert [signal.getsignal(number) for number in (*CAUGHT, signal.SIGALRM)] == before
    assert sys.unraisablehook is hook and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@BOTH
def test_status_and_line(signum: int, capsys: pytest.CaptureFixture[str]) -> None:
    def body() -> int:
        send(signum)
        wait()
        return 0

    assert run_command(body, "half is kept") == 128 + signum
    name = signal.Signals(signum).name
    assert capsys.readouterr().err == f"stopped by {name}; half is kept\n"


def swallowed_by_del() -> None:
    class Dies:
        def __del__(self) -> None:
            send()
            wait()

    Dies()


def swallowed_by_weak_reference() -> None:
    def callback(_: object) -> None:
        send()
        wait()

    thing = nn.Linear(1, 1)
    kept = weakref.ref(thing, callback)
    del thing
    assert kept is not None


def swallowed_by_bare_except() -> None:
    try:
        send()
        wait()
    except BaseException:
        pass


@pytest.mark.parametrize(
    "swallow", [swallowed_by_del, swallowed_by_weak_reference, swallowed_by_bare_except]
)
def test_swallowed_is_raised_again(
    swallow: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def body() -> int:
        swallow()
        wait()
        return 0

    assert run_command(body, "x") == 130
    assert capsys.readouterr().err == "stopped by SIGINT; x\n"


def test_never_status_0() -> None:
    """Also where the body ends before anything could be raised again."""

    def body() -> int:
        swallowed_by_bare_except()
        return 0

    assert run_command(body, "x") == 130


def test_clean_up_is_left_alone() -> None:
    """The timer that raises again does not disturb ``finally`` on the way out."""
    cleaned = []

    def body() -> int:
        try:
            send()
            wait()
        finally:
            end = time.monotonic() + 0.7
            while time.monotonic() < end:
                pass
            cleaned.append(True)
        return 0

    assert run_command(body, "x") == 130 and cleaned == [True]


def test_handled_signal_is_not_raised_again() -> None:
    def body() -> int:
        try:
            send()
            wait()
        except KeyboardInterrupt:
            handled()
        end = time.monotonic() + 0.7
        while time.monotonic() < end:
            pass
        return 0

    assert run_command(body, "x") == 130


def test_noted_until_asked() -> None:
    def body() -> int:
        with noting() as signals:
            send(signal.SIGTERM)
            assert signals.caught == signal.SIGTERM
            end = time.monotonic() + 0.5
            while time.monotonic() < end:
                pass
            check()
        return 0

    assert run_command(body, "x") == 143


def test_loader_processes_leave_the_signal_to_their_parent() -> None:
    def body() -> int:
        process = os.fork()
        if not process:
            send(signal.SIGINT)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 7
        process = os.fork()
        if not process:
            send(signal.SIGTERM)
            time.sleep(30)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGTERM
        return 0

    assert run_command(body, "x") == 0


def test_second_signal_ends_at_once() -> None:
    """Also while nothing of Python runs that could handle it."""
    code = (
        "import os, signal, time\n"
        "from kdfast.machine.signals import run_command\n"
        "def body():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(60)\n"
        "run_command(body, 'x')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGINT


def words(folder: Path, *changes: str) -> list[str]:
    sets = [
        f"output={folder}",
        f"teacher.cache={folder.parent.parent / 'teachers'}",
        *("run.device=cpu", "data.frames=2", "data.val_frames=1", "prune.batches=1"),
        *("run.epochs=1", "run.batch_size=2", "teacher.fit.batch_size=2", *changes),
    ]
    return ["--config", "smoke", *(word for change in sets for word in ("--set", change))]


PHASES = {
    "data": (run, "build_data"),
    "scores": (run, "score_heads"),
    "evaluation": (Evaluator, "__call__"),
    "report": (run, "measure"),
    "files": (run, "write_report"),
    "picture": (run, "draw_predictions"),
    "curves": (loop, "draw_curves"),
    "student": (run, "save_backbone"),
}


@pytest.mark.parametrize("phase", PHASES)
def test_every_phase_of_a_run(
    phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ends at once, says so, and goes on to the same end."""
    monkeypatch.setattr(
        report, "interleave", lambda calls, **_: {name: [(1e-3, True)] for name in calls}
    )
    owner, name = PHASES[phase]
    original: Any = getattr(owner, name)

    def interrupted(*args: Any, **more: Any) -> Any:
        send()
        return original(*args, **more)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        assert main(words(folder)) == 130
    assert capsys.readouterr().err == (
        "stopped by SIGINT; what was done is saved, go on with --resume\n"
    )
    assert (folder / "report.txt").exists() == (phase == "picture")
    if phase not in ("data",):
        assert main([*words(folder), "--resume"]) == 0
        assert (folder / "report.txt").is_file()


def test_evaluation_after_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops in the middle; its steps are kept, and the evaluation is done on --resume."""
    monkeypatch.setattr(
        report, "interleave", lambda calls, **_: {name: [(1e-3, True)] for name in calls}
    )
    original = EvaluateEpochs.on_epoch

    def interrupted(self: EvaluateEpochs, epoch: int, step: int, lr: float) -> Any:
        if self.title == "distil" and epoch == 0:
            send(signal.SIGTERM)
        return original(self, epoch, step, lr)

    results = []
    for name in ("whole", "cut"):
        folder = tmp_path / name / "run"
        folder.parent.mkdir()
        changes = ("run.epochs=2", f"teacher.cache={tmp_path}/teachers", "distill.drop_path=0.2")
        with monkeypatch.context() as patch:
            if name == "cut":
                patch.setattr(EvaluateEpochs, "on_epoch", interrupted)
                assert main(words(folder, *changes)) == 143
                state = load_checkpoint(folder / "last.pt")
                assert state["step"] == state["per_epoch"] and state["open_epoch"] is not None
                assert not (folder / "epochs.csv").exists()
        if name == "cut":
            assert main([*words(folder, *changes), "--resume"]) == 0
        else:
            assert main(words(folder, *changes)) == 0
        results.append(load_checkpoint(folder / "last.pt"))
        assert (folder / "epochs.csv").read_text().count("\n") == 3
    one, two = results
    assert all(torch.equal(one["module"][name], two["module"][name]) for name in one["module"])
    assert torch.equal(one["ranks"][0]["rng"]["torch"], two["ranks"][0]["rng"]["torch"])
    assert one["open_epoch"] is None and two["open_epoch"] is None


def test_cache_keeps_the_rows_that_are_there(tmp_path: Path) -> None:
    class Data(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"image": torch.full((3, 2, 2), float(index))}

    calls: list[int] = []

    def teacher(images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        if len(calls) == 3:
            send()
        return images.flatten(1)[:, :4]

    def body() -> int:
        TeacherCache.build(teacher, Data(), tmp_path / "cache", key={}, batch_size=2)
        return 0

    assert run_command(body, "x") == 130
    before = len(calls)
    assert body() == 0 and len(calls) - before in (1, 2)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    model = timm.create_model(
        "vit_tiny_patch16_224", depth=2, num_classes=7, img_size=32, embed_dim=48, num_heads=3
    )
    return save_pretrained(model, tmp_path / "model")


COMMANDS = {
    "prune": (kdfast.prune, "kdfast.pruner.choose.head_scores", "out holds no new model"),
    "prune calibration": (kdfast.prune, "kdfast.pruner.work.calibrate", "out holds no new model"),
    "prune times": (kdfast.prune, "kdfast.pruner.measure.latencies", "out holds no new model"),
    "compare": (kdfast.compare, "answers", "rows without numbers were not measured"),
    "attention": (kdfast.attention, "capture", "the pictures that were drawn are whole"),
    "plan": (kdfast.plan, "steps_of", "no plan was made"),
    "info": (kdfast.info, "_print", "the report is not complete"),
    "data": (kdfast.data.__main__, "write_sample", "is not whole, delete it"),
    "evaluate": (kdfast.evaluate, "load", "nothing was written"),
}


@BOTH
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command(
    command: str,
    signum: int,
    tmp_path: Path,
    model_folder: Path,
    picture_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module, name, kept = COMMANDS[command]

    def interrupted(*args: Any, **more: Any) -> None:
        send(signum)
        wait()

    monkeypatch.setattr(name if "." in name else f"{module.__name__}.{name}", interrupted)
    model, out = ["--model", str(model_folder)], str(tmp_path / "out")
    arguments = {
        "prune": [*model, "--out", out, "--batches", "1", "--batch-size", "2"],
        "compare": [*model, "--out", out, "--pictures", "2", "--prune", "0", "--only", "eager"],
        "attention": [*model, "--image", str(next(picture_folder.rglob("*.png"))), "--output", out],
        "plan": ["--config", "smoke"],
        "info": [],
        "data": ["sample", "--out", out],
        "evaluate": ["--config", "smoke", "--checkpoint", out],
    }[command.split(" ")[0]]
    if command != "prune":
        arguments += ["--compensate", "--calibrate", "2"] if module is kdfast.prune else []
    assert module.main(arguments) == 128 + signum
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"stopped by {signal.Signals(signum).name}; ") and error.endswith(kept)
    assert not list(tmp_path.glob("out/*.json"))


def test_the_exception_passes_handlers_of_errors() -> None:
    assert issubclass(Interrupted, KeyboardInterrupt) and not issubclass(Interrupted, Exception)
