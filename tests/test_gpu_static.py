# SPDX-License-Identifier: Apache-2.0
"""The counts, limits and checks of bench/gpu_static.py, and the files that it left."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "bench" / "results" / "gpu_static.json"


@pytest.fixture(scope="module")
def static() -> Iterator[Any]:
    sys.path.insert(0, str(ROOT))
    yield importlib.import_module("bench.gpu_static")
    sys.path.remove(str(ROOT))


def test_limits_by_hand(static: Any) -> None:
    limits = {goal.name: goal.limit_us() for goal in static.GOALS}
    # 64 x 16 x 257 x 64 bf16 are 33.7 MB: k is read and written, then q, k, v read and out written.
    tensor = 2 * 64 * 16 * 257 * 64 / 3.35e12 * 1e6
    assert limits["G1"] == pytest.approx(6 * tensor)
    # k again; q, k, v, out, grad, dq and the rotated q; then q, k, v, grad, dk and dv.
    assert limits["G2"] == pytest.approx((2 + 7 + 6) * tensor)
    exp = 1e6 / (132 * 16 * 1.755e9)  # 16 a cycle on each of 132 SMs
    # The KL's forward reads q and k of both sides; its share of each gradient takes one exponential
    # for each of 272 x 272 pairs, the tiles of 257 tokens.
    assert limits["G5"] == pytest.approx(4 * tensor + 2 * exp * 64 * 16 * 272**2)
    assert limits["G6"] == pytest.approx(3 * exp * 8 * 16 * 1600**2)
    # One read of both logits and one write of the gradient.
    assert limits["G7"] == pytest.approx(3 * 2 * 1024 * 1000 / 3.35e12 * 1e6)


def test_tiles_are_useful(static: Any) -> None:
    for row in static.shares():
        assert min(v for k, v in row.items() if k != "tokens") >= 0.75, row


ROW = {
    "op": "pruned_attention",
    "dtype": "bfloat16",
    "dim": 64,
    "options": "",
    "arch": 86,
    "name": "bwd_kernel",
    "constants": {"KEYS": True},
    "spill_bytes": 0,
    "shared_bytes": 99 << 10,
    "tensor_core": 9,
    "loads_16": 4,
}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, []),
        ({"spill_bytes": 72}, ["72 bytes of registers spilled"]),
        ({"spill_bytes": 64, "dtype": "float32", "dim": 72}, []),
        ({"shared_bytes": 100 << 10}, ["102400 bytes of shared memory"]),
        ({"shared_bytes": 100 << 10, "arch": 80}, []),
        ({"tensor_core": 0}, ["0 tensor-core instructions"]),
        ({"name": "total_kernel", "tensor_core": 0, "loads_16": 0}, []),
        ({"loads_16": 0}, ["no 16-byte loads"]),
    ],
)
def test_violations(static: Any, change: dict[str, Any], found: list[str]) -> None:
    assert static.violations(ROW | change) == found


def test_kernels_are_named(static: Any) -> None:
    assert static.describe(ROW) == "sm_86 pruned_attention bfloat16 64, bwd_kernel of keys"


def test_an_op_depends_on_what_it_imports(static: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = static.sources()
    read = Path.read_text

    def changed(path: Path, **options: Any) -> str:
        return read(path, **options) + "#" * (path.name == "_attention_bwd.py")

    monkeypatch.setattr(Path, "read_text", changed)
    after = static.sources()
    assert {op for op in after if after[op] != before[op]} == {
        "pruned_attention",
        "attention_distill",
    }


def test_files_are_those_of_this_code(static: Any) -> None:
    if not RESULT.exists():
        pytest.skip("python -m bench.gpu_static has not been run")
    facts = json.loads(RESULT.read_text())
    if facts["source"] != static.sources():
        pytest.skip("the kernels have changed since; run python -m bench.gpu_static")
    assert facts["violations"] == []
    assert facts["goals"] == json.loads(json.dumps(static.goals()))
    assert facts["shares"] == static.shares()
    tables = importlib.import_module("bench.gpu_tables")
    assert tables.document(facts) in (ROOT / "docs" / "gpu.md").read_text()
