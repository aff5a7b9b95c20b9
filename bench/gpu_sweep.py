# SPDX-License-Identifier: Apache-2.0
"""Traces or compiles cases in worker processes: starting one takes seconds, so each takes many.

``python -m bench.gpu_sweep`` is such a process: a JSON line for a case comes in, one with its
trace, its kernels or the error goes out.
"""

import json
import math
import os
import queue
import resource
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict
from typing import Any

import torch

from bench import aot, gpu_worker
from bench.gpu_cases import Case, trace

# Seconds of CPU time for one case, and for the compiler of one kernel: a stopped process uses none.
LIMIT = 300
# Cases after which a worker makes room: Triton keeps what it has compiled.
CASES_EACH = 40
# What the file keeps of a kernel.
FIELDS = ("warps", "registers", "spill_bytes", "shared_bytes", "tensor_core", "loads_16", "loads")
KERNEL = ("name", "part", *FIELDS, "occupancy")


def compiled(case: Case) -> list[dict[str, Any]]:
    """The kernels of one case, each once."""
    with aot.compile_only(case.arch) as made:
        aot.OPS[case.op](getattr(torch, case.dtype), case.dim, **case.values())
    rows = {}
    for kernel in made:
        part = {True: "keys", False: "queries"}.get(kernel.constants.get("KEYS"), "")
        row = {"name": kernel.name, "part": part}
        row |= {name: getattr(kernel, name) for name in FIELDS}
        row["occupancy"] = round(kernel.occupancy, 3)
        rows[json.dumps([kernel.name, kernel.constants], default=str)] = row
    return list(rows.values())


class Worker(gpu_worker.Worker):
    """A process that compiles."""

    def __init__(self, cache: str) -> None:
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        env["TRITON_CACHE_DIR"] = cache
        super().__init__("bench.gpu_sweep", env, "compiling", CASES_EACH)

    def ask(self, case: Case, *, binaries: bool = True) -> dict[str, Any]:
        """``trace``, with ``binaries`` also ``kernels``, and ``seconds``; or ``error`` alone."""
        return self.answer({"case": asdict(case), "binaries": binaries})


Answer = tuple[Case, dict[str, Any]]


def sweep(
    cases: Iterable[Case],
    jobs: int = 1,
    seconds: float | None = None,
    *,
    binaries: bool = True,
) -> Iterator[Answer]:
    """The answers of ``jobs`` workers, as they come; after ``seconds`` no other case begins."""
    waiting, lock = iter(cases), threading.Lock()
    answers: queue.SimpleQueue[Answer | BaseException | None] = queue.SimpleQueue()
    end = math.inf if seconds is None else time.monotonic() + seconds

    def work(cache: str) -> None:
        try:
            with closing(Worker(cache)) as worker:
                while time.monotonic() < end:
                    with lock:
                        case = next(waiting, None)
                    if case is None:
                        break
                    answers.put((case, worker.ask(case, binaries=binaries)))
            answers.put(None)
        except BaseException as error:
            answers.put(error)

    with tempfile.TemporaryDirectory() as cache:
        threads = [threading.Thread(target=work, args=(cache,), daemon=True) for _ in range(jobs)]
        for thread in threads:
            thread.start()
        working = jobs
        while working:
            answer = answers.get()
            if isinstance(answer, BaseException):
                raise answer
            if answer is None:
                working -= 1
            else:
                yield answer


def main() -> None:
    """Answers until the input ends."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    for question, reply in gpu_worker.questions():
        case = Case(**question["case"])
        start = cpu_seconds()
        # Compilers inherit the limit, which ends a process that reaches it.
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + LIMIT, hard))
        try:
            answer: dict[str, Any] = {"trace": trace(case)}
            if question["binaries"]:
                answer["kernels"] = compiled(case)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answer["seconds"] = round(cpu_seconds() - start, 1)
        reply(answer)


def cpu_seconds() -> float:
    """Of this process and of those that it waited for."""
    return sum(os.times()[:4])


if __name__ == "__main__":
    main()
