# SPDX-License-Identifier: Apache-2.0
"""Tables of block sizes that were measured on a GPU: what is read, refused and shown."""

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kdfast import info
from kdfast.ops import _blocks as in_use

blocks: Any = importlib.import_module("kdfast.kernels._blocks")
KEY = ("fwd", 64, 2)
MINE = blocks.Blocks(((64, 4), (32, 4)), 128, 2)
WIN = {"dtype": "bfloat16", "head_dim": 64, "least": 197, "most": 577, "matrices": 768}
FACTS = {"device": "made-up card", "date": "2026-11-28"}


@pytest.fixture(autouse=True)
def _read_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A folder of tables of this test alone, and nothing remembered."""
    monkeypatch.setattr(blocks, "FOLDER", tmp_path / "tables")
    monkeypatch.delenv(blocks.VARIABLE, raising=False)
    blocks.table.cache_clear()
    yield
    blocks.table.cache_clear()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a table of sm_90 with changes to its content."""

    def file(path: Path | None = None, **changes: Any) -> Path:
        table = blocks.Table(blocks.BLOCKS | {KEY: MINE}, "", "2.8.3", (blocks.Flash(**WIN),))
        content = json.loads(blocks.text_of("sm_90", FACTS, table)) | changes
        path = path or tmp_path / "mine.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
        return path

    return file


def test_without_a_file_the_built_in_table_holds() -> None:
    for arch in ("", "sm_90"):
        assert blocks.table(arch) == blocks.Table(blocks.BLOCKS, "built in")


def test_a_packaged_table_is_that_of_its_architecture(write: Callable[..., Path]) -> None:
    path = write(blocks.FOLDER / "sm_90.json")
    found = blocks.table("sm_90")
    assert found.blocks == blocks.BLOCKS | {KEY: MINE}
    assert found.source == f"packaged: {path}, measured on made-up card, 2026-11-28"
    assert (found.flash_version, found.flash) == ("2.8.3", (blocks.Flash(**WIN),))
    assert blocks.table("sm_80").source == blocks.table("").source == "built in"


def test_a_users_file_comes_first_and_is_read_once(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(blocks.FOLDER / "sm_90.json", blocks={})
    path = write()
    monkeypatch.setenv(blocks.VARIABLE, str(path))
    assert blocks.table("sm_90").blocks[KEY] == MINE
    path.unlink()
    assert blocks.table("sm_90").source.startswith(f"{blocks.VARIABLE}: {path}")
    # What is compiled or interpreted is no GPU's.
    assert blocks.table("").source == "built in"


def test_launches_take_its_blocks(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = pytest.importorskip("kdfast.kernels._common")
    monkeypatch.setenv(blocks.VARIABLE, str(write()))
    common.choose_tiles.cache_clear()
    tiles = common.choose_tiles("fwd", (1600,), 64, 2, "sm_90")
    assert (tiles.rows, tiles.warps, tiles.cols, tiles.stages) == (64, 4, 128, 2)
    assert common.choose_tiles("fwd", (1600,), 64, 2).rows == 128
    common.choose_tiles.cache_clear()


ENTRY = {"rows": [[64, 4]], "cols": 64, "stages": 2}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kdfast_blocks": 2}, '"kdfast_blocks" must be 1'),
        ({"arch": "sm_80"}, "it is of sm_80, and this GPU is sm_90"),
        ({"blocks": {"fwd 65 2": ENTRY}}, "there is no kernel 'fwd 65 2'"),
        ({"blocks": {"fwd 64 2": ENTRY | {"cols": 48}}}, "powers of two"),
        ({"blocks": {"fwd 64 2": ENTRY | {"rows": [[64, 3]]}}}, "warps must be"),
        ({"blocks": {"fwd 64 2": ENTRY | {"stages": 0}}}, "stages 1 to 8"),
        ({"blocks": {"fwd 64 2": ENTRY | {"rows": []}}}, "whole numbers"),
        ({"blocks": {"fwd 64 2": ENTRY | {"stages": True}}}, "whole numbers"),
        ({"blocks": {"fwd 64 2": ENTRY | {"rows": [64]}}}, "cannot unpack"),
        ({"blocks": {"fwd 64 2": {"rows": [[64, 4]]}}}, "'cols' is missing"),
        ({"blocks": []}, "'list' object"),
        ({"flash": {"wins": []}}, "'version' is missing"),
        ({"flash": {"version": "2", "wins": [WIN | {"least": "197"}]}}, "whole numbers"),
        ({"flash": {"version": "2", "wins": [{"dtype": "bfloat16"}]}}, "missing"),
    ],
)
def test_damaged_and_foreign_files_are_refused(
    write: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    reason: str,
) -> None:
    path = write(**changes)
    monkeypatch.setenv(blocks.VARIABLE, str(path))
    with pytest.raises(ValueError, match="must be a table of blocks that") as error:
        blocks.table("sm_90")
    assert str(error.value).startswith(f"{path}: ") and reason in str(error.value)


@pytest.mark.parametrize("text", [None, "", "{", "[]", "\x00"])
def test_what_is_no_table_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    path = tmp_path / "mine.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv(blocks.VARIABLE, str(path))
    with pytest.raises(ValueError, match="must be a table of blocks that"):
        blocks.table("sm_90")


def test_info_names_the_table_of_every_gpu(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert info.tables_in_use is in_use.tables_in_use
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert in_use.tables_in_use() == [("tables", "no GPU")]
    monkeypatch.setenv(blocks.VARIABLE, "here.json")
    unread = "KDFAST_BLOCKS=here.json is not read without a GPU"
    assert in_use.tables_in_use() == [("tables", unread)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(in_use, "installed", lambda: "2.7")
    monkeypatch.setattr(blocks, "architecture", lambda device: f"sm_{80 + 10 * device.index}")
    monkeypatch.setenv(blocks.VARIABLE, str(write()))
    (first, foreign), (second, mine) = in_use.tables_in_use()
    assert (first, second) == ("gpu 0, sm_80", "gpu 1, sm_90")
    assert foreign.startswith("cannot be used: ") and "it is of sm_90" in foreign
    assert mine.startswith("KDFAST_BLOCKS: ") and "made-up card" in mine
    assert mine.endswith(
        "; flash-attn 2.8.3 is faster for 1 kinds of calls, but 2.7 is installed: it is not taken"
    )
    monkeypatch.setattr(in_use, "installed", lambda: "2.8.3")
    assert in_use.tables_in_use()[1][1].endswith("for 1 kinds of calls, and takes them")


def test_no_gpu_has_no_architecture() -> None:
    assert blocks.architecture(torch.device("cpu")) == ""
