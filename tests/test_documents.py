# SPDX-License-Identifier: Apache-2.0
"""Tables of the documents come from the committed result files; links lead somewhere."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

documents = importlib.import_module("bench.documents")


def row(op: str, case: str, candidate: str, ms: float, **more: Any) -> dict[str, Any]:
    base = {"op": op, "case": case, "candidate": candidate}
    return {**base, "ms": ms, "ms_all": 2 * ms, "samples": 9, "fast": 4, **more}


MACHINE = {"gpu": None, "family": "Zen 9", "isa": "avx2", "threads": 2, "torch": "9"}
OPS = {
    "machine": {**MACHINE, "commit": "abc", "dirty": False, "date": "2000-01-02"},
    "rates": {},
    "skipped": [],
    "rows": [
        row("kd_loss", "a float32", "kdfast", 2.0, peak_bytes=2**20, limit_share=0.5),
        row("kd_loss", "a float32", "eager", 8.0, peak_bytes=3 * 2**20),
        row("kd_loss", "a float32", "compile", 5.0),
        row("kd_loss", "a float32", "kdfast, weight", 4.0, yardstick=True),
        row("kd_loss", "b float32", "kdfast", 4.0),
        row("kd_loss", "b float32", "eager", 3.0),
        row("attention_distill", "KL", "kdfast", 3.0),
        row("attention_distill", "KL", "attention only", 2.0, yardstick=True),
        row("vit_chain", "step", "timm", 9.0),
        row("vit_chain", "step", "kdfast", 8.0),
    ],
}
WHOLE = {
    **OPS,
    "rows": [
        row("accelerate", "fwd ViT", "kdfast", 6.0),
        row("accelerate", "fwd ViT", "sdpa", 9.0),
        row("accelerate", "fwd ViT", "openvino", 8.0),
    ],
}
SIZES = ("kdfast", "kdfast, 16 heads", "kdfast, half of units too", "eager, 16 heads")
ORION = {
    **OPS,
    "rows": [
        *(
            row("EVA-ViT-L", f"fwd, 8 heads, 24 of 24 blocks {dtype}", name, ms, peak_bytes=2**21)
            for dtype in ("float32", "bfloat16")
            for ms, name in enumerate(SIZES, 1)
        ),
        row("ORION's heads", "a frame of six cameras", "kdfast", 2000.0, peak_bytes=2**30),
        row("ORION's heads", "a frame of six cameras", "eager", 5000.0, peak_bytes=3 * 2**30),
    ],
}
SHOWN = documents.Machine(OPS, WHOLE)
OTHER = documents.Machine(
    {**WHOLE, "machine": {**OPS["machine"], "family": "Lake"}},
    {**WHOLE, "machine": {**OPS["machine"], "family": "Lake"}},
)


GPU = {
    "goals": [{"goal": "G9", "what": "call", "limit_us": {"H100 SXM": 7.6}, "target_us": 9}],
    "columns": ["spill_bytes"],
    "compiled": [{"arch": 90, "kernels": [[8], [24]]}, {"arch": 942, "kernels": [[99]]}],
    "violations": [],
}


def test_blocks_hold_ratios_against_the_best_other() -> None:
    blocks = documents.blocks(SHOWN, [OTHER, SHOWN], GPU)
    assert "| kd_loss | 2 | 0.75 | 1.62 | 2.50 |" in blocks["span"]
    assert blocks["slower"] == "- `kd_loss` b float32: 0.75"
    assert "| kd_loss | a float32 | 4.00 | 5.00 | 1.25 |" in blocks["weighted"]
    assert "| attention KL on top of attention | KL | +50 % |" in blocks["yardsticks"]
    assert "| kd_loss | a float32 | 1.0 | 3.0 |  |  |" in blocks["peaks"]
    assert "| model, ms | original (SDPA) | OpenVINO | kdfast | ratio |" in blocks["models"]
    assert "| fwd ViT | 9 | 8 | 6 | 1.33 |" in blocks["models"]
    facts, _, *lines = blocks["models elsewhere"].splitlines()
    assert facts.startswith("Lake, ") and lines[-1] == "| fwd ViT | 9 | 8 | 6 | 1.33 |"
    assert "| step | 9 | 8 |  |" in blocks["chain"]
    found = "2 kernels are compiled ahead of time for sm_90: at most 24 bytes of registers spilled"
    assert f"{found}, and none of them" in blocks["binaries"].replace("\n", " ")
    line = "| kd_loss | a float32 | 2.00 (4.00) | compile | 5.00 (10.00) | 2.50 (2.50) | 50 % | "
    assert line + "4/9 and 4/9, too few |" in blocks["ops"]
    assert "accelerate" not in blocks["ops"] and "accelerate" in blocks["span"]


def test_whole_models_are_held_against_torch_at_its_best() -> None:
    times = {
        "fwd ViT batch 1, 4.6 GMACs, half of the heads 3.7": {"eager": 9, "freezing": 8, "onnx": 7},
        "fwd ViT batch 8, 36.8 GMACs": {"eager": 90},
        "fwd ViT batch 1, bf16": {"eager": 6, "openvino": 3},
        "fwd+bwd ViT batch 4": {"compile": 30},
    }
    rows = [
        {"op": "accelerate", "case": case, "candidate": name, "ms": ms}
        for case, found in times.items()
        for name, ms in {**found, "kdfast": 4}.items()
    ]
    file = {**WHOLE, "rows": rows}
    other = {**file, "machine": {**WHOLE["machine"], "family": "Lake"}, "rows": rows[:5]}
    every = [documents.Machine(file, file), documents.Machine(other, other)]
    text = documents.whole(every)
    assert "; Lake, avx2, 2 threads" in text.replace("\n", " ")
    assert text.splitlines()[-4:] == [
        "| ms | Zen 9: PyTorch | Zen 9: kdfast | Zen 9: gain "
        "| Lake: PyTorch | Lake: kdfast | Lake: gain |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| fwd ViT batch 1 | 8 | 4 | 2.00 | 8 | 4 | 2.00 |",
        "| fwd+bwd ViT batch 4 | 30 | 4 | 7.50 |  |  |  |",
    ]


def test_rivals_have_a_row_for_each_model() -> None:
    rows: list[dict[str, Any]] = [{"name": "kdfast", "ms": 4.4}, {"name": "onnx", "reason": "lost"}]
    rows.append({"name": "openvino-bf16", "ms": 2.0})
    machine = SHOWN.ops["machine"]
    lines = documents.rivals({"machine": machine, "models": {"vit": rows}}).splitlines()
    assert lines[0] == "Zen 9, avx2, 2 threads, torch 9, commit abc, 2000-01-02."
    assert lines[-1] == "| vit |  |  |  | 4 |  | 2 |  |"


def test_orions_models_by_size_work_time_and_memory() -> None:
    lines = documents.orion(ORION).splitlines()
    assert lines[4] == "| as ORION computes it, 16 heads | 303.4M | 593 | 4 | 4 | 1.00 | 2 | 2 |"
    assert lines[5] == "| kdfast, 16 heads | 303.4M | 537 | 2 | 2 | 2.00 | 2 | 2 |"
    assert lines[6].startswith("| kdfast, 8 heads | 253.0M | 430 | 1 |")
    assert lines[7].startswith("| kdfast, 8 heads and half of the units | 152.3M | 269 | 3 |")
    assert lines[-1] == "| a frame of six cameras | 5.0 | 2.0 | 2.50 | 3.0 | 1.0 |"


def test_blocks_name_machines_rates_and_what_was_not_timed() -> None:
    blocks = documents.blocks(SHOWN, [OTHER, SHOWN], GPU)
    assert blocks["machine"] == "Zen 9, avx2, 2 threads, torch 9, commit abc, 2000-01-02."
    lines = blocks["machines"].splitlines()
    assert lines[0] == "| op | Lake | Zen 9 |"
    assert {"| accelerate | 1.33 | 1.33 |", "| kd_loss |  | 1.62 |"} <= set(lines)
    assert lines[-1] == "- Zen 9, avx2, 2 threads, torch 9, commit abc, 2000-01-02"
    assert "Not timed" not in blocks["ops"] and "not measured" in blocks["rates"]
    skipped = [{"entry": f"f.py::bench[{i}]", "reason": "flex: no"} for i in range(2)]
    rates = {"float32": {"limit": 2.4e11, "library": 1.6e11}}
    ops = {**OPS, "skipped": skipped, "rates": rates}
    blocks = documents.blocks(documents.Machine(ops, WHOLE), [], GPU)
    assert "| float32 | 240 | 160 |" in blocks["rates"]
    assert "- flex: no: 2 entries, the first is `bench[0]`" in blocks["ops"]


def test_machines_are_found_by_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = documents.machines()
    assert every[documents.SHOWN].whole is not every[documents.SHOWN].ops
    assert all(machine.ops["machine"]["family"] for machine in every.values())
    assert not {"gpu_static", "profile_zen4", "zen4_models"} & every.keys()
    files = {"zen9": OPS, "zen9_models": WHOLE, "lake_models": WHOLE, "zen9_orion": ORION}
    for name, file in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(file))
    monkeypatch.setattr(documents, "RESULTS", tmp_path)
    assert documents.machines() == {"lake": (WHOLE, WHOLE, None), "zen9": (OPS, WHOLE, ORION)}


def test_filled_replaces_named_blocks_only() -> None:
    text = "a\n<!-- span -->\nold\n<!-- end -->\nb <!-- other -->"
    assert documents.filled(text, {"span": "new", "slower": "x"}) == text.replace("old", "new")
    with pytest.raises(ValueError, match="must be followed by <!-- end -->"):
        documents.filled("<!-- span -->", {"span": "new"})


def test_documents_are_up_to_date() -> None:
    contents = documents.committed()
    for path in documents.documents():
        text = path.read_text(encoding="utf-8")
        assert any(f"<!-- {name} -->" in text for name in contents), path.name
        assert documents.filled(text, contents) == text, f"{path.name}: python -m bench.documents"


def test_commands_refuse_what_they_do_not_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- span -->\n<!-- end -->")
    monkeypatch.setattr(documents, "documents", lambda: [page])
    with pytest.raises(SystemExit, match="2"):
        documents.main(["--dry-run"])
    assert page.read_text() == "<!-- span -->\n<!-- end -->"
    assert documents.main([]) == 0 and "| kd_loss |" in page.read_text()
    assert documents.main([]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{page}: written", f"{page}: as it was"]


ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
# Its lists of model names are generated, a line for each file of timm.
GENERATED = ROOT / "docs" / "use" / "support.md"


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them of simple ones."""
    headings = re.findall(r"^#+ (.*)$", without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_links_lead_to_pages_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{names(page)}: {target}"
        assert not anchor or anchor in anchors(there), f"{names(page)}: {target}"


@pytest.mark.parametrize("page", [p for p in PAGES if p != GENERATED], ids=names)
def test_lines_are_at_most_100_characters(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    long = [x for x in lines if len(x) > 100 and not x.startswith("|") and "https://" not in x]
    assert long == []


def test_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*/*.md"):
        assert f"({page.relative_to(ROOT / 'docs').as_posix()})" in index, names(page)


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_files_that_pages_name_exist(page: Path) -> None:
    """Paths in backquotes that start at the root of the repository."""
    folders = "kdfast|kernels|csrc|tests|bench|docs"
    for path in re.findall(rf"`((?:{folders})/[a-z0-9_./]+\.[a-z]+)`", without_code(page)):
        assert (ROOT / path).exists(), f"{names(page)}: {path}"


def test_picture_shows_every_op(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    speedups = importlib.import_module("bench.speedups")
    assert documents.rated(SHOWN) == {"kd_loss": [2.5, 0.75], "accelerate": [8 / 6]}
    assert speedups.main(["--out", str(tmp_path / "new.png")]) == 0
    assert (tmp_path / "new.png").read_bytes().startswith(b"\x89PNG")
