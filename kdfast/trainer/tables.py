# SPDX-License-Identifier: Apache-2.0
"""Tables as text: for a terminal, a log and a file alike."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table

# Columns of an ordinary terminal.
WIDTH = 80


def plain_text(table: Table, width: int = WIDTH) -> str:
    """A table without colours or other codes, also where the output is a terminal.

    Args:
        table: What is written; cells that do not fit are broken into lines.
        width: Columns at most.
    """
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().strip("\n").splitlines())
