# SPDX-License-Identifier: Apache-2.0
"""Writes files so that a crash leaves no half of one, and loads ``torch.save`` files safely."""

from __future__ import annotations

import argparse
import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdfast.machine.archive import check_archive
from kdfast.machine.disk import room_for


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Context with the name of a file beside ``path``, which takes its place at the end.

    Readers see the old content or all of the new one; after an error the old one stays. The file
    gets the permissions that any new file gets here, whatever the library chose that wrote it.

    Raises:
        DiskFull: There is no room for it.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with room_for(path, partial):
            # The system's answer: asking for the umask would change it for other threads.
            partial.touch()
            mode = partial.stat().st_mode
            partial.unlink()
            yield partial
            partial.chmod(mode)
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file in UTF-8 by ``replacing``."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


# Bytes that a tensor of any file may have.
_SMALL = 1 << 20


class NeedsCode(ValueError):
    """A file holds an object that only running code from the file could make."""


def load_torch(path: str | Path, *, mmap: bool = False) -> Any:
    """What ``torch.save`` wrote: tensors on the CPU, plain containers and scalars.

    Options of a command line (``argparse.Namespace``), which timm and DeiT put beside the weights,
    are plain values too.

    Args:
        path: The file.
        mmap: Map it instead of reading it; only files of the zip format can be.

    The checksums of the file are compared first; see ``check_archive``.

    Raises:
        OSError: It cannot be opened.
        NeedsCode: It holds something else; the message names it.
        ValueError: It is damaged, or of another kind.
    """
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
