# SPDX-License-Identifier: Apache-2.0
"""The table of the result file."""

from __future__ import annotations

import statistics
from typing import Any


def table(content: dict[str, Any]) -> str:
    """One row a model; means over the seeds, with the lowest and the highest where there are more.

    Args:
        content: The result file.
    """
    seeds = [run["rows"] for run in content["runs"].values()]
    lines = [
        "| model | accuracy, % | of the dense one's, % | parameters | MACs | core minutes |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in seeds[0]:
        rows = [seed[name] for seed in seeds]
        share = [100 * s[name]["accuracy"] / s["dense"]["accuracy"] for s in seeds]
        cpu = [row["cpu_s"] / 60 for row in rows if "cpu_s" in row]
        cells = [
            name,
            _span([100 * row["accuracy"] for row in rows]),
            _span(share),
            f"{statistics.mean(row['parameters'] for row in rows) / 1e6:.2f} M",
            f"{statistics.mean(row['macs'] for row in rows) / 1e6:.1f} M",
            f"{statistics.mean(cpu):.0f}" if cpu else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _span(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.1f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.1f} to {max(values):.1f})"
