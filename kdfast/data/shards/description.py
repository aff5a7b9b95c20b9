# SPDX-License-Identifier: Apache-2.0
"""The file beside shards that says what they are, and whether all of them are there."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Sequence
from typing import Any

from kdfast.data.shards.places import Shard, common_folder

KEYS = ("kind", "plan", "classes", "whole", "shards")
NAME, FORMAT = "kdfast_shards.json", "kdfast.shards/1"


def parsed(path: str, content: bytes) -> dict[str, Any]:
    """A description.

    Raises:
        ValueError: It is damaged or of another format.
    """
    try:
        found: dict[str, Any] = json.loads(content)
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']}")
        if absent := [key for key in KEYS if key not in found]:
            raise ValueError(f"nothing under {', '.join(absent)}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} must describe shards of kdfast, got {error}") from error
    return found


def describe(shards: Sequence[Shard], *, all_of_them: bool) -> dict[str, Any]:
    """The description beside shards; empty where they have none, as those of others.

    Args:
        shards: One or more.
        all_of_them: Whether every shard that is described must be among them.

    Raises:
        FileNotFoundError: One is missing.
        ValueError: The description is damaged, or the writer was stopped before the last shard.
    """
    path = posixpath.join(common_folder(shards), NAME)
    try:
        content = shards[0].files.here().cat_file(path)
    except FileNotFoundError:
        return {}
    found = parsed(path, content)
    if not found["whole"]:
        raise ValueError(
            f"root: {path} says that not all shards have been written; the same `kdfast data "
            f"shard` goes on with them"
        )
    absent = {one["name"] for one in found["shards"]} - {shard.name for shard in shards}
    if absent and all_of_them:
        raise FileNotFoundError(
            f"root: {path} lists {len(found['shards'])} shards, got none named "
            f"{', '.join(sorted(absent)[:5])}; copy them again"
        )
    return found
