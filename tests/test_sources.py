# SPDX-License-Identifier: Apache-2.0
"""One meaning of ``--model`` and of pictures for the commands that take them."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from kdfast import attention, prune
from kdfast.models.eva import EVAViT
from kdfast.pictures import capture
from kdfast.pruning import prune_heads
from kdfast.pruning.saving import load_pretrained, save_pretrained
from kdfast.sources import (
    SourceError,
    check_model_name,
    image_batches,
    is_random,
    load_images,
    load_model,
    load_saved,
    transform_of,
)

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
TORCHVISION: dict[str, Any] = {
    "image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 3, "hidden_dim": 48,
    "mlp_dim": 96, "num_classes": 5,
}  # fmt: skip


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(5):
        pixels = numpy.random.default_rng(index).integers(0, 255, (40, 60, 3))
        Image.fromarray(pixels.astype(numpy.uint8)).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return save_pretrained(timm.create_model("vit_tiny_patch16_224", **SMALL), tmp_path / "model")


def pruned(model: str, out: Path, *more: str) -> int:
    words = ["--model", model, "--out", str(out), "--method", "magnitude", "--keep", "2"]
    return prune.main([*words, "--rounds", "2", *more])


def drawn(photos: Path, out: Path, *more: str) -> int:
    return attention.main(["--image", str(photos / "0.png"), "--output", str(out), *more])


def heads_seen(folder: Path) -> list[list[int]]:
    seen = capture(load_pretrained(folder), torch.rand(1, 3, 32, 32))
    return [list(layer.heads) for layer in seen.layers]


def test_pictures_of_a_model_that_the_command_pruned(
    tmp_path: Path, saved: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small, out = tmp_path / "small", tmp_path / "out"
    assert pruned(str(saved), small) == 0
    assert "random" not in capsys.readouterr().out
    kept = [block.attn.heads for block in load_pretrained(small).blocks]
    assert [len(row) for row in kept] == [2, 2] and heads_seen(small) == kept
    assert drawn(photos, out, "--model", str(small)) == 0
    assert drawn(photos, out / "pair", "--model", str(saved), "--after", str(small)) == 0
    assert drawn(photos, out / "alone", "--checkpoint", str(small)) == 0
    printed = capsys.readouterr()
    assert len(printed.out.split()) == 2 + 4 + 2 and not printed.err
    assert all(Path(path).is_file() for path in printed.out.split())


def test_torchvision_and_hugging_face_in_both_commands(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96,
        image_size=32, patch_size=8,
    )  # fmt: skip
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")

    def build(*_: object, **__: object) -> nn.Module:
        return torchvision.models.VisionTransformer(**TORCHVISION)

    monkeypatch.setattr(torchvision.models, "get_model", build)
    for number, name in enumerate(("torchvision:vit_b_16", f"hf:{tmp_path / 'vit'}")):
        out = tmp_path / f"pruned{number}"
        assert pruned(name, out) == 0
        assert [len(row) for row in heads_seen(out)] == [2, 2]
        assert drawn(photos, tmp_path / "out", "--model", name) == 0
        assert drawn(photos, tmp_path / "out", "--model", str(out)) == 0


def test_heads_of_a_pruned_hugging_face_model_keep_their_numbers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96,
        image_size=32, patch_size=8,
    )  # fmt: skip
    model = prune_heads(transformers.ViTModel(config).eval(), [[0, 2], [1]])
    save_pretrained(model, tmp_path)
    assert heads_seen(tmp_path) == [[0, 2], [1]]


@pytest.mark.parametrize("kind", ["timm", "torchvision", "eva"])
def test_batches_are_what_the_models_own_preprocessing_makes(kind: str, photos: Path) -> None:
    model: nn.Module
    if kind == "timm":
        model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    elif kind == "torchvision":
        model = torchvision.models.VisionTransformer(**TORCHVISION)
    else:
        model = EVAViT(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3)
    paths = sorted(photos.iterdir())
    want = load_images([paths[0], paths[2]], transform_of(model))
    assert want.shape == (2, 3, 32, 32)
    (got,) = image_batches(model, (32, 32), photos, count=2, batch_size=4)
    assert torch.equal(got, want)
    assert transform_of(model, (16, 24))(Image.open(paths[0])).shape == (3, 16, 24)
    sizes = [len(x) for x in image_batches(model, (32, 32), photos, count=9, batch_size=2)]
    assert sizes == [2, 2, 1]
    rendered = list(image_batches(model.bfloat16(), (16, 18), None, count=3, batch_size=2))
    assert [tuple(x.shape) for x in rendered] == [(2, 3, 16, 18), (1, 3, 16, 18)]
    assert rendered[0].dtype == torch.bfloat16


def test_which_weights_are_random(saved: Path) -> None:
    assert is_random("test_vit") and is_random("torchvision:vit_b_16")
    assert not is_random("test_vit", pretrained=True)
    assert not is_random("test_vit", "weights.pt")
    assert not is_random(None, "weights.pt")
    assert not is_random(str(saved)) and not is_random("hf:folder")


def test_errors_name_the_option(tmp_path: Path, saved: Path, photos: Path) -> None:
    with pytest.raises(SourceError, match=f"^--after: there is no file or folder {tmp_path}/none"):
        load_saved(tmp_path / "none", "--after")
    with pytest.raises(SourceError, match="^--after: .*photos must hold config.json, got none"):
        load_saved(photos, "--after")
    with pytest.raises(SourceError, match="^--model: .*photos must hold config.json, got none"):
        load_model(str(photos))
    with pytest.raises(SourceError, match="^--pretrained: belongs to names of timm and torch"):
        load_model(str(saved), pretrained=True)
    with pytest.raises(SourceError, match="^--checkpoint: there is no file none.pt"):
        load_model("test_vit", "none.pt")
    with pytest.raises(SourceError, match="^--teacher: timm has no model 'test_vitt', .* did you"):
        check_model_name("test_vitt", "--teacher")
    (photos / "0.png").write_bytes(b"")
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    with pytest.raises(SourceError, match="^--data: .*0.png cannot be read as a picture"):
        list(image_batches(model, (32, 32), photos, count=2, batch_size=2))


def test_weights_of_another_model_are_not_left_random(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=3, intermediate_size=96,
        image_size=32, patch_size=8,
    )  # fmt: skip
    # With the head of a task there is no pooler, which nothing reads.
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    load_model(f"hf:{tmp_path}")
    save_file({"other": torch.zeros(3)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"^--model: .* must fit.*(?s:.)*missing: "):
        load_model(f"hf:{tmp_path}")


def test_averaged_weights_of_a_checkpoint_go_first(tmp_path: Path) -> None:
    model = timm.create_model("test_vit")
    state = model.state_dict()
    ema = {f"module.{name}": x + 1 for name, x in state.items()}
    torch.save({"state_dict": state, "state_dict_ema": ema}, tmp_path / "w.pth")
    got = load_model("test_vit", str(tmp_path / "w.pth")).state_dict()
    assert all(torch.equal(got[name], x + 1) for name, x in state.items())


def test_a_pruned_folder_may_be_named_as_one_of_hugging_face(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=3, intermediate_size=96,
        image_size=32, patch_size=8,
    )  # fmt: skip
    save_pretrained(prune_heads(transformers.ViTModel(config).eval(), [[0]]), tmp_path)
    assert heads_seen(tmp_path) == [[0]]
    assert type(load_model(f"hf:{tmp_path}")).__name__ == "ViTModel"
