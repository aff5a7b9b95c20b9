# SPDX-License-Identifier: Apache-2.0
"""What a user of the package meets first in Python: names, tables, batches, hints, maps."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import kdfast
from kdfast.testing import tiny_eva

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def vit(**more: Any) -> Any:
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", num_classes=5, **{**VIT, **more})
    return net.eval()


IMAGES = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_dir_shows_the_api_and_nothing_else() -> None:
    public = [name for name in dir(kdfast) if not name.startswith("__")]
    assert public == sorted(name for name in kdfast.__all__ if not name.startswith("__"))
    assert all(hasattr(kdfast, name) for name in dir(kdfast))


def test_scores_are_a_table_of_text() -> None:
    scores = kdfast.head_scores(vit())
    title, heads, *rows = str(scores).splitlines()
    assert title == "head scores: magnitude; higher is more important"
    assert heads.split() == ["head", "0", "1", "2"]
    assert [row.split()[0] for row in rows] == ["0", "1"]
    assert float(rows[1].split()[3]) == pytest.approx(scores[1][2].item(), rel=0.01)
    assert len(scores) == 2 and [len(row) for row in scores] == [3, 3]
    with pytest.raises(IndexError):
        scores[2]


def test_many_heads_take_several_lines_and_units_are_summed_up() -> None:
    rows = [torch.linspace(0, 1, 30, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)]
    lines = str(kdfast.HeadScores(rows, "gate")).splitlines()
    assert max(map(len, lines)) <= 80 and lines[-1].split() == ["1"]
    assert sum(len(line.split()) for line in lines[1:]) == 1 + 30 + 1 + 30 + 1
    text = str(kdfast.mlp_scores(vit()))
    assert text.startswith("unit scores: magnitude;")
    assert text.splitlines()[1].split() == ["block", "units", "lowest", "median", "highest"]
    assert text.splitlines()[2].split()[:2] == ["0", "192"]


def test_scores_plot(tmp_path: Path) -> None:
    scores = kdfast.head_scores(vit())
    figure = scores.plot(tmp_path / "heads.png", kept=[[0], [1, 2]])
    assert "3 of 6 heads removed" in figure.axes[0].get_title()
    assert (tmp_path / "heads.png").stat().st_size > 1000
    assert "removed" not in kdfast.mlp_scores(vit()).plot().axes[0].get_title()
    with pytest.raises(ValueError, match="kept must have 2 blocks, got 1"):
        scores.plot(kept=[[0]])


@pytest.mark.parametrize("batch", [IMAGES, {"x": IMAGES}, {"image": IMAGES}])
def test_a_bare_tensor_or_dict_is_one_batch(batch: Any) -> None:
    model = vit()
    for method in ("taylor", "entropy", "leave_one_out", "reconstruction"):
        expected = kdfast.head_scores(model, method, [IMAGES], progress=False)
        got = kdfast.head_scores(model, method, batch, progress=False)
        assert torch.equal(torch.stack(got.scores), torch.stack(expected.scores))
        assert got.metadata["images"] == 24
    assert kdfast.mlp_scores(model, "taylor", batch, progress=False).metadata["images"] == 24
    calibration = kdfast.calibrate(model, batch, progress=False)
    assert calibration.metadata["images"] == 24
    kept = [[0, 1], [1, 2]]
    values = [
        kdfast.evaluate_selections(model, [kept], None, data, progress=False)
        for data in ([IMAGES], batch)
    ]
    assert values[0] == values[1]
    pruned = [
        kdfast.prune_heads(
            model, kept, compensate=calibration, sequential=True, data=data, progress=False
        )
        for data in ([IMAGES], batch)
    ]
    with torch.no_grad():
        assert torch.equal(*(net(IMAGES) for net in pruned))


def test_several_inputs_of_a_model_are_one_batch() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Siglip2VisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        patch_size=4, num_patches=16,
    )  # fmt: skip
    model = transformers.Siglip2VisionModel(config).eval()
    batch = {
        "pixel_values": torch.randn(2, 16, 48),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    }
    maps = kdfast.attention_maps(model, batch)
    assert [x.shape for x in maps.values()][:2] == [(2, 4, 16, 16)] * 2
    naflex = timm.create_model(
        "naflexvit_base_patch16_gap", embed_dim=48, depth=2, num_heads=3, num_classes=5
    ).eval()
    patches = {
        "patches": torch.randn(2, 6, 768),
        "patch_coord": torch.tensor([[[i // 3, i % 3] for i in range(6)]] * 2),
        "patch_valid": torch.ones(2, 6, dtype=torch.bool),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kdfast.FallbackWarning)  # the mask of its pads
        scores = kdfast.head_scores(naflex, "taylor", patches, progress=False)
    assert scores.metadata["images"] == 2


@pytest.mark.parametrize("function", [kdfast.head_scores, kdfast.mlp_scores])
def test_a_wrong_method_says_what_is_meant(function: Any) -> None:
    with pytest.raises(TypeError, match="got Tensor; data come after it"):
        function(vit(), IMAGES)
    with pytest.raises(ValueError, match="got 'tailor'; did you mean 'taylor'"):
        function(vit(), "tailor", IMAGES)
    with pytest.raises(ValueError, match="reads no images; to use them name another method"):
        function(vit(), data=IMAGES)


def test_accelerate_says_that_there_is_no_attention() -> None:
    report = str(kdfast.accelerate(nn.Sequential(nn.Linear(3, 3))))
    assert report.splitlines()[0] == (
        "kdfast.accelerate: 1 of 1 linear layers run fused; the model has no attention that kdfast "
        "knows (docs/use/support.md)"
    )


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("vit_tiny_patch16_224", r"timm.create_model\('vit_tiny_patch16_224', pretrained=True\)"),
        ("vit_tiny_patch16_244", "similar name are vit_tiny_patch16_224"),
        ("torchvision:vit_b_16", r"torchvision.models.get_model\('vit_b_16'"),
        ("google/vit-base", r"transformers.AutoModel.from_pretrained\('google/vit-base'\)"),
        ("hf:google/vit-base", r"transformers.AutoModel.from_pretrained\('google/vit-base'\)"),
        ("nothing_like_it", "there is no folder nothing_like_it$"),
        ("./some/where", "there is no folder ./some/where$"),
    ],
)
def test_load_pretrained_says_what_to_call(name: str, hint: str) -> None:
    with pytest.raises(FileNotFoundError, match=hint):
        kdfast.load_pretrained(name)


def test_load_pretrained_of_a_file_names_what_reads_it(tmp_path: Path) -> None:
    folder = kdfast.save_pretrained(vit(), tmp_path / "model")
    with pytest.raises(FileNotFoundError, match=r"give its folder: load_pretrained\('.*model'\)"):
        kdfast.load_pretrained(folder / "model.safetensors")
    (tmp_path / "weights.pth").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"timm.create_model\(NAME, checkpoint_path="):
        kdfast.load_pretrained(tmp_path / "weights.pth")


def timm_maps(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The oracle: weights of timm's own code, seen by its dropout."""
    seen: list[Tensor] = []
    for block in model.blocks:  # type: ignore[union-attr]
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda *call: seen.append(call[1][0]))
    with torch.no_grad():
        model(images)
    return seen


def test_maps_of_a_model_whatever_runs_its_attention() -> None:
    expected = timm_maps(vit(), IMAGES)
    model = vit()
    plain = kdfast.attention_maps(model, IMAGES)
    kdfast.accelerate(model)
    model.train()
    fused = kdfast.attention_maps(model, {"x": IMAGES})
    assert model.training
    assert list(plain) == list(fused) == ["blocks.0.attn", "blocks.1.attn"]
    for maps in (plain, fused):
        for got, want in zip(maps.values(), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    only = kdfast.attention_maps(model, IMAGES, layers=["blocks.1.attn"])
    assert list(only) == ["blocks.1.attn"]
    with pytest.raises(ValueError, match=r"layers must be of \['blocks.0.attn', 'blocks.1.attn'\]"):
        kdfast.attention_maps(model, IMAGES, layers=["blocks.2.attn"])


def test_maps_of_pruned_models_windows_and_eva() -> None:
    small = kdfast.prune_heads(vit(), [[0, 2], [1]])
    assert [x.shape[1] for x in kdfast.attention_maps(small, IMAGES).values()] == [2, 1]
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=64, depths=(2, 1), embed_dim=16,
        num_heads=(2, 4), window_size=4, num_classes=0,
    )  # fmt: skip
    images = torch.randn(1, 3, 64, 64)
    plain = kdfast.attention_maps(swin, images)
    kdfast.accelerate(swin)
    fused = kdfast.attention_maps(swin, images)
    assert [x.shape for x in fused.values()] == [(16, 2, 16, 16)] * 2 + [(4, 4, 16, 16)]
    for name, got in fused.items():
        torch.testing.assert_close(got, plain[name], rtol=1e-3, atol=1e-5)
    eva = kdfast.attention_maps(tiny_eva(0.2), torch.randn(1, 3, 16, 16, dtype=torch.float64))
    assert all(x.shape == (1, 4, 16, 16) and x.dtype == torch.float64 for x in eva.values())


def test_maps_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        image_size=32, patch_size=8,
    )  # fmt: skip
    model = transformers.ViTModel(config).eval()
    assert model(IMAGES, output_attentions=True).attentions == ()
    maps = kdfast.attention_maps(model, {"pixel_values": IMAGES})
    kdfast.accelerate(model)
    with torch.no_grad():
        asked = model(IMAGES, output_attentions=True).attentions
    for got, want in zip(maps.values(), asked, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    model.set_attn_implementation("eager")
    with pytest.raises(NotImplementedError, match='attn_implementation="eager" was asked for'):
        kdfast.attention_maps(model, IMAGES)


def test_maps_that_cannot_be_seen_say_why() -> None:
    hiera = timm.create_model(
        "hiera_tiny_224", img_size=64, stages=(1, 1, 1, 1), embed_dim=16, num_heads=1
    )
    with pytest.raises(NotImplementedError, match=r"call kdfast.accelerate\(model\) first"):
        kdfast.attention_maps(hiera, torch.randn(1, 3, 64, 64))
    with pytest.raises(NotImplementedError, match="ResNet called neither torch's"):
        kdfast.attention_maps(timm.create_model("resnet18"), torch.randn(1, 3, 32, 32))
    with pytest.raises(TypeError, match="attention_maps: a batch must be a tensor, a dict"):
        kdfast.attention_maps(vit(), "cat.jpg")


def test_maps_of_a_module_that_attends_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.attn(x, x, x, need_weights=False)[0]
            return self.attn(x, x, x, need_weights=False)[0]

    maps = kdfast.attention_maps(Twice(), torch.randn(2, 5, 8))
    assert list(maps) == ["attn", "attn call 2"]
