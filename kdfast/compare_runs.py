# SPDX-License-Identifier: Apache-2.0
"""``python -m kdfast.compare_runs``: one table over the models of several finished runs."""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

from rich import box
from rich.table import Table

from kdfast.commandline.compare_runs import parser
from kdfast.machine.files import write_text
from kdfast.trainer.finished import RunModel, read_run
from kdfast.trainer.tables import plain_text

HEADS = ("run", "data", "model", "params", "metric", "quality", "train s", "ms")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table.

    Returns:
        0; 1 if the file cannot be written; 2 if a folder is not that of a finished run.
    """
    args = parser().parse_args(argv)
    try:
        runs = {folder: read_run(folder) for folder in args.runs}
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    names = Counter(found[0].run for found in runs.values() if found)
    rows = [
        # Runs of one name are told apart by what was typed.
        replace(row, run=str(folder)) if names[row.run] > 1 else row
        for folder, found in runs.items()
        for row in found
    ]
    print(plain_text(table(rows)))
    try:
        save(rows, args)
    except OSError as error:
        print(f"error: --out: {error}", file=sys.stderr)
        return 1
    return 0


def table(rows: Sequence[RunModel]) -> Table:
    """The models by run; times are those of the machine of each run, and compare within it."""
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head in HEADS:
        words = head in ("run", "data", "model", "metric")
        made.add_column(head, justify="left" if words else "right", overflow="fold")
    # In a narrow terminal a model's name goes below its role, in one piece.
    made.columns[HEADS.index("model")].min_width = max(
        (len(row.model or row.role) for row in rows), default=0
    )
    before = ""
    for row in rows:
        quality = f"{row.quality:.4f}" + ("" if row.spread is None else f" ± {row.spread:.4f}")
        again = row.run == before
        made.add_row(
            *("" if again else row.run, "" if again else row.data),
            f"{row.role}: {row.model}" if row.model else row.role,
            *(f"{row.params:,}", row.metric, quality),
            "" if row.seconds is None else f"{row.seconds:,.0f}",
            "" if row.ms is None else f"{row.ms:.2f}",
        )
        before = row.run
    return made


def save(rows: Sequence[RunModel], args: argparse.Namespace) -> None:
    """Write the table to ``--out``, if there is one."""
    path: Path | None = args.out
    if path is None:
        return
    if path.suffix == ".json":
        text = json.dumps([asdict(row) for row in rows], indent=1) + "\n"
    else:
        file = io.StringIO()
        writer = csv.DictWriter(file, [field.name for field in fields(RunModel)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
        text = file.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
