# SPDX-License-Identifier: Apache-2.0
"""A file of scalars for TensorBoard, written at once.

``SummaryWriter`` writes in a thread, which dies with a traceback of its own on a full disk.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import scalar

from kdfast.machine.disk import room_for


class EventFile:
    """Scalars of a run; a new file each time that the run goes on."""

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        """Begin a file.

        Args:
            folder: It is made if missing.
            purge_step: TensorBoard forgets what earlier files have from this step on.

        Raises:
            DiskFull: There is no room for it; so do the methods.
        """
        folder.mkdir(parents=True, exist_ok=True)
        # The names that TensorBoard looks for; the time keeps those of one run apart.
        moment = f"{time.time_ns():020d}"
        self.path = folder / f"events.out.tfevents.{moment}.{socket.gethostname()}.{os.getpid()}"
        self._file = self.path.open("ab")
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        if purge_step is not None:
            self._write(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def add_scalar(self, name: str, value: Any, step: int) -> None:
        """Append a value."""
        self._write(step=step, summary=scalar(name, value))

    def _write(self, **content: Any) -> None:
        with room_for(self.path):
            self._records.write(Event(wall_time=time.time(), **content).SerializeToString())
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        with room_for(self.path):
            self._file.close()
