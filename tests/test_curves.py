# SPDX-License-Identifier: Apache-2.0
"""The picture of a training: what is drawn from its CSV files, and what is marked."""

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from kdfast.trainer.curves import draw_curves
from kdfast.trainer.watch import Watch


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def job(folder: Path, watch: Watch | None = None) -> Any:
    return SimpleNamespace(
        title="distil", logs=folder, epochs_file="epochs.csv", watch=watch or Watch()
    )


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved."""
    seen: list[Figure] = []
    save = Figure.savefig

    def savefig(self: Figure, *args: Any, **kwargs: Any) -> None:
        seen.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return seen


def test_metric_epochs_and_alpha(tmp_path: Path, figures: list[Figure]) -> None:
    steps = [
        {"step": i, "epoch": 1 + i // 6, "total": 8271e2 + i / 100, "alpha": 0.8 if i < 6 else 0.6}
        for i in range(1, 12)
    ]
    write(tmp_path / "steps.csv", steps)
    write(tmp_path / "epochs.csv", [{"step": 5, "epoch": 1, "mIoU": 0.3, "loss": 2.0}])
    path = draw_curves(job(tmp_path))
    assert path == tmp_path / "curves.png"
    (figure,) = figures
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["held-out mIoU", "total (the loss)", "alpha"]
    for axes in figure.axes:
        assert not axes.yaxis.get_major_formatter().get_useOffset()
        # The end of the epoch, and the change of alpha there.
        marks = [line for line in axes.lines if list(line.get_ydata()) == [0, 1]]
        assert [line.get_xdata()[0] for line in marks] == [5, 5]
    assert "dotted red: alpha becomes 0.6" in figure.get_suptitle()
    pixels = np.asarray(Image.open(path).convert("L"))
    # No label is cut: the outermost pixels are white.
    assert all((edge == 255).all() for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))


def test_headline_of_a_watch(tmp_path: Path, figures: list[Figure]) -> None:
    write(tmp_path / "steps.csv", [{"step": 1, "epoch": 1, "total": 1.0}])
    write(tmp_path / "epochs.csv", [{"epoch": 1, "train_loss": 1.0, "val_auc": 90.0, "step": 1}])
    watch = Watch()
    watch.headline = "val_auc"
    draw_curves(job(tmp_path, watch))
    assert [axes.get_title() for axes in figures[0].axes] == [
        "held-out val_auc",
        "total (the loss)",
    ]
    watch.headline = "other"
    assert watch.headline_of(["step", "loss"]) is None
    assert Watch().headline_of(["step", "epoch", "mIoU"]) == "mIoU"
    assert Watch().headline_of(["epoch", "step"]) is None


def test_without_rows_there_is_no_picture(tmp_path: Path) -> None:
    assert draw_curves(job(tmp_path)) is None
