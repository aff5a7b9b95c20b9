# SPDX-License-Identifier: Apache-2.0
"""Checksums of a teacher cache: one for every row, so that each read is checked.

A row is what the files hold of one picture in one variant. Its CRC-32 starts from the row's place,
so a row that lies elsewhere is seen too. A single flipped bit always changes it.

B rows.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


def row_sums(
    rows: Mapping[str, NDArray[Any]], variant: NDArray[np.int64], index: NDArray[np.int64]
) -> NDArray[np.uint32]:
    """Checksums (B,) of rows.

    Args:
        rows: What each file holds of them, (B,) or (B, K).
        variant: (B,) of each.
        index: (B,) of each.
    """
    places = np.stack([variant, index], 1).astype("<i8")
    parts = [places, *(rows[name] for name in sorted(rows))]
    count = len(index)
    if not count:
        return np.zeros(0, np.uint32)
    whole = np.concatenate(
        [np.ascontiguousarray(part).reshape(count, -1).view(np.uint8) for part in parts], 1
    )
    return np.fromiter(map(zlib.crc32, whole), np.uint32, count)


def meta_sum(meta: Mapping[str, Any]) -> int:
    """Checksum of the description of a cache, without the one in it."""
    rest = {name: value for name, value in meta.items() if name != "sum"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())
