# SPDX-License-Identifier: Apache-2.0
"""The table of a comparison, and what it says in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdfast.rivals.results import Row

MIB = 2**20
# Answers that are closer to the original's than this count as the same model.
CLOSE = 0.99
# With a smaller share of calls on a quiet machine the times are called rough.
QUIET = 0.8
COLUMNS = (
    "median\nms",
    "p95\nms",
    "images\nper s",
    "times\neager",
    "file\nMiB",
    "memory\nMiB",
    "cosine",
    "top-1",
)


def table(rows: Sequence[Row]) -> Any:
    """A rich table, one section for each model and one row for each candidate."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    made.add_column("run by", no_wrap=True)
    for name in COLUMNS:
        made.add_column(name, justify="right", no_wrap=True)
    base = eager_ms(rows)
    for model in models(rows):
        own = [row for row in rows if row.model == model]
        best = min((row.ms for row in own if row.ms), default=0)
        made.add_row(f"[bold]{model} model")
        for row in own:
            cells = [
                _number(row.ms, 1),
                _number(row.p95_ms, 1),
                _number(row.images_per_second, 1),
                _number(base / row.ms if base and row.ms else None, 2),
                _number(row.file_bytes / MIB if row.file_bytes else None, 1),
                _number(row.memory_bytes / MIB if row.memory_bytes else None, 0),
                "-" if row.cosine is None else f"{row.cosine:.4f}",
                "-" if row.top1 is None else f"{row.top1:.0%}",
            ]
            style = "bold" if row.ms and row.ms == best else "" if row.ms else "dim"
            made.add_row(f" {row.name}", *cells, style=style)
    return made


def notes(rows: Sequence[Row]) -> list[str]:
    """Why rows are missing, how others ran, and whether the times can be relied on."""
    every = models(rows)
    found: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        if text := row.reason or row.note:
            found.setdefault(text, {}).setdefault(row.name, []).append(row.model)
    told = []
    for text, who in found.items():
        # Of both models, where a name stands alone.
        names = (n if some == every else f"{n} ({', '.join(some)})" for n, some in who.items())
        told.append(f"{', '.join(names)}: {text}")
    samples, quiet = sum(row.samples for row in rows), sum(row.quiet for row in rows)
    if quiet < QUIET * samples:
        told.append(
            f"other programs were running: only {quiet} of {samples} calls had the machine for "
            "themselves, so the times are rough"
        )
    return told


def lines(rows: Sequence[Row]) -> list[str]:
    """What the table says: the fastest, and whether int8 and bf16 are faster than fp32."""
    found = []
    base = eager_ms(rows)
    for model in models(rows):
        timed = [row for row in rows if row.model == model and row.ms]
        if not timed:
            continue
        best = min(timed, key=_ms)
        times = f", {base / _ms(best):.2f}x as fast as eager of the whole model" if base else ""
        found.append(f"{model}, fastest: {best.name}, {_ms(best):.1f} ms{times}")
        whole = min((r for r in timed if r.dtype == "fp32"), key=_ms, default=None)
        for dtype in ("bf16", "int8"):
            low = min((r for r in timed if r.dtype == dtype), key=_ms, default=None)
            if low is not None and whole is not None:
                found.append(f"{model}, {_verdict(low, whole)}")
    return found


def models(rows: Sequence[Row]) -> list[str]:
    """Names of the models, in their order."""
    return list(dict.fromkeys(row.model for row in rows))


def eager_ms(rows: Sequence[Row]) -> float | None:
    """Time of the whole model in eager fp32."""
    return next((r.ms for r in rows if (r.model, r.name) == ("whole", "eager") and r.ms), None)


def _verdict(low: Row, whole: Row) -> str:
    """Whether the fastest of a lower precision beats the fastest in fp32, and at which price."""
    ratio = _ms(whole) / _ms(low)
    faster = f"{ratio:.2f}x as fast" if ratio >= 1 else f"not faster ({ratio:.2f}x)"
    text = f"{low.dtype}: {low.name} is {faster} against the fastest fp32, {whole.name}"
    if low.model == "whole" and low.cosine is not None and low.cosine < CLOSE:
        text += f"; its answers differ (cosine {low.cosine:.3f})"
    return text


def _ms(row: Row) -> float:
    return row.ms or float("inf")


def _number(value: float | None, digits: int) -> str:
    """A value without the decimals that a terminal of 80 columns has no room for."""
    if value is None:
        return "-"
    room = max(0, 4 - len(str(int(value))))
    return f"{value:,.{min(digits, room)}f}"
