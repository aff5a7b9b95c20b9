# SPDX-License-Identifier: Apache-2.0
"""The tables that ``python -m kdfast.prune`` prints."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kdfast.pruning.compensate import SiteError
from kdfast.pruning.latency import Latency
from kdfast.pruning.latency_goal import Outcome
from kdfast.pruning.report import PruningReport

if TYPE_CHECKING:
    from rich.table import Table


def _table(title: str, columns: Sequence[str]) -> "Table":
    """An empty table whose first column is text and whose others are numbers."""
    from rich.table import Table

    table = Table(title=title)
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left")
    return table


def site_errors(errors: Sequence[SiteError]) -> "Table":
    """What pruning does to the output of every site, without and with compensation."""
    title = "error of a site's output, as a share of its variance"
    table = _table(title, ("site", "kept", "cut", "compensated"))
    for name, kept, of, before, after in errors:
        table.add_row(name, f"{kept} of {of}", f"{before:.4f}", f"{after:.4f}")
    return table


def costs(
    report: PruningReport, latency: Mapping[str, Latency], name: str, params: int, images: str
) -> "Table":
    """What pruning saves.

    Args:
        report: Counts.
        latency: Result of ``latencies``.
        name: The model's name.
        params: Parameters of the pruned model.
        images: What the times are of, in words.
    """
    before, after = report.full, report.pruned[0]
    table = _table(f"{name}, {images}", ("", "before", "after", "ratio"))

    def row(name: str, old: float, new: float, form: str) -> None:
        ratio = f"{old / new:.2f}x" if new else ""
        table.add_row(name, format(old, form), format(new, form), ratio)

    row("heads", before.heads, after.heads, ",")
    row("parameters", before.params, params, ",")
    row("GMAC", before.flops / 2e9, after.flops / 2e9, ".3f")
    pruned = latency["pruned, fused"]
    for label, value in latency.items():
        if value is not pruned:
            row(f"ms, {label}", value.ms, pruned.ms, ".2f")
    return table


def outcome(result: Outcome) -> "Table":
    """Predicted and measured latency."""
    table = _table("latency, both accelerated", ("", "predicted", "measured", "deviation"))
    for label, predicted, measured, form in (
        ("dense, ms", result.table.dense_ms, result.dense.ms, ".2f"),
        ("pruned, ms", result.predicted_ms, result.pruned.ms, ".2f"),
        ("speedup", result.predicted_speedup, result.speedup, ".2f"),
    ):
        change = measured / predicted - 1
        table.add_row(label, format(predicted, form), format(measured, form), f"{change:+.1%}")
    return table
