# SPDX-License-Identifier: Apache-2.0
"""Kinds `cifar10`, `cifar100`: the official python (pickle) or binary files, packed or not."""

from __future__ import annotations

import hashlib
import io
import lzma
import pickle
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdfast.data.labelled.pictures import ArraySource, Part
from kdfast.data.labelled.raw import Raw, resolve
from kdfast.data.labelled.unpack import tar_files

Read = Callable[[str], bytes | None]


@dataclass(frozen=True)
class Variant:
    """Files of one of the two sets in the python version.

    Attributes:
        name: Name of the set.
        folder: Folder of the python version, as it is unpacked.
        binary: Folder of the binary version.
        archive: File name of the python version.
        train: Files to train on.
        test: Files of the test set.
        meta: File of the class names.
        names: Key of the class names in it.
        labels: Key of the labels in the others.
        md5: Checksums of all these files and of the archive, by file name.
    """

    name: str
    folder: str
    binary: str
    archive: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    names: bytes
    labels: bytes
    md5: dict[str, str] = field(default_factory=dict)


CIFAR10 = Variant(
    "cifar10",
    "cifar-10-batches-py",
    "cifar-10-batches-bin",
    "cifar-10-python.tar.gz",
    tuple(f"data_batch_{number}" for number in range(1, 6)),
    ("test_batch",),
    "batches.meta",
    b"label_names",
    b"labels",
    {
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
        "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
    },
)
CIFAR100 = Variant(
    "cifar100",
    "cifar-100-python",
    "cifar-100-binary",
    "cifar-100-python.tar.gz",
    ("train",),
    ("test",),
    "meta",
    b"fine_label_names",
    b"fine_labels",
    {
        "train": "16019d7e3df5f24257cddd939b257f8d",
        "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
        "meta": "7973b15100ade9c7d40fb424638fde48",
    },
)


def read_cifar(variant: Variant, root: str | Path | None, verify: bool) -> Raw:
    """Read the set from a folder that holds it, in either version, or from its archive.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is not the official one (python version, ``verify``), or not of its
            format.
    """
    expected = f"{variant.folder}/ or {variant.binary}/ with the official files, or its .tar.gz"
    archive = variant.archive
    obtain = (
        f"unpack https://www.cs.toronto.edu/~kriz/{archive} there (python version: "
        f"{', '.join((*variant.train, *variant.test, variant.meta))})"
    )
    path = resolve(variant.name, root, expected, obtain)
    read, binary = _open(variant, path)
    if read is None:
        raise FileNotFoundError(
            f"root: kind {variant.name!r} needs {expected}, got none in {path}; to get it: {obtain}"
        )

    def get(name: str) -> bytes:
        data = read(name)
        if data is None:
            raise FileNotFoundError(
                f"{variant.name}: needs the file {name}, got none in {path}; to get it: {obtain}"
            )
        return data

    return _read_binary(variant, get) if binary else _read_python(variant, get, verify)


def _open(variant: Variant, path: Path) -> tuple[Read | None, bool]:
    """Reader of files by name, and whether they are of the binary version."""
    packed = path if path.is_file() else path / variant.archive
    python = variant.test[0]
    for folder in (path, path / variant.folder, path / variant.binary):
        if any((folder / name).is_file() for name in (python, f"{python}.bin")):
            return _folder_reader(folder), not (folder / python).is_file()
    if not packed.is_file():
        return None, False
    try:
        files = tar_files(packed)
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{variant.name}: {packed} must be a whole archive: {error}") from error
    return files.get, python not in files


def _folder_reader(folder: Path) -> Read:
    def read(name: str) -> bytes | None:
        path = folder / name
        return path.read_bytes() if path.is_file() else None

    return read


def _read_python(variant: Variant, get: Callable[[str], bytes], verify: bool) -> Raw:
    def load(name: str) -> dict[bytes, Any]:
        data = get(name)
        found = hashlib.md5(data, usedforsecurity=False).hexdigest()
        if verify and found != variant.md5[name]:
            raise ValueError(
                f"{variant.name}: {name} must be the official file with md5 {variant.md5[name]}, "
                f"got {found}; get it again; for a set of your own: --set data.verify=false "
                "(verify=False)"
            )
        return load_pickle(data, name)

    classes = [name.decode() for name in load(variant.meta)[variant.names]]
    parts = []
    for names in (variant.train, variant.test):
        batches = [load(name) for name in names]
        images = np.concatenate([_pixels(batch.get(b"data"), variant.name) for batch in batches])
        labels = np.concatenate([np.asarray(batch[variant.labels], np.int64) for batch in batches])
        parts.append(_part(variant, images, labels, classes))
    return Raw(variant.name, parts[0], None, parts[1], classes)


def _read_binary(variant: Variant, get: Callable[[str], bytes]) -> Raw:
    """Records of 1 label byte (CIFAR-100: the coarse one before the fine one) and 3,072 pixels."""
    heading = 2 if variant is CIFAR100 else 1
    meta = "fine_label_names.txt" if variant is CIFAR100 else "batches.meta.txt"
    classes = get(meta).decode().split()
    parts = []
    for names in (variant.train, variant.test):
        data = b"".join(get(f"{name}.bin") for name in names)
        if not data or len(data) % (heading + 3072):
            raise ValueError(
                f"{variant.name}: {names[0]}.bin must hold records of {heading + 3072} bytes, "
                f"got {len(data)} bytes"
            )
        table = np.frombuffer(data, np.uint8).reshape(-1, heading + 3072)
        images = _pixels(table[:, heading:], variant.name)
        parts.append(_part(variant, images, table[:, heading - 1].astype(np.int64), classes))
    return Raw(variant.name, parts[0], None, parts[1], classes)


def _pixels(data: object, name: str) -> NDArray[np.uint8]:
    """(N, 32, 32, 3) of rows with the red, the green and the blue plane."""
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != 3072:
        got = getattr(data, "shape", type(data).__name__)
        raise ValueError(f"{name}: 'data' must be an array (N, 3072), got {got}")
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def _part(
    variant: Variant, images: NDArray[np.uint8], labels: NDArray[np.int64], classes: list[str]
) -> Part:
    if labels.size and not (0 <= labels.min() and labels.max() < len(classes)):
        raise ValueError(
            f"{variant.name}: labels must be in [0, {len(classes)}), "
            f"got {labels.min()} to {labels.max()}"
        )
    return Part.whole(ArraySource(images, variant.name), labels)


def load_pickle(data: bytes, name: str) -> dict[bytes, Any]:
    """Read a pickle of dicts, lists, numbers, strings and uint8 arrays; nothing in it is run.

    Text of Python 2 comes as bytes.

    Raises:
        ValueError: It is broken, or asks for anything else.
    """
    try:
        found = _Unpickler(io.BytesIO(data), encoding="bytes").load()
        if not isinstance(found, dict):
            raise ValueError(f"a dict is needed, got {type(found).__name__}")
        return {_text(key): _finished(value) for key, value in found.items()}
    except (
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        IndexError,
        KeyError,
        TypeError,
        ValueError,
        MemoryError,
        OverflowError,
        RecursionError,
    ) as error:
        # Python's own reader says nothing of data that ends early.
        found = str(error) or "Ran out of input"
        raise ValueError(f"{name}: must be a pickle of the CIFAR format: {found}") from error


def _text(value: object) -> Any:
    return value.encode() if isinstance(value, str) else value


def _finished(value: object) -> Any:
    if isinstance(value, _Array):
        return value.array()
    return [_text(entry) for entry in value] if isinstance(value, list) else value


class _Array:
    """Takes the place of numpy's array while a pickle is read: data only, checked."""

    def __init__(self, *_: object) -> None:
        self._state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._state = state

    def array(self) -> NDArray[np.uint8]:
        """The array; ValueError unless it is uint8 in C order."""
        if len(self._state) != 5:
            raise ValueError("array: must have five entries of state")
        _, shape, dtype, fortran, raw = self._state
        if not isinstance(dtype, _Dtype) or fortran or not isinstance(raw, bytes):
            raise ValueError("array: must be uint8 in C order")
        return np.frombuffer(raw, np.uint8).reshape(shape)


class _Dtype:
    """Takes the place of numpy's dtype: uint8 is the only one."""

    def __init__(self, code: object, *_: object) -> None:
        if _text(code) != b"u1":
            raise pickle.UnpicklingError(f"arrays must be uint8, got dtype {code!r}")

    def __setstate__(self, state: object) -> None:
        del state


def _encode(text: str, codec: str) -> bytes:
    # How Python 3 writes bytes for Python 2.
    if codec not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes must be latin1, got {codec!r}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): None,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle._Unpickler):  # the one in C makes room for any place in its memo
    def find_class(self, module: str, name: str) -> Any:
        """Stand-ins for what the format needs; everything else is refused."""
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not allowed")
        return _ALLOWED[module, name]
