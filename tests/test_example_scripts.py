# SPDX-License-Identifier: Apache-2.0
"""The short scripts of examples/, at tiny sizes, the gallery, and who is to be cited."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

import kdfast
from kdfast.models import load_backbone

ROOT = Path(__file__).resolve().parents[1]
VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
# The size of the pictures, which timm notes apart from the model's.
VIT["pretrained_cfg_overlay"] = {"input_size": (3, 32, 32)}


def script(name: str) -> Any:
    return importlib.import_module(f"examples.{name}")


def folder(path: Path, count: int) -> Path:
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 255, (40, 40 + index, 3))
        (path / str(index % 2)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path / str(index % 2) / f"{index}.png")
    return path


def test_accelerate_vit(capsys: pytest.CaptureFixture[str]) -> None:
    assert script("accelerate_vit").main("vit_tiny_patch16_224", calls=1, **VIT) < 1e-4
    out = capsys.readouterr().out
    assert "2 of 2 attention modules" in out and "attention maps: 2 of (1, 4, 17, 17)" in out


@pytest.mark.filterwarnings("ignore:calibrate")
def test_prune_and_distil(tmp_path: Path) -> None:
    before, after = script("prune_and_distil").main(
        folder(tmp_path / "pictures", 24),
        tmp_path / "half",
        epochs=2,
        model_name="vit_tiny_patch16_224",
        pretrained=False,
        num_classes=5,
        **VIT,
    )
    assert 0 < before < 1 and 0 < after < 1
    small = kdfast.load_pretrained(tmp_path / "half" / "student")
    assert [block.attn.num_heads for block in small.blocks] == [2, 2]
    assert all((tmp_path / "half" / name).is_file() for name in ("heads.png", "report.html"))


def test_attention_loop() -> None:
    teacher, student = script("attention_loop").main()
    assert teacher > 0.7 and student > 0.6  # ten classes


def test_orion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    orion = script("orion")
    student, whole = orion.main(None, tmp_path)
    assert [len(row) for row in load_backbone(student).heads] == [2, 2, 2]
    assert "features (1, 128, 4, 4)" in capsys.readouterr().out
    assert (tmp_path / "heads.png").is_file() and (tmp_path / "kdfast_orion.py").is_file()
    state = torch.load(whole, weights_only=True)["state_dict"]
    assert all(name.startswith("img_backbone.") for name in state)


def test_gallery(tmp_path: Path) -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, **{**VIT, "img_size": 224}
    ).eval()
    images = torch.randint(0, 255, (6, 3, 288, 288), dtype=torch.uint8)
    gallery = script("gallery")
    paths = gallery.draw(model, images, [0, 1], tmp_path)
    assert len(paths) == 5
    for path in paths:
        assert path.stat().st_size <= gallery.LIMIT and max(Image.open(path).size) <= gallery.SIDE


def test_pictures_of_the_gallery_are_small_and_shown() -> None:
    page = (ROOT / "docs/use/gallery.md").read_text(encoding="utf-8")
    pictures = sorted((ROOT / "docs/images").glob("gallery_*.png"))
    assert len(pictures) == 5
    for path in pictures:
        assert path.stat().st_size <= 100_000 and f"(../images/{path.name})" in page


def test_scripts_stay_short() -> None:
    for name in ("accelerate_vit", "prune_and_distil", "attention_loop", "orion"):
        lines = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 80, name


def test_citation_names_the_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == kdfast.__version__ and cited["license"] == "Apache-2.0"
