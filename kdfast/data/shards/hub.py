# SPDX-License-Identifier: Apache-2.0
"""Pictures of Hugging Face datasets: memory-mapped rows by number, or a stream from the front.

That library reads parquet, and what is on the hub, into Arrow files of its own cache once; a row
is then read from the disk where it is needed. It runs no code of a dataset.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdfast.data.corrupt import Unreadable
from kdfast.data.shards.names import Names
from kdfast.data.shards.places import SPLITS, common_folder, find_shards, is_url, split_of

LABELS = ("label", "labels", "fine_label", "class", "target")
# What ``Dataset.save_to_disk`` and ``DatasetDict.save_to_disk`` leave.
SAVED = ("state.json", "dataset_dict.json")
_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?")


def is_hub(root: str | Path) -> bool:
    """Whether a place that was named without its kind is a dataset: saved, parquet, or a name."""
    path = Path(str(root)).expanduser()
    if is_url(root) or "*" in str(root):
        return str(root).endswith(".parquet")
    if not path.exists():
        return _NAME.fullmatch(str(root)) is not None
    saved = any((path / name).is_file() for name in SAVED)
    return saved or path.suffix == ".parquet" or any(path.rglob("*.parquet"))


class HubPictures:
    """The pictures of one split, read from memory-mapped files.

    Attributes:
        names: Of the files that were packed, or the numbers of the rows.
    """

    def __init__(self, rows: Any, column: str, split: str) -> None:
        # Else every read would also make what the other columns hold.
        self.rows, self.column, self.split = rows.select_columns([column]), column, split
        parts = [_facts(chunk) for chunk in rows.data.column(column).chunks]
        self._sizes: NDArray[np.int64] = np.concatenate([sizes for _, sizes in parts])
        paths = [path for part, _ in parts for path in part]
        self.names = Names(path or f"row {n}" for n, path in enumerate(paths))

    def __len__(self) -> int:
        return len(self.names)

    def where(self, row: int) -> str:
        """See ``Stored``."""
        return f"{self.split} row {row} ({self.names[row]})"

    def stamp(self, row: int) -> str:
        """See ``Stored``: the name and the number of bytes."""
        return f"{self.names[row]}\0{self._sizes[row]}\n"

    def fetch(self, rows: Sequence[int]) -> list[bytes | Unreadable]:
        """See ``Stored``."""
        return [encoded(cell) for cell in self.rows[list(rows)][self.column]] if rows else []


def encoded(cell: Any) -> bytes | Unreadable:
    """The bytes of a cell of pictures: bytes, or ``{"bytes", "path"}`` of which one may lack.

    Raises:
        OSError: The file that it names cannot be opened.
    """
    if isinstance(cell, bytes):
        return cell
    if cell is None or (cell["bytes"] is None and not cell["path"]):
        return Unreadable("the row has no picture")
    data: bytes | None = cell["bytes"]
    return Path(cell["path"]).read_bytes() if data is None else data


def _facts(chunk: Any) -> tuple[Sequence[str | None], NDArray[np.int64]]:
    """Names and numbers of bytes of a chunk, of which only offsets are read."""
    import pyarrow as pa
    import pyarrow.compute as pc

    struct = pa.types.is_struct(chunk.type)
    data = chunk.field("bytes") if struct else chunk
    paths = chunk.field("path").to_pylist() if struct else [None] * len(chunk)
    sizes = pc.fill_null(pc.binary_length(data), -1).to_numpy(zero_copy_only=False)
    return paths, sizes.astype(np.int64)


@dataclass(frozen=True)
class Columns:
    """What is taken of a dataset.

    Attributes:
        image: Name of the column of pictures.
        label: Name of that of labels; None: they were not asked for.
        classes: Names of the classes in their order; empty where the dataset gives none.
    """

    image: str
    label: str | None
    classes: list[str]


def opened(
    root: str | Path | None,
    *,
    image_key: str | None = None,
    label_key: str | None = None,
    labelled: bool | None,
    stream: bool = False,
) -> tuple[dict[str, Any], Columns]:
    """The splits of a dataset, train, val and test, whose pictures stay encoded; and its columns.

    Args:
        root: Folder of ``save_to_disk``; folder, file, pattern or URL of parquet; or the name on
            the hub, ``OWNER/NAME`` or ``OWNER/NAME:CONFIG``.
        image_key: Column of the pictures; None: the only one.
        label_key: Column of the labels; None: one of ``LABELS``.
        labelled: Whether labels are wanted; None: where there is a column of ``LABELS``.
        stream: Read from the front without a copy on this machine.

    Raises:
        FileNotFoundError: There is no such dataset.
        ImportError: The package ``datasets`` is missing.
        ValueError: It cannot be read, or lacks a column.
    """
    if importlib.util.find_spec("datasets") is None:
        raise ImportError("huggingface: needs datasets, run `pip install 'kdfast[datasets]'`")
    import datasets

    found = _loaded(root, stream)
    if not isinstance(found, dict):
        found = {"train": found}
    splits = _splits(found)
    features = splits["train"].features
    if features is None:
        raise ValueError(f"root: {root} says nothing of its columns; stream a set of parquet files")
    columns = _columns(features, image_key, label_key, labelled)
    if isinstance(features[columns.image], datasets.Image):
        cell = datasets.Image(decode=False)
        splits = {name: one.cast_column(columns.image, cell) for name, one in splits.items()}
    return splits, columns


def _loaded(root: str | Path | None, stream: bool) -> Any:
    import datasets
    import pyarrow as pa

    if root is None:
        raise ValueError(
            "root: kind 'huggingface' needs a folder, pattern or URL of *.parquet, a folder of "
            "save_to_disk, or a name such as OWNER/NAME"
        )
    path, more = Path(str(root)).expanduser(), {"streaming": True} if stream else {}
    try:
        if not is_url(root) and any((path / name).is_file() for name in SAVED):
            found = datasets.load_from_disk(str(path))
            return _streams(found) if stream else found
        if is_url(root) or path.exists() or any(mark in str(root) for mark in "*?{"):
            return datasets.load_dataset("parquet", data_files=_files(root), **more)
        if name := _NAME.fullmatch(str(root)):
            return datasets.load_dataset(name[1], name[2], **more)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise FileNotFoundError(f"root: {error}") from error
    except (datasets.exceptions.DatasetGenerationError, pa.ArrowException) as error:
        raise ValueError(f"root: {root} cannot be read: {error.__cause__ or error}") from error
    raise FileNotFoundError(f"root: there is no folder, file or dataset {root}")


def _streams(found: Any) -> Any:
    if isinstance(found, dict):
        return {name: one.to_iterable_dataset() for name, one in found.items()}
    return found.to_iterable_dataset()


def _files(root: str | Path) -> dict[str, list[str]]:
    shards = find_shards("huggingface", root, ".parquet")
    files: dict[str, list[str]] = {}
    folder = common_folder(shards)
    for shard in shards:
        address = str(shard.local or shard.files.here().unstrip_protocol(shard.path))
        files.setdefault(split_of(shard, folder), []).append(address)
    return files


def _splits(found: dict[str, Any]) -> dict[str, Any]:
    """Splits by our names; one split of any name is train."""
    named = {SPLITS.get(re.split(r"[^a-z]", name.lower())[0], ""): name for name in found}
    if len(found) == 1:
        return {"train": next(iter(found.values()))}
    if "train" not in named:
        raise ValueError(f"root: must have a split train, got {', '.join(map(str, found))}")
    return {ours: found[name] for ours, name in named.items() if ours}


def _columns(features: Any, image: str | None, label: str | None, labelled: bool | None) -> Columns:
    import datasets

    pictures = [name for name, one in features.items() if isinstance(one, datasets.Image)]
    pictures = pictures or [n for n, one in features.items() if _is_value(one, "binary")]
    text = ", ".join(features)
    if image is None and len(pictures) != 1:
        raise ValueError(f"data.image_key: must name the column of pictures, got columns {text}")
    chosen = image or pictures[0]
    if chosen not in pictures:
        raise ValueError(f"data.image_key: must be a column of pictures, got {chosen} of {text}")
    known = [name for name in LABELS if name in features] if label is None else [label]
    if not (known if labelled is None else labelled):
        return Columns(chosen, None, [])
    if not known or known[0] not in features:
        what = " or ".join(LABELS) if label is None else label
        raise ValueError(f"data.label_key: there must be a column {what}, got {text}")
    kind = features[known[0]]
    is_class = isinstance(kind, datasets.ClassLabel)
    if not is_class and not _is_value(kind, "int") and not _is_value(kind, "string"):
        raise ValueError(
            f"data.label_key: {known[0]} must hold a class, a whole number or a name, got {kind}"
        )
    return Columns(chosen, known[0], list(kind.names) if is_class else [])


def _is_value(feature: Any, dtype: str) -> bool:
    return dtype in str(getattr(feature, "dtype", "")) and type(feature).__name__ == "Value"


def streamed(rows: Any, columns: Columns, start: int) -> Iterator[tuple[Any, Any]]:
    """Cells of pictures and labels from a row on; the files before it are not decoded."""
    names = [columns.image] if columns.label is None else [columns.image, columns.label]
    for row in rows.select_columns(names).skip(start):
        yield row[columns.image], None if columns.label is None else row[columns.label]
