# SPDX-License-Identifier: Apache-2.0
"""Attention maps from q and k against eager maps, rollout against whole matrices, and pictures."""

import math
import re
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import VisionTransformer

from kdfast.attention import main
from kdfast.models import EVAViT
from kdfast.models.checkpoint import save_backbone
from kdfast.nn import accelerate
from kdfast.ops.geometry import Window
from kdfast.pictures import (
    LayerAttention,
    capture,
    draw_head,
    draw_heads,
    draw_pruned_heads,
    draw_rollout,
    draw_rollout_change,
    rollout,
)
from kdfast.pictures.draw import head_row, tokens_of
from kdfast.pictures.page import picture
from kdfast.pruning import prune_heads
from kdfast.sources import SourceError, load_images, load_model, transform_of

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
EVA = {**TINY, "num_heads": 4, "embed_dim": 32, "pt_hw_seq_len": 4, "pretrain_img_size": 32}


def scramble(model: nn.Module) -> nn.Module:
    """Weights large enough for attention that is far from uniform."""
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms keep weights around 1.
            parameter.normal_(std=0.5) if parameter.ndim > 1 else parameter.add_(0.1)
    return model


def timm_vit(**changes: object) -> nn.Module:
    return scramble(timm.create_model("vit_tiny_patch16_224", **{**TINY, **changes}))


def eva(**changes: object) -> EVAViT:
    return scramble(EVAViT(**{**EVA, "with_cp": False, **changes}))


def layer(q: Tensor, k: Tensor, **changes: object) -> LayerAttention:
    heads = list(range(q.shape[1]))
    return LayerAttention("attn", q, k, q.shape[3] ** -0.5, heads, **changes)


def eager_maps(model: nn.Module, images: Tensor) -> list[Tensor]:
    """timm's own matrices: what its attention dropout receives with fused attention off."""
    maps: list[Tensor] = []
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
            module.attn_drop.register_forward_pre_hook(lambda _, args: maps.append(args[0]))
    with torch.no_grad():
        model.eval()(images)
    return maps


@pytest.mark.parametrize(
    ("name", "changes", "prefix", "cls"),
    [
        ("vit_tiny_patch16_224", {}, 1, True),
        ("vit_tiny_patch16_224", {"qk_norm": True, "reg_tokens": 2}, 3, True),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, 0, False),
        ("eva02_tiny_patch14_224", {}, 1, True),
        ("vit_small_patch16_dinov3", {"embed_dim": 32}, 5, True),
        ("vit_base_patch16_rope_reg1_gap_256", {"embed_dim": 32}, 1, False),
        ("beit_base_patch16_224", {}, 1, True),
    ],
)
def test_maps_are_timms_eager_maps(
    name: str, changes: dict[str, object], prefix: int, cls: bool
) -> None:
    model = scramble(timm.create_model(name, **{**TINY, **changes}))
    images = torch.randn(2, 3, 32, 32)
    seen = capture(model, images)
    expected = eager_maps(model, images)
    assert (seen.prefix, seen.grid, seen.cls) == (prefix, (4, 4), cls)
    assert len(seen.layers) == len(expected) == 3
    for number, (ours, eager) in enumerate(zip(seen.layers, expected, strict=True)):
        assert ours.name == f"blocks.{number}.attn"
        torch.testing.assert_close(ours.map(), eager, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours.map().sum(-1), torch.ones(2, 2, 16 + prefix))
        assert eager.std() > 0.02


def test_maps_of_accelerated_modules_are_those_of_the_original() -> None:
    model, images = timm_vit().eval(), torch.randn(1, 3, 32, 32)
    plain = capture(model, images).layers
    accelerate(model)
    fused = capture(model, images).layers
    for ours, theirs in zip(fused, plain, strict=True):
        assert (ours.name, ours.heads) == (theirs.name, [0, 1])
        torch.testing.assert_close(ours.map(), theirs.map(), atol=1e-5, rtol=1e-4)


GRIDS = {
    "padded": (lambda: timm_vit(dynamic_img_size=True, dynamic_img_pad=True), (36, 30), (5, 4)),
    "resized": (lambda: timm_vit(dynamic_img_size=True), (40, 24), (5, 3)),
    "hybrid": (
        lambda: timm.create_model("vit_tiny_r_s16_p8_224", img_size=128, depth=2, num_classes=3),
        (128, 128),
        (4, 4),
    ),
    "NaFlex": (
        lambda: scramble(
            timm.create_model(
                "naflexvit_base_patch16_gap", depth=2, embed_dim=24, num_heads=2, num_classes=3
            )
        ),
        (48, 80),
        (3, 5),
    ),
    "NaFlex, padded": (
        lambda: scramble(
            timm.create_model(
                "naflexvit_base_patch16_gap", depth=2, embed_dim=24, num_heads=2, num_classes=3,
                dynamic_img_pad=True,
            )
        ),
        (40, 70),
        (3, 5),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("case", GRIDS)
def test_the_grid_is_that_of_the_model(case: str, fused: bool) -> None:
    make, size, grid = GRIDS[case]
    model = make().eval()
    if fused:
        accelerate(model)
    seen = capture(model, torch.randn(1, 3, *size))
    assert seen.grid == grid
    assert seen.layers[0].tokens == seen.prefix + grid[0] * grid[1]
    assert seen.patches(seen.layers[0].map()).shape[-2:] == grid
    if "padded" in case:
        assert all(a % b == 0 for a, b in zip(seen.images.shape[2:], grid, strict=True))


def test_torchvision_maps_are_those_that_its_attention_returns() -> None:
    model = scramble(VisionTransformer(32, 8, 2, 2, 24, 48, num_classes=4)).eval()
    images = torch.randn(2, 3, 32, 32)
    seen = capture(model, images)
    assert (seen.prefix, seen.cls) == (1, True)
    attention = model.encoder.layers[1].self_attention
    inputs: list[Tensor] = []
    attention.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model(images)
        x = inputs[0]
        expected = attention(x, x, x, need_weights=True, average_attn_weights=False)[1]
    torch.testing.assert_close(seen.layers[1].map(), expected, atol=1e-6, rtol=1e-4)


def test_hugging_face_maps_are_those_of_its_eager_attention() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    model = scramble(transformers.Dinov2WithRegistersModel(config)).eval()
    images = torch.randn(1, 3, 28, 28)
    seen = capture(model, images)
    assert (seen.prefix, seen.grid, seen.cls) == (5, (2, 2), True)
    eager = transformers.Dinov2WithRegistersModel._from_config(config, attn_implementation="eager")
    eager.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = eager.eval()(images, output_attentions=True).attentions
    for ours, theirs in zip(seen.layers, expected, strict=True):
        torch.testing.assert_close(ours.map(), theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_eva_maps_rebuild_the_attention_output(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdfast.ops._library.DEFAULT_BACKEND", backend)
    model = eva(img_size=48, window_size=4, window_block_indexes=[0, 2])
    images, values = torch.randn(2, 3, 48, 48), []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(
            lambda attn, args: values.append(F.linear(args[0], attn.v_proj.weight, attn.v_bias))
        )
        block.attn.proj.register_forward_pre_hook(lambda _, args: values.append(args[0]))
    seen = capture(model, images)
    assert (seen.prefix, seen.cls, len(seen.layers)) == (0, False, 3)
    for number, ours in enumerate(seen.layers):
        v, out = (x.unflatten(-1, (4, 8)).transpose(1, 2) for x in values[2 * number :][:2])
        weights = ours.map()
        bias = model.blocks[number].attn.v_bias.view(4, 1, 8)
        # A live pad has the bias as its value; it receives what is missing from the row.
        pads = (1 - weights.sum(-1, keepdim=True)) * bias
        torch.testing.assert_close(weights @ v + pads, out, atol=2e-5, rtol=1e-4)
    assert seen.layers[0].map().sum(-1).amin() < 0.9


def test_map_of_two_tokens_is_a_literal() -> None:
    q = torch.tensor([[[[math.log(3.0), 0.0], [0.0, 0.0]]]]) * 2**0.5
    k = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    expected = torch.tensor([[[[0.75, 0.25], [0.5, 0.5]]]])
    torch.testing.assert_close(layer(q, k).map(), expected)
    torch.testing.assert_close(layer(q, k).mean_row(), torch.tensor([[[0.625, 0.375]]]))
    # One pad of logit 0 beside logits log 3 and 0: 3/5, 1/5 and 1/5 for the pad.
    window = Window((1, 2), 2, torch.zeros(1, 2))
    single = layer(q, k, window=Window((1, 2), 1))
    torch.testing.assert_close(single.map(), torch.eye(2)[None, None])
    live = layer(q, k, window=window).map()[0, 0, 0]
    torch.testing.assert_close(live, torch.tensor([3.0, 1.0]) / (3 + 1 + 2))


def test_rows_come_in_the_order_asked_for() -> None:
    one = layer(torch.randn(2, 3, 9, 4), torch.randn(2, 3, 9, 4), window=Window((3, 3), 2))
    torch.testing.assert_close(one.rows([7, 0, 7]), one.map()[:, :, [7, 0, 7]])
    assert one.pairs == 16 + 4 + 4 + 1 == int((one.map()[0, 0] > 0).sum())
    with pytest.raises(ValueError, match=r"tokens must be in \[0, 9\), got \[9\]"):
        one.rows([9])


def whole_rollout(layers: list[LayerAttention], fusion: str, discard: float) -> Tensor:
    """The recursion of the paper on whole matrices, forwards; (B, N, N)."""
    product = torch.eye(layers[0].tokens, dtype=torch.float64)
    for one in layers:
        weights = one.map().double()
        fused = {"mean": weights.mean(1), "max": weights.amax(1), "min": weights.amin(1)}[fusion]
        if discard:
            flat = fused.flatten(1)
            drop = flat.argsort(1)[:, : int(discard * flat.shape[1])]
            fused = flat.scatter(1, drop, 0.0).view_as(fused)
        mixed = fused + torch.eye(one.tokens, dtype=torch.float64)
        product = mixed / mixed.sum(-1, keepdim=True) @ product
    return product


@pytest.mark.parametrize("discard", [0.0, 0.9])
@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
def test_rollout_is_the_product_of_whole_matrices(fusion: str, discard: float) -> None:
    seen = capture(timm_vit(), torch.randn(2, 3, 32, 32))
    whole = whole_rollout(seen.layers, fusion, discard)
    for block in (1, 40, 1 << 22):
        options = {"fusion": fusion, "discard": discard, "block": block}
        from_cls = rollout(seen.layers, 0, **options)
        torch.testing.assert_close(from_cls.double(), whole[:, 0], atol=1e-6, rtol=1e-5)
        from_all = rollout(seen.layers, **options)
        torch.testing.assert_close(from_all.double(), whole.mean(1), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(from_all.sum(1), torch.ones(2))


def test_mean_rollout_is_half_attention_and_half_identity() -> None:
    seen = capture(timm_vit(depth=2), torch.randn(1, 3, 32, 32))
    first, second = (0.5 * one.map().mean(1)[0] + 0.5 * torch.eye(17) for one in seen.layers)
    torch.testing.assert_close(rollout(seen.layers, 0)[0], (second @ first)[0])


def test_rollout_of_windows_and_of_blocks_without_heads() -> None:
    model = eva(img_size=48, window_size=4, window_block_indexes=[0])
    seen = capture(model, torch.randn(1, 3, 48, 48))
    whole = whole_rollout(seen.layers, "mean", 0.0)
    torch.testing.assert_close(rollout(seen.layers, 35).double(), whole[:, 35], atol=1e-6, rtol=0)
    none = layer(torch.zeros(1, 0, 36, 8), torch.zeros(1, 0, 36, 8))
    torch.testing.assert_close(rollout([none, *seen.layers], 3), rollout(seen.layers, 3))


class Largest(TorchDispatchMode):
    """Remembers the elements of the largest tensor that any op returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            self.elements = max(self.elements, x.numel() if isinstance(x, Tensor) else 0)
        return out


@pytest.mark.parametrize("discard", [0.0, 0.5])
@pytest.mark.parametrize("fusion", ["mean", "max"])
def test_rollout_never_holds_a_matrix(fusion: str, discard: float) -> None:
    tokens = 1500
    some = [layer(torch.randn(1, 2, tokens, 4), torch.randn(1, 2, tokens, 4))]
    with Largest() as watch:
        rollout(some, 0, fusion=fusion, discard=discard, block=16 * tokens)
    # Blocks of 16 rows (8 of each head); the radix select adds 256 counts.
    assert 2 * tokens <= watch.elements <= 16 * tokens < tokens**2 // 50


def test_capture_keeps_no_matrix_and_leaves_the_model_as_it_was() -> None:
    model = timm_vit(img_size=160).train()
    model.blocks[1].attn.fused_attn = False
    model.blocks[2].eval()
    with Largest() as watch:
        seen = capture(model, torch.randn(1, 3, 160, 160))
    assert watch.elements < 401 * 401
    assert [block.training for block in model.blocks] == [True, True, False]
    assert [block.attn.fused_attn for block in model.blocks] == [True, False, True]
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not seen.layers[0].q.requires_grad


@pytest.mark.parametrize(
    ("error", "match", "model", "shape"),
    [
        (ValueError, r"images must be \(B, 3, H, W\), got \(3, 32, 32\)", timm_vit, (3, 32, 32)),
        (TypeError, "must have square patches", lambda: nn.Linear(2, 2), (1, 3, 32, 32)),
        (
            NotImplementedError,
            "windows that only the model knows",
            lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=56, depths=(1,)),
            (1, 3, 56, 56),
        ),
        (
            NotImplementedError,
            "no such call was seen",
            lambda: timm.create_model("xcit_nano_12_p16_224", img_size=32, depth=1),
            (1, 3, 32, 32),
        ),
    ],
)
def test_capture_rejects(error: type, match: str, model, shape: tuple[int, ...]) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=match):
        capture(model(), torch.zeros(shape))


def test_arguments_are_checked() -> None:
    with pytest.raises(TypeError, match="images must be a floating tensor, got torch.uint8"):
        capture(timm_vit(), torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    seen = capture(timm_vit(), torch.zeros(1, 3, 32, 32))
    for match, options in (
        ("fusion must be one of", {"fusion": "sum"}),
        (r"discard must be in \[0, 1\), got 1", {"discard": 1.0}),
        (r"start must be in \[0, 17\), got 17", {"start": 17}),
    ):
        with pytest.raises(ValueError, match=match):
            rollout(seen.layers, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one attention, got none"):
        rollout([])
    with pytest.raises(ValueError, match=r"layer must be in \[0, 3\), got 3"):
        head_row(seen, 3)
    with pytest.raises(ValueError, match=r"image must be in \[0, 1\), got 1"):
        head_row(seen, 0, 1)
    with pytest.raises(ValueError, match=r"inside the grid \(4, 4\), got \(0, 4\)"):
        tokens_of(seen, (0, 4))
    assert tokens_of(seen, (1, 2)) == 1 + 4 + 2


def test_heads_are_named_by_their_original_index_and_measured_against_uniform() -> None:
    model = eva()
    student = prune_heads(model, [[0, 2], [1, 3], [3]])
    images = torch.randn(1, 3, 32, 32)
    maps, words = head_row(capture(student, images), 1)
    assert words == ["head 1", "head 3"]
    assert maps.shape == (2, 4, 4)
    # The mean row sums to 1, in units of 1/N to N.
    assert maps.sum((1, 2)) == pytest.approx([16.0, 16.0], rel=1e-4)
    before = head_row(capture(model, images), 0)[0]
    after = head_row(capture(student, images), 0)[0]
    assert after == pytest.approx(before[[0, 2]], abs=1e-4)


def test_pictures_show_what_they_say(tmp_path: Path) -> None:
    model, images = eva(), torch.randn(2, 3, 32, 32)
    before = capture(model, images)
    after = capture(prune_heads(model, [[0, 2]] * 3), images)
    paths = [
        draw_head(before, tmp_path / "new" / "head.png", head=1, title="eva"),
        draw_heads(before, tmp_path / "heads.png", layer=0, image=1),
        draw_rollout(before, tmp_path / "rollout.png", token=3, fusion="max", discard=0.5),
        draw_rollout_change(before, after, tmp_path / "pair.png"),
        draw_pruned_heads(before, after, tmp_path / "pruned.png"),
    ]
    for path in paths:
        with Image.open(path) as drawn:
            assert min(drawn.size) > 200
            assert sum(count > 0 for count in drawn.convert("L").histogram()) > 50
    with pytest.raises(ValueError, match=r"head must be one of \[0, 2\], got 1"):
        draw_head(after, tmp_path / "no.png", head=1)
    with pytest.raises(ValueError, match="the same images in the same grid"):
        draw_rollout_change(before, capture(model, images[:1]), tmp_path / "no.png")
    shown = picture(before, 0)
    assert shown.shape == (32, 32, 3)
    assert (shown.min(), shown.max()) == (0.0, 1.0)


@pytest.fixture
def photo(tmp_path: Path) -> str:
    path = tmp_path / "photo.png"
    Image.effect_noise((90, 60), 80).convert("RGB").save(path)
    return str(path)


def test_command_draws_and_prints_paths(
    tmp_path: Path, photo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, whole, half = eva(), tmp_path / "whole.safetensors", tmp_path / "half.safetensors"
    save_backbone(model, whole)
    save_backbone(prune_heads(model, [[0, 2]] * 3), half)
    argv = ["--checkpoint", str(whole), "--after", str(half), "--image", photo, photo]
    assert main([*argv, "--output", str(tmp_path / "out"), "--heads", "1", "--patch", "0,3"]) == 0
    printed = capsys.readouterr().out.split()
    names = [f"{i}-photo-{what}.png" for i in (0, 1) for what in (
        "rollout", "layer2", "layer2-head1", "layer2-pruned", "pruned")]  # fmt: skip
    assert printed == [str(tmp_path / "out" / name) for name in names]
    assert all(Path(path).is_file() for path in printed)


def test_model_with_its_checkpoint(tmp_path: Path, photo: str) -> None:
    weights = tmp_path / "weights.pt"
    state = timm.create_model("test_vit", num_classes=7).state_dict()
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, weights)
    model = load_model("test_vit", str(weights))
    torch.testing.assert_close(dict(model.state_dict()), dict(state))
    images = load_images([photo], transform_of(model))
    assert images.shape[1:] == model.default_cfg["input_size"]
    with pytest.raises(SourceError, match="must fit test_vit2"):
        load_model("test_vit2", str(weights))


@pytest.mark.parametrize("averaged", [False, True])
def test_checkpoint_of_a_chain_says_its_model(tmp_path: Path, photo: str, averaged: bool) -> None:
    args = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    net = timm.create_model("vit_tiny_patch16_224", num_classes=5, **args)
    state = net.state_dict()
    other = {f"student.net.{key}": torch.zeros_like(x) for key, x in state.items()}
    meta = {
        "link": {"role": "student", "model": "vit_tiny_patch16_224", "args": args},
        "data": {"classes": list("abcde")},
    }
    module = other if averaged else {f"student.net.{key}": x for key, x in state.items()}
    ema = {f"net.{key}": x for key, x in state.items()} if averaged else None
    torch.save({"meta": meta, "module": module, "ema": ema}, tmp_path / "best.pt")
    model = load_model(None, str(tmp_path / "best.pt"))
    torch.testing.assert_close(dict(model.state_dict()), dict(state))
    assert load_images([photo], transform_of(model)).shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        ([], "give --model, --checkpoint or both"),
        (
            ["--model", "vit_tiny_patch16_225"],
            "timm has no model 'vit_tiny_patch16_225'.*; did you",
        ),
        (
            ["--model", "torchvision:vit_x"],
            "torchvision has no model .* did you mean torchvision:vit",
        ),
        (["--model", "hf:./nowhere"], "there is no folder ./nowhere"),
        (["--checkpoint", "nowhere.pt"], "there is no file or folder nowhere.pt"),
        (["--model", "test_vit", "--image", "nowhere.jpg"], "there is no file nowhere.jpg"),
        (["--model", "test_vit", "--output", f"{__file__}/x"], "Not a directory"),
        (["--model", "test_vit", "--image", __file__], "cannot be read as a picture"),
        (["--model", "test_vit", "--layers", "90"], r"layer must be in \[0, 6\), got 90"),
        (["--model", "test_vit", "--patch", "1"], "must be row,column, got"),
    ],
)
def test_command_explains(
    argv: list[str],
    match: str,
    tmp_path: Path,
    photo: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with_image = argv if "--image" in argv else [*argv, "--image", photo]
    assert main(["--output", str(tmp_path), *with_image]) == 2
    error = capsys.readouterr().err
    assert "error: " in error and "Traceback" not in error
    assert re.search(match, error)
