# SPDX-License-Identifier: Apache-2.0
"""The end of a chain: all links in one table, file and picture, over the seeds."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from kdfast.chain.plots import draw_comparison
from kdfast.machine.facts import machine_facts
from kdfast.machine.files import replacing, write_text
from kdfast.trainer.tables import plain_text

VALUES = ("test_accuracy", "test_f1_score", "test_auc", "val_accuracy", "seconds", "peak_mib")


def compare(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each role, in the order of the results.

    Args:
        results: Summaries of links: ``role``, ``model``, ``params``, ``seed`` and ``VALUES``.

    Returns:
        Rows with ``seeds``, ``values`` (a list for each name, one entry a seed), ``mean`` and
        ``spread`` (sample standard deviation; None with one seed).
    """
    rows: list[dict[str, Any]] = []
    for role in dict.fromkeys(result["role"] for result in results):
        mine = [result for result in results if result["role"] == role]
        values = {name: [float(result[name]) for result in mine] for name in VALUES}
        rows.append(
            {
                "role": role,
                "model": mine[0]["model"],
                "params": mine[0]["params"],
                "seeds": [result["seed"] for result in mine],
                "values": values,
                "mean": {name: statistics.fmean(x) for name, x in values.items()},
                "spread": {name: _deviation(x) for name, x in values.items()},
            }
        )
    return rows


def _deviation(values: Sequence[float]) -> float | None:
    """Sample standard deviation; None of one value, NaN where one is not defined."""
    if len(values) < 2:
        return None
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def gain(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What distillation brought the student over its twin; None without a twin.

    Returns:
        ``margin`` of the mean test accuracies, the larger ``spread`` of the two, and whether the
        former exceeds the latter (None with one seed).
    """
    by_role = {row["role"]: row for row in rows}
    if not {"student", "student_ce"} <= by_role.keys():
        return None
    student, twin = by_role["student"], by_role["student_ce"]
    margin = student["mean"]["test_accuracy"] - twin["mean"]["test_accuracy"]
    spreads = [row["spread"]["test_accuracy"] for row in (student, twin)]
    known = [spread for spread in spreads if spread is not None]
    spread = max(known) if known else None
    return {
        "margin": margin,
        "spread": spread,
        "beats": None if spread is None else margin > spread,
    }


def write_comparison(
    root: Path, results: Sequence[Mapping[str, Any]], name: str, facts: Mapping[str, Any]
) -> tuple[str, dict[str, Path]]:
    """Write ``comparison.{csv,json,png,txt}`` of the links that are done.

    Args:
        root: Folder of the chain's run.
        results: As in ``compare``.
        name: Name of the data.
        facts: Further content of the JSON file.

    Returns:
        The text for the terminal, and the files by kind.
    """
    rows = compare(results)
    paths = {kind: root / f"comparison.{kind}" for kind in ("csv", "json", "png", "txt")}
    better = gain(rows)
    content = {
        **facts,
        "machine": machine_facts(),
        "links": rows,
        "gain": better,
    }
    write_text(paths["json"], json.dumps(content, indent=1) + "\n")
    with (
        replacing(paths["csv"]) as partial,
        partial.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["role", "model", "params", "seed", *VALUES])
        for row in rows:
            for i, seed in enumerate(row["seeds"]):
                numbers = [f"{row['values'][value][i]:.6g}" for value in VALUES]
                writer.writerow([row["role"], row["model"], row["params"], seed, *numbers])
    draw_comparison(rows, paths["png"], f"{name}, test images")
    text = _text(rows, name, better)
    write_text(paths["txt"], text + "\n")
    return text, paths


def _text(rows: Sequence[Mapping[str, Any]], name: str, better: dict[str, Any] | None) -> str:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head in ("link", "model", "params", "accuracy %", "macro F1 %", "AUC %"):
        left = head in ("link", "model")
        # A name of a model may be long; a number is never broken.
        table.add_column(
            head, justify="left" if left else "right", no_wrap=head != "model", overflow="fold"
        )
    for row in rows:
        cells = [spread_of(row, value) for value in ("test_accuracy", "test_f1_score")]
        cells.append(_number(row["mean"]["test_auc"]))
        table.add_row(row["role"], row["model"], f"{row['params'] / 1e6:.2f}M", *cells)
    text = f"{name}, test images, {_over(rows)}\n\n{plain_text(table)}"
    if better is not None:
        spread = "" if better["spread"] is None else f", larger spread {better['spread']:.2f}"
        text += (
            f"\n\nstudent with distillation minus its twin without: {better['margin']:+.2f} points "
            f"of\ntest accuracy{spread}"
        )
    return text


def _over(rows: Sequence[Mapping[str, Any]]) -> str:
    """What stands behind the numbers, in words."""
    counts = sorted({len(row["seeds"]) for row in rows})
    if counts == [1]:
        return "one seed"
    return f"mean ± spread over {' or '.join(map(str, counts))} seeds"


def spread_of(row: Mapping[str, Any], name: str) -> str:
    """A value of a row as text, with its spread where there are several seeds."""
    mean, spread = row["mean"][name], row["spread"][name]
    if spread is None or math.isnan(mean):
        return _number(mean)
    return f"{_number(mean)} ± {_number(spread)}"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"
