# SPDX-License-Identifier: Apache-2.0
"""Heads to keep from a JSON file."""

import json
from pathlib import Path
from typing import Any

import pytest

from kdfast.pruning.selection_file import read_selection

HELD = [3, 2, 4]


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        ([[2, 0], [], [1]], [[0, 2], [], [1]]),
        ({"heads": [[0], [1], [2]]}, [[0], [1], [2]]),
        ({"kept": [[0], [1], [2]], "cost": {}}, [[0], [1], [2]]),
        ({"1": [], "2": [3]}, [[0, 1, 2], [], [3]]),
        ({"heads": {"0": [1]}}, [[1], [0, 1], [0, 1, 2, 3]]),
    ],
)
def test_forms(tmp_path: Path, content: Any, kept: list[list[int]]) -> None:
    path = tmp_path / "heads.json"
    path.write_text(json.dumps(content))
    assert read_selection(path, HELD) == kept


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must be JSON"),
        ("3", r'lists of heads, \[\[0, 3\], \[1, 2\], ...\] or \{"0": \[0, 3\], ...\}, got 3'),
        ("{}", "must hold lists of heads"),
        ("[[0], [1]]", r"one list per block \(3\), got 2; name only the blocks that lose heads"),
        ('{"3": [0]}', "must name blocks 0 to 2, got 3"),
        ("[[0], [2], [1]]", r"block 1 must be a list of different heads of 0 to 1, got \[2\]"),
        ("[[0, 0], [1], [1]]", "block 0 must be a list of different heads"),
        ("[[0.5], [1], [1]]", "block 0 must be"),
        ("[[true], [1], [1]]", "block 0 must be"),
        ("[0, [1], [1]]", "block 0 must be .* got 0$"),
    ],
)
def test_damage(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "heads.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"heads.json:? .*{message}|heads.json: {message}"):
        read_selection(path, HELD)


def test_absent(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file .*gone.json with the heads"):
        read_selection(tmp_path / "gone.json", HELD)
