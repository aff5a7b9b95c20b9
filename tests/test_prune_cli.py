# SPDX-License-Identifier: Apache-2.0
"""``python -m kdfast.prune`` as a user runs it."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest
import timm
import torch
from PIL import Image

from kdfast import prune
from kdfast.prune import main
from kdfast.pruning import HeadScores
from kdfast.pruning.saving import load_pretrained, save_pretrained


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", depth=2, num_classes=7, img_size=32, embed_dim=48, num_heads=3
    )
    return save_pretrained(model, tmp_path / "model")


def arguments(model: Path, out: Path, /, **more: Any) -> list[str]:
    given: dict[str, Any] = {
        "model": model,
        "out": out,
        "batches": 1,
        "batch-size": 2,
        "rounds": 2,
        **more,
    }
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def test_prunes_saves_draws_and_times(
    tmp_path: Path, model_folder: Path, picture_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pruned"
    more = {"keep": 2, "mlp-keep": 0.5, "data": picture_folder}
    assert main([*arguments(model_folder, out, **more), "--mean-context"]) == 0
    text = capsys.readouterr().out
    assert "pictures of" in text and "heads" in text and "1.50x" in text
    assert text.strip().endswith(str(out / "report.json"))
    model = load_pretrained(out)
    assert [len(block.attn.heads) for block in model.blocks] == [2, 2]
    assert [block.mlp.fc2.in_features for block in model.blocks] == [96, 96]
    report = json.loads((out / "report.json").read_text())
    assert report["kept"] == [block.attn.heads for block in model.blocks]
    assert report["cost"]["full"]["heads"] == 6
    assert set(report["latency_ms"]) == {"before", "before, fused", "pruned, fused"}
    assert all(row["ms"] > 0 for row in report["latency_ms"].values())
    scores = HeadScores.load(out / "scores.json")
    assert scores.method == "taylor" and scores.metadata["images"] == 2
    with Image.open(out / "heads.png") as image:
        pixels = numpy.asarray(image.convert("L"))
    assert pixels.shape[0] > 100 and pixels.std() > 10


def test_compensates_where_there_is_data(
    tmp_path: Path, model_folder: Path, picture_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By default, said aloud; every site's error falls, and the written model is the fitted one."""
    more = {"keep": 1, "mlp-keep": 0.25, "data": picture_folder, "method": "reconstruction"}
    weights = {}
    for name, flags in (("fit", []), ("slow", ["--sequential"]), ("cut", ["--no-compensate"])):
        out = tmp_path / name
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "calibrate: .* tokens")
            assert main([*arguments(model_folder, out, **more), *flags]) == 0
        text = " ".join(capsys.readouterr().out.split())
        report = json.loads((out / "report.json").read_text())
        weights[name] = load_pretrained(out).blocks[1].mlp.fc2.weight
        if name == "cut":
            assert "compensating on" not in text and report["errors"] == []
            continue
        assert f"compensating on 5 pictures of {picture_folder}" in text
        assert "(--no-compensate turns it off)" in text and "the same pictures" in text
        assert ("one site after the other" in text) == (name == "slow")
        assert "blocks.1.mlp" in text and "48 of 192" in text
        assert len(report["errors"]) == 4
        assert all(site["compensated"] < site["cut"] for site in report["errors"])
    assert weights["fit"].shape == weights["cut"].shape == (48, 48)
    assert not torch.equal(weights["fit"], weights["cut"])
    assert not torch.equal(weights["fit"], weights["slow"])


def test_scenes_without_data_and_pruning_again(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = arguments(model_folder, tmp_path / "one", method="magnitude", keep=2)
    assert main(first) == 0
    assert "on the weights alone" in capsys.readouterr().out
    second = arguments(tmp_path / "one", tmp_path / "two", method="entropy", keep=0.5)
    assert main([*second, "--scope", "global"]) == 0
    assert "rendered driving scenes" in capsys.readouterr().out
    assert sum(len(b.attn.heads) for b in load_pretrained(tmp_path / "two").blocks) == 2


def test_magnitude_looks_at_no_picture(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def scenes(size: tuple[int, int], count: int) -> list[torch.Tensor]:
        drawn.append(count)
        return [torch.rand(3, *size) for _ in range(count)]

    monkeypatch.setattr("kdfast.sources.pictures.scenes", scenes)
    more = {"method": "magnitude", "mlp-keep": 0.5}
    assert main(arguments(model_folder, tmp_path / "weights", **more)) == 0
    assert not drawn
    assert main([*arguments(model_folder, tmp_path / "means", **more), "--mean-context"]) == 0
    assert drawn == [2]


@pytest.mark.parametrize("kind", [TypeError, ValueError, ImportError, OSError])
@pytest.mark.parametrize("method", ["magnitude", "taylor"])
def test_errors_of_the_model_are_not_hidden(
    tmp_path: Path,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[Exception],
    method: str,
) -> None:
    model = load_pretrained(model_folder)

    def fail(*_: object) -> None:
        raise kind("the model's own fault")

    model.patch_embed.register_forward_pre_hook(fail)
    monkeypatch.setattr("kdfast.sources.models.load_pretrained", lambda _: model)
    # With "magnitude" its first pass is the last step, the timing.
    monkeypatch.setattr(prune, "pruning_report", lambda *_, **__: None)
    with pytest.raises(kind, match="^the model's own fault$"):
        main(arguments(model_folder, tmp_path / "out", method=method))


def test_missing_packages_are_named_before_anything_runs(
    tmp_path: Path,
    model_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prune, "PACKAGES", ("torch", "no_such_package"))
    assert main(arguments(model_folder, tmp_path / "out")) == 2
    assert capsys.readouterr() == (
        "",
        "error: missing packages: no_such_package; pip install " + "'kdfast[train]'\n",
    )


def test_mean_context_needs_biases(
    tmp_path: Path,
    model_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = load_pretrained(model_folder)
    model.blocks[1].mlp.fc2.bias = model.blocks[0].attn.proj.bias = None
    monkeypatch.setattr("kdfast.sources.models.load_pretrained", lambda _: model)
    for more, names in (({}, "blocks.0.attn"), ({"mlp-keep": 2}, "blocks.0.attn, blocks.1.mlp")):
        assert main([*arguments(model_folder, tmp_path / "out", **more), "--mean-context"]) == 2
        error = capsys.readouterr().err
        assert error == f"error: --mean-context: needs a bias in the projections of {names}\n"


def test_leave_one_out_says_how_long_it_takes(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(model_folder, tmp_path / "out", method="leave_one_out", keep=1)) == 0
    text = capsys.readouterr().out
    assert re.search(r"6 heads, each left out in half a pass over 2 pictures: about \d+ sec", text)
    assert [len(b.attn.heads) for b in load_pretrained(tmp_path / "out").blocks] == [1, 1]


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (
            {"model": "vit_tinny_patch16_224"},
            "--model: timm has no model 'vit_tin.*no folder .*did you",
        ),
        ({"model": "resnet18"}, "kdfast.prune: model must be one of EVAViT.*holds no attention"),
        ({"data": "nowhere"}, "--data: must be a folder, got nowhere"),
        ({"keep": 4}, r"keep must be in \[1, 3\] for block 0, got 4"),
        ({"keep": 1.5}, r"--keep: with a point it is a fraction in \(0, 1\], got 1.5"),
        ({"mlp-keep": 0.0}, r"--mlp-keep: with a point it is a fraction in \(0, 1\], got 0.0"),
        ({"mlp-keep": 500}, r"keep must be in \[1, 192\] for block 0, got 500"),
        ({"batches": 0}, "--batches and --batch-size must be at least 1"),
        ({"calibrate": 0}, "--calibrate: must be at least 1, got 0"),
    ],
)
def test_bad_requests_are_one_line(
    tmp_path: Path,
    model_folder: Path,
    capsys: pytest.CaptureFixture[str],
    more: dict[str, Any],
    match: str,
) -> None:
    out = tmp_path / "out"
    assert main(arguments(model_folder, out, **{"method": "magnitude", **more})) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and re.search(match, line), line
    assert not out.exists()


def test_more_bad_requests(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(model_folder, model_folder)) == 2
    assert "holds a model already; --overwrite replaces it" in capsys.readouterr().err
    assert main([*arguments(model_folder, tmp_path / "x"), "--pretrained"]) == 2
    assert "--pretrained: belongs to names of timm and torchvision; " in capsys.readouterr().err
    assert main(arguments(model_folder, model_folder / "config.json" / "x")) == 2
    assert "--out: " in (error := capsys.readouterr().err) and "cannot be written" in error
    both = ["--compensate", "--mean-context"]
    assert main([*arguments(model_folder, tmp_path / "x"), *both]) == 2
    assert "--mean-context: --compensate has it" in capsys.readouterr().err
    assert main([*arguments(model_folder, tmp_path / "x"), "--sequential"]) == 2
    assert "--sequential: needs --compensate or --data" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(arguments(model_folder, tmp_path / "x", data=tmp_path / "empty")) == 2
    assert "must hold pictures" in capsys.readouterr().err
    (tmp_path / "empty" / "a.png").write_bytes(b"no picture")
    assert main(arguments(model_folder, tmp_path / "x", data=tmp_path / "empty")) == 2
    assert "a.png cannot be read" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["--model", "x", "--out", "y", "--method", "luck"])
