# SPDX-License-Identifier: Apache-2.0
"""Shards by path or by URL of fsspec: which there are, and bytes of them."""

from __future__ import annotations

import importlib.util
import os
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
# They have no positions to read a picture at.
COMPRESSED = {
    ".tar.gz": "gunzip",
    ".tgz": "gunzip",
    ".tar.bz2": "bunzip2",
    ".tar.xz": "unxz",
    ".tar.zst": "unzstd",
}
INSTALL = "pip install 'kdfast[shards]'"


class Files:
    """A filesystem of fsspec that survives a fork: every process makes its own.

    Attributes:
        url: Any address on it.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._made: tuple[int, Any] = (0, None)

    def here(self) -> Any:
        """The filesystem of this process."""
        if self._made[0] != os.getpid():
            self._made = (os.getpid(), fsspec.core.url_to_fs(self.url)[0])
        return self._made[1]

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "_made": (0, None)}


@dataclass(frozen=True)
class Shard:
    """One file of many pictures.

    Attributes:
        files: The filesystem that it is on.
        path: Its path there.
        size: Bytes.
    """

    files: Files
    path: str
    size: int

    @property
    def name(self) -> str:
        """The last part of its path."""
        return posixpath.basename(self.path)

    @property
    def local(self) -> Path | None:
        """Its path on this machine; None for one elsewhere."""
        return None if is_url(self.files.url) else Path(self.path)

    def open(self) -> IO[bytes]:
        """The whole file."""
        opened: IO[bytes] = self.files.here().open(self.path, "rb")
        return opened


def read_ranges(ranges: Sequence[tuple[Shard, int, int]]) -> list[bytes]:
    """Bytes of several ranges of shards on one filesystem, which a network has under way together.

    Args:
        ranges: Shard, first byte, and the byte after the last.

    Raises:
        OSError: One cannot be read.
    """
    if not ranges:
        return []
    shards, starts, ends = zip(*ranges, strict=True)
    found: list[bytes] = (
        shards[0]
        .files.here()
        .cat_ranges([shard.path for shard in shards], list(starts), list(ends), on_error="raise")
    )
    return found


def is_url(root: str | Path) -> bool:
    """Whether this is an address for fsspec and no path."""
    return "://" in str(root)


def find_shards(kind: str, root: str | Path | None, suffix: str) -> list[Shard]:
    """The shards of a folder, a file, or a pattern, in the order of their paths.

    Args:
        kind: For messages.
        root: Folder (searched at any depth), file, or pattern with ``*`` or ``{000..127}``; a path
            or a URL such as ``s3://bucket/train-*.tar``.
        suffix: Of the files.

    Raises:
        FileNotFoundError: There is none.
        ImportError: The package for the braces or the protocol is missing.
        ValueError: No place was given, or it is a pipe.
    """
    if root is None:
        raise ValueError(f"root: kind {kind!r} needs a folder, pattern or URL of *{suffix} shards")
    text = str(root)
    if text.startswith("pipe:"):
        raise ValueError(
            f"root: kind {kind!r} reads pictures by their position, which a pipe has not; name "
            f"files or a URL such as s3://bucket/train-*{suffix}, got {text}"
        )
    if not is_url(text):
        text = os.path.abspath(os.path.expanduser(text))
    found = {shard.path: shard for one in _braces(text) for shard in _matching(one, (suffix,))}
    if not found:
        packed = [one.path for part in _braces(text) for one in _matching(part, tuple(COMPRESSED))]
        what = str(root)
        if packed:
            tool = next(tool for end, tool in COMPRESSED.items() if packed[0].endswith(end))
            what = f"only compressed ones such as {packed[0]}; `{tool}` them"
        raise FileNotFoundError(f"root: must hold *{suffix} shards for kind {kind!r}, got {what}")
    return [found[path] for path in sorted(found)]


def _braces(text: str) -> list[str]:
    if "{" not in text:
        return [text]
    if importlib.util.find_spec("braceexpand") is None:
        raise ImportError(
            f"root: braces need braceexpand, run `{INSTALL}`, or write * for them, got {text}"
        )
    import braceexpand

    return list(braceexpand.braceexpand(text))


def _matching(url: str, suffixes: tuple[str, ...]) -> list[Shard]:
    try:
        files, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ImportError(f"root: {url} needs a package of fsspec: {error}") from error
    except ValueError as error:
        raise ValueError(f"root: must be a path or a URL of fsspec, got {url}: {error}") from error
    if "*" in path or "?" in path:
        facts = files.glob(path, detail=True)
    elif files.isdir(path):
        facts = files.find(path, detail=True)
    elif files.exists(path):
        facts = {path: files.info(path)}
    else:
        facts = {}
    here, fixed = Files(url), re.split(r"[^/]*[*?]", path)[0]
    return [
        Shard(here, name, int(fact["size"]))
        for name, fact in facts.items()
        if fact["type"] != "directory" and name.endswith(suffixes) and not _hidden(name, fixed)
    ]


def _hidden(name: str, root: str) -> bool:
    """Whether a part of a path below its root starts with a dot, as files do that are not whole."""
    return any(part.startswith(".") for part in name.removeprefix(root).split("/"))


def is_part(root: str | Path) -> bool:
    """Whether a root names some files of a folder and not all of them."""
    return any(mark in str(root) for mark in "*?{") or str(root).endswith(".tar")


def holds_shards(root: str | Path | None) -> bool:
    """Whether a root is tar shards and no folder of pictures."""
    if root is None:
        return False
    if is_url(root) or is_part(root):
        return True
    path = Path(root).expanduser()
    return not (path / "v1").is_dir() and any(path.glob("*.tar"))


def split_of(shard: Shard, root: str) -> str:
    """The split that the name of a shard, or of a folder below ``root``, begins with; or train."""
    for word in reversed(shard.path.removeprefix(root).split("/")):
        first = re.match("[a-z]+", word.lower())
        if first and first[0] in SPLITS:
            return SPLITS[first[0]]
    return "train"


def common_folder(shards: Sequence[Shard]) -> str:
    """The folder that all shards are in."""
    return posixpath.commonpath([posixpath.dirname(shard.path) for shard in shards])
