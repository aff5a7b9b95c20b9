# SPDX-License-Identifier: Apache-2.0
"""The processes in which models are exported and run, seen from inside.

Each candidate runs in a process of its own: its memory is its own, its threads do not wait while
another one's run, and a crash of its library ends nobody else.
"""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor, nn

from kdfast.machine.memory import reset_peak, resident_bytes
from kdfast.machine.timing import timed_sample
from kdfast.rivals.rival import Loaded, Rival, Unavailable, told
from kdfast.rivals.table import RIVALS

CPU = torch.device("cpu")


class Task(NamedTuple):
    """What a process is to do.

    Attributes:
        rivals: Names, of one runtime.
        model: The pickled model, made by the process that asks; None where a file is loaded.
        batches: (n, B, 3, H, W), fp32: pictures to run or to calibrate on.
        folder: Where exported files are.
        threads: Of every library.
        log: File that takes what the libraries print.
        imports: Modules that the model's classes come from.
    """

    rivals: Sequence[str]
    model: bytes | None
    batches: numpy.ndarray[Any, Any]
    folder: Path
    threads: int
    log: Path
    imports: Sequence[str] = ()


class Ready(NamedTuple):
    """A candidate is loaded; ``reason``, if any, says why it is not."""

    reason: str = ""
    note: str = ""
    nbytes: int = 0
    seconds: float = 0.0


class Finished(NamedTuple):
    """What a candidate answered, one output for each batch that it saw, and its memory in bytes."""

    outputs: dict[int, numpy.ndarray[Any, Any]]
    memory: int


def export(connection: Connection, task: Task) -> None:
    """Sends (name, reason or "") for each of the task's rivals when its files are written."""
    batches = _enter(task)
    model = _model(task)
    for name in task.rivals:
        rival = RIVALS[name]
        try:
            rival.require()
            if model is not None:
                rival.export(model, batches[0], batches, task.folder)
            connection.send((name, ""))
        except Unavailable as error:
            connection.send((name, str(error)))


def run(connection: Connection, task: Task) -> None:
    """Loads the task's one rival, sends Ready, and obeys until it is told to stop.

    ("turn", seconds): calls for that long and sends [(seconds of a call, was the machine quiet)].
    ("finish", complete): sends Finished; ``complete`` first runs the batches not seen yet.
    """
    batches = _enter(task)
    rival = RIVALS[task.rivals[0]]
    try:
        loaded, base, ready = _load(rival, task, batches[0])
    except Unavailable as error:
        connection.send(Ready(str(error)))
        return
    reset_peak(CPU)
    connection.send(ready)
    runner = Runner(loaded, batches)
    while True:
        try:
            command, value = connection.recv()
        except EOFError:  # the parent has gone
            return
        if command == "turn":
            connection.send(runner.turn(value))
        elif command == "finish":
            if value:
                runner.complete()
            connection.send(Finished(runner.outputs, max(0, resident_bytes()[1] - base)))
        else:
            return


class Runner:
    """Calls a candidate on the pictures in turn and keeps its first answer to each."""

    def __init__(self, loaded: Loaded, batches: Sequence[Tensor]) -> None:
        self._call, self._batches = loaded.call, batches
        self._next = 0
        self.outputs: dict[int, numpy.ndarray[Any, Any]] = {}

    def turn(self, seconds: float) -> list[tuple[float, bool]]:
        """Calls for ``seconds``, at least once, after one call that is not timed.

        Returns:
            Seconds of each call, and whether the machine was quiet meanwhile.
        """
        self._step()
        found: list[tuple[float, bool]] = []
        end = time.perf_counter() + seconds
        while not found or time.perf_counter() < end:
            found.append(timed_sample(self._step, 1))
        return found

    def complete(self) -> None:
        """Runs the batches that were not seen yet."""
        while len(self.outputs) < len(self._batches):
            self._step()

    def _step(self) -> None:
        index = self._next % len(self._batches)
        out = self._call(self._batches[index])
        self._next += 1
        if index not in self.outputs:
            # A copy: a runtime may write its next answer into the same memory.
            self.outputs[index] = out.numpy().copy()


def _enter(task: Task) -> list[Tensor]:
    """Sets the process up; the batches."""
    # Ctrl-C is for the parent, which then asks for what there is.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open(task.log, "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(task.threads)
    return list(torch.from_numpy(task.batches))


def _model(task: Task) -> nn.Module | None:
    """The model that the parent pickled."""
    model: nn.Module | None = None if task.model is None else pickle.loads(task.model)
    return model


def _load(rival: Rival, task: Task, example: Tensor) -> tuple[Loaded, int, Ready]:
    """The candidate, the process's memory before the model came, and what is sent."""
    rival.require()
    # Libraries are not the model's memory, and unpickling would import them.
    for name in task.imports:
        importlib.import_module(name)
    base = resident_bytes()[0]
    model = _model(task)
    start = time.perf_counter()
    with told("loading"):
        loaded = rival.load(model, example, task.folder)
        loaded.call(example)
    seconds = time.perf_counter() - start
    return loaded, base, Ready("", loaded.note, rival.nbytes(model, task.folder), seconds)
