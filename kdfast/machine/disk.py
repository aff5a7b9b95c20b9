# SPDX-License-Identifier: Apache-2.0
"""Full disks and folders that cannot be written: said in one line, and before long work."""

from __future__ import annotations

import errno
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NO_SPACE, TOO_LARGE = "no space left", "larger than a file may be here"
_REASONS = {errno.ENOSPC: NO_SPACE, errno.EDQUOT: NO_SPACE, errno.EFBIG: TOO_LARGE}
# What the writers of torch and safetensors say, which are not written in Python.
_TEXTS = {
    "No space left on device": NO_SPACE,
    "os error 28": NO_SPACE,
    "Disk quota exceeded": NO_SPACE,
    "iostream error": NO_SPACE,
    "File too large": TOO_LARGE,
    "os error 27": TOO_LARGE,
}


# Folders of ``replacing_files``.
_STAGED = re.compile(r"\.files\..*\.kdfast")


class DiskFull(OSError):
    """There is no room for a file; the message names it, and how much is free."""

    def __init__(self, text: str) -> None:
        super().__init__(errno.ENOSPC, text)

    def __str__(self) -> str:
        return str(self.strerror)


@contextmanager
def room_for(path: Path, partial: Path | None = None) -> Iterator[None]:
    """Context in which a file is written; turns what a full disk makes of that into ``DiskFull``.

    Args:
        path: The file.
        partial: Where it is written, if not there: a file or a folder of files, which goes when
            the writing fails.

    Raises:
        DiskFull: The disk or the user's share of it is full.
    """
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        written = partial or path
        files = [written, *written.rglob("*")]
        size = sum(file.stat().st_size for file in files if file.is_file())
        free = free_bytes(path.parent) + (size if partial else 0)
        raise DiskFull(
            f"{_shown(path)}: {reason}, it needs more than {size:,} bytes and {free:,} are free; "
            f"make room or choose another folder"
        ) from error


def require_room(path: Path, size: int) -> None:
    """Raises DiskFull unless a file or folder of ``size`` bytes can be made beside ``path``."""
    free = free_bytes(path.parent)
    if size > free:
        raise DiskFull(
            f"{_shown(path)}: {NO_SPACE}, it needs {size:,} bytes and {free:,} are free; make room "
            f"or choose another folder"
        )


def _shown(path: Path) -> Path:
    """A path without the folder in which files wait for others."""
    return Path(*(part for part in path.parts if not _STAGED.fullmatch(part)))


def require_writable(folder: Path, what: str) -> None:
    """Makes a folder if it is missing and opens a file in it that has no name, so none is left.

    Asked before long work whose result goes there.

    Args:
        folder: The folder.
        what: The setting that names it, for the message.

    Raises:
        ValueError: It cannot be written; the message says why.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{what}: {folder} cannot be written: {error.strerror}") from error


def free_bytes(folder: Path) -> int:
    """Bytes that a user may still write into a folder, which need not exist yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _reason(error: BaseException) -> str | None:
    """Why a full disk or a limit ended a writing; None where neither did."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _REASONS:
            return _REASONS[seen.errno]
        found = [reason for text, reason in _TEXTS.items() if text in str(seen)]
        if found:
            return found[0]
        seen = seen.__cause__ or seen.__context__
    return None
