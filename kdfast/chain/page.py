# SPDX-License-Identifier: Apache-2.0
"""The page about a chain, made of the summaries and pictures of its links."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdfast.chain.compare import compare, gain, spread_of
from kdfast.configs import plain
from kdfast.configs.chain import ChainConfig
from kdfast.trainer.report_page import PAGE, Grid, Picture, Section, write_page

COLUMNS = {
    "accuracy %": "test_accuracy",
    "macro F1 %": "test_f1_score",
    "AUC %": "test_auc",
    "validation accuracy %": "val_accuracy",
    "seconds": "seconds",
    "peak MiB": "peak_mib",
}
# Pictures of a link by the end of their names, and what they show.
CAPTIONS = {
    "curves": "training and validation over the epochs",
    "confusion": "test images by true and predicted class",
    "rollout": "rollout of attention through all layers",
    "heads": "what each head of the last layer looks at",
}


def write_chain_page(
    root: Path, results: Sequence[Mapping[str, Any]], data: str, config: ChainConfig
) -> Path:
    """Write ``report.html`` of the links that are done.

    Args:
        root: Folder of the chain's run.
        results: Summaries of links, as ``compare`` takes them.
        data: Name of the data.
        config: The chain.
    """
    rows = compare(results)
    comparison = Picture(root / "comparison.png", "Links of the chain on the test images")
    sections = [Section("Links", grids=[_links(rows)], pictures=[comparison])]
    seen: set[str] = set()
    for result in results:
        # Seeds look alike: the first one of each link stands for all.
        if result["role"] not in seen:
            seen.add(result["role"])
            sections.append(_link(result, several=len(config.seeds) > 1))
    return write_page(
        root / PAGE,
        title=f"kdfast: {' -> '.join(config.chain)}",
        lead=_lead(rows, data),
        note=config.note,
        sections=sections,
        config=plain(config),
    )


def _links(rows: Sequence[Mapping[str, Any]]) -> Grid:
    cells = [
        (
            *(row["role"], row["model"], f"{row['params']:,}", str(len(row["seeds"]))),
            *(spread_of(row, name) for name in COLUMNS.values()),
        )
        for row in rows
    ]
    head = ("link", "model", "parameters", "seeds", *COLUMNS)
    several = any(len(row["seeds"]) > 1 for row in rows)
    return Grid(head, cells, "Mean ± sample standard deviation over the seeds." if several else "")


def _lead(rows: Sequence[Mapping[str, Any]], data: str) -> str:
    """The result in words."""
    last = next((row for row in rows if row["role"] == "student"), rows[-1])
    text = f"{data}: {last['role']} {spread_of(last, 'test_accuracy')} % of the test images right"
    others = [row for row in rows if row is not last]
    if others:
        text += ", " + ", ".join(
            f"{row['role']} {spread_of(row, 'test_accuracy')} %" for row in others
        )
    better = gain(rows)
    if better is None:
        return text + "."
    text += f". Distillation is worth {better['margin']:+.2f} points over the twin without it"
    if better["spread"] is None:
        return text + ", with one seed."
    return text + f"; the larger spread of the two is {better['spread']:.2f}."


def _link(result: Mapping[str, Any], *, several: bool) -> Section:
    folder = Path(result["folder"])
    found = sorted((folder / "visualizations").glob("*.png"), key=_order)
    size = f"{result['params'] / 1e6:.2f}M parameters"
    text = f"{result['model']}, {size}" + (f", seed {result['seed']}." if several else ".")
    pictures = [Picture(path, _caption(path)) for path in found]
    pictures.append(Picture(folder / "logs" / "curves.png", "losses and speed over the steps"))
    return Section(result["role"], text, pictures=pictures, folded=result["role"] != "student")


def _order(path: Path) -> tuple[int, str]:
    """Curves and confusion before pictures of single images."""
    return (path.stem.startswith("attention"), "" if path.stem == "curves" else path.name)


def _caption(path: Path) -> str:
    image, _, what = path.stem.rpartition("_")
    caption = CAPTIONS.get(what, path.stem)
    return f"{caption}, test image {image.removeprefix('attention')}" if image else caption
