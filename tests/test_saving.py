# SPDX-License-Identifier: Apache-2.0
"""Folders of saved models: what comes back, what lies there, and what is refused."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import kdfast
from kdfast.models import EVAViT
from kdfast.pruning import prune_heads
from kdfast.pruning.families import anatomy_of
from kdfast.pruning.saving import load_pretrained, save_pretrained

KEEP = [[0, 2], []]


def timm_vit(**overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    arguments = {"depth": 2, "num_classes": 7, "img_size": 32, "embed_dim": 48, "num_heads": 3}
    return timm.create_model("vit_tiny_patch16_224", **{**arguments, **overrides}).eval()


def eva() -> nn.Module:
    return EVAViT(
        img_size=32, embed_dim=48, num_heads=3, depth=2, mlp_ratio=2.0, pretrain_img_size=32
    ).eval()


def torchvision_vit() -> nn.Module:
    vision = pytest.importorskip("torchvision.models")
    return vision.VisionTransformer(32, 8, 2, 3, 48, 64, num_classes=5).eval()


def hugging_face() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 64}
    config = transformers.ViTConfig(
        **sizes, num_hidden_layers=2, image_size=32, patch_size=8, num_labels=4
    )
    return transformers.ViTForImageClassification(config).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm": timm_vit,
    "timm rope, half precision": lambda: (
        timm.create_model("eva02_tiny_patch14_224", depth=2, img_size=32, patch_size=16)
        .eval()
        .bfloat16()
    ),
    "eva": eva,
    "torchvision": torchvision_vit,
    "hugging face": hugging_face,
}


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pruned", [True, False])
def test_comes_back_bit_by_bit(tmp_path: Path, name: str, pruned: bool) -> None:
    model = MODELS[name]()
    if pruned:
        width = len(anatomy_of("test", model).mlps[0].held)
        model = prune_heads(model, KEEP, mlp=[[1, 5, 7], list(range(width))])
    assert save_pretrained(model.train(), tmp_path / "a" / "b") == tmp_path / "a" / "b"
    again = load_pretrained(tmp_path / "a" / "b")
    assert type(again) is type(model) and not again.training
    state = model.state_dict()
    assert again.state_dict().keys() == state.keys()
    for key, tensor in again.state_dict().items():
        assert tensor.dtype == state[key].dtype and torch.equal(tensor, state[key]), key
    sites = [anatomy_of("test", m).attentions for m in (again, model)]
    assert [site.held for site in sites[0]] == [site.held for site in sites[1]]
    x = torch.randn(2, 3, 32, 32).to(next(model.parameters()).dtype)
    with torch.no_grad():
        assert torch.equal(first(again(x)), first(model.eval()(x)))
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    save_pretrained(again, tmp_path / "c")
    assert (tmp_path / "c" / "config.json").read_text() == (
        tmp_path / "a" / "b" / "config.json"
    ).read_text()


def test_what_the_files_say(tmp_path: Path) -> None:
    save_pretrained(prune_heads(timm_vit(), KEEP), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "vit_tiny_patch16_224"
    assert config["num_classes"] == config["pretrained_cfg"]["num_classes"] == 7
    assert config["model_args"]["depth"] == 2
    assert config["kdfast"] == {
        "format": "kdfast.model/1",
        "version": kdfast.__version__,
        "family": "timm",
        "class": "VisionTransformer",
        "fused": True,
        "heads": KEEP,
        "fast_layers": False,
        "mlp_hidden": [192, 192],
        "tables": {},
    }
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["blocks.0.attn.qkv.weight"].shape == (3 * 32, 48)
    assert tensors["blocks.1.attn.proj.weight"].shape == (48, 0)


def test_unpruned_folders_are_those_of_the_library(tmp_path: Path) -> None:
    model = timm_vit()
    save_pretrained(model, tmp_path / "timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(theirs(x), model(x))
    timm.models.save_for_hf(model, tmp_path / "own", safe_serialization=True)
    with torch.no_grad():
        assert torch.equal(load_pretrained(tmp_path / "own")(x), model(x))
    model = hugging_face()
    save_pretrained(model, tmp_path / "hf")
    with torch.no_grad():
        again = type(model).from_pretrained(tmp_path / "hf").eval()
        torch.testing.assert_close(first(again(x)), first(model(x)))
    model.save_pretrained(tmp_path / "own hf")
    with torch.no_grad():
        own = load_pretrained(tmp_path / "own hf")
        torch.testing.assert_close(first(own(x)), first(model(x)))


def test_loads_without_the_original_in_a_new_process(tmp_path: Path) -> None:
    pruned = prune_heads(timm_vit(), KEEP)
    save_pretrained(pruned, tmp_path)
    x = torch.ones(1, 3, 32, 32)
    code = (
        "import sys, torch, kdfast; torch.set_num_threads(1)\n"
        "model = kdfast.load_pretrained(sys.argv[1])\n"
        "print(*model(torch.ones(1, 3, 32, 32)).flatten().tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    with torch.no_grad():
        want = pruned(x).flatten()
    torch.testing.assert_close(torch.tensor(list(map(float, done.stdout.split()))), want)


def test_a_failed_write_leaves_the_old_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pretrained(timm_vit(), tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("kdfast.pruning.saving.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        save_pretrained(timm_vit(num_classes=3), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 3
    load_pretrained(tmp_path)


def test_shared_tensors_are_stored_once_and_shared_again(tmp_path: Path) -> None:
    model: Any = timm_vit()
    model.blocks[1].norm1.weight = model.blocks[0].norm1.weight
    pruned: Any = prune_heads(model, KEEP)
    assert pruned.blocks[1].norm1.weight is pruned.blocks[0].norm1.weight
    save_pretrained(pruned, tmp_path)
    assert "blocks.1.norm1.weight" not in load_file(tmp_path / "model.safetensors")
    again = load_pretrained(tmp_path)
    assert again.blocks[1].norm1.weight is again.blocks[0].norm1.weight


def test_buffers_stay_buffers(tmp_path: Path) -> None:
    """A hybrid, whose batch norms have buffers in the state dict."""
    model: Any = timm.create_model(
        "vit_base_resnet26d_224", img_size=64, depth=1, embed_dim=32, num_heads=2, num_classes=2
    ).eval()
    model.patch_embed.backbone.bn1.running_mean.fill_(0.5)
    pruned = prune_heads(model, [[1]])
    again = load_pretrained(save_pretrained(pruned, tmp_path))
    names = [name for name, _ in again.named_buffers()]
    assert names == [name for name, _ in pruned.named_buffers()] and len(names) > 10
    assert [name for name, _ in again.named_parameters()] == [
        name for name, _ in pruned.named_parameters()
    ]
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(x), pruned(x))


def test_save_rejects_what_it_could_not_rebuild(tmp_path: Path) -> None:
    model: Any = timm_vit()
    model.head = nn.Linear(48, 9)
    with pytest.raises(ValueError, match=r"head.weight has shape \(9, 48\), expected \(7, 48\)"):
        save_pretrained(model, tmp_path)
    model = timm_vit()
    model.blocks[0].mlp.act = nn.ReLU()
    with pytest.raises(ValueError, match=r"blocks.0.mlp.act is a .*ReLU, but .*GELU is built"):
        save_pretrained(model, tmp_path)
    model = timm_vit()
    del model._model_args
    with pytest.raises(ValueError, match="describe 12 attentions .* got 2 .*pass model_args"):
        save_pretrained(model, tmp_path)
    arguments = {"depth": 2, "img_size": 32, "embed_dim": 48, "num_heads": 3}
    save_pretrained(model, tmp_path / "given", model_args=arguments)
    load_pretrained(tmp_path / "given")
    with pytest.raises(TypeError, match="save_pretrained: model must be one of EVAViT.*Linear"):
        save_pretrained(nn.Linear(2, 2), tmp_path)
    with pytest.raises(ValueError, match="arguments of the architecture must be JSON values"):
        save_pretrained(timm_vit(norm_layer=nn.LayerNorm), tmp_path)
    assert not (tmp_path / "config.json").exists()


def pooled(model: Any) -> Any:
    model.reset_classifier(3, global_pool="avg")
    return model


def cut_off(model: Any) -> Any:
    model.reset_classifier(0, global_pool="")
    return model


def blurred(model: Any) -> Any:
    model.norm.eps, model.blocks[0].norm1.eps = 1e-2, 0.5
    return model


def flat(model: Any) -> Any:
    for block in model.blocks:
        block.attn.scale = 2.0
        block.attn.qkv.weight.data *= 20
    return model


def without_activation(model: Any) -> Any:
    model.blocks[0].mlp.act = nn.GELU(approximate="tanh")
    model.blocks[1].mlp.drop1.p = 0.25
    return model


CHANGES = [pooled, cut_off, blurred, flat, without_activation]


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_after_building_comes_back(
    tmp_path: Path, change: Callable[[Any], Any], pruned: bool
) -> None:
    model = change(timm_vit())
    model = prune_heads(model, KEEP) if pruned else model
    again = load_pretrained(save_pretrained(model, tmp_path / "a"))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert getattr(again.blocks[1].mlp.drop1, "p", 0) == model.blocks[1].mlp.drop1.p
    save_pretrained(again, tmp_path / "b")
    files = [(tmp_path / x / "config.json").read_text() for x in "ab"]
    assert files[0] == files[1]


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax"])
def test_another_pool_comes_back_in_other_families(tmp_path: Path, pool: str) -> None:
    sizes = {"depths": (1, 1), "embed_dim": 32, "num_heads": (2, 4), "img_size": 56}
    model: Any = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **sizes).eval()
    model.reset_classifier(4, global_pool=pool)
    siglip: Any = timm_vit(global_pool="map", class_token=False)
    siglip.reset_classifier(4, global_pool="avg")
    for net, side in ((model, 56), (siglip, 32)):
        x = torch.randn(2, 3, side, side)
        again = load_pretrained(save_pretrained(net, tmp_path / str(side)))
        theirs = timm.create_model(f"local-dir:{tmp_path / str(side)}", pretrained=True).eval()
        with torch.no_grad():
            assert torch.equal(again(x), net(x)) and torch.equal(theirs(x), net(x))


def test_changes_that_no_file_holds_are_refused(tmp_path: Path) -> None:
    model: Any = timm_vit()
    model.blocks[0].mlp.act = nn.Identity()
    with pytest.raises(ValueError, match=r"blocks.0.mlp.act is a nothing, but .*GELU is built"):
        save_pretrained(model, tmp_path)
    model = timm_vit()
    model.blocks[1].forward = lambda x, **_: x
    with pytest.raises(ValueError, match="blocks.1 has a forward of its own"):
        save_pretrained(model, tmp_path)
    model = timm_vit()
    model.norm.eps = float("inf")
    with pytest.raises(ValueError, match="norm has eps inf, but 1e-06 is built"):
        save_pretrained(model, tmp_path)
    rope: Any = timm.create_model("vit_small_patch16_rope_224", depth=1, img_size=32)
    state = torch.get_rng_state()
    save_pretrained(rope, tmp_path / "rope")
    assert torch.equal(torch.get_rng_state(), state)
    rope.rope.pos_embed.mul_(0.5)
    with pytest.raises(ValueError, match="rope.pos_embed is a table that no file holds"):
        save_pretrained(rope, tmp_path / "rope")


@pytest.mark.parametrize(
    "attributes",
    [{"norm": {"forward": 1}}, {"norm": {"_hooks": 1}}, {"norm": {"eps": {"a": 1}}},
     {"x": {"a": 1}}, {"norm": ["eps"]}, {"norm": {"training": True}}, ["norm"]],
)  # fmt: skip
def test_only_plain_attributes_are_set(tmp_path: Path, attributes: Any) -> None:
    save_pretrained(blurred(timm_vit()), tmp_path)
    edit(lambda c: c["kdfast"].update(attributes=attributes))(tmp_path)
    with pytest.raises(ValueError, match="load_pretrained: .*config.json must set plain attr"):
        load_pretrained(tmp_path, verify=False)


def test_foreign_hugging_face_folders_must_fit(tmp_path: Path) -> None:
    model = hugging_face()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    taken = tensors.pop("classifier.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"must fit.*(?s:.)*missing: classifier.weight"):
        load_pretrained(tmp_path)
    tensors["classifier.weight"] = taken[:2].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"must fit.*(?s:.)*classifier.weight"):
        load_pretrained(tmp_path)
    save_file({"other.weight": torch.zeros(3)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="missing: "):
        load_pretrained(tmp_path)


def edit(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return apply


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["more"] = tensors.pop("head.bias")
    save_file(tensors, folder / "model.safetensors")


def cut(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("damage", "error", "match"),
    [
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, "must hold config.json"),
        (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "hold model.safetensors"),
        (lambda f: (f / "config.json").write_text("{"), ValueError, "config.json must be JSON"),
        (lambda f: (f / "config.json").write_text("[]"), ValueError, "must be a JSON object"),
        (lambda f: (f / "config.json").write_text("{}"), ValueError, "got one without 'kdfast'"),
        (cut, ValueError, "model.safetensors must be a whole safetensors file"),
        (drop_tensor, ValueError, "(?s)missing: head.bias.*not expected: more"),
        (
            edit(lambda c: c["kdfast"].update(format="kdfast.model/9")),
            ValueError,
            "must have format 'kdfast.model/1', got 'kdfast.model/9'",
        ),
        (edit(lambda c: c.update(architecture="vit_x")), ValueError, "'vit_x' must be one of timm"),
        (edit(lambda c: c["kdfast"].pop("family")), ValueError, "has no usable 'family'"),
        (edit(lambda c: c["kdfast"].update(family="exec")), ValueError, "has no usable 'exec'"),
        (edit(lambda c: c["kdfast"].update(heads=[[0]])), ValueError, "describe 2 attentions"),
        (
            edit(lambda c: c["kdfast"].update(heads=[[0, 1], []])),
            ValueError,
            None,
        ),
        (
            edit(lambda c: c["kdfast"].update(heads=[[0], [1]])),
            ValueError,
            r"(?s)blocks.0.attn.qkv.weight has shape \(96, 48\), expected \(48, 48\)",
        ),
        (
            edit(lambda c: c["kdfast"].update({"family": "transformers", "class": "Trainer"})),
            ValueError,
            "'Trainer' must be a model class of transformers",
        ),
    ],
)
def test_load_rejects(
    tmp_path: Path, damage: Callable[[Path], None], error: type[Exception], match: str | None
) -> None:
    save_pretrained(prune_heads(timm_vit(), KEEP), tmp_path)
    damage(tmp_path)
    if match is None:  # other heads of the same number: only the names of the heads differ
        assert load_pretrained(tmp_path, verify=False).blocks[0].attn.heads == [0, 1]
        return
    with pytest.raises(error, match=match):
        load_pretrained(tmp_path, verify=False)


def test_swin_is_saved_pruned(tmp_path: Path) -> None:
    sizes = {"depths": (2, 1), "embed_dim": 32, "num_heads": (2, 4), "img_size": 56}
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **sizes).eval()
    pruned = kdfast.prune_heads(model, [[1], [], [0, 2]])
    kdfast.save_pretrained(pruned, tmp_path)
    again, x = kdfast.load_pretrained(tmp_path), torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        assert torch.equal(again(x), pruned(x))
    block = kdfast.pruning_report(model, [0.5], image_size=56).full.blocks[0]
    # Four windows of 49 tokens.
    assert block.window == 7 and block.attention == 4 * 32 * 4 * 49**2


def test_other_models_of_torchvision_say_so(tmp_path: Path) -> None:
    vision = pytest.importorskip("torchvision.models.swin_transformer")
    whole = vision.SwinTransformer([4, 4], 32, [2], [2], [7, 7], num_classes=5)
    with pytest.raises(TypeError, match="of torchvision must be a VisionTransformer.*got Swin"):
        kdfast.save_pretrained(kdfast.prune_heads(whole, [[1], [0]]), tmp_path)
