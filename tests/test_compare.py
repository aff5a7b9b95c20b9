# SPDX-License-Identifier: Apache-2.0
"""``python -m kdfast.compare`` as a user runs it."""

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import timm
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from kdfast import compare
from kdfast.compare import batched, main, parser, pictures
from kdfast.pruning.saving import load_pretrained, save_pretrained
from kdfast.resolve import class_count
from kdfast.rivals import RIVALS
from kdfast.rivals.picture import draw
from kdfast.rivals.race import Contender, Race
from kdfast.rivals.report import lines, notes, table
from kdfast.rivals.results import Row, row_of


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", depth=2, num_classes=7, img_size=32, embed_dim=48, num_heads=4
    )
    return save_pretrained(model, tmp_path / "model")


def arguments(model: Path, out: Path, /, **more: Any) -> list[str]:
    given = {"model": model, "out": out, "seconds": 0.05, "only": "eager,kdfast", **more}
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def test_measures_prints_draws_and_writes(
    tmp_path: Path, model_folder: Path, picture_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(arguments(model_folder, out, data=picture_folder, batch=2)) == 0
    text = capsys.readouterr().out
    assert "pruned: 50% of the heads removed by magnitude" in text
    assert f"4 pictures to agree on: {picture_folder}" in text
    assert "whole model" in text and "pruned model" in text and "whole, fastest: " in text
    assert text.strip().endswith(f"{out / 'compare.png'}\n{out / 'compare.json'}")
    found = json.loads((out / "compare.json").read_text())
    assert found["batch"] == 2 and found["picture_count"] == 4 and not found["random_weights"]
    assert found["machine"]["threads"] == torch.get_num_threads()
    rows = [Row(**row) for row in found["rows"]]
    assert [(row.model, row.name) for row in rows] == [
        (model, name) for model in ("whole", "pruned") for name in ("eager", "kdfast")
    ]
    for row in rows:
        assert not row.reason and row.ms and row.p95_ms and row.ms <= row.p95_ms
        assert row.images_per_second == pytest.approx(2e3 / row.ms)
        assert row.samples >= 6 and row.file_bytes and row.memory_bytes and row.prepare_seconds
    for row in rows[:2]:
        assert row.cosine == pytest.approx(1) and row.top1 == 1
    assert rows[2].cosine is not None and rows[2].cosine < 1 - 1e-6
    assert rows[2].cosine == pytest.approx(rows[3].cosine or 0, abs=1e-5)
    assert (rows[2].file_bytes or 0) < (rows[0].file_bytes or 0)
    with Image.open(out / "compare.png") as image:
        pixels = numpy.asarray(image.convert("L"))
    assert pixels.shape[0] > 400 and pixels.std() > 10


def test_stand_ins_and_a_given_pruned_model(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = compare.pruned(load_pretrained(model_folder), parser().parse_args(["--model", "x"]))
    folder = save_pretrained(small["pruned"], tmp_path / "small")
    more = {"pruned": folder, "pictures": 2, "only": "kdfast"}
    assert main(arguments(model_folder, tmp_path / "out", **more)) == 0
    text = capsys.readouterr().out
    assert "2 pictures to agree on: rendered driving scenes, a stand-in" in text
    assert f"pruned: {folder}" in text


def test_a_model_that_cannot_be_pruned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = {"pictures": 1, "only": "eager", "skip": "kdfast"}
    assert main(arguments(Path("test_resnet"), tmp_path / "out", **more)) == 0
    text = capsys.readouterr().out
    assert "no pruned model: head_scores: model must be one of" in text
    assert "random weights" in text and "agreement says little" in text
    (row,) = json.loads((tmp_path / "out" / "compare.json").read_text())["rows"]
    assert row["name"] == "eager" and row["cosine"] == pytest.approx(1)


def test_missing_libraries_are_rows_with_the_reason(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [torch.zeros(1, 3, 32, 32)]
    model = load_pretrained(model_folder)
    eager, lost = Contender("whole", RIVALS["eager"]), Contender("whole", RIVALS["openvino"])
    lost.reason = "not installed: openvino (pip install 'kdfast[bench]')"
    eager.samples, eager.outputs = [(0.002, True)] * 6, {0: numpy.ones((1, 7), numpy.float32)}
    with Race({}, [], images, images, 1):
        rows = [row_of(c, torch.ones(1, 7), 1, 1, True) for c in (eager, lost)]
    assert class_count(model) == 7 and rows[0].ms == pytest.approx(2) and rows[0].top1 == 1
    assert rows[1].ms is None and notes(rows) == [f"openvino: {lost.reason}"]
    assert lines(rows) == [
        "whole, fastest: eager, 2.0 ms, 1.00x as fast as eager of the whole model"
    ]
    assert table(rows).row_count == 3


def test_the_end_of_a_process_is_a_reason(model_folder: Path) -> None:
    images = [torch.randn(1, 3, 32, 32)]
    model = load_pretrained(model_folder)
    with Race({"whole": model}, [RIVALS["eager"], RIVALS["kdfast"]], images, images, 1) as race:
        race.prepare(race.contenders, lambda _: None)
        race._children["whole eager"]._process.kill()
        race.time(race.contenders, 0.01, lambda _: None)
        # As if Ctrl-C had come before the answer to a turn.
        race._children["whole kdfast"]._connection.send(("turn", 0.0))
        race.finish(race.contenders, lambda _: None)
        dead, alive = race.contenders
        assert dead.reason == "its process was ended by SIGKILL, perhaps for lack of memory"
        assert not alive.reason and len(alive.samples) >= 7 and alive.memory > 0
        assert alive.note == "2 modules fused, 0 left"


def test_errors_of_loading_are_a_reason() -> None:
    images = [torch.randn(1, 3, 8, 8)]
    with Race({"whole": nn.Linear(3, 3)}, [RIVALS["eager"]], images, images, 1) as race:
        race.prepare(race.contenders, lambda _: None)
        (contender,) = race.contenders
    assert re.match(r"loading failed: RuntimeError: .*mat1 and mat2", contender.reason)
    assert row_of(contender, torch.zeros(1, 3), 1, 1, False).reason == contender.reason


def test_what_was_measured_before_ctrl_c_is_kept(
    tmp_path: Path,
    model_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = Race.time

    def stopped(self: Race, heat: Sequence[Contender], seconds: float, _: object) -> None:
        turns = []

        def say(contender: Contender) -> None:
            turns.append(contender.name)
            if len(turns) == 1:
                raise KeyboardInterrupt

        original(self, heat, seconds, say)

    monkeypatch.setattr(Race, "time", stopped)
    out = tmp_path / "out"
    assert main(arguments(model_folder, out, prune=0, pictures=4)) == 130
    assert "stopped by SIGINT; rows without numbers were not measured" in capsys.readouterr().err
    first, second = json.loads((out / "compare.json").read_text())["rows"]
    assert first["ms"] and first["cosine"] == pytest.approx(1)
    assert second["ms"] is None and second["reason"] == "stopped before it was timed"


def test_heats_keep_within_the_memory(model_folder: Path) -> None:
    images = [torch.zeros(1, 3, 32, 32)]
    model = load_pretrained(model_folder)
    with Race({"whole": model}, list(RIVALS.values()), images, images, 1) as race:
        assert race.heats(2**40) == [race.contenders]
        heats = race.heats(2**30)
        assert [c for heat in heats for c in heat] == race.contenders
        assert {len(heat) for heat in heats[:-1]} == {3}
        assert [len(heat) for heat in race.heats(0)] == [1] * len(RIVALS)


def test_no_picture_calibrates_and_is_agreed_on(picture_folder: Path, model_folder: Path) -> None:
    model = load_pretrained(model_folder)
    options = parser().parse_args(["--model", "x", "--data", str(picture_folder), "--batch", "3"])
    agree, calibrate, count = pictures(model, options)
    assert count == 4 and [tuple(b.shape) for b in agree] == [(3, 3, 32, 32)] * 2
    seen, other = torch.cat(agree)[:count], torch.cat(calibrate)
    assert not any(torch.equal(a, b) for a in seen for b in other)
    assert torch.equal(torch.cat(agree)[4:], seen[:2])
    few = parser().parse_args(["--model", "x", "--pictures", "5"])
    agree, calibrate, count = pictures(model, few)
    assert count == len(agree) == 5 and len(calibrate) == 16
    (one,) = batched(torch.arange(1.0), 2)
    assert one.tolist() == [0, 0]


def test_sentences_and_the_picture(tmp_path: Path) -> None:
    common = {"p95_ms": 1.0, "samples": 10, "quiet": 10}
    rows = [
        Row("whole", "eager", "fp32", ms=8.0, cosine=1.0, **common),
        Row("whole", "kdfast-bf16", "bf16", ms=4.0, cosine=0.9999, note="as asked", **common),
        Row("whole", "onnx-int8", "int8", ms=10.0, cosine=0.5, **common),
        Row("pruned", "onnx-int8", "int8", reason="no"),
    ]
    assert lines(rows) == [
        "whole, fastest: kdfast-bf16, 4.0 ms, 2.00x as fast as eager of the whole model",
        "whole, bf16: kdfast-bf16 is 2.00x as fast against the fastest fp32, eager",
        "whole, int8: onnx-int8 is not faster (0.80x) against the fastest fp32, eager; "
        "its answers differ (cosine 0.500)",
    ]
    assert notes(rows) == ["kdfast-bf16 (whole): as asked", "onnx-int8 (pruned): no"]
    both = [Row(model, name, "int8", reason="no") for model in "ab" for name in ("x", "y")]
    assert notes([*both, Row("a", "z", "int8", reason="no")]) == ["x, y, z (a): no"]
    busy = [Row("whole", "eager", "fp32", ms=8.0, samples=10, quiet=2)]
    assert notes(busy)[0].startswith("other programs were running: only 2 of 10 calls")
    assert draw(rows, tmp_path / "a.png", "title") and (tmp_path / "a.png").exists()
    assert not draw(rows[3:], tmp_path / "b.png", "title") and not (tmp_path / "b.png").exists()


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"model": "vit_tinny_patch16_224"}, "--model: timm has no model 'vit_tin.*did you"),
        ({"data": "nowhere"}, "--data: must be a folder, got nowhere"),
        ({"batch": 0}, "--batch: must be at least 1, got 0"),
        ({"pictures": 0}, "--pictures: must be at least 1, got 0"),
        ({"threads": 0}, "--threads: must be at least 1, got 0"),
        ({"seconds": 0}, "--seconds: must be above 0, got 0"),
        ({"prune": 1}, r"--prune: must be a share in \[0, 1\), got 1"),
        ({"skip": "eager,kdfast"}, "--skip: leaves no candidate"),
        (
            {"pruned": "nowhere"},
            "--pruned: timm has no model 'nowhere', and there is no folder",
        ),
    ],
)
def test_bad_requests_are_one_line(
    tmp_path: Path,
    model_folder: Path,
    capsys: pytest.CaptureFixture[str],
    more: dict[str, Any],
    match: str,
) -> None:
    assert main(arguments(model_folder, tmp_path / "out", **more)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and re.search(match, line), line


def test_more_bad_requests(
    tmp_path: Path,
    model_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "empty").mkdir()
    assert main(arguments(model_folder, tmp_path / "out", data=tmp_path / "empty")) == 2
    assert "must hold pictures" in capsys.readouterr().err
    assert main(arguments(model_folder, model_folder / "config.json" / "x")) == 2
    assert "--out: " in (error := capsys.readouterr().err) and "cannot be written" in error
    with pytest.raises(SystemExit, match="2"):
        main(arguments(model_folder, tmp_path / "out", only="eager,tensorrt"))
    assert "got 'tensorrt'" in capsys.readouterr().err
    monkeypatch.setattr(compare, "PACKAGES", ("no_such_package",))
    assert main(arguments(model_folder, tmp_path / "out")) == 2
    assert "missing packages: no_such_package" in capsys.readouterr().err


def test_help_names_every_candidate(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in RIVALS)


def test_the_table_fits_a_terminal_of_eighty_columns() -> None:
    slow: dict[str, Any] = {"ms": 12345.6, "p95_ms": 2510.4, "images_per_second": 1234.5}
    slow |= {"file_bytes": 4 << 30, "memory_bytes": 16 << 30, "cosine": 0.99999, "top1": 1.0}
    fast = {**slow, "ms": 75.25, "images_per_second": 65.97}
    models = "whole", "pruned"
    rows = [Row(model, "onnx-int8-dynamic", "int8", **fast) for model in models]
    rows.append(Row("whole", "eager", "fp32", **slow))
    with io.StringIO() as text:
        Console(file=text, width=80).print(table(rows))
        shown = text.getvalue()
    assert "…" not in shown
    assert "top-1" in shown and "onnx-int8-dynamic    75.2  2,510" in shown and "164.1" in shown
