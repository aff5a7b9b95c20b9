# SPDX-License-Identifier: Apache-2.0
"""A folder of memory-mapped arrays: how converted infos and maps lie on disk.

``manifest.json`` names every array with its dtype and shape; each is one ``.npy`` file without
pickles. Opening maps the files and reads nothing, whatever their size.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MANIFEST = "manifest.json"


def write_table(
    folder: str | Path, kind: str, arrays: Mapping[str, NDArray[Any]], facts: Mapping[str, Any]
) -> Path:
    """Write arrays and facts as a folder, which appears whole or not at all.

    Args:
        folder: Where; a table that stands there is replaced.
        kind: What the table is, checked when it is opened.
        arrays: Arrays without objects, by name.
        facts: Anything that JSON holds.

    Raises:
        FileExistsError: ``folder`` is something else than a table.
        TypeError: An array holds Python objects.
    """
    target = Path(folder).expanduser()
    if target.exists() and not (target / MANIFEST).is_file():
        raise FileExistsError(f"{target}: must be free or a converted table, got something else")
    objects = [name for name, array in arrays.items() if array.dtype.hasobject]
    if objects:
        raise TypeError(f"write_table: arrays must hold numbers or strings, got objects: {objects}")
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        for name, array in arrays.items():
            np.save(aside / f"{name}.npy", np.ascontiguousarray(array), allow_pickle=False)
        shapes = {name: [array.dtype.str, list(array.shape)] for name, array in arrays.items()}
        manifest = {"kind": kind, "arrays": shapes, "facts": dict(facts)}
        (aside / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        # mkdtemp makes a folder that nobody else may read.
        umask = os.umask(0)
        os.umask(umask)
        aside.chmod(0o777 & ~umask)
        if target.exists():
            shutil.rmtree(target)
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def open_table(folder: str | Path, kind: str) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Memory-mapped arrays and the facts of a table.

    Raises:
        FileNotFoundError: There is no table.
        ValueError: It is of another kind, or damaged.
    """
    source = Path(folder).expanduser()
    again = "make it again with `kdfast data infos`"
    if not (source / MANIFEST).is_file():
        raise FileNotFoundError(f"{source}: must be a folder of {kind}, got none; {again}")
    try:
        manifest = json.loads((source / MANIFEST).read_text(encoding="utf-8"))
        found, shapes, facts = manifest["kind"], manifest["arrays"], manifest["facts"]
        wanted = {name: (np.dtype(code), tuple(shape)) for name, (code, shape) in shapes.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{source / MANIFEST}: must be a manifest, got {error!r}; {again}"
        ) from error
    if found != kind:
        raise ValueError(f"{source}: must hold {kind}, got {found}; {again}")
    arrays: dict[str, NDArray[Any]] = {}
    for name, (dtype, shape) in wanted.items():
        file = source / f"{name}.npy"
        if name != Path(name).name:
            raise ValueError(f"{source / MANIFEST}: must name files of its folder, got {name!r}")
        try:
            # An empty file cannot be mapped.
            mapped = np.load(file, mmap_mode="r" if np.prod(shape) else None, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{file}: must be an array of {shape}, got {error}; {again}"
            ) from error
        if mapped.dtype != dtype or mapped.shape != shape:
            raise ValueError(
                f"{file}: must be {dtype} {shape}, got {mapped.dtype} {mapped.shape}; {again}"
            )
        arrays[name] = mapped
    return arrays, facts
