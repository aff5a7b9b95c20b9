# SPDX-License-Identifier: Apache-2.0
"""The tables that ``kdfast prune`` prints."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kdfast.pruning.compensate import SiteError
from kdfast.pruning.latency import Latency
from kdfast.pruning.latency_goal import Outcome
from kdfast.pruning.quality import Quality
from kdfast.pruning.report import PruningReport

if TYPE_CHECKING:
    from rich.table import Table


def empty_table(title: str, columns: Sequence[str]) -> "Table":
    """An empty table whose first column is text and whose others are numbers."""
    from rich.table import Table

    table = Table(title=title)
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left")
    return table


def site_errors(errors: Sequence[SiteError]) -> "Table":
    """What pruning does to the output of every site, without and with compensation."""
    title = "error of a site's output, as a share of its variance"
    table = empty_table(title, ("site", "kept", "cut", "compensated"))
    for name, kept, of, before, after in errors:
        table.add_row(name, f"{kept} of {of}", f"{before:.4f}", f"{after:.4f}")
    return table


def costs(
    report: PruningReport,
    latency: Mapping[str, Latency],
    name: str,
    params: int,
    images: str,
    file_bytes: tuple[int, int],
    quality: Quality | None,
) -> "Table":
    """What pruning saves, and what is left of the model's answers.

    Args:
        report: Counts.
        latency: Result of ``latencies``.
        name: The model's name.
        params: Parameters of the pruned model.
        images: What the times are of, in words.
        file_bytes: Of the weights on disk, before and after.
        quality: Of the pruned model; None where it was not measured.
    """
    before, after = report.full, report.pruned[0]
    table = empty_table(f"{name}, {images}", ("", "before", "after", "ratio"))

    def row(name: str, old: float, new: float, form: str) -> None:
        ratio = f"{old / new:.2f}x" if new else ""
        table.add_row(name, format(old, form), format(new, form), ratio)

    row("heads", before.heads, after.heads, ",")
    row("parameters", before.params, params, ",")
    row("MB on disk", file_bytes[0] / 1e6, file_bytes[1] / 1e6, ",.1f")
    row("GMACs", before.flops / 2e9, after.flops / 2e9, ".3f")
    pruned = latency["pruned, fused"]
    for label, value in latency.items():
        if value is not pruned:
            row(f"ms, {label}", value.ms, pruned.ms, ".2f")
    if quality is not None:
        _add_quality(table, quality)
    return table


def _add_quality(table: "Table", quality: Quality) -> None:
    if quality.accuracy is not None and quality.original is not None:
        lost = 100 * (quality.accuracy - quality.original)
        shares = (f"{100 * x:.1f} %" for x in (quality.original, quality.accuracy))
        table.add_row("top-1 accuracy", *shares, f"{lost:+.1f} points")
    if quality.agreement is not None:
        table.add_row("same class as before", "", f"{100 * quality.agreement:.1f} %", "")
    table.add_row("cosine with its output", "", f"{quality.cosine:.3f}", "")


def outcome(result: Outcome) -> "Table":
    """Predicted and measured latency."""
    table = empty_table("latency, both accelerated", ("", "predicted", "measured", "deviation"))
    for label, predicted, measured, form in (
        ("dense, ms", result.table.dense_ms, result.dense.ms, ".2f"),
        ("pruned, ms", result.predicted_ms, result.pruned.ms, ".2f"),
        ("speedup", result.predicted_speedup, result.speedup, ".2f"),
    ):
        change = measured / predicted - 1
        table.add_row(label, format(predicted, form), format(measured, form), f"{change:+.1%}")
    return table
