# SPDX-License-Identifier: Apache-2.0
"""Kind `parquet`: shards as the Hugging Face hub stores image sets."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdfast.data.corrupt import Unreadable
from kdfast.data.labelled.pictures import EncodedSource, Part
from kdfast.data.labelled.raw import Raw, resolve
from kdfast.data.labelled.unpack import require_unpacked

if TYPE_CHECKING:
    import pyarrow as pa

EXPECTED = (
    "*.parquet at any depth, named train*, val*, valid*, validation* or test*, with a column of "
    "images {bytes, path} and one of whole numbers"
)
OBTAIN = "the `data` folder of an image classification set on huggingface.co/datasets"
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
LABELS = ("label", "labels", "fine_label", "class", "target")


class ColumnSource(EncodedSource):
    """Encoded pictures of a column, in memory; files that it only names are read when needed."""

    def __init__(self, root: Path, cells: list[dict[str, Any]]) -> None:
        super().__init__([str(cell.get("path") or f"row {n}") for n, cell in enumerate(cells)])
        self.root = root
        self.cells = cells

    def fetch(self, rows: Sequence[int]) -> list[bytes | Unreadable]:
        """See ``EncodedSource``."""
        return [self._content(row) for row in rows]

    def _content(self, row: int) -> bytes:
        cell = self.cells[row]
        data: bytes | None = cell["bytes"]
        return (self.root / cell["path"]).read_bytes() if data is None else data

    def stamp(self, row: int) -> str:
        """See ``Source``."""
        return hashlib.sha256(self._content(row)).hexdigest()


def read_parquet(root: str | Path | None) -> Raw:
    """Read all shards of a folder, or one file.

    The split is the first word of a shard's name, or of a folder above it; without any the rows
    are all for training. Class names come from the features that the Hugging Face library stores.

    Raises:
        FileNotFoundError: There is no shard.
        ImportError: pyarrow is missing.
        ValueError: A shard is broken, lacks a column, or the splits do not have the same classes.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise ImportError("parquet: needs pyarrow, run `pip install 'kdfast[train]'`")
    path = resolve("parquet", root, EXPECTED, OBTAIN)
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    if not files:
        raise FileNotFoundError(f"root: must hold {EXPECTED}, got none in {path}; {OBTAIN}")
    folder = path.parent if path.is_file() else path
    shards: dict[str, list[Path]] = {}
    for file in files:
        shards.setdefault(_split(file.relative_to(folder)), []).append(file)
    if "train" not in shards:
        raise ValueError(f"root: must hold shards named train*, got {sorted(shards)} in {path}")
    parts, names = {}, set()
    for split, members in shards.items():
        tables = [_read(member) for member in members]
        cells = [cell for images, _, _ in tables for cell in images]
        labels = np.concatenate([numbers for _, numbers, _ in tables])
        names |= {classes for _, _, classes in tables}
        parts[split] = Part.whole(ColumnSource(folder, cells), labels)
    if len(names) != 1:
        raise ValueError(f"root: all shards must have the same class names, got {len(names)} lists")
    classes = _classes(parts, *names)
    return Raw("parquet", parts["train"], parts.get("val"), parts.get("test"), classes)


def _split(name: Path) -> str:
    for word in (name.name, *reversed(name.parts[:-1])):
        first = re.match("[a-z]+", word.lower())
        if first and first[0] in SPLITS:
            return SPLITS[first[0]]
    return "train"


def _classes(parts: dict[str, Part], names: tuple[str, ...]) -> list[str]:
    lowest = min(int(part.targets.min()) for part in parts.values() if len(part))
    highest = max(int(part.targets.max()) for part in parts.values() if len(part))
    if lowest < 0 or (names and highest >= len(names)):
        raise ValueError(
            f"labels: must be in [0, {len(names) or 'C'}), got {lowest} to {highest}; "
            f"hidden test labels of -1 cannot be used"
        )
    return list(names) or [str(number) for number in range(highest + 1)]


def _read(path: Path) -> tuple[list[dict[str, Any]], np.ndarray[Any, Any], tuple[str, ...]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        facts = pq.read_metadata(path)
        groups = [facts.row_group(n) for n in range(facts.num_row_groups)]
        require_unpacked(path, sum(group.total_byte_size for group in groups))
        schema = pq.read_schema(path)
        image, label = _columns(schema, path)
        table = pq.read_table(path, columns=[image, label])
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path.name}: must be a parquet file: {error}") from error
    cells = table.column(image).to_pylist()
    if not pa.types.is_struct(schema.field(image).type):
        cells = [{"bytes": cell, "path": None} for cell in cells]
    empty = [
        n for n, c in enumerate(cells) if c is None or (c["bytes"] is None and not c.get("path"))
    ]
    if empty or table.column(label).null_count:
        row = f"row {empty[0]}" if empty else "a label"
        raise ValueError(
            f"{path.name}: every row must have a picture and a label, got none in {row}"
        )
    return cells, table.column(label).to_numpy().astype(np.int64), _names(schema, label)


def _columns(schema: pa.Schema, path: Path) -> tuple[str, str]:
    import pyarrow as pa

    images = [
        field.name
        for field in schema
        if (pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0)
        or pa.types.is_binary(field.type)
        or pa.types.is_large_binary(field.type)
    ]
    whole = [field.name for field in schema if pa.types.is_integer(field.type)]
    labels = [name for name in LABELS if name in whole] or whole
    if not images or not labels:
        found = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise ValueError(
            f"{path.name}: must have a column of images {{bytes, path}} and one of whole numbers "
            f"({', '.join(LABELS)}), got {found}"
        )
    return images[0], labels[0]


def _names(schema: pa.Schema, label: str) -> tuple[str, ...]:
    stored = (schema.metadata or {}).get(b"huggingface")
    if stored is None:
        return ()
    feature = json.loads(stored).get("info", {}).get("features", {}).get(label, {})
    return tuple(feature.get("names", ()))
