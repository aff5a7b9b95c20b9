# SPDX-License-Identifier: Apache-2.0
"""Small files that ask for much: pictures, archives, YAML."""

from __future__ import annotations

import gzip
import io
import resource
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from kdfast.configs.load import load as load_config
from kdfast.data.files import CorruptDataError, read_bgr
from kdfast.data.labelled import build_classification
from kdfast.data.labelled.unpack import check_unpacked, unpacked
from kdfast.machine.files import load_torch
from kdfast.sources import load_images
from kdfast.testing.damage.tally import Tally

# Bytes that a refusal may take.
MEMORY = 300 << 20


def png(width: int, height: int) -> bytes:
    """A PNG of one colour with one bit for each pixel; huge ones have few rows of data."""
    rows = zlib.compress(bytes(min((1 + (width + 7) // 8) * height, 1 << 27)), 9)
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)

    def chunk(name: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(name + data)
        return len(data).to_bytes(4, "big") + name + data + crc.to_bytes(4, "big")

    parts = [chunk(b"IHDR", head), chunk(b"IDAT", rows), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def resized(data: bytes, marker: bytes, offset: int, form: str) -> bytes:
    """A picture whose header says that it is huge."""
    place = data.index(marker) + offset
    sides = struct.pack(form, 30000, 30000)
    return data[:place] + sides + data[place + len(sides) :]


def picture_files() -> dict[str, bytes]:
    """Names and bytes."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    made = {
        form: cv2.imencode(form, noise)[1].tobytes()
        for form in (".png", ".jpg", ".bmp", ".webp", ".tiff")
    }
    found = {
        "bomb.png": png(30000, 30000),
        "wide.png": png(2**31 - 1, 2),
        "overflow.png": png(2**31 - 1, 2**31 - 1),
        "huge.jpg": resized(made[".jpg"], b"\xff\xc0", 5, ">HH"),
        "huge.bmp": resized(made[".bmp"], b"BM", 18, "<ii"),
        "text.png": b"not a picture",
        "empty.png": b"",
        "svg.png": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
    }
    tiff = io.BytesIO()
    Image.new("1", (30000, 30000)).save(tiff, "tiff", compression="group4")
    found["huge.tiff"] = tiff.getvalue()
    webp = io.BytesIO()
    Image.new("L", (16000, 16000)).save(webp, "webp", lossless=True, method=0, quality=0)
    found["huge.webp"] = webp.getvalue()
    for form, data in made.items():
        for part in (0.1, 0.5, 0.9):
            found[f"cut{part}{form}"] = data[: int(len(data) * part)]
    return found


def pictures(tally: Tally, root: Path) -> None:
    """Every hostile picture through every reader of pictures."""
    for name, data in picture_files().items():
        folder = root / name.replace(".", "-")
        for label in "ab":
            (folder / label).mkdir(parents=True, exist_ok=True)
            for number in range(8):
                Image.new("RGB", (9, 9)).save(folder / label / f"{number}.png")
        path = folder / "a" / name
        path.write_bytes(data)
        readers: dict[str, Callable[[], Any]] = {
            "read_bgr": partial(_read_bgr, path),
            "load_images": partial(load_images, [path], lambda _: torch.zeros(1)),
        }
        if not name.endswith(".tiff"):
            readers["imagefolder"] = partial(_set, folder)
        for reader, read in readers.items():
            _limited(tally, "pictures", f"{name} by {reader}", read, name)


def _read_bgr(path: Path) -> Any:
    """The picture, or an error with the reason."""
    found = read_bgr(path)
    if isinstance(found, str):
        raise ValueError(found)
    return found


def _set(folder: Path) -> Any:
    try:
        return build_classification("imagefolder", folder, size=8, seed=0)
    except CorruptDataError as error:
        raise ValueError(str(error)) from error


def _limited(tally: Tally, kind: str, text: str, read: Callable[[], Any], name: str) -> None:
    """A trial that may not take much memory."""
    before = _peak()
    named = "" if "read_bgr" in text else name
    tally.trial(kind, text, read, lambda found: "it was read", named)
    grown = _peak() - before
    if grown > MEMORY:
        tally.fault(kind, f"{text}: took {grown:,.0f} bytes")


def _peak() -> int:
    """The most memory that the process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def archives(tally: Tally, root: Path) -> None:
    """Compressed and overlapping records in checkpoints, and data that grows."""
    whole = root / "whole.pt"
    torch.save({"w": torch.zeros(1000)}, whole)
    packed = root / "packed.pt"
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(packed, "w") as target:
        for record in source.infolist():
            data = source.read(record)
            if record.filename.endswith("data/0"):
                data = bytes(1 << 28)
            target.writestr(record.filename, data, zipfile.ZIP_DEFLATED)
    view = root / "view.pt"
    torch.save({"w": torch.zeros(1).expand(10**6, 10**6)}, view)
    for path in (packed, view):
        _limited(tally, "archives", path.name, partial(load_torch, path), path.name)
    grown = root / "data.gz"
    grown.write_bytes(gzip.compress(bytes(1 << 29), 1))
    table = root / "set.npz"
    np.savez_compressed(table, train_images=np.zeros((1 << 29,), np.uint8))
    _limited(tally, "archives", grown.name, lambda: unpacked(grown), grown.name)
    _limited(tally, "archives", table.name, lambda: check_unpacked(table), table.name)


def yaml_texts() -> dict[str, str]:
    """Configs that stand for more than they hold, or for nothing."""
    laughs = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    laughs += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    merges = ["a0: &a0 {x: 1, y: 2}"]
    merges += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 12)]
    return {
        "aliases": "\n".join(laughs),
        "merges": "\n".join(merges),
        "itself": "a: &a [*a]",
        "deep": "a: " + "[" * 5000,
        "deeper": "a: " + "{a: " * 2000,
        "long": "a: " + "x" * (1 << 22),
        "wide": "a: [" + "1," * 200_000 + "]",
        "digits": "seed: " + "9" * 100_000,
        "date": "name: 2001-99-99",
        "object": "name: !!python/object/apply:os.getcwd []",
        "binary": "name: !!binary 'x'",
        "unhashable": "? [1, 2]\n: 3",
        "nothing": "",
        "list": "- 1",
        "anchor": "a: *unknown",
    }


def configs(tally: Tally, root: Path) -> None:
    """Every hostile YAML as a config, and in ``--set``."""
    for name, text in yaml_texts().items():
        path = root / f"{name}.yaml"
        path.write_text(text)
        _limited(tally, "YAML", path.name, partial(load_config, str(path)), path.name)
        change = f"seed={text.removeprefix('a: ')}"
        if name not in ("nothing", "list"):
            _limited(
                tally, "YAML", f"--set {name}", partial(load_config, "smoke", [change]), "seed"
            )
    path = root / "bytes.yaml"
    path.write_bytes(bytes(range(128, 256)))
    _limited(tally, "YAML", path.name, partial(load_config, str(path)), path.name)
