# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.speedups``: draws docs/images/speedups.png from the committed result files.

One dot is one comparison of the machine that README.md shows: how many times faster kdfast is than
the best other implementation.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.documents import SHOWN, Machine, machines, rated
from bench.gpu_tables import ROOT
from bench.rows import facts_line

PICTURE = ROOT / "docs" / "images" / "speedups.png"
# What a reader calls the rows of a result file.
TITLES = {
    "accelerate": "whole models, accelerate()",
    "EVA-ViT-L": "ORION's backbone",
    "lengths": "attention, 64 to 3136 tokens",
}
FASTER, SLOWER, MEDIAN = "tab:blue", "tab:red", "black"


def draw(machine: Machine, path: Path) -> None:
    """Draws the ratio of every comparison, one row of dots per op, the highest median on top."""
    ratios = rated(machine)
    order = sorted(ratios, key=lambda op: statistics.median(ratios[op]))
    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    for y, op in enumerate(order):
        values, median = ratios[op], statistics.median(ratios[op])
        axis.plot([min(values), max(values)], [y, y], color="lightgray", linewidth=2, zorder=1)
        colours = [FASTER if value >= 1 else SLOWER for value in values]
        axis.scatter(values, [y] * len(values), c=colours, s=22, alpha=0.55, linewidths=0, zorder=2)
        axis.plot([median], [y], "|", color=MEDIAN, markersize=16, markeredgewidth=2.5, zorder=3)
        axis.text(1.02, y, f"{median:.2f}x", transform=axis.get_yaxis_transform(), va="center")
    axis.text(1.02, len(order) - 0.35, "median", transform=axis.get_yaxis_transform())
    axis.axvline(1, color=MEDIAN, linewidth=1)
    names = [f"{TITLES.get(op, op)} ({len(ratios[op])})" for op in order]
    axis.set_yticks(range(len(order)), names)
    ticks = [0.8, 1, 1.5, 2, 3, 4, 5, 7]
    axis.set(xscale="log", ylim=(-0.6, len(order) - 0.4))
    axis.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.set_xlabel("time of the fastest other code over kdfast's")
    axis.grid(True, axis="x", alpha=0.3)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    dots = [
        plt.Line2D([], [], marker="o", linestyle="", color=FASTER, label="a case that is faster"),
        plt.Line2D([], [], marker="o", linestyle="", color=SLOWER, label="a case that is slower"),
        plt.Line2D(
            [], [], marker="|", linestyle="", color=MEDIAN, markersize=12, label="median of the op"
        ),
    ]
    axis.legend(handles=dots, loc="lower right", frameon=False)
    figure.suptitle("kdfast against the fastest other code, case by case", fontsize=12)
    axis.set_title(facts_line(machine.ops["machine"]), fontsize=8, color="dimgray")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main(argv: Sequence[str]) -> int:
    """Draws the picture of README.md again."""
    parser = argparse.ArgumentParser(prog="python -m bench.speedups", description=__doc__)
    parser.add_argument("--out", type=Path, default=PICTURE, help="the PNG to write")
    out = parser.parse_args(argv).out
    draw(machines()[SHOWN], out)
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
