# SPDX-License-Identifier: Apache-2.0
"""Many names in little memory, and the names of pictures inside of tar shards."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Sequence
from typing import overload
from urllib.parse import unquote

import numpy as np

# As webdataset divides the name of a member into the key of its sample and the name of its field.
_MEMBER = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)")


class Names(Sequence[str]):
    """Names as one buffer: loader processes share it, which a list of strings would not allow."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        self._text = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        if isinstance(at, slice):
            return [self[n] for n in range(*at.indices(len(self)))]
        if not 0 <= at < len(self):
            raise IndexError(f"names: must be in [0, {len(self)}), got {at}")
        text = self._text[self._ends[at] : self._ends[at + 1]].tobytes()
        return text.decode("utf-8", "surrogateescape")


def divided(member: str) -> tuple[str, str] | None:
    """Key of the sample and name of the field of a member, as webdataset has them; or None.

    The field is in small letters. Members without a field and those named ``__like_this__``, which
    webdataset leaves out, are None.
    """
    found = _MEMBER.fullmatch(member.removeprefix("./"))
    if found is None or re.match(r"__[^/]*__($|/)", member):
        return None
    return found[1], found[2].lower()


def member_of(name: str, taken: bool = False) -> str:
    """The member of a tar shard that holds a picture: keys have no dots, so they are quoted.

    Args:
        name: Path of the picture below its root.
        taken: Another picture has the same path but for its suffix.
    """
    folder, base = posixpath.split(name)
    stem, suffix = posixpath.splitext(base)
    whole = taken or stem.lower().endswith(suffix.lower())
    key = _quoted(base if whole else stem)
    return posixpath.join(folder, key + suffix)


def key_of(stem: str) -> str:
    """The key of a sample whose last part would be ``stem``."""
    folder, base = posixpath.split(stem)
    return posixpath.join(folder, _quoted(base))


def _quoted(text: str) -> str:
    # Only what divides a key from a field, what marks a quote, and what webdataset leaves out.
    found = text.replace("%", "%25").replace(".", "%2E")
    return "%5F" + found[1:] if found.startswith("__") else found


def name_of(member: str) -> str:
    """The path of the picture that ``member_of`` gave to a member."""
    folder, base = posixpath.split(member)
    key, dot, suffix = base.partition(".")
    stem = unquote(key, errors="surrogateescape")
    ending = dot + suffix
    return posixpath.join(folder, stem if stem.lower().endswith(ending.lower()) else stem + ending)
