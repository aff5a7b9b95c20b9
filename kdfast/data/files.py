# SPDX-License-Identifier: Apache-2.0
"""Picture files of every kind of data: those that a folder holds, and their pixels."""

from __future__ import annotations

import os
import re
import warnings
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kdfast.machine.limits import MAX_PIXELS

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
# The first bytes of TIFF and BigTIFF, in either order of bytes.
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class CorruptDataError(RuntimeError):
    """Too many pictures of a run could not be read."""


def list_images(root: Path) -> list[str]:
    """Paths of all pictures below ``root``, relative to it, in one order on every machine.

    Links to folders are followed once; names that start with a dot are ignored.
    """
    found: list[str] = []
    visited: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = Path(folder).relative_to(root)
        found += [
            (relative / name).as_posix()
            for name in files
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
    return sorted(found)


def read_bgr(path: Path) -> NDArray[np.uint8] | str:
    """Decode a picture as (H, W, 3) BGR, EXIF rotation ignored; or say why it cannot be done."""
    try:
        data = path.read_bytes()
    except OSError as error:
        return f"cannot be opened: {error.strerror or error}"
    return decode_bgr(data)


def decode_bgr(data: bytes) -> NDArray[np.uint8] | str:
    """As ``read_bgr`` for the bytes of a file."""
    if not data:
        return "the file is empty"
    pixels, limit = _pixels(data), MAX_PIXELS()
    if pixels is None:
        return "cannot be decoded: broken, truncated, or not a picture"
    if pixels > limit:
        return (
            f"has {pixels:,} pixels in {len(data):,} bytes; {limit:,} are allowed, "
            f"{MAX_PIXELS.name} changes that"
        )
    try:
        if data.startswith(TIFF):
            return _decode_tiff(data)
        image = cv2.imdecode(
            np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
        )
    except cv2.error as error:
        return f"cannot be decoded: {error.err or error}"
    if image is None:
        return "cannot be decoded: broken, truncated, or not a picture"
    return _truncated(data) or np.asarray(image, np.uint8)


def _decode_tiff(data: bytes) -> NDArray[np.uint8] | str:
    """The first page of a TIFF file as (H, W, 3) BGR, by Pillow; or why it cannot be decoded."""
    try:
        with Image.open(BytesIO(data)) as picture:
            picture.load()
            if picture.mode.startswith("I;16"):
                # As OpenCV does with other files of 16 bits.
                grey = (np.asarray(picture) >> 8).astype(np.uint8)
                return np.stack([grey] * 3, -1)
            if picture.mode in ("I", "F"):
                return (
                    f"has values of mode {picture.mode!r}, whose range is not known; 8 or 16 bits"
                )
            return np.ascontiguousarray(np.asarray(picture.convert("RGB"), np.uint8)[..., ::-1])
    except Exception as error:  # on damaged bytes Pillow's reader stumbles over whatever comes
        return f"cannot be decoded: {error}"


def _pixels(data: bytes) -> int | None:
    """Width times height as the header says it, without decoding; None for no picture."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        # Read here, as PIL refuses damage in other parts that leaves the pixels readable.
        return int.from_bytes(data[16:20], "big") * int.from_bytes(data[20:24], "big")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own limit, a lower one
            with Image.open(BytesIO(data)) as picture:
                return picture.width * picture.height
    except Image.DecompressionBombError as error:
        found = re.search(r"\((\d+) pixels\)", str(error))
        return int(found[1]) if found else None
    except Exception:  # on damaged bytes PIL's readers stumble over whatever comes
        return None


def _truncated(data: bytes) -> str | None:
    # Some OpenCV versions fill the missing end of a JPEG with grey; PIL reports it.
    if not data.startswith(b"\xff\xd8") or data.rstrip(b"\0").endswith(b"\xff\xd9"):
        return None
    try:
        Image.open(BytesIO(data)).load()
    except (OSError, SyntaxError) as error:
        return f"cannot be decoded: {error}"
    return None
