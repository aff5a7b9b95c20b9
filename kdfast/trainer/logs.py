# SPDX-License-Identifier: Apache-2.0
"""Records of a run: its log, CSV files and TensorBoard."""

from __future__ import annotations

import csv
import io
import logging
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from kdfast.machine.disk import DiskFull, room_for
from kdfast.machine.files import replacing
from kdfast.trainer.events import EventFile

LOG = logging.getLogger("kdfast")
# The CSV with a row for every few steps.
STEPS = "steps.csv"
# Mark of a record that is for train.log alone, as ``extra`` of a call.
FILE_ONLY = {"file_only": True}


def open_log(folder: Path | None) -> None:
    """Send the package's log to the terminal and to ``train.log``; None: silence (other ranks)."""
    close_log()
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    if folder is None:
        LOG.addHandler(logging.NullHandler())
        return
    for handler in (_Terminal(), _LogFile(folder / "train.log", encoding="utf-8")):
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        LOG.addHandler(handler)


class _Terminal(logging.StreamHandler):  # type: ignore[type-arg]  # no generic in Python 3.10
    """Writes to the standard output of the moment, which a progress bar takes while it is shown."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)

    def emit(self, record: logging.LogRecord) -> None:
        """Leave out what is for the file."""
        if not getattr(record, "file_only", False):
            self.stream = sys.stdout
            super().emit(record)


class _LogFile(logging.FileHandler):
    """Raises DiskFull where Python's own prints a traceback and goes on."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Called with the exception of a write that failed."""
        try:
            with room_for(Path(self.baseFilename)):
                raise  # noqa: PLE0704
        except DiskFull:
            stream: Any = self.stream
            self.stream = None
            with suppress(OSError):  # it would write the same again
                stream.close()
            raise
        except Exception:
            super().handleError(record)


def close_log() -> None:
    """Close what ``open_log`` opened."""
    for handler in list(LOG.handlers):
        LOG.removeHandler(handler)
        handler.close()


class Table:
    """A CSV file that grows by rows of one schema, and forgets the rows after a resumed step."""

    def __init__(self, path: Path, resume_step: int | None) -> None:
        self.path = path
        self.columns: list[str] = []
        # Whether the columns come from the file.
        self.read = False
        rows = read_rows(path) if resume_step is not None and path.is_file() else []
        rows = [row for row in rows if row.get("step", "").isdigit()]
        kept = [row for row in rows if int(row["step"]) <= (resume_step or 0)]
        if not kept:
            path.unlink(missing_ok=True)
            return
        self.columns, self.read = list(kept[0]), True
        with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(kept)

    def add(self, row: Mapping[str, object]) -> None:
        """Append a row and flush it; the first one fixes the columns.

        A file that was read and has others, which only damage explains, begins anew.

        Raises:
            ValueError: The row has other columns.
        """
        if self.read and list(row) != self.columns:
            LOG.warning("%s has other columns than it must have and begins anew", self.path)
            self.path.unlink()
            self.columns = []
        self.read = False
        if not self.columns:
            self.columns = list(row)
        elif list(row) != self.columns:
            raise ValueError(f"{self.path.name}: columns must be {self.columns}, got {list(row)}")
        new = not self.path.is_file()
        with room_for(self.path), self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            if new:
                writer.writeheader()
            writer.writerow(row)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file of ``Table``; what is no row of numbers, as after a crash, is left out."""
    text = path.read_text(encoding="utf-8", errors="replace").replace("\0", "?")
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    whole = [row for row in rows if None not in row.values() and None not in row]
    return [row for row in whole if all(map(_is_number, row.values()))]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class Records:
    """CSV and TensorBoard of one stage; a disabled one (other ranks) ignores everything."""

    def __init__(
        self,
        folder: Path,
        resume_step: int | None,
        *,
        enabled: bool,
        epochs_file: str = "epochs.csv",
    ) -> None:
        self.folder, self.enabled = folder, enabled
        if not enabled:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.steps = Table(folder / STEPS, resume_step)
        self.epochs = Table(folder / epochs_file, resume_step)
        self.board = EventFile(
            folder / "tensorboard",
            purge_step=None if resume_step is None else resume_step + 1,
        )

    @property
    def files(self) -> tuple[Path, ...]:
        """The CSV files."""
        return (self.steps.path, self.epochs.path) if self.enabled else ()

    def step(self, row: Mapping[str, float | int]) -> None:
        """A row of training values; it has ``step``."""
        self._add(self.steps, "train", row) if self.enabled else None

    def epoch(self, row: Mapping[str, float | int]) -> None:
        """A row of held-out values after an epoch; it has ``step``."""
        self._add(self.epochs, "held_out", row) if self.enabled else None

    def _add(self, table: Table, group: str, row: Mapping[str, float | int]) -> None:
        table.add({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        for name, value in row.items():
            if name != "step":
                self.board.add_scalar(f"{group}/{name}", value, int(row["step"]))

    def close(self) -> None:
        """Close the file for TensorBoard."""
        if self.enabled:
            self.board.close()
