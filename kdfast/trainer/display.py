# SPDX-License-Identifier: Apache-2.0
"""Progress of a training: one bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from kdfast.trainer.logs import FILE_ONLY, LOG

# A line of the log appears at most this often, so that it stays readable.
QUIET_SECONDS = 10.0
# Columns of a terminal that the bar itself takes at least.
LEAST_BAR = 6
# Longest title; a longer one would leave no room for the values.
TITLE = 14


class Display:
    """Shows how far a training is, with its loss, one held-out metric and the memory.

    On a terminal that is one bar as wide as the terminal, which stays below the lines of the log.
    The log gets a line with all values at most every ``QUIET_SECONDS``; where there is no bar, so
    does the standard output.

    Attributes:
        bar: What draws; None without a terminal.
    """

    def __init__(self, title: str, total: int, start: int, *, enabled: bool) -> None:
        """Begin.

        Args:
            title: Name of the training.
            total: Steps at its end.
            start: Steps that are done.
            enabled: False on other processes than the first: nothing is shown.
        """
        self.title, self.total, self.enabled = title, total, enabled
        self.done = self.first = start
        self.began = self.printed = time.monotonic()
        self.values: dict[str, float] = {}
        self.metric: tuple[str, float] | None = None
        self.bar: Progress | None = None
        if enabled and sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
            self._open()

    def _open(self) -> None:
        def column(text: str) -> TextColumn:
            return TextColumn(text, markup=False, table_column=Column(no_wrap=True))

        self.console = Console()
        self.bar = Progress(
            column("{task.description}"),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=LEAST_BAR)),
            column("{task.completed}/{task.total}"),
            column("{task.fields[text]}"),
            console=self.console,
            expand=True,
        )
        self.bar.start()
        self.task = self.bar.add_task(
            self.title[:TITLE], total=self.total, completed=self.done, text=""
        )

    def update(self, step: int, values: Mapping[str, float] | None) -> None:
        """Show that a step is done.

        Args:
            step: Steps that are done.
            values: Those of the row of the log that it ended, the loss first; None: it ended none.
        """
        if not self.enabled:
            return
        self.done = step
        if values is not None:
            self.values = dict(values)
        self._draw()
        now = time.monotonic()
        if values is None or not (now - self.printed >= QUIET_SECONDS or step in (1, self.total)):
            return
        self.printed = now
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        extra = FILE_ONLY if self.bar is not None else None
        LOG.info(
            *("%s %d/%d  eta %s  %s", self.title, step, self.total, self.eta(), text), extra=extra
        )

    def held_out(self, name: str, value: float) -> None:
        """Show a held-out metric from now on."""
        self.metric = (name, value)
        if self.enabled:
            self._draw()

    def eta(self) -> str:
        """Time that the steps that are left will take; "?" before the first one."""
        rate = (self.done - self.first) / max(time.monotonic() - self.began, 1e-9)
        return duration((self.total - self.done) / rate) if rate else "?"

    def _draw(self) -> None:
        if self.bar is None:
            return
        # Title, bar and count, each with a blank behind it.
        taken = len(self.title[:TITLE]) + LEAST_BAR + 2 * len(str(self.total)) + 1 + 3
        text = fitting(self._pieces(), self.console.width - taken)
        self.bar.update(self.task, completed=self.done, text=text)

    def _pieces(self) -> list[str]:
        """What the bar says, the most important first."""
        pieces = [f"eta {self.eta()}"]
        if self.values:
            pieces.append(f"loss {next(iter(self.values.values())):.4g}")
        if self.metric is not None:
            pieces.append(f"{_short(self.metric[0])} {self.metric[1]:.4g}")
        if memory := self.values.get("memory_mib"):
            pieces.append(f"{memory:.0f} MiB" if memory < 9999.5 else f"{memory / 1024:.1f} GiB")
        return pieces

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.bar is not None:
            self.bar.stop()


def _short(name: str) -> str:
    """Name of a metric for the bar, as logs of other trainers have it."""
    return name.replace("accuracy", "acc").replace("_", " ")


def fitting(pieces: Sequence[str], width: int) -> str:
    """As many of the pieces, from the first on, as fit into a width."""
    text = ""
    for piece in pieces:
        longer = f"{text}  {piece}" if text else piece
        if len(longer) > width:
            break
        text = longer
    return text


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
