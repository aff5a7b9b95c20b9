# SPDX-License-Identifier: Apache-2.0
"""What ``kdfast prune`` keeps by number, share, list or file, and what it says of the result."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from kdfast.models import EVAViT
from kdfast.prune import main
from kdfast.pruner import sweep
from kdfast.pruner.output import next_command
from kdfast.pruning.keep import counted, parse_keep, read_heads
from kdfast.pruning.quality import answers, quality_of
from kdfast.pruning.saving import load_pretrained, save_pretrained
from kdfast.sources import SourceError, judged_pictures


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", depth=2, num_classes=3, img_size=32, embed_dim=48, num_heads=3
    )
    return save_pretrained(model, tmp_path / "model")


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Three folders of pictures, four in each."""
    for index in range(12):
        pixels = np.random.default_rng(index).integers(0, 255, (32, 32, 3)).astype(np.uint8)
        path = tmp_path / "pictures" / "cab"[index % 3] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return tmp_path / "pictures"


def words(model: Path, out: Path, *more: object) -> list[str]:
    fixed = ["--model", model, "--out", out, "--rounds", 2, "--batches", 1, "--batch-size", 2]
    return [str(word) for word in (*fixed, *more)]


def test_values_of_keep() -> None:
    assert parse_keep("6") == 6 and parse_keep("0.5") == 0.5 and parse_keep("50%") == 0.5
    assert parse_keep("6,6,4") == parse_keep("[6, 6, 4]") == [6, 6, 4]
    assert parse_keep("heads.json") == Path("heads.json")
    with pytest.raises(ValueError, match="must be a number of heads .6.* got 'many'"):
        parse_keep("many")


def test_words_say_what_a_share_came_to() -> None:
    assert counted([[0, 1], [0, 2]], [3, 3]) == "2 of 3 heads in every block (67 %)"
    assert counted([[0], [0, 2]], [3, 3], "units") == "3 of 6 units in all blocks (50 %)"


def test_heads_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    for content in ([[2, 0], []], {"kept": [[2, 0], []]}, {"heads": [[2, 0], []]}):
        path.write_text(json.dumps(content))
        assert read_heads(path, [3, 3], "--keep") == [[0, 2], []]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("[[0]]", "must have one list per block .2., got 1"),
        ("[[0], [3]]", r"block 1 must be a list of different heads of 0 to 2, got \[3\]"),
        ("[[0], [true]]", "block 1 must be a list of different heads"),
        ("[[0, 0], [1]]", "block 0 must be a list of different heads"),
        ("[0, 1]", "block 0 must be a list of different heads of 0 to 2, got 0"),
        ('{"other": 1}', "must name blocks 0 to 1, got other"),
        ("no", "must be JSON"),
    ],
)
def test_bad_files_of_heads(content: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "h.json").write_text(content)
    with pytest.raises(ValueError, match=f"^prune.heads: .*{text}"):
        read_heads(tmp_path / "h.json", [3, 3], "prune.heads")
    with pytest.raises(ValueError, match="^prune.heads: there is no file"):
        read_heads(tmp_path / "none.json", [3, 3], "prune.heads")


def test_quality_against_literals() -> None:
    original = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 2.0], [1.0, 0.0, 0.0]])
    got = torch.tensor([[4.0, 3.0, 0.0], [0.0, 0.0, 9.0], [1.0, 0.0, 0.0]])
    labels = torch.tensor([1, 2, 1])
    found = quality_of(got, original, classes=3, labels=labels)
    assert found.cosine == pytest.approx((24 / 25 + 2) / 3)
    assert found.agreement == pytest.approx(2 / 3)
    assert found.accuracy == pytest.approx(1 / 3) and found.original == pytest.approx(2 / 3)
    assert found.main == ("top-1 accuracy", found.accuracy) and found.images == 3
    assert quality_of(got, original, classes=3).main == ("same class", found.agreement)
    assert quality_of(got, original).main == ("output cosine", found.cosine)
    maps = quality_of(torch.ones(2, 3, 4), torch.ones(2, 3, 4), classes=3)
    assert maps.agreement is None and maps.cosine == pytest.approx(1)
    with pytest.raises(ValueError, match="must have the original's shape"):
        quality_of(got[:2], original)


def test_answers_of_every_kind_of_output() -> None:
    class Model(nn.Module):
        def __init__(self, kind: Any) -> None:
            super().__init__()
            self.kind = kind

        def forward(self, x: Tensor) -> Any:
            return self.kind(x)

    image = torch.rand(2, 3, 4, 4)
    kinds = (
        *(lambda x: x.bfloat16(), lambda x: (x, 1), lambda x: [x]),
        *(lambda x: {"logits": x, "loss": x[:1]}, lambda x: {"last_hidden_state": x}),
    )
    for kind in kinds:
        got = answers(Model(kind), [image, image[:1]])
        assert got.shape == (3, 3, 4, 4) and got.dtype == torch.float32


def test_labels_are_the_folders_where_their_number_fits(model_folder: Path, classes: Path) -> None:
    model = load_pretrained(model_folder)

    def judged(folder: Path, count: int = 3, **more: Any) -> Any:
        options: dict[str, Any] = {"count": 20, "batch_size": 5, "classes": count, "used": ()}
        return judged_pictures(model, (32, 32), folder, **{**options, **more})

    found = judged(classes)
    assert [len(batch) for batch in found.batches] == [5, 5, 2]
    assert found.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert "none of which" in found.origin
    assert judged(classes, 4).labels is None
    model.config = type("Config", (), {"label2id": {"b": 0, "c": 1, "a": 2}})()
    assert judged(classes).labels.tolist() == [2] * 4 + [0] * 4 + [1] * 4
    del model.config
    used = sorted(classes.rglob("*.png"))
    half = judged(classes, used=used[::2])
    assert sum(map(len, half.batches)) == 6
    every = judged(classes, used=used)
    assert sum(map(len, every.batches)) == 12 and "there are no others" in every.origin
    # A folder of pictures beside the classes is no set of classes.
    (classes / "x.png").write_bytes(used[0].read_bytes())
    assert judged(classes).labels is None
    (classes / "val").mkdir()
    with pytest.raises(SourceError, match="val must hold pictures"):
        judged(classes)


def test_top1_of_class_folders_and_the_command_that_follows(
    tmp_path: Path, model_folder: Path, classes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, more = tmp_path / "out", ("--data", classes, "--calibrate", 4, "--keep", "0.5")
    assert main(words(model_folder, out, *more)) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "keep 50 %: 2 of 3 heads in every block (67 %)" in text
    for name in ("top-1 accuracy", "same class as before", "cosine with its output", "MB on disk"):
        assert name in text
    assert "none of which it was chosen or fitted on; with their classes" in text
    last = f"kdfast distill --teacher {model_folder} --student {out} --data {classes} --labels"
    assert text.endswith(last)
    report = json.loads((out / "report.json").read_text())
    assert report["bytes"]["after"] == (out / "model.safetensors").stat().st_size
    assert report["bytes"]["after"] < report["bytes"]["before"]
    assert 0 <= report["quality"]["accuracy"] <= 1 and report["quality"]["images"] == 8

    # The heads of one report are kept by another run.
    again = tmp_path / "again"
    more = ("--keep", out / "report.json", "--pictures", 0)
    assert main(words(model_folder, again, *more)) == 0
    assert "quality: not measured" in capsys.readouterr().out
    kept = [[block.attn.heads for block in load_pretrained(path).blocks] for path in (out, again)]
    assert kept[0] == kept[1]


def test_a_number_for_each_block(tmp_path: Path, model_folder: Path) -> None:
    more = ("--keep", "1,3", "--mlp-keep", "64,32", "--method", "magnitude")
    assert main(words(model_folder, tmp_path / "out", *more)) == 0
    model = load_pretrained(tmp_path / "out")
    assert [len(block.attn.heads) for block in model.blocks] == [1, 3]
    assert [block.mlp.fc2.in_features for block in model.blocks] == [64, 32]


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (("--keep", "gone.json"), "--keep: there is no file gone.json"),
        (("--keep", "1,2,3"), "one entry per block .2., got 3"),
        (("--keep", "1,2", "--scope", "global"), "in global scope"),
        (("--mlp-keep", "config.json"), "--mlp-keep: "),
        (("--sweep", "0.25,0.5", "--keep", "1"), "--sweep: takes the place of --keep"),
        (("--sweep", "0.25,1.5"), "--sweep: with a point it is a fraction"),
        (("--pictures", "-1"), "--pictures: must be at least 0"),
    ],
)
def test_bad_requests(
    more: tuple[str, ...],
    text: str,
    tmp_path: Path,
    model_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(words(model_folder, tmp_path / "out", "--method", "magnitude", *more)) == 2
    assert text.replace(".2.", "(2)") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["0.5", "0.5,0.5", "0.5,all", "0.5,heads.json"])
def test_bad_sweeps(value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words(tmp_path, tmp_path / "out", "--sweep", value))
    assert "argument --sweep: must be" in capsys.readouterr().err


def test_a_sweep_is_one_table_and_one_picture(
    tmp_path: Path,
    model_folder: Path,
    classes: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[Any] = []
    frame = sweep._frame
    monkeypatch.setattr(sweep, "_frame", lambda axes, *a: (frame(axes, *a), drawn.append(axes)))
    out = tmp_path / "out"
    more = ("--sweep", "1,0.67,3", "--data", classes, "--calibrate", 4)
    assert main(words(model_folder, out, *more)) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("top-1") == 1 and f"--student {out / 'keep_1'} " in text
    content = json.loads((out / "sweep.json").read_text())
    for point, name, heads in zip(content["points"], ("0.67", "1", "3"), (2, 1, 3), strict=True):
        folder = out / f"keep_{name}"
        assert point["folder"] == str(folder)
        assert [len(b.attn.heads) for b in load_pretrained(folder).blocks] == [heads] * 2
        assert point["quality"]["images"] == 8 and point["latency_ms"]["pruned, fused"]["ms"] > 0
    assert content["points"][2]["quality"]["cosine"] == pytest.approx(1)
    (axes,) = drawn
    bars = axes.containers[0].lines[2][0].get_segments()
    left, right = axes.get_xlim()
    assert all(left < x < right for bar in bars for x, _ in bar)
    with Image.open(out / "sweep.png") as image:
        assert image.width > 500 and len(np.unique(np.asarray(image))) > 20
    assert main(words(model_folder, out, *more)) == 2
    assert "keep_0.67" in (error := capsys.readouterr().err) and "--overwrite" in error


def test_the_next_command_of_other_models(tmp_path: Path) -> None:
    options = SimpleNamespace(
        model="vit_s", checkpoint="w 1.pth", pretrained=True, data=None, mlp_keep=0.5, seed=1
    )
    work: Any = SimpleNamespace(options=options, model=nn.Linear(1, 1), judged=None)
    assert next_command(work, Path("out")) == (
        "kdfast distill --teacher vit_s --teacher-checkpoint 'w 1.pth' --pretrained "
        "--student out --data PICTURES"
    )
    work.model = EVAViT(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3)
    options.data = Path("views")
    assert next_command(work, Path("out")) == (
        "kdfast train --config orion50 --set 'teacher.checkpoint=w 1.pth' --set "
        "prune.heads=out/report.json --set prune.mlp_keep=0.5 --set data.kind=images --set "
        "data.root=views"
    )
