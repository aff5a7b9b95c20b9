# SPDX-License-Identifier: Apache-2.0
"""Scores from data of models with several inputs, against a model around them that takes one."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import kdfast
from kdfast.pruning.inputs import model_inputs

Batch = dict[str, Tensor]


@pytest.fixture(autouse=True)
def masks_fall_back() -> Iterator[None]:
    """Calls with a mask run torch's attention, and say so once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kdfast.FallbackWarning)
        yield


def siglip() -> tuple[nn.Module, Batch]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Siglip2VisionConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=64,
        patch_size=8, num_patches=16,
    )  # fmt: skip
    batch = {
        "pixel_values": torch.randn(2, 16, 192),
        "pixel_attention_mask": torch.tensor([[1] * 16, [1] * 12 + [0] * 4]),
        "spatial_shapes": torch.tensor([[4, 4], [3, 4]]),
    }
    return transformers.Siglip2VisionModel(config).eval(), batch


def naflex() -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    model = timm.create_model(
        "naflexvit_base_patch16_gap", num_classes=5, depth=2, embed_dim=48, num_heads=3
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    places = [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    batch = {
        "patches": torch.randn(2, 6, 768),
        "patch_coord": torch.tensor([places] * 2),
        "patch_valid": torch.tensor([[True] * 6, [True] * 4 + [False] * 2]),
    }
    return model.eval(), batch


MODELS = {"SigLIP 2": siglip, "NaFlexViT": naflex}


def output(model: nn.Module, batch: Batch) -> Tensor:
    """The call by hand."""
    out: Any = model(batch) if "patches" in batch else model(**batch)
    return out if isinstance(out, Tensor) else out.pooler_output


def main(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out.pooler_output


def loss(out: Any, batch: Any) -> Tensor:
    return main(out).square().mean()


@pytest.mark.parametrize("name", MODELS)
def test_gradient_scores(name: str) -> None:
    """Of both images, from the gradients of the inputs of the projections."""
    model, batch = MODELS[name]()
    sites = kdfast.pruning.families.anatomy_of("test", model).attentions
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        args[0].retain_grad()
        seen.append(args[0])

    handles = [site.projection.register_forward_pre_hook(keep) for site in sites]
    output(model, batch).square().mean().backward()
    for handle in handles:
        handle.remove()
    want = [
        2 * (x * x.grad).detach().unflatten(2, (3, -1)).sum(-1).abs().mean((0, 1)) for x in seen
    ]
    given: Any
    for given in (batch, {**batch, "label": torch.tensor([0, 1])}, (batch, torch.tensor([0, 1]))):
        scores = kdfast.head_scores(model, "taylor", [given], loss=loss, progress=False)
        assert scores.metadata["images"] == 2
        for row, other in zip(scores.scores, want, strict=True):
            torch.testing.assert_close(row, other.double(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_everything_that_reads_data(name: str) -> None:
    model, batch = MODELS[name]()
    data, silent = [batch], {"progress": False}
    for method in ("gradient", "entropy"):
        scores = kdfast.head_scores(model, method, data, **silent).scores  # type: ignore[arg-type]
        assert all(row.shape == (3,) and (row > 0).all() for row in scores)
    assert len(kdfast.mlp_scores(model, "taylor", data, **silent).scores) == 2  # type: ignore[arg-type]
    keep = [[0, 2], [1]]
    (got,) = kdfast.evaluate_selections(model, [keep], loss, data, **silent)  # type: ignore[arg-type]
    with torch.no_grad():
        want = output(kdfast.prune_heads(model, keep), batch).square().mean()
        whole = output(model, batch).square().mean()
    assert got == pytest.approx(want.item(), rel=1e-4) and got != pytest.approx(whole.item())
    drops = kdfast.head_scores(model, "leave_one_out", data, metric=loss, **silent)  # type: ignore[arg-type]
    (one,) = kdfast.evaluate_selections(model, [[[0, 2], [0, 1, 2]]], loss, data, **silent)  # type: ignore[arg-type]
    assert drops.scores[0][1].item() == pytest.approx(whole.item() - one, rel=1e-3, abs=1e-7)
    folded = kdfast.prune_heads(model, keep, mean_context=True, data=data, progress=False)
    assert not torch.equal(output(folded, batch), output(kdfast.prune_heads(model, keep), batch))


@pytest.mark.parametrize("name", MODELS)
def test_gates_count_images(name: str) -> None:
    model, batch = MODELS[name]()
    with kdfast.HeadGates(model) as gates:
        output(model, batch).square().mean().backward()
    rows = gates.scores()
    assert rows.metadata["images"] == 2
    # Images apart: their gradients have signs that would cancel.
    each = []
    for i in range(2):
        with kdfast.HeadGates(model) as gates:
            output(model, {k: v[i : i + 1] for k, v in batch.items()}).square().mean().backward()
        each.append(gates.last[0])
    want = (each[0].abs() + each[1].abs()) / 2  # type: ignore[union-attr]
    torch.testing.assert_close(rows.scores[0], want, rtol=1e-3, atol=1e-9)


def test_labels_stay_with_the_loss() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=64,
        image_size=16, patch_size=8, num_labels=4,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).eval()
    images = torch.randn(2, 3, 16, 16)
    batch = {"pixel_values": images, "labels": torch.tensor([9, 9]), "name": ["a", "b"]}
    assert model_inputs("f", model, batch) is images
    large = {"pixel_values": torch.randn(2, 3, 32, 32), "interpolate_pos_encoding": True}
    got = kdfast.head_scores(model, "taylor", [large], progress=False).scores
    assert len(got) == 2 and all(row.isfinite().all() for row in got)


def test_batches_that_lack_something() -> None:
    model, batch = siglip()
    for bad in (batch["pixel_values"], {"pixel_values": batch["pixel_values"]}):
        with pytest.raises(
            TypeError, match="model's pixel_attention_mask, spatial_shapes, got (Tensor|a dict)"
        ):
            kdfast.head_scores(model, "taylor", [bad], progress=False)
    with pytest.raises(TypeError, match=r"head_scores: a batch must be .* got a dict with \['x'\]"):
        kdfast.head_scores(model, "taylor", [{"x": batch["pixel_values"]}], progress=False)
    empty = {name: tensor[:0] for name, tensor in batch.items()}
    with pytest.raises(ValueError, match="must hold at least one image, got none"):
        kdfast.head_scores(model, "taylor", [empty], progress=False)
