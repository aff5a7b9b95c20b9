# SPDX-License-Identifier: Apache-2.0
"""The example on CIFAR-10 from its command to its table, at toy size."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.test_examples import TINY, class_folder

run = importlib.import_module("examples.cifar10.run")
table = importlib.import_module("examples.cifar10.table")
config = importlib.import_module("examples.cifar10.config")
training = importlib.import_module("examples.training")

ROWS = ["dense", "cut", "mean", "compensated", "compensated in sequence"]
ROWS += ["compensated in sequence, one budget", "distilled", "timm", "fine-tuned"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:calibrate. .* tokens")
def test_two_seeds_make_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = training.Recipe(1, 1e-3, 10)
    tiny = config.Config(
        model=TINY, train=short, recover=short, prune=config.PruneConfig(pictures=20, batch=10)
    )
    monkeypatch.setattr(run, "Config", lambda: tiny)
    data = class_folder(tmp_path / "data", {"train": 3, "val": 2})
    path = tmp_path / "results.json"
    options = ["--data", str(data), "--output", str(tmp_path / "out"), "--results", str(path)]
    for seed in ("0", "1"):
        run.main([*options, "--seed", seed])
    found = json.loads(path.read_text())
    assert list(found["runs"]) == ["seed 0", "seed 1"]
    for one in found["runs"].values():
        assert list(one["rows"]) == ROWS and one["pictures"] == {"train": 30, "test": 20}
        assert one["machine"]["torch"] and one["command"].startswith("python -m examples.cifar10")
        rows = one["rows"]
        assert rows["dense"]["heads"] == 8 and rows["cut"]["heads"] == 4
        halves = {rows[name]["macs"] for name in ROWS[1:5] + ROWS[6:]}
        assert len(halves) == 1 and halves.pop() < rows["dense"]["macs"]
        epochs = {rows[name]["epochs"] for name in ("distilled", "timm", "fine-tuned")}
        assert epochs == {1}
    out = capsys.readouterr().out
    assert table.table(found) in out and f"results: {path}" in out
    # Finished trainings are loaded: the same numbers, at once.
    run.main(options)
    again = json.loads(path.read_text())
    assert again["runs"]["seed 0"]["rows"] == found["runs"]["seed 0"]["rows"]
    monkeypatch.setattr(run, "Config", lambda: config.Config(model=TINY))
    with pytest.raises(ValueError, match="must hold results of these settings"):
        run.main(options)


def test_the_table_has_means_and_spans_of_seeds() -> None:
    def seed(dense: float, cut: float) -> dict[str, Any]:
        size = {"parameters": 500_000, "macs": 30_000_000}
        rows = {"dense": {"accuracy": dense, "cpu_s": 600.0}, "cut": {"accuracy": cut}}
        return {"rows": {name: {**row, **size} for name, row in rows.items()}}

    one = table.table({"runs": {"seed 0": seed(0.8, 0.4)}}).splitlines()
    assert one[2:] == [
        "| dense | 80.0 | 100.0 | 0.50 M | 30.0 M | 10 |",
        "| cut | 40.0 | 50.0 | 0.50 M | 30.0 M |  |",
    ]
    two = table.table({"runs": {"seed 0": seed(0.8, 0.4), "seed 1": seed(0.9, 0.54)}})
    line = "| cut | 47.0 (40.0 to 54.0) | 55.0 (50.0 to 60.0) | 0.50 M | 30.0 M |  |"
    assert two.splitlines()[3] == line
