# SPDX-License-Identifier: Apache-2.0
"""Tar shards: written from folders, read as the folders are, and exchanged with webdataset."""

import asyncio
import hashlib
import io
import json
import logging
import tarfile

import cv2
import fsspec
import numpy as np
import pytest
import torch
from fsspec.asyn import AsyncFileSystem
from torch.utils.data import DataLoader

import kdfast.data as data
from kdfast.data.__main__ import main
from kdfast.data.corrupt import Unreadable
from kdfast.data.labelled import build_classification
from kdfast.data.packing import plan_shards
from kdfast.data.sampler import EpochSampler
from kdfast.data.shards.names import Names, divided, member_of, name_of
from kdfast.data.shards.places import find_shards
from kdfast.data.shards.tar_index import SUFFIX
from kdfast.data.shards.tars import open_tars
from kdfast.data.shards.write import Limits, write_shards
from kdfast.data.views.bench2drive import CAMERAS

SIZE = (32, 32)


def encoded(seed, suffix="jpg"):
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    image = cv2.resize(small, (40, 24), interpolation=cv2.INTER_CUBIC)
    return cv2.imencode(f".{suffix}", image)[1].tobytes()


def write(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(seed, path.suffix[1:].lower()))


def add(archive, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Indexes of shards that cannot be written beside them."""
    monkeypatch.setenv("KDFAST_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def pictures(tmp_path):
    """Forty pictures, some with dots in their names, or in one folder with the same stem."""
    root = tmp_path / "pictures"
    for n in range(37):
        write(root / f"set.{n % 3}" / f"{n:03d}.jpg", n)
    write(root / "a.1.jpg", 50)
    write(root / "a.2.jpg", 51)
    write(root / "set.0" / "000.png", 52)
    return root


@pytest.fixture
def classes(tmp_path):
    """Two splits of three classes."""
    root = tmp_path / "classes"
    for n in range(30):
        write(root / ("val" if n % 5 == 0 else "train") / "xyz"[n % 3] / f"{n:03d}.JPEG", n)
    return root


def shard(source, out, *options):
    assert main(["shard", str(source), "--out", str(out), *map(str, options)]) == 0
    return out


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(a[n]["image"], b[n]["image"]) for n in range(len(a))
    )


def views(root, kind="webdataset", **options):
    return data.build(**{"kind": kind, "root": root, "size": SIZE, **options})


@pytest.mark.parametrize(
    ("name", "taken", "member"),
    [
        ("b/a.jpg", False, "b/a.jpg"),
        ("b.c/a.1.jpg", False, "b.c/a%2E1.jpg"),
        ("a.png", True, "a%2Epng.png"),
        ("a.png.png", False, "a%2Epng%2Epng.png"),
        ("50%.jpg", False, "50%25.jpg"),
        ("__a__.jpg", False, "%5F_a__.jpg"),
    ],
)
def test_names_have_keys_without_dots_and_come_back(name, taken, member):
    assert member_of(name, taken) == member and name_of(member) == name
    assert "." not in divided(member)[0].rsplit("/", 1)[-1]


def test_many_names():
    names = Names(["a", "", "über"])
    assert list(names) == ["a", "", "über"] and names[1:] == ["", "über"]
    with pytest.raises(IndexError, match=r"must be in \[0, 3\), got 3"):
        names[3]


def test_shards_of_pictures_give_the_items_of_the_folder(pictures, tmp_path):
    out = shard(pictures, tmp_path / "out", "--samples-per-shard", 7)
    assert len(list(out.glob("all-*.tar"))) == 6
    for split in ("train", "val"):
        options = {"split": split, "augment": True, "seed": 3}
        folder = views(pictures, "images", **options)
        assert same(folder, views(out, **options))


def test_shards_of_classes_give_the_items_of_the_folder(classes, tmp_path):
    out = shard(classes, tmp_path / "out", "--samples-per-shard", 5)
    options = {"size": 16, "seed": 0, "variants": 2}
    for memory in (0, 1):
        folder = build_classification("imagefolder", classes, memory=memory, **options)
        packed = build_classification("webdataset", out, memory=memory, **options)
        assert packed.class_names == folder.class_names == ["x", "y", "z"]
        for split in ("train", "val", "test"):
            one, other = getattr(folder, split), getattr(packed, split)
            assert same(one, other) and torch.equal(one.targets, other.targets)


def test_shards_of_bench2drive_give_the_items_of_the_folder(tmp_path):
    root, split = tmp_path / "b2d", tmp_path / "split.json"
    for n, clip in enumerate(("a.b", "c", "d")):
        for frame in range(2):
            for m, camera in enumerate(CAMERAS):
                write(root / "v1" / clip / "camera" / camera / f"{frame:05d}.jpg", 40 * n + m)
    split.write_text(json.dumps({"val": ["v1/c"]}))
    out = shard(root, tmp_path / "out", "--samples-per-shard", 4)
    for name in ("train", "val"):
        options = {"kind": "bench2drive", "split_file": split, "split": name, "augment": True}
        folder, packed = views(root, **options), views(out, **options)
        assert same(folder, packed) and folder.frames == packed.frames


def test_written_again_after_a_kill(pictures, tmp_path, capsys):
    out = shard(pictures, tmp_path / "out", "--samples-per-shard", 7)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "all-000002.tar").unlink()
    (out / "all-000003.tar").write_bytes(before["all-000003.tar"][:2000])
    (out / f"all-000004.tar{SUFFIX}").unlink()
    capsys.readouterr()
    shard(pictures, out, "--samples-per-shard", 7)
    assert capsys.readouterr().out.count("was there") == 3
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    sums = (out / "SHA256SUMS").read_text().split()
    assert sums[0] == hashlib.sha256(before["all-000000.tar"]).hexdigest()


def test_a_set_that_is_not_whole_is_refused(pictures, tmp_path):
    plan = plan_shards(pictures, limits=Limits(count=7))

    def stop(name, size, before):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(plan, tmp_path / "out", stop)
    with pytest.raises(ValueError, match="not all shards have been written"):
        build_classification("webdataset", tmp_path / "out", size=16, seed=0)
    with pytest.raises(ValueError, match="not all shards have been written"):
        views(tmp_path / "out")


def test_shards_are_written_to_a_url(pictures, tmp_path, capsys):
    near = shard(pictures, tmp_path / "out", "--samples-per-shard", 7)
    files, out = fsspec.filesystem("memory"), "memory://packed/set"
    try:
        shard(pictures, out, "--samples-per-shard", 7)
        names = sorted(path.name for path in near.iterdir())
        assert sorted(files.ls("/packed/set", detail=False)) == [f"/packed/set/{n}" for n in names]
        assert all(files.cat(f"/packed/set/{n}") == (near / n).read_bytes() for n in names)
        assert same(views(near), views(out))
        files.rm(f"/packed/set/all-000002.tar{SUFFIX}")
        capsys.readouterr()
        shard(pictures, out, "--samples-per-shard", 7)
        assert capsys.readouterr().out.count("was there") == 5
        assert main(["shard", str(pictures), "--out", "memory://packed"]) == 2
        assert "must be a new or empty folder, got memory://packed" in capsys.readouterr().err
        assert main(["shard", str(pictures), "--out", "nothing://x"]) == 2
        assert "--out: nothing://x cannot be written to: " in capsys.readouterr().err
    finally:
        files.rm("/packed", recursive=True)


def test_nothing_is_overwritten(pictures, tmp_path, capsys):
    out = shard(pictures, tmp_path / "out", "--samples-per-shard", 7)
    assert main(["shard", str(pictures), "--out", str(out), "--samples-per-shard", "8"]) == 2
    assert "holds shards of other pictures or sizes" in capsys.readouterr().err
    assert main(["shard", str(pictures), "--out", str(pictures)]) == 2
    assert "must be a new or empty folder" in capsys.readouterr().err
    assert main(["shard", str(tmp_path / "no"), "--out", str(tmp_path / "new")]) == 2
    assert "there is no folder or .tar" in capsys.readouterr().err
    assert main(["shard", str(pictures), "--out", str(out), "--shard-size", "0"]) == 2
    assert "--shard-size: must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_order_is_that_of_numbers(pictures, tmp_path, workers, world):
    out = shard(pictures, tmp_path / "out", "--samples-per-shard", 7)
    dataset = views(out, augment=True)
    seen = []
    for rank in range(world):
        sampler = EpochSampler(len(dataset), seed=1, epoch=2, start=6, rank=rank, world=world)
        loader = DataLoader(
            dataset, 1, sampler=sampler, num_workers=workers, collate_fn=data.collate
        )
        seen.append([(batch["index"].item(), batch["image"]) for batch in loader])
    taken = [item for step in zip(*seen, strict=True) for item in step]
    whole = EpochSampler(len(dataset), seed=1, epoch=2).order()[6:]
    assert [index for index, _ in taken] == whole[: len(taken)].tolist()
    assert all(torch.equal(image[0], dataset[index]["image"]) for index, image in taken)


def test_damaged_pictures_are_named_and_counted(pictures, tmp_path, caplog):
    out = shard(pictures, tmp_path / "out", "--samples-per-shard", 7)
    store = open_tars("webdataset", out).pictures
    first = out / "all-000000.tar"
    code = bytearray(first.read_bytes())
    code[code.index(b"\xff\xd8") + 100] ^= 1
    first.write_bytes(code)
    (problem, whole) = store.fetch([0, 2])
    assert isinstance(problem, Unreadable) and isinstance(whole, bytes)
    assert str(problem) == "its checksum is not that of the index"
    last = sorted(out.glob("*.tar"))[-1]
    last.write_bytes(last.read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        dataset = views(out)
    assert "100 bytes, its index says" in caplog.text
    items = [dataset[n] for n in range(len(dataset))]
    bad = [item.path for item in items if isinstance(item, data.Corrupt)]
    assert len(bad) == 2 and bad[0] == f"{first}: a%2E1.jpg" and str(last) in bad[1]
    counter = data.CorruptCounter(len(dataset))
    with pytest.raises(data.CorruptDataError, match="at most 1.0% may be unreadable"):
        counter.update(data.collate(items))


def test_shards_of_others(tmp_path):
    """Listed once, with labels as numbers, names, or in JSON, at any address."""
    files = fsspec.filesystem("memory")
    for number in range(2):
        with files.open(f"/shards/train-{number}.tar", "wb") as file:
            with tarfile.open(fileobj=file, mode="w") as archive:
                for n in range(6):
                    key = f"{number}{n}"
                    add(archive, f"{key}.jpg", encoded(n))
                    add(archive, f"{key}.json", json.dumps({"label": "ab"[n % 2]}).encode())
                    add(archive, f"{key}.cls", str(n % 3).encode())
    try:
        for root in ("memory://shards", "memory://shards/train-*.tar"):
            found = build_classification("webdataset", root, size=16, seed=0, val_fraction=0.2)
            assert found.class_names == ["0", "1", "2"]
        named = build_classification(
            "webdataset", root, size=16, seed=0, val_fraction=0.2, label_key="json:label"
        )
        assert named.class_names == ["a", "b"]
        with pytest.raises(ValueError, match="label_key: every sample must have a field x, got "):
            build_classification("webdataset", root, size=16, seed=0, label_key="x")
        with pytest.raises(ValueError, match="image_key: every sample must have a field png, got "):
            views(root, image_key="png")
    finally:
        files.rm("/shards", recursive=True)


def test_a_broken_shard_without_index_is_named(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for n in range(4):
            add(archive, f"{n}.jpg", encoded(n))
    code = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(code[:700])
    with pytest.raises(ValueError, match=r"shard: .*a.tar must be a whole uncompressed .tar, got "):
        views(tmp_path)
    size = len(encoded(0))
    second = 512 + size + -size % 512
    (tmp_path / "a.tar").write_bytes(code[:second] + b"x" * 512 + code[second + 512 :])
    with pytest.raises(ValueError, match="got a damaged header near byte"):
        views(tmp_path)


def test_places_that_cannot_be(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must hold \*.tar shards"):
        find_shards("webdataset", tmp_path, ".tar")
    with pytest.raises(ValueError, match="which a pipe has not"):
        find_shards("webdataset", "pipe:cat a.tar", ".tar")
    with pytest.raises(ValueError, match="needs a folder, pattern or URL"):
        find_shards("webdataset", None, ".tar")
    with pytest.raises(ValueError, match="must be a path or a URL of fsspec, got nothing://a"):
        find_shards("webdataset", "nothing://a", ".tar")


def test_webdataset_reads_our_shards(pictures, classes, tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="pip install 'kdfast[test]'")
    out = shard(classes, tmp_path / "out", "--samples-per-shard", 50)
    found = list(webdataset.WebDataset(str(out / "train-000000.tar"), shardshuffle=False))
    assert len(found) == 24 and {int(sample["cls"]) for sample in found} == {0, 1, 2}
    first = sorted((classes / "train" / "x").iterdir())[0]
    assert found[0]["jpeg"] == first.read_bytes()
    out = shard(pictures, tmp_path / "plain", "--samples-per-shard", 50)
    assert len(list(webdataset.WebDataset(str(out / "all-000000.tar"), shardshuffle=False))) == 40


def test_we_read_shards_of_webdataset(tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="pip install 'kdfast[test]'")
    with webdataset.TarWriter(str(tmp_path / "train-0.tar")) as writer:
        for n in range(8):
            writer.write({"__key__": f"sample{n}", "jpg": encoded(n), "cls": n % 2})
    samples = open_tars("webdataset", tmp_path, labelled=True)
    assert samples.labels == ["0", "1"] * 4
    assert samples.pictures.fetch([3, 5]) == [encoded(3), encoded(5)]


class Slow(AsyncFileSystem):
    """Files of this machine behind a network: counts the requests that are under way together."""

    protocol = "slow"
    cachable = False
    now = most = requests = 0

    async def _cat_file(self, path, start=None, end=None, **kwargs):
        Slow.now, Slow.requests = Slow.now + 1, Slow.requests + 1
        Slow.most = max(Slow.most, Slow.now)
        await asyncio.sleep(0.01)
        Slow.now -= 1
        return fsspec.filesystem("file").cat_file(path, start, end)

    async def _info(self, path, **kwargs):
        return fsspec.filesystem("file").info(path)

    async def _ls(self, path, detail=True, **kwargs):
        return fsspec.filesystem("file").ls(path, detail=detail)


def test_the_pictures_of_a_batch_are_fetched_together(pictures, tmp_path):
    out = shard(pictures, tmp_path / "out", "--samples-per-shard", 7)
    fsspec.register_implementation("slow", Slow, clobber=True)
    near, far = views(out), views(f"slow://{out}")
    Slow.most = Slow.requests = 0
    batch = next(iter(DataLoader(far, 16, collate_fn=data.collate)))
    assert Slow.most > 4 and Slow.requests == 16
    assert all(torch.equal(image, near[n]["image"]) for n, image in enumerate(batch["image"]))
    forked = next(iter(DataLoader(far, 16, num_workers=1, collate_fn=data.collate)))
    assert torch.equal(forked["image"], batch["image"])
    with pytest.raises(IndexError, match="got 99"):
        far.__getitems__([0, 99])
