# SPDX-License-Identifier: Apache-2.0
"""The picture and the table that compare the links of a chain."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure

from kdfast.chain.compare import compare, write_comparison
from kdfast.chain.plots import draw_comparison

ROLES = {"teacher": 96.0, "assistant": 95.0, "student": 93.5, "student_ce": 91.0}


def results(seeds: int, roles: dict[str, float] = ROLES) -> list[dict[str, Any]]:
    return [
        {
            **{"role": role, "model": "vit_base_patch16_224", "params": 123456, "seed": seed},
            **{"test_accuracy": accuracy + seed, "test_f1_score": accuracy - 1, "test_auc": 99.0},
            **{"val_accuracy": accuracy, "seconds": 3.0, "peak_mib": 900.0},
        }
        for role, accuracy in roles.items()
        for seed in range(seeds)
    ]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved."""
    seen: list[Figure] = []
    monkeypatch.setattr(
        Figure, "savefig", lambda self, path, **_: (seen.append(self), path.touch())
    )
    return seen


@pytest.mark.parametrize("seeds", [1, 3])
def test_bars_from_zero_with_gaps(tmp_path: Path, figures: list[Figure], seeds: int) -> None:
    draw_comparison(compare(results(seeds)), tmp_path / "c.png", "digits, test images")
    (figure,) = figures
    assert figure.get_suptitle() == (
        "digits, test images, " + ("one seed" if seeds == 1 else "mean and spread of 3 seeds")
    )
    for axes in figure.axes:
        low, high = axes.get_ylim()
        assert low == 0 and high > 96
        bars = [c for c in axes.containers if isinstance(c, BarContainer)]
        assert [bar.patches[0].get_y() for bar in bars] == [0, 0, 0, 0]
        # One seed has no spread and no dots.
        spread = [c for c in axes.containers if isinstance(c, ErrorbarContainer)]
        assert bool(spread) == bool(axes.lines) == (seeds > 1)
        gaps = "student against teacher -2.50, assistant -1.50, student_ce +2.50"
        assert axes.get_title().splitlines()[1] == gaps
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts[2] == ("93.50" if seeds == 1 else "94.50 ± 1.00")
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels[2].replace("\n", " ") == "student vit_base patch16_224 0.12M"


def test_a_teacher_alone(tmp_path: Path, figures: list[Figure]) -> None:
    draw_comparison(compare(results(1, {"teacher": 96.0})), tmp_path / "c.png", "digits")
    assert figures[0].axes[0].get_title() == "test accuracy, %"


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_table_fits_80_columns(tmp_path: Path, figures: list[Figure], seeds: int) -> None:
    text, paths = write_comparison(tmp_path, results(seeds), "digits", {})
    assert "\x1b" not in text and max(map(len, text.splitlines())) <= 80
    assert paths["txt"].read_text() == text + "\n"
    over = "one seed" if seeds == 1 else "mean ± spread over 3 seeds"
    assert text.startswith(f"digits, test images, {over}\n")
    assert "vit_base_patch16_224" in text
    assert "twin without: +2.50 points of\ntest accuracy" in text
