# SPDX-License-Identifier: Apache-2.0
"""``kdfast compare-runs``: runs of every trainer in one table."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from kdfast.compare_runs import main


def chain(folder: Path, model: str, accuracy: float, spread: float | None) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text("data: {kind: imagefolder, root: /data/birds}\n")
    mean = {"test_accuracy": accuracy, "seconds": 61.0}
    link = {"role": "student", "model": model, "params": 1234567}
    link |= {"mean": mean, "spread": {"test_accuracy": spread}}
    (folder / "comparison.json").write_text(json.dumps({"links": [link]}))
    return folder


def report(folder: Path, quality: Any, **facts: str) -> Path:
    folder.mkdir()
    line = {"model": "distilled", "quality": quality, "params": 99, "ms": 1.5}
    (folder / "report.json").write_text(json.dumps({"models": [line], **facts}))
    return folder


def test_runs_of_every_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [
        chain(tmp_path / "vit", "vit_tiny", 52.5, 0.6),
        chain(tmp_path / "cnn", "resnet18", 68.25, None),
        report(tmp_path / "orion", 0.4279, metric="mIoU"),
        report(tmp_path / "distil", {"cosine": 0.9, "agreement": 0.8, "accuracy": None}),
    ]
    for suffix in (".json", ".csv"):
        out = tmp_path / f"table{suffix}"
        assert main([*map(str, folders), "--out", str(out)]) == 0
        said = capsys.readouterr().out
        assert f"wrote {out}" in said and all(len(line) <= 80 for line in said.splitlines()[:-1])
    for word in ("birds", "0.5250", "0.0060", "0.6825", "mIoU", "0.4279", "agreement", "1,234,567"):
        assert word in said, word
    rows = json.loads((tmp_path / "table.json").read_text())
    assert [row["quality"] for row in rows] == [0.525, 0.6825, 0.4279, 0.8]
    with (tmp_path / "table.csv").open(newline="") as file:
        assert [row["run"] for row in csv.DictReader(file)] == ["vit", "cnn", "orion", "distil"]


def test_names_stay_in_one_piece_and_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Path(name).mkdir()
        chain(Path(name, "run"), "vit_tiny_patch16_224", 50.0, None)
    assert main(["a/run", "b/run"]) == 0
    said = capsys.readouterr().out
    assert said.count("vit_tiny_patch16_224") == 2 and "a/run" in said and "b/run" in said


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        (None, "", "must hold comparison.json or report.json"),
        ("report.json", "{", "report.json cannot be read"),
        ("report.json", '{"models": [{}]}', "is not what a run writes: KeyError"),
        ("comparison.json", "[]", "is not what a run writes: TypeError"),
    ],
)
def test_what_is_no_run(
    name: str | None, content: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name is not None:
        (tmp_path / name).write_text(content)
    assert main([str(tmp_path)]) == 2
    assert text in capsys.readouterr().err


def test_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "gone")]) == 2
    assert "gone must be the folder of a run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--out", "table.txt"])
    assert "must end in .csv or .json, got 'table.txt'" in capsys.readouterr().err
