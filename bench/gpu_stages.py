# SPDX-License-Identifier: Apache-2.0
"""What the parts of ``python -m bench.gpu`` share: their settings, processes and files.

A part runs its work in processes of their own, so that a crash of the device costs only the results
of one, and writes what there is while they run.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
# Seconds between two looks at a process, and between two writings of the results.
LOOK, WRITE = 0.1, 5.0


@dataclass(frozen=True)
class Settings:
    """Of one command.

    Attributes:
        name: Of the device, for the names of files.
        out: Where the files go.
        end: When the command has to be over, by ``time.monotonic``.
        dry: Whether this is small and on the CPU.
    """

    name: str
    out: Path
    end: float
    dry: bool

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.end - time.monotonic()

    def write(self, file: str, text: str) -> Path:
        """Replaces a file as a whole, so that no reader and no kill sees a part of it."""
        return replace(self.out / file, text)


def replace(path: Path, text: str) -> Path:
    """Writes a file beside its place and moves it there."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
    return path


def environment(dry: bool, **more: str) -> dict[str, str]:
    """The variables of a process that uses the device, or interprets the kernels."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    if dry:
        env |= {"KDFAST_DRY_RUN": "1", "TRITON_INTERPRET": "1"}
    return env | more


def stage(
    name: str,
    commands: Sequence[Sequence[str]],
    seconds: float,
    env: dict[str, str],
    write: Callable[[], object] | None = None,
) -> dict[str, Any]:
    """Runs the processes of one stage at once; the first code that is not 0, and the time.

    The output of one process is shown as it comes, that of several at their end.

    Args:
        name: Shown.
        commands: What follows "python" on the command lines.
        seconds: Processes that have not ended by then are killed.
        env: Their variables.
        write: Called every few seconds, to keep what they have found so far.
    """
    print(f"== {name}", flush=True)
    started = time.monotonic()
    with ExitStack() as stack:
        several = len(commands) > 1
        files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in commands]
        running = [
            subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, env=env, **(captured(file) if several else {})
            )
            for command, file in zip(commands, files, strict=True)
        ]
        written = started
        while any(process.poll() is None for process in running):
            if time.monotonic() > started + seconds:
                break
            if write is not None and time.monotonic() > written + WRITE:
                write()
                written = time.monotonic()
            time.sleep(LOOK)
        codes = [ended(process) for process in running]
        for file in files:
            file.seek(0)
            print(file.read(), end="", flush=True)
    code = next((code for code in codes if code), 0)
    return {"code": code, "seconds": round(time.monotonic() - started, 1)}


def captured(file: IO[str]) -> dict[str, Any]:
    """Where both outputs of a process go."""
    return {"stdout": file, "stderr": subprocess.STDOUT}


def ended(process: subprocess.Popen[bytes]) -> int | str:
    """The code of a process, which is killed if it has not ended."""
    if process.poll() is None:
        process.kill()
        process.wait()
        return "stopped: no time left"
    return process.returncode
