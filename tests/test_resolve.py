# SPDX-License-Identifier: Apache-2.0
"""What the name of a model stands for: libraries, folders, the hub, all kinds of checkpoints."""

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from kdfast.models import EVAViT, save_backbone
from kdfast.pruning import prune_heads
from kdfast.pruning.saving import save_pretrained
from kdfast.resolve import (
    SourceError,
    check_model_name,
    class_count,
    file_name,
    is_saved,
    load_model,
    load_saved,
    with_classes,
)

NAME = "test_vit"
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    torch.manual_seed(0)
    return timm.create_model(NAME, num_classes=7).state_dict()


def put(prefix: str, state: State) -> State:
    return {prefix + name: x for name, x in state.items()}


def headless(state: State) -> State:
    return {name: x for name, x in state.items() if not name.startswith("head")}


def options(**more: Any) -> argparse.Namespace:
    return argparse.Namespace(model=NAME, lr=0.1, **more)


WRITERS: dict[str, Callable[[State], Any]] = {
    "plain": lambda s: s,
    "ddp": lambda s: put("module.", s),
    "compiled in ddp": lambda s: {"state_dict": put("module._orig_mod.", s)},
    "ddp in compiled": lambda s: put("_orig_mod.module.", s),
    "blocks compiled": lambda s: {
        name.replace("blocks.0.", "blocks.0._orig_mod."): x for name, x in s.items()
    },
    "lightning": lambda s: {"state_dict": put("model.backbone.", s), "epoch": 3},
    "mmcv": lambda s: {"meta": {"epoch": 2}, "state_dict": put("backbone.", s)},
    "averaged": lambda s: {"model": put("module.", s) | {"n_averaged": torch.tensor(3)}},
    "timm": lambda s: {"arch": NAME, "state_dict": s, "args": options(img_size=None, gp=None)},
    "deit": lambda s: {"model": s, "args": options(input_size=160), "scaler": {}},
}


@pytest.mark.parametrize("writer", WRITERS)
def test_weights_of_every_training_script(writer: str, state: State, tmp_path: Path) -> None:
    torch.save(WRITERS[writer](state), tmp_path / "w.pth")
    model = load_model(NAME, str(tmp_path / "w.pth"))
    assert class_count(model) == 7 and not model.training
    got = model.state_dict()
    assert all(torch.equal(got[name], x) for name, x in state.items())


@pytest.mark.parametrize("writer", ["timm", "deit"])
def test_files_that_say_their_architecture(writer: str, state: State, tmp_path: Path) -> None:
    torch.save(WRITERS[writer](state), tmp_path / "w.pth")
    got = load_saved(tmp_path / "w.pth").state_dict()
    assert all(torch.equal(got[name], x) for name, x in state.items())
    assert is_saved(str(tmp_path / "w.pth"))


def test_headless_weights_and_what_is_left_out(
    state: State, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extra = {"decode_head.conv.weight": torch.zeros(3)}
    torch.save({"state_dict": put("backbone.", headless(state)) | extra}, tmp_path / "w.pth")
    model = load_model(NAME, str(tmp_path / "w.pth"))
    assert class_count(model) == 0
    assert "not used: decode_head.conv.weight" in caplog.text
    # Who says how many classes there are wants a new classifier.
    assert class_count(load_model(NAME, str(tmp_path / "w.pth"), classes=3)) == 3


def test_safetensors_of_another_name_are_known_by_their_content(
    state: State, tmp_path: Path
) -> None:
    save_file(state, tmp_path / "weights.bin")
    assert class_count(load_model(NAME, str(tmp_path / "weights.bin"))) == 7


def test_position_embeddings_are_resized_as_timm_does(
    state: State, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(state, tmp_path / "w.pth")
    got: Any = load_model(NAME, str(tmp_path / "w.pth"), img_size=96)
    want = timm.layers.resample_abs_pos_embed(state["pos_embed"], [6, 6])
    assert torch.equal(got.pos_embed, want)
    assert f"pos_embed resized from {tuple(state['pos_embed'].shape)}" in caplog.text


def test_position_embeddings_of_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: dict[str, Any] = {"patch_size": 8, "num_layers": 1, "num_heads": 3, "hidden_dim": 48}
    sizes |= {"mlp_dim": 96, "num_classes": 5}
    kind = torchvision.models.VisionTransformer
    torch.save(kind(image_size=32, **sizes).state_dict(), tmp_path / "w.pth")

    def build(*_: object, **__: object) -> nn.Module:
        return kind(image_size=64, **sizes)

    monkeypatch.setattr(torchvision.models, "get_model", build)
    model: Any = load_model("torchvision:vit_b_16", str(tmp_path / "w.pth"))
    assert model.encoder.pos_embedding.shape == (1, 65, 48)


def test_two_models_in_one_file_are_no_choice_of_ours(state: State, tmp_path: Path) -> None:
    torch.save(put("student.", state) | put("teacher.", state), tmp_path / "w.pth")
    with pytest.raises(SourceError, match="two such models, under 'student.' and 'teacher.'"):
        load_model(NAME, str(tmp_path / "w.pth"))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: {k: x for k, x in s.items() if k != "norm.weight"}, "missing: norm.weight$"),
        (lambda s: s | {"more": torch.zeros(1)}, "not expected: more$"),
        (lambda s: s | {"norm.bias": torch.zeros(2)}, r"of another shape: norm.bias \(2,\) for"),
        (lambda s: s | {"norm.bias": s["norm.bias"] / 0}, "norm.bias must be finite"),
        (lambda s: {"epoch": 3}, "must hold a state dict, got entries epoch"),
    ],
)
def test_weights_that_do_not_fit(
    change: Callable[[State], Any], text: str, state: State, tmp_path: Path
) -> None:
    torch.save(change(state), tmp_path / "w.pth")
    with pytest.raises(SourceError, match=f"^--checkpoint: .*w.pth must fit {NAME}: .*{text}"):
        load_model(NAME, str(tmp_path / "w.pth"))


def test_a_file_that_runs_code_is_not_opened(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "hook": print}, tmp_path / "w.pth")
    with pytest.raises(SourceError, match="--checkpoint: .*w.pth cannot be read"):
        load_model(NAME, str(tmp_path / "w.pth"))


def test_bare_weights_ask_for_their_architecture(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "test_vit2-abcd.pth")
    with pytest.raises(SourceError, match="--model test_vit2 --checkpoint .*test_vit2-abcd.pth"):
        load_model(str(tmp_path / "test_vit2-abcd.pth"))


def test_folders_and_the_files_in_them(state: State, tmp_path: Path) -> None:
    model = timm.create_model(NAME, num_classes=7)
    save_pretrained(prune_heads(model.eval(), [[0]] * len(model.blocks)), tmp_path / "small")
    for name in (str(tmp_path / "small"), str(tmp_path / "small/model.safetensors")):
        found: Any = load_model(name)
        assert [block.attn.num_heads for block in found.blocks] == [1] * len(found.blocks)
    # Weights trained elsewhere, for the pruned architecture.
    tuned = {name: x + 1 for name, x in found.state_dict().items()}
    torch.save({"model": put("module.", tuned)}, tmp_path / "tuned.pth")
    again = load_model(str(tmp_path / "small"), str(tmp_path / "tuned.pth")).state_dict()
    assert all(torch.equal(again[name], x) for name, x in tuned.items())
    with pytest.raises(SourceError, match="^--pretrained: belongs to names"):
        load_model(str(tmp_path / "small"), pretrained=True)
    with pytest.raises(SourceError, match="is a saved model, which takes no img_size"):
        load_model(str(tmp_path / "small"), img_size=32)


def test_a_student_of_a_recovery_run(tmp_path: Path) -> None:
    model = EVAViT(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3)
    save_backbone(model, tmp_path / "student.safetensors")
    assert isinstance(load_model(str(tmp_path / "student.safetensors")), EVAViT)
    with pytest.raises(SourceError, match="has no classifier that could be given 3 classes"):
        load_model(str(tmp_path / "student.safetensors"), classes=3)


def test_folders_of_hugging_face_keep_a_classifier(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=3, intermediate_size=96,
        image_size=32, patch_size=8, num_labels=4,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "whole")
    transformers.ViTForMaskedImageModeling(config).save_pretrained(tmp_path / "masked")
    for name in (f"hf:{tmp_path / 'whole'}", str(tmp_path / "whole")):
        model = load_model(name)
        assert class_count(model) == 4
    assert class_count(with_classes(model, 9, "it")) == 9 and model.config.num_labels == 9
    masked = load_model(str(tmp_path / "masked"))
    assert type(masked).__name__ == "ViTModel" and class_count(masked) == 0


class NotCached(FileNotFoundError, ValueError):
    """As huggingface_hub raises it before its version 1."""


def test_models_of_the_hub_come_from_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pretrained(timm.create_model(NAME), tmp_path / "cached")
    asked: list[tuple[str, bool]] = []

    def snapshot(name: str, *, local_files_only: bool, revision: str | None, **_: Any) -> str:
        asked.append((f"{name}@{revision}", local_files_only))
        if local_files_only:
            raise NotCached("not cached")
        if name == "owner/none":
            raise ConnectionError("no network\nand more")
        if name == "owner/late":
            raise TimeoutError
        return str(tmp_path / "cached")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert load_model("hf:owner/model@v1") is not None
    assert asked == [("owner/model@v1", True), ("owner/model@v1", False)]
    with pytest.raises(SourceError, match=r"cannot be downloaded \(no network\); .* copy config"):
        load_model("hf:owner/none")
    with pytest.raises(SourceError, match=r"cannot be downloaded \(TimeoutError\)"):
        load_model("hf:owner/late")
    (tmp_path / "cached/model.safetensors").unlink()
    with pytest.raises(SourceError, match="must hold config.json and model.safetensors"):
        load_model("hf:owner/model")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("test_vitt", "timm has no model 'test_vitt', .*; did you mean test_vit"),
        ("vit_b_16", "did you mean torchvision:vit_b_16?"),
        ("torchvision:vit_b16", "torchvision has no model .*; did you mean torchvision:vit_b_16"),
        ("google/vit-base", "no file or folder google/vit-base; did you mean hf:google/vit-base"),
        ("hf-hub:timm/x", "did you mean hf:timm/x"),
        ("studnet.safetensors", "no file or folder studnet.*; did you mean student.safetensors?"),
        ("./studen.pt", "no file or folder ./studen.pt; did you mean student.safetensors?"),
        ("smal", "did you mean small"),
    ],
)
def test_did_you_mean(
    name: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "student.safetensors").touch()
    (tmp_path / "small").mkdir()
    (tmp_path / "small/config.json").touch()
    for call in (check_model_name, lambda name, flag: load_model(name, flag=flag)):
        with pytest.raises(SourceError, match=f"^--teacher: .*{text}"):
            call(name, "--teacher")


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("vit_tiny_patch16_224.augreg_in21k", "vit_tiny_patch16_224.augreg_in21k"),
        ("torchvision:vit_b_16", "torchvision_vit_b_16"),
        ("hf:google/vit-base-patch16-224@main", "hf_google_vit-base-patch16-224_main"),
        ("hf:../here", "hf_.._here"),
        ("/", "model"),
    ],
)
def test_names_of_files(name: str, want: str) -> None:
    assert file_name(name) == want


def test_names_of_files_of_saved_models(tmp_path: Path) -> None:
    (tmp_path / "half: 1").mkdir()
    (tmp_path / "w.x.pth").touch()
    assert file_name(str(tmp_path / "half: 1")) == file_name(f"{tmp_path}/half: 1/") == "half_1"
    assert file_name(str(tmp_path / "w.x.pth")) == "w.x"


def test_classes_of_libraries() -> None:
    assert class_count(load_model(NAME, classes=3)) == 3
    assert class_count(load_model("torchvision:resnet18", classes=3)) == 3
    assert class_count(with_classes(load_model("torchvision:resnet18"), 4, "it")) == 4
    with torch.device("meta"):
        assert next(load_model(NAME).parameters()).is_meta


def test_a_saved_model_that_is_a_name_has_random_weights_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "kdfast"):
        load_saved("test_vit", "--after")
    (record,) = caplog.records
    assert record.message == "note: --after test_vit: a model's name, so it has random weights"
    save_pretrained(load_model("test_vit"), tmp_path / "saved")
    caplog.clear()
    load_saved(tmp_path / "saved", "--after")
    assert not caplog.records
