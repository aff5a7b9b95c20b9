# SPDX-License-Identifier: Apache-2.0
"""CIFAR and MedMNIST in small files of the true formats, written here."""

import os
import pickle
import struct
import tarfile

import numpy as np
import pytest
import torch

from kdfast.data.labelled import build_classification, cifar, medmnist_info

NAMES10 = [f"name{number}" for number in range(10)]


def load(kind, root, **options):
    return build_classification(
        kind, root, **{"size": 8, "seed": 0, "augment": "none", "verify": False} | options
    )


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


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
