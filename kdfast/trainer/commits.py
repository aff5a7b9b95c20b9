# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a training: which files belong together is decided by one rename.

A commit writes the new state as ``next.pt``, then ``manifest.json`` with size and SHA-256 of every
file that belongs to it. Renaming the manifest is the commit. After that ``next.pt`` takes its names
(``last.pt``, and ``best.pt`` where it is the best), the one before becomes ``previous.pt``. Killed
before the rename, a process leaves the older commit whole; killed after it, ``settle`` finishes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kdfast.machine.digest import file_digest
from kdfast.machine.disk import require_room, room_for
from kdfast.machine.files import load_torch, replacing, sync, write_text
from kdfast.machine.weights import tensor_bytes

LAST, PREVIOUS, BEST, NEXT = "last.pt", "previous.pt", "best.pt", "next.pt"
MANIFEST = "manifest.json"
FORMAT = 1
Manifest = dict[str, "Entry"]


class Entry(NamedTuple):
    """What a manifest says of a file.

    Attributes:
        bytes: Its size; a log may have grown since.
        sha256: Of so many bytes.
        step: Optimiser steps that were done; None where the file is no checkpoint.
    """

    bytes: int
    sha256: str
    step: int | None = None


def save_checkpoint(
    folder: Path, state: dict[str, Any], *, best: bool = False, beside: Iterable[Path] = ()
) -> Path:
    """Commit a state as ``last.pt``; the one before stays as ``previous.pt``.

    Args:
        folder: Exists already.
        state: Tensors, plain containers and scalars; ``step`` is named in the manifest.
        best: It becomes ``best.pt`` too.
        beside: Other files that belong to it; those that are not there are left out.

    Returns:
        The file.
    """
    settle(folder)
    require_room(folder / LAST, tensor_bytes(state))
    staged = folder / NEXT
    try:
        with room_for(folder / LAST, staged), staged.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        entry = _entry(staged, state.get("step"))
        write_manifest(folder / MANIFEST, _following(folder, entry, best), beside)
    except BaseException:
        # Kept where the manifest has it: then the next commit, or a resume, finishes this one.
        with suppress(ValueError):
            settle(folder)
        raise
    settle(folder)
    return folder / LAST


def _following(folder: Path, entry: Entry, best: bool) -> Manifest:
    """The checkpoints of the commit that comes now."""
    before = read_manifest(folder / MANIFEST)
    older = before.get(LAST if (folder / LAST).is_file() else PREVIOUS)
    finest = entry if best else before.get(BEST)
    named = {LAST: entry, PREVIOUS: older, BEST: finest}
    return {name: value for name, value in named.items() if value is not None}


def write_manifest(path: Path, files: Manifest, beside: Iterable[Path]) -> None:
    """Commit files together, by the rename that puts the manifest in place.

    Args:
        path: The manifest.
        files: Entries of files whose content is on the disk.
        beside: More files, which are read here; those that are not there are left out.
    """
    found = dict(files)
    for file in beside:
        if file.is_file():
            sync(file)
            found[os.path.relpath(file, path.parent)] = _entry(file, None)
    named = {name: entry._asdict() for name, entry in found.items()}
    write_text(path, json.dumps({"format": FORMAT, "files": named}, indent=1) + "\n")


def _entry(path: Path, step: int | None) -> Entry:
    return Entry(path.stat().st_size, file_digest(path), step)


def read_manifest(path: Path) -> Manifest:
    """What a manifest names; nothing where there is none.

    Raises:
        ValueError: It is damaged.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r} instead of {FORMAT}")
        return {name: Entry(**entry) for name, entry in content["files"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"checkpoint: {path} is damaged: {error}; delete it to take the files unchecked"
        ) from error


def settle(folder: Path) -> None:
    """Finish the commit that a killed process had decided, or remove what it had not.

    Raises:
        ValueError: The manifest is damaged.
    """
    staged, last = folder / NEXT, folder / LAST
    if not staged.is_file():
        return
    files = read_manifest(folder / MANIFEST)
    if not _holds(staged, files.get(LAST)):
        staged.unlink()
        return
    if files.get(BEST) == files[LAST]:
        _second_name(staged, folder / BEST)
    if last.is_file():
        os.replace(last, folder / PREVIOUS)
    os.replace(staged, last)
    sync(folder)


def _holds(path: Path, entry: Entry | None) -> bool:
    return (
        entry is not None
        and path.stat().st_size == entry.bytes
        and file_digest(path) == entry.sha256
    )


def _second_name(source: Path, target: Path) -> None:
    """Give a file another name too: later renames leave that name's content alone."""
    with replacing(target) as partial:
        partial.unlink(missing_ok=True)
        try:
            os.link(source, partial)
        except OSError:
            shutil.copyfile(source, partial)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint of a folder, or None."""
    return next((folder / n for n in (LAST, PREVIOUS) if (folder / n).is_file()), None)


def check_file(path: Path, manifest: Path | None = None, way_back: str | None = None) -> None:
    """Compare a file with a manifest; one that the manifest does not name is not checked.

    Args:
        path: The file.
        manifest: The manifest; that of the folder's checkpoints if None.
        way_back: What the message advises; None: what helps with checkpoints.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not the file that was written; the message says what to do.
    """
    entry = read_manifest(manifest or path.with_name(MANIFEST)).get(path.name)
    if entry is None or _holds(path, entry):
        return
    found = path.stat().st_size
    what = "its bytes are not those that were written"
    if found != entry.bytes:
        what = f"it has {found:,} bytes instead of {entry.bytes:,}"
    raise ValueError(f"checkpoint: {path} is damaged: {what}; {way_back or _way_back(path)}")


def _way_back(path: Path) -> str:
    older = path.with_name(PREVIOUS)
    if path.name == LAST and older.is_file():
        return f"delete it, and {older} is taken"
    if path.name == BEST:
        return "delete it, and --resume takes the best epoch of those that are still to come"
    return "delete it and train again"


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; no code from the file is run.

    Raises:
        ValueError: The file is damaged, or of another format.
    """
    check_file(path)
    try:
        state: dict[str, Any] = load_torch(path)
    except ValueError as error:
        raise ValueError(f"checkpoint: {error}; {_way_back(path)}") from error
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise ValueError(f"checkpoint: {path} must have format {FORMAT}, got {found!r}")
    return state


def step_of(path: Path) -> int | None:
    """Optimiser steps that a checkpoint holds; None where neither manifest nor file say it.

    Raises:
        ValueError: The file is damaged.
    """
    check_file(path)
    entry = read_manifest(path.with_name(MANIFEST)).get(path.name)
    step: int | None = load_checkpoint(path).get("step") if entry is None else entry.step
    return step


def changed(folder: Path, path: Path) -> bool:
    """Whether a file that the newest commit names no longer begins as it was then.

    Raises:
        ValueError: The manifest is damaged.
    """
    entry = read_manifest(folder / MANIFEST).get(os.path.relpath(path, folder))
    if entry is None:
        return False
    short = not path.is_file() or path.stat().st_size < entry.bytes
    return short or file_digest(path, entry.bytes) != entry.sha256
