# SPDX-License-Identifier: Apache-2.0
"""The folder of what kdfast keeps from one run to the next on this machine."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "KDFAST_CACHE"


def cache_folder() -> Path:
    """``KDFAST_CACHE``, else kdfast's folder among the user's caches (XDG)."""
    given = os.environ.get(VARIABLE)
    if given:
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The standard ignores relative paths.
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "kdfast"
