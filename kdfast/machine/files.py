# SPDX-License-Identifier: Apache-2.0
"""Writes files so that a crash leaves no half of one, and loads ``torch.save`` files safely."""

from __future__ import annotations

import argparse
import os
import pickle
import platform
import re
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdfast.machine.archive import check_archive
from kdfast.machine.disk import room_for

# Files that are not finished yet: .NAME.MACHINE-PROCESS.kdfast.SUFFIX. The suffix stays because
# libraries read the format off it; machine and process say whether the writer may still live.
_NODE = f"{zlib.crc32(platform.node().encode()):08x}"
_PARTIAL = re.compile(r"\..+\.(?P<node>[0-9a-f]{8})-(?P<process>\d+)\.kdfast(\.[^.]*)?")
# Seconds after which the file of a writer that cannot be asked counts as left behind.
ABANDONED = 86400.0


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Context with the name of a file beside ``path``, which takes its place at the end.

    The content is on the disk before the name is: readers see the old content or all of the new
    one, also after a power loss. After an error the old one stays. The file gets the permissions
    that any new file gets here, whatever the library chose that wrote it.

    Raises:
        DiskFull: There is no room for it.
    """
    partial = _partial(path)
    try:
        with room_for(path, partial):
            mode = _new_mode(partial)
            yield partial
            partial.chmod(mode)
            sync(partial)
            os.replace(partial, path)
            sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replacing_files(folder: Path, last: str) -> Iterator[Path]:
    """Context with a folder inside ``folder``, whose files take their places there at the end.

    Killed in between, the process leaves ``folder`` without the file ``last``, never with files of
    two times beside it.

    Raises:
        DiskFull: There is no room for the files.
    """
    staged = _partial(folder / "files")
    staged.mkdir(parents=True)
    try:
        with room_for(folder, staged):
            mode = _new_mode(staged / "new")
            yield staged
            for path in staged.iterdir():
                path.chmod(mode)
                sync(path)
        (folder / last).unlink(missing_ok=True)
        for path in sorted(staged.iterdir(), key=lambda path: path.name == last):
            os.replace(path, folder / path.name)
        sync(folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _new_mode(path: Path) -> int:
    """Permissions of a new file; asking for the umask would change it for other threads."""
    path.touch()
    mode = path.stat().st_mode
    path.unlink()
    return mode


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.stem}.{_NODE}-{os.getpid()}.kdfast{path.suffix}")


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 by ``replacing``."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def clear_partials(folder: Path) -> list[Path]:
    """Remove what killed processes left unfinished in a folder and below it.

    Other files are never touched, nor those of a process that may still live.

    Returns:
        What was removed.
    """
    gone = [path for path in folder.rglob(".*.kdfast*") if _left_behind(path)]
    for path in gone:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return gone


def _left_behind(path: Path) -> bool:
    match = _PARTIAL.fullmatch(path.name)
    if match is None or path.is_symlink() or not path.exists():
        return False
    if time.time() - path.stat().st_mtime > ABANDONED:
        return True
    if match["node"] != _NODE:
        return False
    try:
        os.kill(int(match["process"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    # Containers give the same few numbers again: this process asks before it writes.
    return int(match["process"]) == os.getpid()


# Bytes that a tensor of any file may have.
_SMALL = 1 << 20


class NeedsCode(ValueError):
    """A file holds an object that only running code from the file could make."""


def load_torch(path: str | Path, *, mmap: bool = False) -> Any:
    """What ``torch.save`` wrote: tensors on the CPU, plain containers and scalars.

    Options of a command line (``argparse.Namespace``), which timm and DeiT put beside the weights,
    are plain values too. The checksums of the file are compared first; see ``check_archive``.

    Args:
        path: The file.
        mmap: Map it instead of reading it; only files of the zip format can be.

    Raises:
        OSError: It cannot be opened.
        NeedsCode: It holds something else; the message names it.
        ValueError: It is damaged, or of another kind.
    """
    # Imported here: it takes seconds, and whoever writes text alone needs none of it.
    import torch

    check_archive(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError:
        raise
    except Exception as error:  # on damaged bytes torch's reader stumbles over whatever comes
        # Not all of torch's text: it recommends to run the code of the file.
        text = str(error)
        if isinstance(error, pickle.UnpicklingError) and "Unsupported operand" not in text:
            name = re.search(r"GLOBAL (\S+)", text)
            raise NeedsCode(
                f"{path} must hold tensors and plain values only, got "
                f"{name[1] if name else 'another object'}"
            ) from error
        what = text.splitlines()[0] if isinstance(error, RuntimeError) else type(error).__name__
        raise ValueError(f"{path} must be a whole file of torch.save, got {what}") from error
    _check_sizes(path, found)
    return found


def _check_sizes(path: str | Path, found: Any) -> None:
    """Raises ValueError for a view of few numbers as so many that a copy would take all memory."""
    from torch import Tensor

    size, left, known = Path(path).stat().st_size, [found], {id(found)}
    while left:
        value = left.pop()
        if isinstance(value, Tensor):
            if value.numel() * value.element_size() > max(size, _SMALL):
                raise ValueError(
                    f"{path} must hold tensors no larger than itself, got {tuple(value.shape)} in "
                    f"{size:,} bytes"
                )
            continue
        parts = [*value.values()] if isinstance(value, dict) else []
        parts += value if isinstance(value, list | tuple) else []
        parts = [part for part in parts if id(part) not in known]
        known.update(map(id, parts))
        left += parts
