# SPDX-License-Identifier: Apache-2.0
"""What a terminal, a pipe and train.log get to see of a training."""

import io
import logging
import re
import sys
from pathlib import Path

import pytest
from rich.table import Table

from kdfast.trainer import display
from kdfast.trainer.display import Display, duration, fitting
from kdfast.trainer.logs import FILE_ONLY, LOG, close_log, open_log
from kdfast.trainer.tables import plain_text

VALUES = {"total": 0.123456, "task": 2.5, "time": 0.25, "data_time": 0.125, "memory_mib": 993.4}
CODES = re.compile(r"\x1b\[[?\d;]*[A-Za-z]")


class Terminal(io.StringIO):
    """Standard output that says that somebody looks at it."""

    def isatty(self) -> bool:
        """It does."""
        return True


def terminal_of(monkeypatch: pytest.MonkeyPatch, columns: int = 80) -> Terminal:
    """Standard output from now on. No fixture: pytest sets its own between those and the test."""
    made = Terminal()
    monkeypatch.setattr(sys, "stdout", made)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    return made


def shown(terminal: Terminal) -> list[str]:
    """Everything that was drawn, frame by frame."""
    frames = re.split(r"[\r\n]+|\x1b\[2K", terminal.getvalue())
    return [text for frame in frames if (text := CODES.sub("", frame).strip())]


@pytest.mark.parametrize("total", [24, 1234567])
def test_a_bar_fits_80_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, total: int) -> None:
    terminal = terminal_of(monkeypatch)
    open_log(tmp_path)
    bar = Display("distil", total, 0, enabled=True)
    bar.update(1, VALUES)
    bar.held_out("val_accuracy", 15.642)
    LOG.info("an epoch is over")
    bar.update(total, VALUES)
    bar.close()
    close_log()
    frames = shown(terminal)
    assert all(len(frame) <= 80 for frame in frames)
    last = frames[-1]
    assert last.startswith("distil ") and f"{total}/{total} eta 0:00:00  loss 0.1235" in last
    assert "val acc 15.64  993 MiB" in last
    # The line of the log stands above the bar; those with all values are for the file.
    assert sum("an epoch is over" in frame for frame in frames) == 1
    assert not any("data_time" in frame for frame in frames)
    log = (tmp_path / "train.log").read_text()
    assert "\x1b" not in log and "\r" not in log
    assert f"distil {total}/{total}  eta 0:00:00  total 0.1235  task 2.5  time 0.25" in log


def test_a_narrow_terminal_gets_what_matters_most(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch, 50)
    bar = Display("a name that takes all of the room", 100, 0, enabled=True)
    bar.update(7, VALUES)
    bar.close()
    frames = shown(terminal)
    assert all(len(frame) <= 50 for frame in frames)
    assert "a name that ta " in frames[-1] and " 7/100 eta " in frames[-1]
    assert "MiB" not in frames[-1]


def test_a_pipe_gets_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    open_log(tmp_path)
    lines = Display("distil", 30, 0, enabled=True)
    for step in range(1, 31):
        lines.update(step, VALUES if step % 10 == 0 or step == 1 else None)
    LOG.info("for the file", extra=FILE_ONLY)
    lines.close()
    close_log()
    out = capsys.readouterr().out
    assert [line.split()[2] for line in out.splitlines()] == ["1/30", "30/30"]
    assert "data_time 0.125" in out and "\x1b" not in out
    assert "for the file" in (tmp_path / "train.log").read_text()


def test_other_processes_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Display("distil", 30, 0, enabled=False)
    bar.update(1, VALUES)
    bar.held_out("mIoU", 0.5)
    bar.close()
    assert capsys.readouterr().out == ""


def test_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    bar = Display("distil", 110, 10, enabled=True)
    assert bar.eta() == "?"
    now[0] += 50.0
    bar.update(35, None)
    assert bar.eta() == duration(150) == "0:02:30"
    assert fitting(["eta 1", "loss 2", "mIoU 3"], 13) == "eta 1  loss 2"
    assert fitting(["eta 1"], 3) == ""


def test_log_goes_to_the_output_of_the_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_log(tmp_path)
    other = io.StringIO()
    monkeypatch.setattr(sys, "stdout", other)
    LOG.log(logging.WARNING, "here")
    close_log()
    assert other.getvalue().endswith(" here\n")


def test_tables_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    monkeypatch.setenv("FORCE_COLOR", "1")
    table = Table("a name", "value", title="title")
    table.add_row("x" * 100, "1.5")
    text = plain_text(table)
    assert "\x1b" not in text and max(map(len, text.splitlines())) <= 80
    assert terminal.getvalue() == ""
