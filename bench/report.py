# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.report FILE``: a Markdown table of a run, slower rows included.

FILE is what ``pytest bench --benchmark-json=FILE`` wrote, or a result file of bench/results.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.rows import facts_line, read
from kdfast.machine.timing import FEW

OURS = "kdfast"


def is_rival(row: dict[str, Any]) -> bool:
    """Whether other code did the work of the case; yardsticks did other work."""
    return not (row.get("yardstick") or row["candidate"].startswith(OURS))


def best_other(rows: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest rival among the rows of a comparison, or None if it has no rival."""
    return min(filter(is_rival, rows), key=lambda row: row["ms"], default=None)


def table(every: Iterable[dict[str, Any]]) -> str:
    """One line per comparison: our time, the best other one, the ratio, the share of the limit.

    Candidates whose name starts with "kdfast" are ours; yardsticks (native heads, attention alone)
    stay in the file only. Every time and ratio is that of the fast samples and, in parentheses,
    that of all.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in every:
        groups.setdefault((row["op"], row["case"]), []).append(row)
    lines = [
        "| op | case | kdfast ms (all) | best other | ms (all) | ratio (all) | of limit | fast |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (op, case), rows in groups.items():
        ours = next((r for r in rows if r["candidate"] == OURS), None)
        best = best_other(rows)
        if ours is None or best is None:
            continue
        best_all = min(r["ms_all"] for r in rows if is_rival(r))
        share = f"{100 * ours['limit_share']:.0f} %" if "limit_share" in ours else ""
        lines.append(
            f"| {op} | {case} | {both(ours)} | {best['candidate']} | "
            f"{both(best)} | {best['ms'] / ours['ms']:.2f} ({best_all / ours['ms_all']:.2f}) | "
            f"{share} | {gate(ours, best)} |"
        )
    return "\n".join(lines)


def both(row: dict[str, Any]) -> str:
    """Medians of the fast and of all samples."""
    return f"{row['ms']:.2f} ({row['ms_all']:.2f})"


def gate(*rows: dict[str, Any]) -> str:
    """Fast samples out of all, and a warning where they are too few for a median of their own."""
    counts = " and ".join(f"{row['fast']}/{row['samples']}" for row in rows)
    return f"{counts}, too few" if min(row["fast"] for row in rows) < FEW else counts


def found(parser: argparse.ArgumentParser, path: Path) -> dict[str, Any]:
    """A result file; ends the command ``parser`` belongs to where there is none."""
    try:
        return read(path)
    except (OSError, ValueError) as error:
        parser.error(f"{path}: must be a result file: {error}")


def main(argv: Sequence[str]) -> int:
    """Prints the table of the file named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("file", type=Path, help="a result file, or a run's")
    results = found(parser, parser.parse_args(argv).file)
    print(facts_line(results["machine"]), table(results["rows"]), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
