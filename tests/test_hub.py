# SPDX-License-Identifier: Apache-2.0
"""Kind `huggingface`: datasets of that library, memory-mapped, read by number."""

import logging
from pathlib import Path
from typing import Any

import cv2
import fsspec
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import kdfast.data as data
from kdfast.data.__main__ import main
from kdfast.data.labelled import build_classification, worker_init
from kdfast.data.shards.hub import opened
from kdfast.trainer.class_feed import class_feed

datasets = pytest.importorskip("datasets", reason="pip install 'kdfast[datasets]'")

SIZE = {"size": 16, "seed": 0, "variants": 2}


@pytest.fixture(autouse=True)
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, an own cache, no bars."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def png(seed: int) -> bytes:
    small = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), np.uint8)
    code: bytes = cv2.imencode(".png", small)[1].tobytes()
    return code


def rows(numbers: Any, label: Any = None) -> Any:
    """A dataset of pictures, of three classes if ``label`` says no other."""
    classes = datasets.ClassLabel(names=["x", "y", "z"])
    features = {"image": datasets.Image(), "label": classes if label is None else label}
    return datasets.Dataset.from_dict(
        {
            "image": [{"bytes": png(n), "path": f"{n:03d}.png"} for n in numbers],
            "label": ["zxy"[n % 3] if label is not None else n % 3 for n in numbers],
        },
        features=datasets.Features(features),
    )


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    root = tmp_path / "set" / "data"
    root.mkdir(parents=True)
    for name, numbers in (("train-00000", range(40)), ("train-00001", range(40, 60))):
        rows(numbers).to_parquet(root / f"{name}-of-00002.parquet")
    rows(range(60, 72)).to_parquet(root / "validation-00000-of-00001.parquet")
    return root.parent


def load(kind: str, root: object, **options: Any) -> Any:
    return build_classification(kind, root, **{**SIZE, **options})  # type: ignore[arg-type]


def assert_same(one: Any, other: Any) -> None:
    for name in ("train", "val", "test"):
        a, b = getattr(one, name), getattr(other, name)
        assert len(a) == len(b) and torch.equal(a.targets, b.targets)
        assert all(torch.equal(a[n]["image"], b[n]["image"]) for n in range(len(a)))


@pytest.mark.parametrize("memory", [0, 1])
def test_items_are_those_of_parquet(parquet: Path, tmp_path: Path, memory: int) -> None:
    held = load("parquet", parquet)
    assert_same(held, load("huggingface", parquet, memory=memory))
    assert_same(held, load("huggingface", f"{parquet}/data/*.parquet", memory=memory))
    both = {"train": rows(range(60)), "validation": rows(range(60, 72))}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "saved")
    assert_same(held, load("huggingface", tmp_path / "saved", memory=memory))
    found = load("huggingface", parquet, memory=memory)
    assert found.class_names == ["x", "y", "z"] and found.key == load(
        "huggingface", parquet, memory=memory
    ).key  # fmt: skip


def test_by_url(parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # It takes every URL for the network.
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    files = fsspec.filesystem("memory")
    files.put(str(parquet), "/hub", recursive=True)
    try:
        assert_same(load("parquet", parquet), load("huggingface", "memory://hub/data", memory=0))
        splits, columns = opened("memory://hub/data", labelled=True, stream=True)
        first = next(iter(splits["val"]))
        assert first[columns.image]["bytes"] == png(60) and first["label"] == 0
    finally:
        files.rm("/hub", recursive=True)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_decode_and_keep_the_order(parquet: Path, workers: int) -> None:
    found = load("huggingface", parquet, memory=0).train
    feed = class_feed(found, batch_size=8, device=torch.device("cpu"), workers=workers, seed=3)
    batches = list(feed.batches(1, done=2))
    feed.close()
    found.set_epoch(1)
    plain = class_feed(found, batch_size=8, device=torch.device("cpu"), seed=3)
    whole = [batch.index for batch in plain.batches(1)]
    assert [batch.index for batch in batches] == whole[2:]
    for batch in batches:
        images = torch.stack([found[n]["image"] for n in batch.index])
        assert torch.equal(batch.images, images)


@pytest.mark.slow
def test_spawned_workers(parquet: Path) -> None:
    found = load("huggingface", parquet, memory=0).train
    loader = DataLoader(
        found, 20, num_workers=1, worker_init_fn=worker_init, multiprocessing_context="spawn"
    )
    images = torch.cat([batch["image"] for batch in loader])
    assert all(torch.equal(images[n], found[n]["image"]) for n in range(len(found)))


def test_views(parquet: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"kind": "huggingface", "size": (32, 32)}
    train, val = (data.build(root=parquet, split=x, **options) for x in ("train", "val"))
    assert (len(train), len(val)) == (60, 12)
    assert val[3]["path"] == "val row 3 (063.png)" and val[3]["image"].shape == (3, 32, 32)
    rows(range(40)).save_to_disk(tmp_path / "saved")
    parts = [data.build(root=tmp_path / "saved", split=x, **options) for x in ("train", "val")]
    assert sum(map(len, parts)) == 40


def test_labels(tmp_path: Path) -> None:
    rows(range(30), datasets.Value("string")).save_to_disk(tmp_path / "names")
    found = load("huggingface", tmp_path / "names")
    assert found.class_names == ["x", "y", "z"]
    with pytest.raises(ValueError, match="label_key: there must be a column kind, got image"):
        load("huggingface", tmp_path / "names", label_key="kind")
    with pytest.raises(ValueError, match="image_key: must be a column of pictures, got label of"):
        load("huggingface", tmp_path / "names", image_key="label")
    with pytest.raises(ValueError, match="only kind webdataset, huggingface has fields"):
        load("digits", None, label_key="x")


def test_damage_is_named_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = rows(range(30)).to_dict()
    broken["image"][3] = {"bytes": b"no picture", "path": "003.png"}
    features = rows([0]).features
    datasets.Dataset.from_dict(broken, features=features).save_to_disk(tmp_path / "saved")
    found = load("huggingface", tmp_path / "saved", memory=0).train
    feed = class_feed(found, batch_size=8, device=torch.device("cpu"), train=False)
    with caplog.at_level(logging.WARNING, "kdfast.data"):
        list(feed.batches(0))
    assert "row 3 (003.png): cannot be decoded" in caplog.text
    assert feed.state_dict()["bad"] == 1


def test_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="needs a folder, pattern or URL of"):
        load("huggingface", None)
    with pytest.raises(FileNotFoundError, match="there is no folder, file or dataset /gone/x"):
        load("huggingface", "/gone/x")
    with pytest.raises(FileNotFoundError, match=r"must hold \*.parquet shards"):
        load("huggingface", tmp_path)
    (tmp_path / "train.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="train.parquet cannot be read"):
        load("huggingface", tmp_path / "train.parquet")
    monkeypatch.setattr("kdfast.data.shards.hub.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'kdfast\[datasets\]'"):
        load("huggingface", tmp_path)


def shard(source: object, out: Path, *more: str) -> int:
    return main(["shard", str(source), "--out", str(out), *more])


def test_a_stream_becomes_shards(
    parquet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Read from the front without a copy; a killed writer goes on; the same items."""
    out = tmp_path / "out"
    assert shard(parquet, out, "--samples-per-shard", "13") == 0
    assert_same(load("parquet", parquet), load("webdataset", out))
    assert load("webdataset", out).class_names == ["x", "y", "z"]
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert [name for name in sorted(before) if name.endswith(".tar")] == [
        *(f"train-00000{n}.tar" for n in range(5)),
        "val-000000.tar",
    ]
    for name in ("train-000003.tar", "train-000004.tar", "val-000000.tar"):
        (out / f"{name}.index.json").unlink()
    capsys.readouterr()
    assert shard(parquet, out, "--samples-per-shard", "13") == 0
    assert capsys.readouterr().out.count("was there") == 3
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert shard(parquet, out, "--samples-per-shard", "12") == 2
    assert "holds shards of other pictures or sizes (huggingface)" in capsys.readouterr().err
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_streams_of_other_kinds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows(range(9), datasets.Value("string")).save_to_disk(tmp_path / "saved")
    assert shard(tmp_path / "saved", tmp_path / "out", "--shard-size", "1") == 0
    found = load("webdataset", tmp_path / "out", val_fraction=0.34, test_fraction=0.33)
    assert found.class_names == ["x", "y", "z"]
    images = rows(range(4)).select_columns(["image"])
    images.save_to_disk(tmp_path / "plain")
    assert shard(tmp_path / "plain", tmp_path / "views") == 0
    assert len(data.build(kind="webdataset", root=tmp_path / "views", size=(32, 32))) == 4
    assert shard("gone", tmp_path / "x") == 2
    assert "there is no folder or .tar gone" in capsys.readouterr().err
    assert shard("gone", tmp_path / "x", "--kind", "huggingface") == 2
    assert "there is no folder, file or dataset gone" in capsys.readouterr().err
    assert shard(tmp_path, tmp_path / "x", "--kind", "images", "--label-key", "a") == 2
    assert "only for a Hugging Face dataset" in capsys.readouterr().err
