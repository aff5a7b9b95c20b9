# SPDX-License-Identifier: Apache-2.0
"""How pictures of Hugging Face models are prepared: their file, their family, and what is said."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, OPENAI_CLIP_MEAN
from torch import nn

import kdfast
from kdfast.models.image_processor import KEPT, check_pictures, guessed, pictures_of
from kdfast.models.prepared import PreparedModel, input_config
from kdfast.resolve import SourceError, load_model
from kdfast.sources import transform_of

HALF = (0.5, 0.5, 0.5)


def saved(folder: Path, facts: dict[str, Any] | None, kind: str = "ViT") -> Path:
    """A small model of transformers in a folder, perhaps with its processor's file."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = getattr(transformers, f"{kind}Config")(
        **sizes, image_size=32, patch_size=8, intermediate_size=32, num_labels=3
    )
    name = f"{kind}ForImageClassification" if kind in ("ViT", "DeiT") else f"{kind}Model"
    getattr(transformers, name)(config).save_pretrained(folder)
    if facts is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(facts))
    return folder


FACTS = {
    "do_normalize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4, 0.5, 0.6],
    "do_center_crop": True,
    "crop_size": {"height": 32, "width": 32},
    "size": {"shortest_edge": 40},
    "resample": 3,
}


def test_the_file_beside_the_weights_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_model(str(saved(tmp_path / "whole", FACTS)))
    assert not caplog.records
    config = input_config(model)
    assert config["input_size"] == (3, 32, 32)
    assert (config["mean"], config["std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert (config["crop_pct"], config["interpolation"]) == (0.8, "bicubic")
    prepared = PreparedModel(model).prepared(torch.full((1, 3, 32, 32), 0.5))
    torch.testing.assert_close(prepared[0, :, 0, 0], torch.tensor([1.0, 0.6, 0.2 / 0.6]))
    # A pruned copy keeps it, and so does the folder that it is saved to.
    small = kdfast.prune_heads(model, [[0, 1], [2]])
    kdfast.save_pretrained(small, tmp_path / "half")
    for again in (kdfast.load_pretrained(tmp_path / "half"), load_model(str(tmp_path / "half"))):
        assert input_config(again) == config
    assert not caplog.records


def test_a_folder_of_transformers_read_by_load_pretrained_has_it(tmp_path: Path) -> None:
    model = kdfast.load_pretrained(saved(tmp_path, FACTS))
    assert input_config(model)["mean"] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    ("kind", "mean", "whose"),
    [
        ("ViT", HALF, "that of published vit models: mean and std 0.5, 0.5, 0.5 and 0.5"),
        ("CLIPVision", OPENAI_CLIP_MEAN, "that of published clip models"),
        ("SiglipVision", HALF, "that of published siglip models"),
        ("DeiT", IMAGENET_DEFAULT_MEAN, "ImageNet's: mean and std 0.485, 0.456, 0.406 and 0.229"),
    ],
)
def test_without_a_file_the_family_counts_and_it_is_said(
    kind: str,
    mean: tuple[float, ...],
    whose: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "kdfast"):
        model = load_model(str(saved(tmp_path, None, kind)))
    (record,) = caplog.records
    assert f"{tmp_path}: no preprocessor_config.json: " in record.message
    assert whose in record.message and guessed(model.config) in record.message
    assert tuple(input_config(model)["mean"]) == mean
    assert guessed(nn.Identity()) == ""


def test_families_have_what_their_own_processor_has() -> None:
    """Where transformers has a processor of a family's own, its defaults are ours."""
    transformers = pytest.importorskip("transformers")
    for family in ("CLIP", "Siglip", "ViT", "Beit"):
        try:
            processor = getattr(transformers, f"{family}ImageProcessor")()
        except ImportError as error:
            pytest.skip(str(error))
        config = getattr(transformers, f"{family}VisionConfig", None)
        config = config or getattr(transformers, f"{family}Config")
        found = input_config(type("Net", (nn.Module,), {"config": config()})())
        assert list(found["mean"]) == pytest.approx(list(processor.image_mean)), family
        assert list(found["std"]) == pytest.approx(list(processor.image_std)), family


@pytest.mark.parametrize(
    ("facts", "wanted"),
    [
        (
            {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 224},
            {"mean": [0.5] * 3, "std": [0.5] * 3, "size": [224, 224], "crop_mode": "squash"},
        ),
        ({"do_normalize": False}, {"mean": [0.0] * 3, "std": [1.0] * 3}),
        (
            {"do_rescale": False, "image_mean": [127.5], "image_std": [127.5]},
            {"mean": [0.5] * 3, "std": [0.5] * 3},
        ),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875}, {"crop_pct": 0.875}),
        ({"size": {"shortest_edge": 384}, "crop_pct": 0.875}, {"crop_mode": "squash"}),
        ({"size": {"height": 224, "width": 192}}, {"size": [224, 192], "crop_pct": 1.0}),
        ({"image_processor": {"do_normalize": False}}, {"mean": [0.0] * 3}),
        ({"do_center_crop": True, "crop_size": 224, "size": 256}, {"crop_pct": 0.875}),
        ({"resample": 2}, {"interpolation": "bilinear"}),
        ({}, {}),
    ],
)
def test_what_processors_save(facts: dict[str, Any], wanted: dict[str, Any]) -> None:
    found = pictures_of(facts)
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value), name
    check_pictures(json.loads(json.dumps(found)))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"image_mean": [0.5, 0.5], "image_std": [1] * 3}, "image_mean must be three numbers"),
        ({"image_mean": ["a"] * 3, "image_std": [1] * 3}, "image_mean must be a finite number"),
        ({"image_mean": [0] * 3, "image_std": [0] * 3}, "image_std must be above 0"),
        ({"rescale_factor": 0}, "must be above 0"),
        ({"size": {"height": -1, "width": 3}}, "size must be whole numbers above 0"),
        ({"size": [1, 2, 3]}, "size must be a side"),
        ({"size": 224, "crop_pct": 1.5}, "crop_pct must be above 0 and at most 1"),
        ({"image_processor": 3}, "image_processor must be an object"),
    ],
)
def test_a_damaged_file_is_an_error(facts: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        pictures_of(facts)
    folder = saved(tmp_path, facts)
    with pytest.raises(SourceError, match=f"preprocessor_config.json: .*{message}"):
        load_model(str(folder))


@pytest.mark.parametrize(
    "kept",
    [
        3,
        {"odd": 1},
        {"mean": [1, 2]},
        {"std": [1, 1, 0]},
        {"size": [0, 3]},
        {"crop_pct": 0},
        {"crop_mode": "border"},
        {"interpolation": "random"},
    ],
)
def test_an_edited_configuration_is_an_error(kept: Any, tmp_path: Path) -> None:
    model = load_model(str(saved(tmp_path / "whole", FACTS)))
    folder = kdfast.save_pretrained(model, tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, KEPT: kept}))
    with pytest.raises(ValueError, match=KEPT):
        kdfast.load_pretrained(folder, verify=False)


def test_pictures_of_commands_are_squashed_where_the_processor_does(tmp_path: Path) -> None:
    from PIL import Image

    facts = {**FACTS, "do_center_crop": False, "size": {"height": 32, "width": 32}}
    del facts["crop_size"]
    model = load_model(str(saved(tmp_path, facts)))
    # Red on its left edge only: a centre crop would lose it.
    picture = Image.new("RGB", (96, 32))
    picture.paste((255, 0, 0), (0, 0, 12, 32))
    image = transform_of(model)(picture)
    assert image.shape == (3, 32, 32)
    assert float(image[0, :, 0].mean()) > float(image[0, :, -1].mean()) + 1
