# SPDX-License-Identifier: Apache-2.0
"""The table of the result file."""

from __future__ import annotations

from typing import Any

HEADER = (
    "model",
    "Pearson",
    "error",
    "IoU",
    "token cosine",
    "heads",
    "GMACs",
    "core minutes",
    "ms",
    "accelerated",
)


def table(content: dict[str, Any]) -> str:
    """One row a model.

    Args:
        content: The result file.
    """
    (run,) = content["runs"].values()
    lines = [f"| {' | '.join(HEADER)} |", f"|{' --- |' * len(HEADER)}"]
    for name, row in run["rows"].items():
        took = run["times"].get(name, {})
        cells = [
            name,
            *(f"{row[key]:.3f}" for key in ("pearson", "error", "iou", "cosine")),
            str(row["heads"]),
            f"{row['macs'] / 1e9:.2f}",
            f"{row['cpu_s'] / 60:.0f}" if "cpu_s" in row else "",
            *(f"{took[kind]['ms']:.0f}" if took else "" for kind in ("plain", "accelerated")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
