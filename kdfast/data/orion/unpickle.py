# SPDX-License-Identifier: Apache-2.0
"""Reading pickles from the internet: numpy arrays and plain containers, nothing else.

Bench2Drive's tools write their infos and maps as pickles. A pickle may name any function of any
installed module and have it called while it is read; this reader knows the few names that
arrays need and refuses every other.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

_BUILTINS = {"set": set, "frozenset": frozenset, "complex": complex}
# Stands for numpy.ndarray, which a pickle must not be able to call with a size of its own.
_ARRAY = object()
# numpy's own helpers under the module names of numpy 1 and 2.
_CORE = ("numpy.core", "numpy._core")


class RefusedPickleError(ValueError):
    """A pickle names something that a file of numbers does not need."""


class _Reader(pickle.Unpickler):
    def __init__(self, file: BinaryIO, name: str) -> None:
        super().__init__(file, encoding="latin1")
        self._name = name

    def find_class(self, module: str, name: str) -> Any:
        """The few names that arrays and containers need."""
        if module in ("builtins", "__builtin__"):
            if name in _BUILTINS:
                return _BUILTINS[name]
            if name == "bytes":
                return _no_bytes
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("_codecs", "encode"):
            return _bytes
        if (module, name) == ("numpy", "ndarray"):
            return _ARRAY
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if module in [f"{core}.multiarray" for core in _CORE] and name == "_reconstruct":
            return _empty_array
        if module in [f"{core}.multiarray" for core in _CORE] and name == "scalar":
            return _scalar
        if module in [f"{core}.numeric" for core in _CORE] and name == "_frombuffer":
            return _from_buffer
        raise RefusedPickleError(
            f"{self._name}: must hold numpy arrays and plain containers only, got a pickle that "
            f"asks for {module}.{name}; it was not read. Make the file again with "
            f"`kdfast data infos`"
        )

    def persistent_load(self, pid: Any) -> Any:
        """Pickles of numbers have no outside references."""
        raise RefusedPickleError(f"{self._name}: must hold no persistent ids, got {pid!r}")


def _no_bytes(*content: Any) -> bytes:
    # How protocol 2 writes b"".
    if content:
        raise RefusedPickleError("bytes must be written as text, got a call")
    return b""


def _bytes(text: str, codec: str) -> bytes:
    # How protocol 2 writes bytes.
    if codec != "latin1":
        raise RefusedPickleError(f"bytes must be written as latin1, got {codec!r}")
    return text.encode("latin1")


def _empty_array(kind: Any, shape: Any, code: Any) -> np.ndarray:
    # Its contents come by __setstate__, which checks their length.
    if kind is not _ARRAY or tuple(shape) != (0,):
        raise RefusedPickleError(f"an array must start empty, got {kind!r} of shape {shape!r}")
    return np.ndarray((0,), dtype=np.int8)


def _scalar(kind: np.dtype[Any], data: Any = None) -> Any:
    if kind.hasobject:
        raise RefusedPickleError("a numpy scalar must be a number or a string, got an object")
    raw = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(raw, dtype=kind, count=1)[0]


def _from_buffer(buffer: Any, kind: np.dtype[Any], shape: Any, order: Any) -> np.ndarray:
    if kind.hasobject:
        raise RefusedPickleError("a buffer must hold numbers or strings, got objects")
    return np.frombuffer(buffer, dtype=kind).reshape(shape, order=order).copy()


def load_pickle(path: str | Path) -> Any:
    """Contents of a pickle of numpy arrays and plain containers.

    Raises:
        FileNotFoundError: There is no such file.
        RefusedPickleError: It asks for anything else; nothing of it was run.
        ValueError: It is not a whole pickle.
    """
    with open(path, "rb") as file:
        return _read(file, str(path))


def load_object_npz(path: str | Path, key: str = "arr") -> Any:
    """The one Python object that an ``.npz`` file keeps as a pickle under ``key``.

    Bench2Drive's maps (``Town##_HD_map.npz``) are such files.

    Raises:
        FileNotFoundError: There is no such file.
        RefusedPickleError: The pickle in it asks for more than arrays and containers.
        ValueError: It is damaged or holds no ``key``.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if f"{key}.npy" not in names:
                raise ValueError(f"{path}: must hold an array {key!r}, got {names}")
            content = archive.read(f"{key}.npy")
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path}: must be an .npz file, got a damaged one ({error})") from error
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    header = (
        np.lib.format.read_array_header_1_0(file)
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0(file)
    )
    if header[2] != np.dtype(object):
        raise ValueError(f"{path}: {key!r} must be a pickled object, got {header[2]}")
    held = _read(file, str(path))
    return held.item() if isinstance(held, np.ndarray) and held.ndim == 0 else held


def _read(file: BinaryIO, name: str) -> Any:
    try:
        return _Reader(file, name).load()
    except RefusedPickleError:
        raise
    except MemoryError as error:
        raise ValueError(f"{name}: needs more memory than there is") from error
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(
            f"{name}: must be a pickle of arrays, got a damaged or foreign file "
            f"({type(error).__name__}: {error})"
        ) from error
