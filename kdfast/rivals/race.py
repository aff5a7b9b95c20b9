# SPDX-License-Identifier: Apache-2.0
"""Prepares candidates in processes of their own and times them in turns."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import pickle
import signal
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from kdfast.rivals import worker
from kdfast.rivals.rival import Rival

# Processes that prepare at a time; more would slow each other down more than they save.
AT_ONCE = 2
ROUNDS = 6
# What a candidate's process may take, to decide how many run together: memory that is free, the
# libraries, and its weights, which runtimes copy into a layout of their own.
SHARE, EACH, TIMES_WEIGHTS = 0.7, 200 * 2**20, 1.5


@dataclass
class Contender:
    """One rival on one model.

    Attributes:
        subject: Which model, such as "whole".
        rival: How it runs.
        reason: Why it was not measured; empty if it was.
        note: What is worth knowing about how it runs.
        nbytes: Size of the model on disk.
        prepare_seconds: From the model, or the exported file, to the first answer.
        samples: Seconds of each timed call, and whether the machine was quiet meanwhile.
        outputs: Answer to each batch, by its number.
        memory: Bytes, as in ``worker.Finished``.
    """

    subject: str
    rival: Rival
    reason: str = ""
    note: str = ""
    nbytes: int = 0
    prepare_seconds: float = 0.0
    samples: list[tuple[float, bool]] = field(default_factory=list)
    outputs: dict[int, numpy.ndarray[Any, Any]] = field(default_factory=dict)
    memory: int = 0

    @property
    def name(self) -> str:
        return f"{self.subject} {self.rival.name}"


Say = Callable[[Contender], None]
Target = Callable[[Connection, worker.Task], None]


class Child:
    """A process and the pipe to it; a process that ends early is a reason, not an exception."""

    def __init__(self, target: Target, task: worker.Task) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["kdfast.rivals.worker"])
        self._log = task.log
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs, task), daemon=True)
        self._process.start()
        theirs.close()

    def receive(self) -> Any:
        """What it sends next.

        Raises:
            EOFError: It ended; the message says how.
        """
        try:
            return self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(10)
            raise EOFError(self._end()) from None

    def ask(self, command: str, value: object) -> Any:
        """Sends a command and waits for the answer; raises EOFError as ``receive``."""
        try:
            self._connection.send((command, value))
        except (BrokenPipeError, ConnectionResetError):
            self._process.join(10)
            raise EOFError(self._end()) from None
        return self.receive()

    def stop(self) -> None:
        """Asks it to end, which it does when its answer to the last command is sent."""
        with contextlib.suppress(OSError):
            self._connection.send(("stop", None))

    def end(self, patience: float) -> None:
        """Waits so many seconds for the end, then kills it."""
        self._process.join(patience)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _end(self) -> str:
        code = self._process.exitcode
        if code is not None and code < 0:
            hint = ", perhaps for lack of memory" if code == -signal.SIGKILL else ""
            return f"its process was ended by {signal.Signals(-code).name}{hint}"
        said = self._log.read_text(errors="replace").split("\n") if self._log.exists() else []
        last = next((line.strip() for line in reversed(said) if line.strip()), "no message")
        return f"its process ended with status {code}: {last}"


class Race:
    """All candidates of a comparison; a context that ends their processes.

    Where memory is short they run in several heats, one after the other.

    Args:
        subjects: Name to a model on the CPU in eval mode; they are not changed.
        rivals: How to run each of them.
        batches: Pictures to run, each (B, 3, H, W), fp32.
        calibration: Pictures for quantisers, of the same shape.
        threads: Of every library.
    """

    def __init__(
        self,
        subjects: Mapping[str, nn.Module],
        rivals: Sequence[Rival],
        batches: Sequence[Tensor],
        calibration: Sequence[Tensor],
        threads: int,
    ) -> None:
        self.contenders = [Contender(name, rival) for name in subjects for rival in rivals]
        self._batches = torch.stack(list(batches)).numpy()
        self._calibration = torch.stack(list(calibration)).numpy()
        self._threads = threads
        self._folder = tempfile.TemporaryDirectory(prefix="kdfast-")
        self._models = {name: pickle.dumps(model) for name, model in subjects.items()}
        self._imports = {
            name: sorted({type(module).__module__ for module in model.modules()})
            for name, model in subjects.items()
        }
        self._children: dict[str, Child] = {}
        self._started: list[Child] = []
        self._numbers = itertools.count()
        self._closed = False

    def __enter__(self) -> Race:
        return self

    def __exit__(self, *_: object) -> None:
        # A thread that still prepares, after Ctrl-C, must not start another process.
        self._closed = True
        self.clear(0.5)
        self._folder.cleanup()

    def heats(self, free: int) -> list[list[Contender]]:
        """Candidates that run together, so that the memory of all is below a share of ``free``."""
        heats: list[list[Contender]] = [[]]
        used = 0.0
        for contender in self.contenders:
            need = EACH + TIMES_WEIGHTS * len(self._models[contender.subject])
            if heats[-1] and used + need > SHARE * free:
                heats.append([])
                used = 0.0
            heats[-1].append(contender)
            used += need
        return heats

    def prepare(self, heat: Sequence[Contender], say: Say) -> None:
        """Exports, compiles and loads; ``say`` is told each candidate that is done."""
        groups: dict[tuple[str, str], list[Contender]] = {}
        for contender in heat:
            own = contender.rival.loads_model
            name = contender.rival.name if own else contender.rival.runtime
            groups.setdefault((contender.subject, name), []).append(contender)
        # The longest first, so that no core is idle at the end.
        order = sorted(groups.values(), key=lambda some: -some[0].rival.effort)
        pool = ThreadPoolExecutor(AT_ONCE)
        futures: list[Future[None]] = [pool.submit(self._prepare, some, say) for some in order]
        try:
            for future in as_completed(futures):
                future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def time(self, heat: Sequence[Contender], seconds: float, say: Say) -> None:
        """Times candidates in turns.

        Args:
            heat: Candidates that were prepared.
            seconds: About the time for each, all in all.
            say: Is told each candidate after its turn.
        """
        order = [c for c in heat if not c.reason]
        for _ in range(ROUNDS):
            for contender in [c for c in order if not c.reason]:
                try:
                    child = self._children[contender.name]
                    contender.samples += child.ask("turn", seconds / ROUNDS)
                except EOFError as error:
                    contender.reason = str(error)
                say(contender)
            # Not reversed: the first and the last would follow themselves, on warm caches.
            order = [*order[1:], *order[:1]]

    def finish(self, heat: Sequence[Contender], say: Say, *, complete: bool = True) -> None:
        """Collects answers and memory.

        Args:
            heat: Candidates that were timed.
            say: Is told each candidate that is done.
            complete: Whether pictures that a candidate has not seen yet are run first.
        """
        for contender in heat:
            if contender.reason or not contender.samples:
                continue
            try:
                child = self._children[contender.name]
                done = child.ask("finish", complete)
                while isinstance(done, list):  # the answer to a turn that Ctrl-C fell into
                    contender.samples += done
                    done = child.receive()
                contender.outputs, contender.memory = done.outputs, done.memory
            except EOFError as error:
                contender.reason = str(error)
            say(contender)

    def clear(self, patience: float = 5.0) -> None:
        """Ends all processes, those that do not end by themselves after ``patience`` seconds."""
        for child in self._started:
            child.stop()
        for child in self._started:
            child.end(patience)
        self._started.clear()
        self._children.clear()

    def _prepare(self, contenders: Sequence[Contender], say: Say) -> None:
        """Exports what candidates of one runtime and model need, then loads each."""
        if not contenders[0].rival.loads_model:
            self._export(contenders)
        for contender in contenders:
            if not contender.reason:
                try:
                    self._load(contender)
                except EOFError as error:
                    contender.reason = str(error)
            say(contender)

    def _export(self, contenders: Sequence[Contender]) -> None:
        left = {c.rival.name: c for c in contenders}
        try:
            child = self._start(worker.export, contenders, self._calibration, model=True)
            while left:
                name, reason = child.receive()
                left.pop(name).reason = reason
        except EOFError as error:
            for contender in left.values():
                contender.reason = str(error)

    def _load(self, contender: Contender) -> None:
        with_model = contender.rival.loads_model
        child = self._start(worker.run, [contender], self._batches, model=with_model)
        ready: worker.Ready = child.receive()
        contender.reason, contender.note = ready.reason, ready.note
        contender.nbytes, contender.prepare_seconds = ready.nbytes, ready.seconds
        self._children[contender.name] = child

    def _start(
        self,
        target: Target,
        contenders: Sequence[Contender],
        batches: numpy.ndarray[Any, Any],
        *,
        model: bool,
    ) -> Child:
        subject = contenders[0].subject
        folder = Path(self._folder.name) / subject
        folder.mkdir(exist_ok=True)
        task = worker.Task(
            rivals=[c.rival.name for c in contenders],
            model=self._models[subject] if model else None,
            batches=batches,
            folder=folder,
            threads=self._threads,
            log=Path(self._folder.name) / f"{next(self._numbers)}.log",
            imports=self._imports[subject] if model else (),
        )
        if self._closed:
            raise EOFError("stopped")
        child = Child(target, task)
        self._started.append(child)
        return child
