# SPDX-License-Identifier: Apache-2.0
"""How much a small file may ask for: limits with a setting each, see docs/use/settings.md."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Limit:
    """A limit that an environment variable changes.

    Attributes:
        name: The variable.
        default: The limit without it.
    """

    name: str
    default: int

    def __call__(self) -> int:
        """The limit as it is now.

        Raises:
            ValueError: The variable is no whole number above 0.
        """
        text = os.environ.get(self.name)
        if text is None:
            return self.default
        if not text.isdecimal() or not text.isascii() or int(text) < 1:
            raise ValueError(f"{self.name}: must be a whole number above 0, got {text!r}")
        return int(text)


# Pixels of one picture: about 300 MB while it is decoded.
MAX_PIXELS = Limit("KDFAST_MAX_PIXELS", 100_000_000)
# Bytes that compressed data becomes, for each byte of its file.
MAX_RATIO = Limit("KDFAST_MAX_RATIO", 100)
# Bytes of an architecture before it is pruned, for each byte of its weights file.
MAX_GROWTH = Limit("KDFAST_MAX_GROWTH", 64)
# Values and keys of a YAML text, what aliases stand for counted every time.
MAX_YAML = Limit("KDFAST_MAX_YAML", 10_000)
# Bytes of a config.json.
MAX_TEXT = Limit("KDFAST_MAX_TEXT", 32 << 20)
