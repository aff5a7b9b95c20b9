# SPDX-License-Identifier: Apache-2.0
"""Counts the file operations of a process, and ends it at one of them as ``kill -9`` would.

Operations are opening a file for writing, renaming, linking, removing, making and removing a
folder, and flushing to the disk. Two operations more are counted where a file may be half there:
before its ``fsync`` the half of it is cut off, before a row is appended half a row is.
"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import Any

import numpy as np

KILLED = 137
_CHANGES = {"os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir", "os.truncate"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Shim:
    """Watches everything below a folder; for a process that is about to die, as it stays.

    Attributes:
        done: Operations so far, in words.
    """

    def __init__(self, folder: Path, at: int | None) -> None:
        """Begin.

        Args:
            folder: Operations elsewhere are not counted.
            at: Number of the operation before which the process ends, from 0; None: it lives.
        """
        self.folder, self.at = str(folder.resolve()), at
        self.done: list[str] = []
        self._fsync, self._flush = os.fsync, np.memmap.flush
        system: Any = os
        system.fsync = self.fsync
        maps: Any = np.memmap
        maps.flush = lambda array: self.flush(array)
        sys.addaudithook(self.audit)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Called by Python before what it does to files."""
        if event in _CHANGES:
            self.count(event, arguments[0])
        elif event == "open":
            path, mode, flags = arguments
            writes = set(mode or "") & set("wax+") or (flags or 0) & _WRITES
            if writes and not isinstance(path, int):
                if mode and "a" in mode and str(path).endswith(".csv"):
                    self.count("half a row", path, lambda: self._append(path))
                self.count("open", path)

    def fsync(self, handle: int) -> None:
        """In place of ``os.fsync``."""
        path = os.readlink(f"/proc/self/fd/{handle}")
        facts = os.fstat(handle)
        # On the disk already are the earlier rows of a log, and what has a second name.
        flushed = path.endswith(".csv") or facts.st_nlink > 1
        if stat.S_ISREG(facts.st_mode) and not flushed:
            self.count("half a file", path, lambda: self._halve(path))
        self.count("fsync", path)
        self._fsync(handle)

    def flush(self, array: np.memmap[Any, Any]) -> None:
        """In place of a memory map's ``flush``."""
        self.count("flush", array.filename)
        self._flush(array)

    def count(self, what: str, path: Any, last: Any = None) -> None:
        """Count an operation, or be killed before it; ``last`` is done on the way."""
        name = os.path.abspath(os.fsdecode(path))
        if not name.startswith(self.folder):
            return
        if len(self.done) == self.at:
            self.at = None
            if last is not None:
                last()
            os._exit(KILLED)
        self.done.append(f"{what} {name[len(self.folder) + 1 :]}")

    @staticmethod
    def _halve(path: str) -> None:
        os.truncate(path, os.stat(path).st_size // 2)

    @staticmethod
    def _append(path: Any) -> None:
        with open(path, "a", encoding="utf-8") as file:
            file.write("7,0.")
