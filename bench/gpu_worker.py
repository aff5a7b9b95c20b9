# SPDX-License-Identifier: Apache-2.0
"""Processes that answer questions, a line of JSON each; each takes many, as it starts for seconds.

What ends a process, a crash of the compiler or of the device, costs the answer to one question.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from bench.gpu_stages import ROOT


class Worker:
    """A process that answers, started when there is something to ask."""

    def __init__(self, module: str, env: dict[str, str], what: str, lasts: int) -> None:
        """Starts nothing.

        Args:
            module: What the process runs; it calls ``questions``.
            env: Its variables.
            what: It does, for messages: "compiling".
            lasts: Questions after which a new process takes over: some keep what they have made.
        """
        self.module, self.env, self.what, self.lasts = module, env, what, lasts
        self.process: subprocess.Popen[str] | None = None
        self.taken = 0

    def close(self) -> None:
        """Ends the process after its answer."""
        if self.process is not None:
            self.process.communicate()
        self.process, self.taken = None, 0

    def answer(self, question: dict[str, Any], seconds: float | None = None) -> dict[str, Any]:
        """What the process answers; ``error`` alone if it ended or was killed after ``seconds``."""
        if self.taken == self.lasts:
            self.close()
        if self.process is None:
            command = [sys.executable, "-m", self.module]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self.process = subprocess.Popen(command, cwd=ROOT, env=self.env, text=True, **pipes)
        self.taken += 1
        assert self.process.stdin is not None and self.process.stdout is not None
        timer = threading.Timer(seconds or 0.0, self.process.kill)
        if seconds is not None:
            timer.start()
        with suppress(BrokenPipeError):  # it has ended, as the missing answer shows
            print(json.dumps(question), file=self.process.stdin, flush=True)
        found = self.process.stdout.readline()
        timer.cancel()
        if found:
            return dict(json.loads(found))
        code = self.process.wait()
        self.process, self.taken = None, 0
        return {"error": f"the {self.what} process ended with {code}"}


def questions() -> Iterator[tuple[dict[str, Any], Callable[[dict[str, Any]], None]]]:
    """In the process: each question, and what takes its answer, until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # compilers may print

    def reply(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    for line in sys.stdin:
        yield json.loads(line), reply
