# SPDX-License-Identifier: Apache-2.0
"""The HTML page about a run: one file, whole by itself, and what stands in it."""

import base64
import io
import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from kdfast.chain.page import write_chain_page
from kdfast.configs import load
from kdfast.recovery.page import write_run_page
from kdfast.trainer import report_page
from kdfast.trainer.report_page import Grid, Picture, Section, command_line, write_page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
# What makes a browser fetch something.
FETCHES = {"script", "link", "iframe", "object", "embed", "base", "source", "video", "audio"}
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Reads a page and refuses what is not well formed, or not in the file.

    Attributes:
        words: All text, as a reader sees it.
        pictures: Size and description of every picture.
        cells: Content of the cells of tables, row by row.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words, self.style = "", ""
        self.pictures: list[tuple[tuple[int, int], str]] = []
        self.cells: list[list[str]] = []
        self.meta: dict[str, str] = {}
        assert text.startswith("<!DOCTYPE html>")
        self.feed(text)
        self.close()
        assert not self.open, f"elements that are not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in FETCHES
        values = {name: value or "" for name, value in attrs}
        assert not {name for name in values if name.startswith("on")}
        for name in ("href", "src", "srcset", "poster", "action"):
            assert values.get(name, "data:").startswith("data:")
        if tag == "img":
            kind, content = values["src"].split(",", 1)
            assert kind == "data:image/png;base64"
            with Image.open(io.BytesIO(base64.b64decode(content, validate=True))) as image:
                image.load()
                self.pictures.append((image.size, values["alt"]))
        if tag == "meta" and "name" in values:
            self.meta[values["name"]] = values["content"]
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.style += data
            return
        self.words += data
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1][-1] += data


def read(path: Path) -> Page:
    page = Page(path.read_text(encoding="utf-8"))
    assert "url(" not in page.style and "@import" not in page.style
    return page


def png(path: Path, size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 30, 30)).save(path)
    return path


def example(folder: Path, **changes: Any) -> Path:
    """A page with everything that a page may have."""
    sections = [
        Section("Models", "Two of them.", [Grid(("model", "mIoU"), [("a<b", "0.5")], "A note.")]),
        Section("Curves", pictures=[Picture(png(folder / "curves.png"), "losses & speed")]),
        Section("More", pictures=[Picture(folder / "gone.png", "a view")], folded=True),
    ]
    config = {"name": "<script>alert(1)</script>", "data": {"size": [32, 32], "root": None}}
    values = {"title": "run </title>", "lead": "All is well.", "sections": sections}
    return write_page(folder / "report.html", **{**values, "config": config, **changes})


def test_a_page_is_whole_by_itself(tmp_path: Path) -> None:
    page = read(example(tmp_path, note="EMBEDDED DEFAULT: made-up data"))
    assert page.pictures == [((40, 30), "losses & speed")]
    assert page.cells[:2] == [["model", "mIoU"], ["a<b", "0.5"]]
    for text in ("run </title>", "All is well.", "Two of them.", "A note.", "EMBEDDED DEFAULT"):
        assert text in page.words
    assert "a view: gone.png is gone" in page.words
    assert "name: <script>alert(1)</script>" in page.words
    facts = dict(page.cells[2:])
    assert {"torch", "kdfast", "cpu", "python", "timm", "numpy", "threads", "date"} <= set(facts)
    assert command_line() in page.words
    assert "width=device-width" in page.meta["viewport"]
    for rule in ("prefers-color-scheme: dark", "@media print", "overflow-x: auto"):
        assert rule in page.style


def test_config_can_be_read_again(tmp_path: Path) -> None:
    config = {"name": "ä: b", "size": [1, 2], "nested": {"x": None, "on": True}}
    page = read(example(tmp_path, config=config, sections=[]))
    assert yaml.safe_load(page.words.split("Config\n")[1]) == config


def test_grids_are_checked() -> None:
    with pytest.raises(ValueError, match="a row must have 2 cells, got 1"):
        Grid(("a", "b"), [("1",)])


@pytest.mark.parametrize(
    ("started", "argv", "expected"),
    [
        (
            ["/usr/bin/python3", "-m", "kdfast.train", "--set", "a=[1, 2]"],
            [],
            "python3 -m kdfast.train --set 'a=[1, 2]'",
        ),
        (
            ["/usr/bin/python3", "/x/bin/kdfast", "train"],
            ["/x/bin/kdfast", "train"],
            "kdfast train",
        ),
    ],
)
def test_command_line(
    started: list[str], argv: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "orig_argv", started)
    monkeypatch.setattr(sys, "argv", argv)
    assert command_line() == expected


def test_unknown_facts_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"cpu": "a cpu", "gpu": None, "commit": "abc", "dirty": True}
    monkeypatch.setattr(report_page, "machine_facts", lambda: dict(facts))
    monkeypatch.setattr(report_page, "LIBRARIES", ("no_such_library",))
    page = read(example(tmp_path, sections=[]))
    assert page.cells == [["cpu", "a cpu"], ["commit", "abc with changes"]]


def line(model: str, quality: float, heads: int) -> dict[str, Any]:
    sizes = {"params": 214304, "gmac": 0.007, "ms": 1.25, "peak_mib": 1.5}
    return {"model": model, "quality": quality, "heads": heads, **sizes}


def test_page_of_a_pruning_run(tmp_path: Path) -> None:
    for name in ("predictions.png", "curves.png", "teacher/curves.png"):
        png(tmp_path / name)
    models = [line("teacher", 0.5, 8), line("pruned", 0.3, 4), line("distilled", 0.45, 4)]
    report = {"metric": "mIoU", "recovered": {"distilled": 0.75}, "models": models}
    (tmp_path / "report.json").write_text(json.dumps(report))
    config = load("smoke", [])
    page = read(write_run_page(tmp_path, config))
    assert "4 of 8 heads are left: mIoU 0.4500 after distillation, 0.5000 of the" in page.words
    assert "Of what pruning lost is back: distilled 75%." in page.words
    assert ["teacher", "0.5000", "8", "214,304", "0.007", "1.25", "1.5"] in page.cells
    assert len(page.pictures) == 3 and "Boxes and lanes" not in page.words
    columns = ("mAP", "map mAP", "translation", "scale", "orientation", "velocity")
    frames = {"frames": 7, "models": {"teacher": dict.fromkeys(columns, 0.125)}}
    (tmp_path / "frames.json").write_text(json.dumps(frames))
    png(tmp_path / "head_scores.png")
    page = read(write_run_page(tmp_path, config))
    assert len(page.pictures) == 4
    assert "On 7 held-out frames" in page.words and ["teacher", *["0.125"] * 6] in page.cells


@pytest.mark.parametrize("seeds", [1, 3])
def test_page_of_a_chain(tmp_path: Path, seeds: int) -> None:
    results = []
    for role, accuracy in {"teacher": 96.0, "student": 93.5, "student_ce": 91.0}.items():
        for seed in range(seeds):
            folder = tmp_path / f"seed{seed}" / role
            for name in ("curves", "confusion", "attention0_heads", "attention0_rollout"):
                png(folder / "visualizations" / f"{name}.png")
            results.append(
                {
                    **{"role": role, "model": "vit_tiny", "params": 123456, "seed": seed},
                    **{"test_accuracy": accuracy + seed, "test_f1_score": 90.0},
                    **{"test_auc": float("nan"), "val_accuracy": 92.0, "seconds": 3.0},
                    **{"peak_mib": 900.0, "folder": str(folder)},
                }
            )
    config = load("vit_chain_digits", [f"seeds={list(range(seeds))}"])
    page = read(write_chain_page(tmp_path, results, "digits", config))
    spread = "" if seeds == 1 else " ± 1.00"
    mean = 93.5 + (seeds - 1) / 2
    assert f"digits: student {mean:.2f}{spread} % of the test images right" in page.words
    assert "Distillation is worth +2.50 points" in page.words
    # Of one seed of each link; the curves over the steps and the comparison are missing here.
    assert len(page.pictures) == 3 * 4
    captions = [caption for _, caption in page.pictures[:4]]
    assert captions == [
        "training and validation over the epochs",
        "test images by true and predicted class",
        "what each head of the last layer looks at, test image 0",
        "rollout of attention through all layers, test image 0",
    ]
    assert page.cells[1][:4] == ["teacher", "vit_tiny", "123,456", str(seeds)]
    assert page.cells[1][6] == "-", "an AUC that is not defined"


def test_in_a_browser(tmp_path: Path) -> None:
    """Drawn as wide as a phone and as a desktop: the picture's red is on it."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    page = example(tmp_path)
    for width in (390, 1280):
        shot = tmp_path / f"{width}.png"
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--window-size={width},1600", f"--screenshot={shot}", page.as_uri()]
        subprocess.run(command, check=True, timeout=120, capture_output=True)
        pixels = np.asarray(Image.open(shot).convert("RGB"))
        assert pixels.shape[1] == width
        assert (pixels == (200, 30, 30)).all(-1).sum() >= 0.9 * 40 * 30
