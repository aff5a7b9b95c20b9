# SPDX-License-Identifier: Apache-2.0
"""Compressed data files: how large they become is known, or limited, before they are read."""

from __future__ import annotations

import gzip
import tarfile
import zipfile
import zlib
from pathlib import Path

from kdfast.machine.limits import MAX_RATIO

# Small files may become this large whatever their ratio is.
FREE = 64 << 20


def unpacked_limit(path: Path) -> int:
    """Bytes that a compressed file may become."""
    return FREE + MAX_RATIO() * path.stat().st_size


def check_unpacked(path: Path) -> None:
    """Raises ValueError if a zip file says that it becomes too large."""
    with zipfile.ZipFile(path) as archive:
        size = sum(record.file_size for record in archive.infolist())
    require_unpacked(path, size)


def require_unpacked(path: Path, size: int) -> None:
    """Raises ValueError if ``size`` is more than a compressed file may become."""
    if size > unpacked_limit(path):
        raise ValueError(_too_large(path))


def unpacked(path: Path) -> bytes:
    """Content of a gzip file.

    Raises:
        ValueError: It is damaged, or becomes too large.
    """
    limit = unpacked_limit(path)
    try:
        with gzip.open(path) as file:
            data: bytes = file.read(limit + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path.name}: must be a whole gzip file: {error}") from error
    if len(data) > limit:
        raise ValueError(_too_large(path))
    return data


def tar_files(path: Path) -> dict[str, bytes]:
    """Content of all files of an archive, by name without folders.

    Raises:
        tarfile.TarError: It is damaged; other errors of the decompressors as well.
        ValueError: Its files become too large.
    """
    limit, total, files = unpacked_limit(path), 0, {}
    with tarfile.open(path) as archive:
        for member in archive:
            total += member.size
            if total > limit:
                raise ValueError(_too_large(path))
            if (file := archive.extractfile(member)) is not None:
                files[member.name.rsplit("/", 1)[-1]] = file.read()
    return files


def _too_large(path: Path) -> str:
    size = path.stat().st_size
    return (
        f"{path.name}: {size:,} bytes become more than {unpacked_limit(path):,}; "
        f"{MAX_RATIO.name} changes that limit"
    )
