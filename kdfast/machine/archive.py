# SPDX-License-Identifier: Apache-2.0
"""Zip files that tensors and arrays come in: every record is whole and as large as it claims.

``torch.save`` writes a CRC-32 for every record and never compresses, but ``torch.load`` looks at
neither. Comparing the CRCs reads the file once more (docs/internals/reliability.md has the cost).
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

# Bytes in memory at a time.
CHUNK = 1 << 20
# Length of a record's own header without its name, and where the lengths of name and extra are.
_HEADER, _LENGTHS = 30, slice(26, 30)


def is_archive(path: str | Path) -> bool:
    """Whether a file starts as a zip file does: the way in which ``torch.load`` tells."""
    with Path(path).open("rb") as file:
        return file.read(4) == b"PK\3\4"


def check_archive(path: str | Path) -> None:
    """Compares a file of ``torch.save`` with its own checksums, before anything in it is used.

    A file of another kind is left to its reader, and so is one without checksums
    (``torch.serialization.set_crc32_options(False)`` writes zeros).

    Raises:
        OSError: It cannot be opened.
        ValueError: A record is damaged, compressed, or lies on another one.
    """
    if not is_archive(path):
        return
    with Path(path).open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                _check(path, file, archive.infolist())
        except (zipfile.BadZipFile, UnicodeDecodeError, NotImplementedError, struct.error) as error:
            raise ValueError(f"{path} must be a whole file of torch.save: {error}") from error


def _check(path: str | Path, file: BinaryIO, records: list[zipfile.ZipInfo]) -> None:
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
            raise ValueError(
                f"{path} must hold records as torch.save writes them, got a compressed one: "
                f"{record.filename} of {record.file_size:,} bytes"
            )
    size = file.seek(0, 2)
    if sum(record.file_size for record in records) > size:
        raise ValueError(f"{path} is damaged: its records are larger than its {size:,} bytes")
    if not any(record.CRC for record in records):
        return
    for record in records:
        if _crc(file, record) != record.CRC:
            raise ValueError(f"{path} is damaged: {record.filename} does not match its checksum")


def _crc(file: BinaryIO, record: zipfile.ZipInfo) -> int | None:
    """Checksum of a record's bytes; None where the file does not hold them."""
    if record.header_offset < 0:
        return None
    file.seek(record.header_offset)
    head = file.read(_HEADER)
    if len(head) < _HEADER:
        return None
    lengths = head[_LENGTHS]
    name, extra = (int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
    file.seek(name + extra, 1)
    crc, left = 0, record.file_size
    while left:
        piece = file.read(min(CHUNK, left))
        if not piece:
            return None
        crc, left = zlib.crc32(piece, crc), left - len(piece)
    return crc
