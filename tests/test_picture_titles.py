# SPDX-License-Identifier: Apache-2.0
"""What pictures of attention show besides maps: the crop, overlays, and names in titles."""

from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from kdfast.models import EVAViT
from kdfast.pictures import capture, class_names, model_name, prediction
from kdfast.pictures.page import OPACITY, Page, picture
from kdfast.sources import crops_of, load_images, transform_of

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}


def timm_vit(**changes: object) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **{**TINY, **changes})


def eva() -> EVAViT:
    sizes = {**TINY, "num_heads": 4, "embed_dim": 32, "pt_hw_seq_len": 4, "pretrain_img_size": 32}
    return EVAViT(**sizes, with_cp=False)


def test_the_crop_is_what_the_model_saw(tmp_path: Path) -> None:
    model = timm_vit(num_classes=5)
    path = tmp_path / "grey.png"
    Image.new("RGB", (40, 40), (51, 102, 204)).save(path)
    images = load_images([path], transform_of(model))
    seen = capture(model, images, crops_of(model, images))
    expected = torch.tensor([51, 102, 204]) / 255
    torch.testing.assert_close(torch.tensor(picture(seen, 0)[7, 9]), expected)
    torch.testing.assert_close(seen.output, model.eval()(images))
    orion = eva()
    images = load_images([path], transform_of(orion))
    torch.testing.assert_close(crops_of(orion, images)[0, :, 7, 9], expected, atol=1e-3, rtol=0)
    assert capture(orion, images).output is None
    with pytest.raises(ValueError, match="crop must be like images"):
        capture(model, torch.rand(1, 3, 32, 32), torch.rand(1, 3, 16, 16))


def test_an_overlay_is_as_opaque_as_the_value_is_high() -> None:
    seen = capture(timm_vit(), torch.randn(1, 3, 32, 32))
    page = Page(1, 1, 2.0, seen.grid, "one\ntwo")
    values = numpy.zeros((4, 4))
    values[0, 0], values[0, 1], values[0, 2] = 2.0, 1.0, 9.0
    drawn = page.map(0, values, 2.0, "overlay", overlay=(seen, 0))
    assert drawn.get_alpha()[0].tolist() == [OPACITY, OPACITY / 2, OPACITY, 0.0]
    signed = page.map(0, -values, 2.0, "change", overlay=(seen, 0), signed=True)
    assert signed.get_alpha()[0, 1] == OPACITY / 2


def test_titles_fit_beside_the_colour_bar() -> None:
    name = "vit_small_patch16_224.augreg_in21k_ft_in1k, 21.7M parameters, on imagefolder, seed 42"
    page = Page(1, 2, 1.7, (4, 4), f"{name}\ntest image 0")
    page.subtitle("layer 1")
    drawn = page.figure.get_suptitle().splitlines()
    assert len(drawn) > 3 and " ".join(drawn) == f"{name} test image 0 layer 1"
    page.figure.canvas.draw()
    box = page.figure._suptitle.get_window_extent()  # type: ignore[attr-defined]
    assert box.x0 >= 0 and box.x1 <= page.figure.bbox.x1
    assert box.y0 > page.panels[0].get_window_extent().y1


def test_titles_name_models_and_classes() -> None:
    model = timm_vit()
    assert model_name(model) == "vit_tiny_patch16_224"
    assert model_name(eva()) == "EVA-ViT, 3 blocks, 32 wide, 12 heads"
    assert model_name(nn.Linear(1000, 100)) == "Linear, 0.10M parameters"
    names = class_names(model)
    assert names is not None and names[281] == "tabby"
    assert class_names(timm_vit(num_classes=10)) is None
    logits = torch.full((4,), -100.0)
    logits[2] = 0.0
    assert prediction(logits, ["a", "b", "c", "d"]) == "c (100%)"
    assert prediction(logits, None) == prediction(logits, ["too few"]) == "class 2 (100%)"
    config = SimpleNamespace(model_type="vit", id2label={0: "no", 1: "yes"})
    named = nn.Identity()
    named.config = config  # type: ignore[assignment]
    assert (model_name(named), class_names(named)) == ("vit", ["no", "yes"])
