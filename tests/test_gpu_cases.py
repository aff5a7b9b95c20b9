# SPDX-License-Identifier: Apache-2.0
"""What has to compile for every GPU, the rules for it, and what decides that it still holds."""

import importlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]
NVIDIA = (80, 86, 89, 90, 100)


@pytest.fixture(scope="module")
def bench() -> Any:
    """Gives modules of bench/."""
    return lambda name: importlib.import_module(f"bench.{name}")


def test_every_head_dim_of_every_architecture(bench: Any) -> None:
    every = bench("gpu_cases").cases()
    assert len(set(every)) == len(every) > 500
    for op in ("pruned_attention", "attention_distill"):
        found = {(c.arch, c.dtype, c.dim) for c in every if c.op == op}
        for dim in (16, 24, 64, 72, 80, 88, 96, 128):
            for dtype in ("bfloat16", "float16", "float32"):
                assert {(arch, dtype, dim) for arch in NVIDIA} <= found
            assert (942, "bfloat16", dim) in found
        assert {(942, "float16", 64), (942, "float16", 88)} <= found
    for op in ("kd_loss", "feature_loss", "swiglu_norm"):
        both = {(c.arch, c.dtype) for c in every if c.op == op}
        assert len(both) == 6 * 3, op


def test_every_kind_of_distance_is_compiled(bench: Any) -> None:
    every = bench("gpu_cases").cases()
    for arch in NVIDIA:
        mine = [c.values() for c in every if c.arch == arch and c.op == "attention_distill"]
        kinds = {values.get("kind", "kl") for values in mine}
        assert kinds == {"kl", "reverse_kl", "jsd", "mse", "cosine", "logit_mse"}
        assert any("window" in values for values in mine)


def test_every_entry_of_the_block_table_is_compiled(bench: Any) -> None:
    """Each choice of rows of BLOCKS that any length takes."""
    common = importlib.import_module("kdfast.kernels._common")
    table = importlib.import_module("kdfast.kernels._blocks").BLOCKS
    every = bench("gpu_cases").cases()

    def taken(case: Any) -> Iterator[tuple[Any, ...]]:
        values = case.values()
        tokens, size = values.get("tokens", 257), values.get("window", 0)
        lengths = common.window_lengths(1600 if size else tokens, (40, 40) if size else None, size)
        names: tuple[str, ...] = ("distance", "dq_maps", "dkdv_maps")
        width, itemsize = (
            max(case.dim, values.get("teacher_dim", 0)),
            4 if "32" in case.dtype else 2,
        )
        if case.op == "pruned_attention":
            biased = ("fwd_bias", "dq_bias", "dkdv_bias", "dbias")
            names = biased if "bias" in values else ("fwd", "dq", "dkdv")
        for name in names:
            tiles = common.choose_tiles(name, lengths, width, itemsize)
            yield (name, common.table_width(width, itemsize), itemsize), tiles.rows

    for arch, dtype in itertools.product(NVIDIA, ("bfloat16", "float16", "float32")):
        attention = [c for c in every if (c.arch, c.dtype) == (arch, dtype) and "attention" in c.op]
        found = {x for c in attention for x in taken(c)}
        for key, blocks in table.items():
            if key[2] == (4 if dtype == "float32" else 2):
                assert {x[1] for x in found if x[0] == key} >= {r for r, _ in blocks.rows}, (
                    arch,
                    key,
                )


def test_order_is_by_importance(bench: Any) -> None:
    every = bench("gpu_cases").cases()
    first = [c for c in every if c.dtype == "bfloat16" and c.arch in (80, 90)]
    assert every[: len(first)] == first
    assert {c.dtype for c in every[: len(first) + 100]} == {"bfloat16"}


ROW = {
    "name": "bwd_kernel",
    "part": "keys",
    "spill_bytes": 0,
    "shared_bytes": 99 << 10,
    "tensor_core": 9,
    "loads_16": 4,
}
SPILLED = " bytes of registers spilled"
LOSS = {"tensor_core": 0, "loads_16": 0}


@pytest.mark.parametrize(
    ("case", "change", "found"),
    [
        ({}, {}, []),
        ({}, {"spill_bytes": 72}, [f"72{SPILLED}"]),
        ({"dtype": "float32", "dim": 72}, {"spill_bytes": 64}, []),
        ({"arch": 942}, {"spill_bytes": 500, "shared_bytes": 64 << 10}, []),
        ({"arch": 100, "op": "attention_distill"}, {"spill_bytes": 136}, [f"136{SPILLED}"]),
        ({"arch": 942}, {"shared_bytes": 65 << 10}, ["66560 bytes of shared memory"]),
        ({}, {"shared_bytes": 100 << 10}, ["102400 bytes of shared memory"]),
        ({"arch": 80}, {"shared_bytes": 100 << 10}, []),
        ({}, {"tensor_core": 0}, ["0 tensor-core instructions"]),
        ({}, {"name": "total_kernel"}, ["9 tensor-core instructions"]),
        ({}, {"name": "total_kernel"} | LOSS, []),
        ({}, {"loads_16": 0}, ["no 16-byte loads"]),
        ({"dim": 24}, {"loads_16": 0}, []),
        ({"dim": 1000}, {"name": "_rows_kernel"} | LOSS, ["no 16-byte loads"]),
        ({"dim": 2730}, {"name": "_fwd_kernel"} | LOSS, []),
    ],
)
def test_violations(
    bench: Any, case: dict[str, Any], change: dict[str, Any], found: list[str]
) -> None:
    labels = {"arch": 86, "op": "pruned_attention", "dtype": "bfloat16", "dim": 64} | case
    cases = bench("gpu_cases")
    assert cases.violations(cases.Case(**labels), ROW | change) == found


def test_kernels_are_named(bench: Any) -> None:
    cases = bench("gpu_cases")
    case = cases.Case(86, "pruned_attention", "bfloat16", 64, "layout= tokens=577")
    assert case.values() == {"layout": "", "tokens": 577}
    name = "sm_86 pruned_attention bfloat16 64 layout= tokens=577"
    assert str(case) == name
    assert cases.describe(case, ROW) == f"{name}, bwd_kernel of keys"


# Where a change stands, what is replaced by what, and the ops whose binaries depend on it.
CHANGES = {
    "a comment": ("_attention_bwd.py", "\n\n", "\n\n# More.\n", set()),
    "a kernel of both": (
        "_attention_bwd.py",
        "tl.exp2(",
        "1 + tl.exp2(",
        {"pruned_attention", "attention_distill"},
    ),
    "the block table": (
        "_blocks.py",
        "Blocks(((128",
        "Blocks(((256",
        {"pruned_attention", "attention_distill"},
    ),
    "what all round by": (
        "_common.py",
        "return 1 << max(",
        "return 2 << max(",
        {"pruned_attention", "attention_distill", "kd_loss", "feature_loss", "swiglu_norm"},
    ),
    "the maps": ("_attention_maps.py", "= tuple(", "= tuple(2 * ", {"attention_distill"}),
    "the last sum": (
        "_common.py",
        "SUM_BLOCK = ",
        "SUM_BLOCK = 2 * ",
        {"attention_distill", "kd_loss", "feature_loss"},
    ),
    "one loss": ("kd_loss.py", "ONE_TILE = 8192", "ONE_TILE = 4096", {"kd_loss"}),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_what_an_op_comes_from(bench: Any, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    source = bench("gpu_source")
    file, old, new, ops = CHANGES[change]
    read = Path.read_text

    def changed(path: Path, **options: Any) -> str:
        text = read(path, **options)
        if path.parent.name != "kernels" or path.name != file:
            return text
        assert old in text
        return text.replace(old, new)

    before = source.fingerprints()
    monkeypatch.setattr(Path, "read_text", changed)
    after = {op: source.fingerprint(op) for op in before}
    assert {op for op in after if after[op] != before[op]} == ops


def test_launches_count_as_well(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = bench("gpu_source")
    read = Path.read_text

    def changed(path: Path, **options: Any) -> str:
        text = read(path, **options)
        return text.replace("rows: int = 64", "rows: int = 65") if path.name == "aot.py" else text

    before = source.fingerprints()
    monkeypatch.setattr(Path, "read_text", changed)
    assert source.fingerprint("kd_loss") != before["kd_loss"]
    assert source.fingerprint("swiglu_norm") == before["swiglu_norm"]


def test_unknown_statements_are_refused(bench: Any) -> None:
    source = bench("gpu_source")
    tree = source.ast.parse("import os\nif os.name:\n    x = 1\n")
    with pytest.raises(NotImplementedError, match=re.escape("what does this define? if os.name")):
        source.Module(tree)


def test_a_measured_table_has_binaries_of_its_own(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cases, source = bench("gpu_cases"), bench("gpu_source")
    before = {op: source.fingerprint(op) for op in source.fingerprints()}
    for module in (cases, source):
        monkeypatch.setattr(module, "FOLDER", tmp_path)
    (tmp_path / "sm_90.json").write_text("{}")
    found = {}
    for arch in cases.ARCHS:
        found[arch] = cases.traced_as(cases.Case(arch, "kd_loss", "bfloat16", 1000)).arch
    assert found == {90: 90, 80: 80, 100: 80, 86: 80, 89: 80, 942: 942}
    changed = {op for op, old in before.items() if source.fingerprint(op) != old}
    assert changed == {"pruned_attention", "attention_distill"}


def test_compiling_takes_the_table_of_the_architecture(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the device of the tensors, which are those of the CPU."""
    aot = bench("aot")
    call = importlib.import_module("kdfast.kernels._attention_call")
    monkeypatch.setattr(aot.triton.knobs.runtime, "interpret", False)
    for arch, name in ((90, "sm_90"), (aot.AMD, "gfx942")):
        with aot._driver(arch, arch):
            assert call.architecture(torch.device("cpu")) == name
    assert call.architecture(torch.device("cpu")) == ""
