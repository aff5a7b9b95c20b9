# SPDX-License-Identifier: Apache-2.0
"""What a misspelt word may have meant; without torch, for commands that answer at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a complaint about a word that is not known; "" where no other is like it.

    Args:
        word: What was given.
        known: What could have been.
    """
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
