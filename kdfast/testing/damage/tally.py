# SPDX-License-Identifier: Apache-2.0
"""Counts what became of damaged files."""

from __future__ import annotations

import collections
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# A reader that takes longer is taken to hang.
SECONDS = 60
# Lines of a message; lists of problems have some.
LINES = 40


class Tally:
    """What became of every trial.

    Attributes:
        counts: By kind of file: tried, seen, harmless and faults.
        faults: One line for each file that was used though it was damaged, hung its reader, ended
            in an unclear error, or made the reader open another file.
    """

    def __init__(self) -> None:
        self.counts: dict[str, collections.Counter[str]] = {}
        self.faults: list[str] = []

    def fault(self, kind: str, text: str) -> None:
        """Keeps and prints a fault."""
        self.counts.setdefault(kind, collections.Counter())["faults"] += 1
        self.faults.append(f"{kind}: {text}")
        print(f"FAULT {kind}: {text}", flush=True)

    def trial(
        self,
        kind: str,
        text: str,
        read: Callable[[], Any],
        fine: Callable[[Any], str | None],
        names: str = "",
    ) -> None:
        """Reads a damaged file.

        Args:
            kind: What is counted together.
            text: What was done to the file.
            read: Reads it.
            fine: What is wrong with the result of a reader that took it; None for nothing.
            names: What the message of an error has to name.
        """
        counts = self.counts.setdefault(kind, collections.Counter())
        counts["tried"] += 1
        OPENED.clear()
        try:
            with _alarm():
                result = read()
        except (ValueError, OSError) as error:
            counts["seen"] += 1
            message = str(error)
            if not message.strip() or message.count("\n") > LINES or names not in message:
                self.fault(kind, f"{text}: unclear {type(error).__name__}: {message[:200]}")
        except BaseException as error:
            self.fault(kind, f"{text}: {type(error).__name__}: {str(error)[:200]}")
        else:
            wrong = fine(result)
            if wrong is None:
                counts["harmless"] += 1
            else:
                self.fault(kind, f"{text}: used silently: {wrong}")
        if OPENED:
            self.fault(kind, f"{text}: opened {OPENED[0]}")

    def table(self) -> str:
        """One line of Markdown for each kind."""
        columns = ("tried", "seen", "harmless", "faults")
        lines = [f"| files | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
        for kind, counts in self.counts.items():
            lines.append(f"| {kind} | {' | '.join(f'{counts[name]:,}' for name in columns)} |")
        return "\n".join(lines)


@contextmanager
def _alarm() -> Iterator[None]:
    def hangs(signum: int, frame: object) -> None:
        raise TimeoutError(f"no answer in {SECONDS} s")

    # pytest-timeout has the alarm too: its own comes back.
    before, left = signal.signal(signal.SIGALRM, hangs), signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.alarm(left)


# Files and addresses that a reader opened and that it must never open.
OPENED: list[str] = []
BAIT = "kdfast-bait"
# A path that leads out of any folder, as whoever edits a file may write it.
OUTSIDE = f"/{BAIT}"


def watch_opened() -> None:
    """Notes from now on each file with ``BAIT`` in its path, and each connection."""
    if not _watching:
        sys.addaudithook(_note)
        _watching.append(True)


_watching: list[bool] = []


def _note(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and BAIT in str(args[0]) and not str(args[0]).endswith(BAIT + "-own"):
        OPENED.append(str(args[0]))
    elif event in ("socket.connect", "socket.getaddrinfo"):
        OPENED.append(f"{event} {args[:2]}")


def same(first: Any, second: Any) -> bool:
    """Whether two plain values or tensors, nested in lists and dicts, are the same bits."""
    if isinstance(first, Tensor):
        return (
            isinstance(second, Tensor)
            and first.dtype == second.dtype
            and first.shape == second.shape
            and torch.equal(_bits(first), _bits(second))
        )
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def differs(want: Any) -> Callable[[Any], str | None]:
    """For ``Tally.trial``: the result has to be what it was."""
    return lambda got: None if same(want, got) else "other values"


def put(folder: Path, files: dict[str, bytes]) -> None:
    """Writes the files of a folder."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def taken(folder: Path) -> dict[str, bytes]:
    """The files of a folder, by name below it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
