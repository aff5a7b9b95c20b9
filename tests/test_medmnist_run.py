# SPDX-License-Identifier: Apache-2.0
"""A whole chain on a made-up file in MedMNIST's format, with a warm-up that is cut."""

from pathlib import Path

import numpy as np
import pytest

from kdfast.train import main

CLASSES = 9


def written(folder: Path) -> Path:
    """``pathmnist.npz`` with a few pictures, each class of a colour of its own."""
    draw = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 36), ("val", 18), ("test", 18)):
        labels = np.arange(count, dtype=np.uint8) % CLASSES
        noise = draw.integers(0, 40, (count, 28, 28, 3))
        arrays[f"{split}_images"] = (noise + 20 * labels[:, None, None, None]).astype(np.uint8)
        arrays[f"{split}_labels"] = labels[:, None]
    folder.mkdir()
    np.savez_compressed(folder / "pathmnist.npz", **arrays)
    return folder


def words(tmp_path: Path, *changes: str) -> list[str]:
    sizes = [
        f"{{img_size: 28, patch_size: 14, embed_dim: {dim}, depth: 1, num_heads: 2}}"
        for dim in (16, 8, 8)
    ]
    sets = [
        *("data.kind=medmnist", "data.set=pathmnist", "data.size=28", "data.workers=0"),
        *("epochs=2", "batch=9", "twin=false", "seeds=[0]", "device=cpu"),
        f"data.root={tmp_path / 'med'}",
        f"output={tmp_path / 'run'}",
        f"model_args=[{', '.join(sizes)}]",
        *changes,
    ]
    return ["--config", "vit_chain", *(word for one in sets for word in ("--set", one))]


def test_a_chain_on_medmnist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path / "med")
    assert main([*words(tmp_path), "--dry-run"]) == 2
    assert "for a set of your own: --set data.verify=false" in capsys.readouterr().err
    assert main(words(tmp_path, "data.verify=false")) == 0
    shown = capsys.readouterr().out
    assert "pathmnist" in shown and "warm-up" in shown
    run = tmp_path / "run"
    assert (run / "report.html").is_file()
    assert [path.name for path in run.rglob("pathmnist") if path.is_dir()]
