# SPDX-License-Identifier: Apache-2.0
"""Where every member of a tar shard begins: written with the shard, or made by listing it once."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

from kdfast.data.shards.names import divided
from kdfast.data.shards.places import Shard
from kdfast.machine.cache import cache_folder
from kdfast.machine.files import write_text

LOG = logging.getLogger("kdfast.data")
SUFFIX = ".index.json"
FORMAT = "kdfast.shard/1"
BLOCK = tarfile.BLOCKSIZE
GZIP = b"\x1f\x8b"
# Members whose content an index keeps: labels, short enough to be no captions.
TEXTS, LONGEST = ("cls", "cls.txt", "json"), 256
# Shards that are listed at the same time: the time goes into waiting for storage.
THREADS = 8


@dataclass
class Index:
    """The members of a shard that are files, in their order.

    Attributes:
        size: Bytes of the shard.
        sha256: Of the shard; empty where it was only listed.
        names: Of the members.
        offsets: Of their first bytes in the shard; the header is the block before.
        sizes: Their bytes.
        crcs: CRC-32 of their bytes; empty where the shard was only listed.
        texts: Content of short members with labels, by name.
    """

    size: int = 0
    sha256: str = ""
    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    crcs: list[int] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, offset: int, size: int) -> None:
        """Append a member."""
        self.names.append(name)
        self.offsets.append(offset)
        self.sizes.append(size)

    def as_text(self) -> str:
        """The content of its file."""
        return json.dumps({"format": FORMAT, **asdict(self)}, separators=(",", ":"))


def keeps_text(name: str, size: int) -> bool:
    """Whether an index keeps the content of a member."""
    found = divided(name)
    return found is not None and size <= LONGEST and found[1] in TEXTS


def grouped(index: Index, path: str) -> list[dict[str, int]]:
    """The samples of a shard as webdataset has them: fields with the numbers of their members.

    Members that follow each other and have one key are one sample.

    Args:
        index: Of the shard.
        path: Of the shard, for messages.

    Raises:
        ValueError: A sample has two fields of one name, as two samples of one key look.
    """
    samples: list[dict[str, int]] = []
    last = None
    for number, name in enumerate(index.names):
        parts = divided(name)
        if parts is None:
            continue
        if parts[0] != last:
            samples.append({})
            last = parts[0]
        if samples[-1].setdefault(parts[1], number) != number:
            raise ValueError(
                f"shard: {path}: must have one field {parts[1]} in a sample, got two in "
                f"{parts[0]}; every sample needs a key of its own"
            )
    return samples


def read_indexes(shards: Sequence[Shard]) -> list[Index]:
    """The indexes of shards: those beside them or in the cache; else the shards are listed.

    Raises:
        OSError: A shard cannot be opened.
        ValueError: A shard that has no index is no whole tar.
    """
    with ThreadPoolExecutor(THREADS) as threads:
        found = list(threads.map(_kept, shards))
        absent = [n for n, index in enumerate(found) if index is None]
        if absent:
            LOG.info("listing %d shards that have no index", len(absent))
        listed = threads.map(list_shard, [shards[n] for n in absent])
        for n, index in zip(absent, listed, strict=True):
            found[n] = index
            _keep(shards[n], index)
    return [index for index in found if index is not None]


def list_shard(shard: Shard) -> Index:
    """The index of a shard, from its headers.

    Raises:
        OSError: It cannot be opened.
        ValueError: It is no whole uncompressed tar, and the message says where it ends; or it
            holds links where pictures should be.
    """
    index = Index(size=shard.size)
    with shard.open() as file:
        archive = None
        try:
            archive = tarfile.open(fileobj=file, mode="r:")
            for member in archive:
                # Else it remembers every member of the shard.
                archive.members.clear()  # type: ignore[attr-defined]
                _require_no_link(shard, member)
                if not member.isreg():
                    continue
                index.add(member.name, member.offset_data, member.size)
                if keeps_text(member.name, member.size):
                    file.seek(member.offset_data)
                    index.texts[member.name] = file.read(member.size).decode("utf-8", "replace")
            _require_end(file, archive.offset)
        except (tarfile.TarError, EOFError) as error:
            at = 0 if archive is None else archive.offset
            got, remedy = f"{error} near byte {at:,} of {shard.size:,}", "write or copy it again"
            file.seek(0)
            if file.read(2) == GZIP:
                got, remedy = "one compressed by gzip", "`gunzip` it, as pictures are read in place"
            raise ValueError(
                f"shard: {shard.path} must be a whole uncompressed .tar, got {got}; {remedy}, or "
                f"take it away"
            ) from error
    return index


def _require_no_link(shard: Shard, member: tarfile.TarInfo) -> None:
    """Else the samples of a folder of links would be left out without a word."""
    if (member.issym() or member.islnk()) and divided(member.name) is not None:
        raise ValueError(
            f"shard: {shard.path}: must hold files, got a link {member.name} to {member.linkname}; "
            f"pack them with `tar --dereference --hard-dereference`"
        )


def _require_end(file: IO[bytes], offset: int) -> None:
    """A reader of tar takes a damaged header for the end, which is a block of zeros or nothing."""
    file.seek(offset)
    if file.read(BLOCK).strip(b"\0"):
        raise tarfile.ReadError("a damaged header")


def _kept(shard: Shard) -> Index | None:
    """The index beside a shard, or of the cache; None if there is none of a shard of this size."""
    try:
        beside = shard.files.here().cat_file(shard.path + SUFFIX)
    except FileNotFoundError:
        beside = b""
    in_cache = _cached(shard)
    content = beside or (in_cache.read_bytes() if in_cache.is_file() else b"")
    if not content:
        return None
    index = parsed_index(shard.path, content)
    if not index.sha256 and (index.size != shard.size or _is_older(shard)):
        # It was listed here, and has been written again since.
        return None
    if index.size != shard.size:
        LOG.warning(
            "%s has %d bytes, its index says %d: what cannot be read is left out, and counted",
            shard.path,
            shard.size,
            index.size,
        )
    return index


def _is_older(shard: Shard) -> bool:
    """Whether a shard on this machine was written after its index: tars are padded to few sizes."""
    if shard.local is None:
        return False
    places = (shard.local.with_name(shard.name + SUFFIX), _cached(shard))
    place = next(path for path in places if path.is_file())
    return place.stat().st_mtime_ns < shard.local.stat().st_mtime_ns


def parsed_index(path: str, content: bytes) -> Index:
    """The index of the shard at a path.

    Raises:
        ValueError: It is damaged or of another format.
    """
    try:
        found = json.loads(content)
        if found.pop("format") != FORMAT:
            raise ValueError("another format")
        return Index(**found)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"shard: {path}{SUFFIX} must be an index of kdfast, got {error}; take it away, "
            f"and the shard is listed again"
        ) from error


def _keep(shard: Shard, index: Index) -> None:
    """Beside a shard on this machine, where that may be written; else in the cache."""
    local = shard.local
    if local is not None and os.access(local.parent, os.W_OK):
        write_text(local.with_name(local.name + SUFFIX), index.as_text())
        return
    path = _cached(shard)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, index.as_text())


def _cached(shard: Shard) -> Path:
    address = shard.files.here().unstrip_protocol(shard.path)
    name = hashlib.sha256(str(address).encode()).hexdigest()[:24]
    return cache_folder() / "shards" / f"{name}.json"
