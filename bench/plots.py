# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.plots FILE PNG``: time and memory of attention over the number of tokens."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.report import found
from bench.rows import facts_line

COLOURS = {"kdfast": "tab:red", "eager": "tab:gray", "sdpa": "tab:blue"}


def lengths(results: dict[str, Any], path: Path) -> None:
    """Draws the rows of bench_lengths: milliseconds, and extra memory at the peak, against N.

    Raises:
        ValueError: The file has no such rows.
    """
    rows = [row for row in results["rows"] if row["op"] == "lengths"]
    if not rows:
        raise ValueError("the result file must have rows of bench_lengths.py, got none")
    # "fwd+bwd 1x8x1600 bfloat16"
    what = rows[0]["case"].split()
    batch_heads = what[1].rpartition("x")[0]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    panels = (("ms", 1.0, "time, ms"), ("peak_bytes", 2.0**20, "extra memory at the peak, MiB"))
    for axis, (key, unit, label) in zip(axes, panels, strict=True):
        for name, colour in COLOURS.items():
            points = sorted(
                (int(row["case"].split()[1].rpartition("x")[2]), row[key] / unit)
                for row in rows
                if row["candidate"] == name
            )
            axis.plot(*zip(*points, strict=True), "o-", color=colour, label=name)
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        ticks = sorted({int(row["case"].split()[1].rpartition("x")[2]) for row in rows})
        axis.set_xticks(ticks, [str(n) for n in ticks], minor=False)
        axis.set_xticks([], minor=True)
        axis.grid(True, which="major", alpha=0.3)
        axis.legend()
    title = f"attention, forward and backward, {batch_heads}xN, head dim 64, {what[2]}"
    figure.suptitle(f"{title}\n{facts_line(results['machine'])}", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str]) -> int:
    """Draws the rows of bench_lengths in the file named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.plots", description=__doc__)
    parser.add_argument("file", type=Path, help="a result file, or a run's")
    parser.add_argument("picture", type=Path, help="where to draw, a PNG")
    options = parser.parse_args(argv)
    try:
        lengths(found(parser, options.file), options.picture)
    except ValueError as error:
        parser.error(f"{options.file}: {error}")
    print(options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
