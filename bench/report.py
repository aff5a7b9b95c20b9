# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.report FILE``: a Markdown table of a result file, slower rows included."""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kdfast.machine.timing import FEW

OURS = "kdfast"
RIVALS = (
    *("eager", "sdpa", "compile", "flex", "flash-attn", "index_select"),
    *("eager fp32", "sdpa fp32", "compile fp32"),  # beside the same in a lower precision
)


def best_other(rows: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest rival among the rows of a comparison, or None if it has no rival."""
    rivals = (row for row in rows if row["candidate"] in RIVALS)
    return min(rivals, key=lambda row: row["ms"], default=None)


def table(results: dict[str, Any]) -> str:
    """One line per comparison: our time, the best other one, the ratio, the share of the limit.

    Candidates whose name starts with "kdfast" are ours; those that are no rival but a yardstick
    (native heads, attention alone) stay in the file only. Every time and ratio is that of the fast
    samples and, in parentheses, that of all.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in results["rows"]:
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
        best_all = min(r["ms_all"] for r in rows if r["candidate"] in RIVALS)
        share = "" if ours["limit_share"] is None else f"{100 * ours['limit_share']:.0f} %"
        lines.append(
            f"| {op} | {case.replace('torch.', '')} | {both(ours)} | {best['candidate']} | "
            f"{both(best)} | {best['ms'] / ours['ms']:.2f} ({best_all / ours['ms_all']:.2f}) | "
            f"{share} | {gate(ours, best)} |"
        )
    return "\n".join(lines)


def both(row: dict[str, Any]) -> str:
    """Medians of the fast and of all samples."""
    return f"{row['ms']:.2f} ({row['ms_all']:.2f})"


def gate(*rows: dict[str, Any]) -> str:
    """Fast samples out of all, and a warning where they are too few for a median of their own."""
    if any("fast" not in row for row in rows):
        return ""  # a file of before the calibration loops
    counts = " and ".join(f"{row['fast']}/{row['samples']}" for row in rows)
    return f"{counts}, too few" if min(row["fast"] for row in rows) < FEW else counts


def headline(results: dict[str, Any]) -> str:
    """Machine, versions and commit of the rows, as one line."""
    m = results["machine"]
    changes = " with changes" if m["dirty"] else ""
    return (
        f"{m['gpu'] or m['cpu']}, {m['isa']}, {m['threads']} threads, torch {m['torch']}, "
        f"commit {m['commit']}{changes}, {m['date']}"
    )


def read(parser: argparse.ArgumentParser, path: Path) -> dict[str, Any]:
    """A result file; ends the command ``parser`` belongs to where there is none."""
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        parser.error(f"{path}: must be a result file: {error}")
    return results


def main(argv: Sequence[str]) -> int:
    """Prints the table of the file named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("file", type=Path, help="what `pytest bench --save FILE` wrote")
    results = read(parser, parser.parse_args(argv).file)
    print(headline(results), table(results), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
