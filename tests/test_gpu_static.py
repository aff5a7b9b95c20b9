# SPDX-License-Identifier: Apache-2.0
"""The counts and limits of bench/gpu_limits.py, and that the file of gpu_static.py holds them."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "bench" / "results" / "gpu_static.json"


@pytest.fixture(scope="module")
def counts() -> Any:
    return importlib.import_module("bench.gpu_limits")


def test_limits_by_hand(counts: Any) -> None:
    limits = {goal.name: goal.limit_us() for goal in counts.GOALS}
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


def test_tiles_are_useful(counts: Any) -> None:
    for row in counts.shares():
        assert min(v for k, v in row.items() if k != "tokens") >= 0.75, row


def test_files_hold_these_figures(counts: Any) -> None:
    facts = json.loads(RESULT.read_text())
    again = "run `make gpu-static` (ARGS='--minutes 0' compiles nothing)"
    assert facts["goals"] == json.loads(json.dumps(counts.goals())), again
    assert facts["shares"] == counts.shares(), again
    tables = importlib.import_module("bench.gpu_tables")
    assert tables.document(facts) in (ROOT / "docs" / "internals" / "gpu.md").read_text(), again
