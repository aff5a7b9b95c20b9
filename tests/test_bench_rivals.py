# SPDX-License-Identifier: Apache-2.0
"""``bench.rivals``: one comparison for each model, and what is kept of it."""

import json
from pathlib import Path

import pytest

from bench import rivals

NOTHING = {"ms": None, "p95_ms": None, "cosine": None, "memory_bytes": None, "reason": ""}
ROWS = [
    {**NOTHING, "name": "kdfast", "ms": 1.2345678, "cosine": 1.0, "memory_bytes": 3 << 20},
    {**NOTHING, "name": "onnx", "reason": "it is not installed"},
]


def test_models_are_compared_in_turn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def compare(arguments: list[str]) -> int:
        asked.append(arguments)
        content = {"machine": {"family": "Zen 9"}, "rows": ROWS}
        folder = Path(arguments[arguments.index("--out") + 1])
        (folder / "compare.json").write_text(json.dumps(content), "utf-8")
        return 0

    monkeypatch.setattr("kdfast.compare.main", compare)
    path = tmp_path / "rivals.json"
    rivals.main(["--save", str(path), "--models", "Swin-T", "DeiT-S"])
    assert [words[1] for words in asked] == [rivals.MODELS["Swin-T"], rivals.MODELS["DeiT-S"]]
    assert all(words[-4:] == list(rivals.REQUEST) for words in asked)
    found = json.loads(path.read_text("utf-8"))
    assert found["machine"] == {"family": "Zen 9"}
    assert found["models"]["DeiT-S"] == [
        {"name": "kdfast", "ms": 1.2346, "cosine": 1.0, "memory_mib": 3},
        {"name": "onnx", "reason": "it is not installed"},
    ]
    assert "--only eager,onnx" in found["command"]


def test_a_comparison_that_fails_ends_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("kdfast.compare.main", lambda _: 2)
    with pytest.raises(RuntimeError, match="deit_small_patch16_224 must end with 0, got 2"):
        rivals.main(["--save", str(tmp_path / "rivals.json")])
    assert not list(tmp_path.iterdir())
