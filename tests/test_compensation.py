# SPDX-License-Identifier: Apache-2.0
"""What is folded into kept slices: exact where it can be, never worse than the cut."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdfast
from kdfast.models.eva import EVAViT
from kdfast.pruning.adapter import Site
from kdfast.pruning.compensate import SiteError
from kdfast.pruning.families import anatomy_of
from tests.test_prune_families import blocks, hugging_face, run, small, torchvision_vit

EXACT = 1e-10  # ridge of fits that have an exact solution


def eva() -> tuple[nn.Module, Tensor]:
    """Windows, rotary positions and a norm inside the MLP."""
    torch.manual_seed(0)
    model = EVAViT(
        img_size=40,
        patch_size=8,
        embed_dim=32,
        depth=3,
        num_heads=4,
        mlp_ratio=2.0,
        window_size=3,
        window_block_indexes=[0, 1],
        pretrain_img_size=16,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, torch.randn(2, 3, 40, 40)


def grouped() -> tuple[nn.Module, Tensor]:
    from timm.layers import AttentionRope

    torch.manual_seed(0)
    model = nn.Sequential()
    attention = AttentionRope(32, 8, num_prefix_tokens=0, num_kv_heads=4, qkv_fused=False)
    model.add_module("attn", attention.eval())
    return model, torch.randn(6, 25, 32)


# Every kind of attention and MLP: norms before the projections, windows, biases, grouped queries.
MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "EVAViT": eva,
    "grouped queries": grouped,
    "torchvision": torchvision_vit,
    "torchvision's Swin": lambda: blocks("torchvision's Swin"),
    "MetaFormer": lambda: blocks("MetaFormer"),
    **{
        name: lambda name=name: small(name)  # type: ignore[misc]
        for name in (
            "vit_small_patch14_reg4_dinov2",
            "beit3_base_patch16_224",
            "eva02_base_patch14_224",
            "vit_giant_patch14_dinov2",
            "beit_base_patch16_224",
            "swin_tiny_patch4_window7_224",
            "swinv2_tiny_window8_256",
            "tiny_vit_5m_224",
        )
    },
    **{
        name: lambda name=name: hugging_face(name)  # type: ignore[misc]
        for name in ("ViTForImageClassification", "Dinov2ForImageClassification", "DINOv3ViTModel")
    },
}


def more(x: Tensor, count: int = 12) -> list[Tensor]:
    """Batches like x, in double, with enough tokens for the fits."""
    return [torch.randn(len(x), *x.shape[1:], dtype=torch.float64) for _ in range(count)]


@torch.no_grad()
def output(model: nn.Module, x: Tensor) -> Tensor:
    return run(model, x)


@torch.no_grad()
def plant(site: Site) -> list[int]:
    """Makes every second slice compute what the one before does; the slices that suffice."""
    size = site.group
    count = len(site.held) // size
    for name, (axis, tensor) in site.tensors().items():
        owner = site.module.get_submodule(name.rpartition(".")[0])
        if owner is site.projection:
            continue
        slices = count if not axis.grouped else len(site.held) // site.group
        view = tensor.unflatten(axis.dim, (axis.parts, slices, -1)).movedim(
            axis.dim % tensor.dim() + 1, 0
        )
        view[1 : count // 2 * 2 : 2] = view[0 : count // 2 * 2 : 2]
    kept = [index for index in range(count) if index % 2 == 0]
    return [group * size + i for group in kept for i in range(size)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:calibrate. .* tokens")
def test_exact_where_removed_channels_are_linear_in_kept_ones(name: str) -> None:
    model, x = MODELS[name]()
    model, data = model.double(), more(x)
    anatomy = anatomy_of("test", model)
    heads = [plant(site) for site in anatomy.attentions]
    units = [plant(site) for site in anatomy.mlps] or None
    calibration = kdfast.calibrate(model, data, progress=False)
    cut = kdfast.prune_heads(model, heads, mlp=units)
    given = {"mlp": units, "compensate": calibration, "data": data, "ridge": EXACT}
    whole = output(model, data[0])
    far = (output(cut, data[0]) - whole).abs().max()
    for sequential in (False, True):
        errors: list[SiteError] = []
        pruned = kdfast.prune_heads(
            model, heads, sequential=sequential, progress=False, errors=errors, **given
        )
        assert len(errors) == len(heads) + len(units or [])
        assert all(error.compensated < 1e-7 < error.cut for error in errors)
        assert (output(pruned, data[0]) - whole).abs().max() < 1e-3 * far


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:calibrate. .* tokens")
def test_never_worse_than_the_cut(name: str) -> None:
    model, x = MODELS[name]()
    data = [batch.float() for batch in more(x)]
    anatomy = anatomy_of("test", model)
    heads = [list(range(site.group)) for site in anatomy.attentions]
    units = [list(range(0, len(site.held), 3)) for site in anatomy.mlps] or None
    calibration = kdfast.calibrate(model, data, progress=False)
    for sequential in (False, True):
        errors: list[SiteError] = []
        kdfast.prune_heads(
            model,
            heads,
            mlp=units,
            compensate=calibration,
            data=data,
            sequential=sequential,
            progress=False,
            errors=errors,
        )
        assert len(errors) == sum(
            len(row) < len(site.held)
            for row, site in zip(
                [*heads, *(units or [])], [*anatomy.attentions, *anatomy.mlps], strict=True
            )
        )
        for error in errors:
            assert error.compensated <= error.cut * (1 + 1e-6), error


def inputs(model: nn.Module, layers: list[nn.Module], data: list[Tensor]) -> list[Tensor]:
    """Rows (T, D) that enter each layer."""
    seen: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers}

    def watch(module: nn.Module, args: tuple[Tensor]) -> None:
        seen[module].append(args[0].detach().flatten(0, -2))

    handles = [layer.register_forward_pre_hook(watch) for layer in layers]
    with torch.no_grad():
        for batch in data:
            model(batch)
    for handle in handles:
        handle.remove()
    return [torch.cat(rows) for rows in seen.values()]


def test_moments_fits_and_errors_are_those_of_the_definition() -> None:
    """Against least squares on all rows at once, per site of a ViT."""
    model, x = small("vit_small_patch14_reg4_dinov2")
    model, data = model.double(), more(x, 30)
    layers = [layer for block in model.blocks for layer in (block.attn.proj, block.mlp.fc2)]
    rows = inputs(model, layers, data)
    calibration = kdfast.calibrate(model, data, progress=False)
    sites = [
        moments
        for pair in zip(calibration.attentions.values(), calibration.mlps.values(), strict=True)
        for moments in pair
    ]
    heads, units = [[0, 2], [1]], [list(range(0, 256, 2)), list(range(40))]
    errors: list[SiteError] = []
    pruned = kdfast.prune_heads(
        model,
        heads,
        mlp=units,
        compensate=calibration,
        ridge=1e-3,
        progress=False,
        errors=errors,
    )
    new = [layer for block in pruned.blocks for layer in (block.attn.proj, block.mlp.fc2)]
    kept = [
        torch.tensor([16 * h + i for h in heads[0] for i in range(16)]),
        torch.tensor(units[0]),
        torch.tensor([16 * h + i for h in heads[1] for i in range(16)]),
        torch.tensor(units[1]),
    ]
    order = [errors[0], errors[2], errors[1], errors[3]]
    for moments, c, layer, fitted, index, error in zip(
        sites, rows, layers, new, kept, order, strict=True
    ):
        torch.testing.assert_close(moments.mean, c.mean(0), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(moments.covariance, c.T.cov(correction=0), rtol=1e-8, atol=1e-12)
        assert moments.tokens == len(c)
        centred = c - c.mean(0)
        k = centred[:, index]
        gone = torch.ones(c.shape[1], dtype=torch.bool)
        gone[index] = False
        size = 1e-3 * (k.square().mean(0)).mean()
        gram = k.T @ k / len(c) + size * torch.eye(len(index), dtype=torch.float64)
        b = torch.linalg.solve(gram, k.T @ centred[:, gone] / len(c)).T
        weight = layer.weight[:, index] + layer.weight[:, gone] @ b
        bias = layer.bias + layer.weight[:, gone] @ (c.mean(0)[gone] - b @ c.mean(0)[index])
        torch.testing.assert_close(fitted.weight, weight, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(fitted.bias, bias, rtol=1e-6, atol=1e-9)
        want, variance = layer(c), layer(c).var(0, correction=0).sum()
        cut = nn.functional.linear(c[:, index], layer.weight[:, index], layer.bias)
        for got, y in ((error.cut, cut), (error.compensated, fitted(c[:, index]))):
            true = ((want - y).square().sum(1).mean() / variance).item()
            assert got == pytest.approx(true, rel=1e-6)


def test_gains_are_found_whatever_they_are_called() -> None:
    """LayerScale of three libraries; none where windows stand between or a norm follows."""
    cases: list[tuple[str, Callable[[Any], Tensor]]] = [
        ("vit_small_patch14_reg4_dinov2", lambda m: m.blocks[1].ls2.gamma),
        ("Dinov2ForImageClassification", lambda m: m.dinov2.encoder.layer[1].layer_scale2.lambda1),
        ("beit_base_patch16_224", lambda m: m.blocks[1].gamma_2),
        ("torchvision", lambda m: torch.ones(32)),
        ("EVAViT", lambda m: torch.ones(32)),
    ]
    for name, gain in cases:
        model, x = MODELS[name]()
        got = kdfast.calibrate(model, [b.float() for b in more(x)], progress=False)
        moments = list(got.mlps.values())[1]
        assert moments.gain is not None, name
        torch.testing.assert_close(moments.gain.float(), gain(model).detach(), rtol=1e-3, atol=1e-4)
        assert all(moments.gain is not None for moments in got.attentions.values())
    for name in ("swinv2_tiny_window8_256", "torchvision's Swin"):
        model, x = MODELS[name]()
        got = kdfast.calibrate(model, [b.float() for b in more(x)], progress=False)
        assert all(moments.gain is None for moments in got.attentions.values())


def test_pads_do_not_count() -> None:
    from torchvision.models.swin_transformer import ShiftedWindowAttention

    model, x = blocks("torchvision's Swin")
    got = kdfast.calibrate(model, [x, x[:1]], progress=False)
    assert {m.tokens for m in got.attentions.values()} == {3 * 5 * 7}
    assert isinstance(model[0].attn, ShiftedWindowAttention)
    import timm

    swin = timm.create_model(
        "swin_tiny_patch4_window7_224",
        depths=(2,),
        embed_dim=32,
        num_heads=(2,),
        img_size=40,
        num_classes=5,
    ).eval()
    x = torch.randn(2, 3, 40, 40)
    got = kdfast.calibrate(swin, [x], progress=False)
    assert {m.tokens for m in (*got.attentions.values(), *got.mlps.values())} == {200}
    # Nor in mean contexts: real tokens alone, by hooks on what enters the attention.
    pruned = kdfast.prune_heads(swin, [[], []], mean_context=True, data=[x], progress=False)
    attn = swin.layers[0].blocks[0].attn
    seen: list[tuple[Tensor, Tensor]] = []

    def watch(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        seen.append((args[0], output))

    attn.register_forward_hook(watch)
    with torch.no_grad():
        swin(x)
    tokens = seen[0][1][(seen[0][0] != 0).any(-1)]
    assert len(tokens) == 200
    want = tokens.mean(0)
    torch.testing.assert_close(
        pruned.layers[0].blocks[0].attn.proj.bias, want, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "name", ["EVAViT", "torchvision", "vit_giant_patch14_dinov2", "DINOv3ViTModel"]
)
def test_nothing_left_is_the_mean(name: str, tmp_path: Path) -> None:
    """Without heads and units every branch is a constant; saved and loaded all the same."""
    model, x = MODELS[name]()
    model, data = model.double(), more(x, 20)
    anatomy = anatomy_of("test", model)
    none: list[list[int]] = [[] for _ in anatomy.attentions]
    calibration = kdfast.calibrate(model, data, progress=False)
    pruned = kdfast.prune_heads(model, none, mlp=none, compensate=calibration, progress=False)
    small_anatomy = anatomy_of("test", pruned)
    for sites, moments in (
        ((anatomy.attentions, small_anatomy.attentions), calibration.attentions),
        ((anatomy.mlps, small_anatomy.mlps), calibration.mlps),
    ):
        for site, target in zip(*sites, strict=True):
            layer: Any = site.projection
            want = layer.bias + layer.weight @ moments[site.name].mean
            torch.testing.assert_close(target.projection.bias, want, rtol=1e-9, atol=1e-9)
            assert target.held == []
    out = run(pruned, data[0])
    assert torch.isfinite(out).all()
    kdfast.save_pretrained(pruned, tmp_path / "none")
    assert torch.equal(run(kdfast.load_pretrained(tmp_path / "none"), data[0]), out)
    again = kdfast.prune_heads(pruned, none, mlp=none)
    assert torch.equal(run(again, data[0]), out)


def test_without_a_bias_the_fit_has_no_intercept() -> None:
    """Uncentred least squares, and the architecture stays what the library builds."""
    model, x = blocks("MetaFormer")
    model, data = model.double(), more(x, 30)
    assert model[0].attn.proj.bias is None
    rows = inputs(model, [model[0].attn.proj], data)[0] + 0
    calibration = kdfast.calibrate(model, data, progress=False)
    pruned = kdfast.prune_heads(model, [[0, 1], [0, 1]], compensate=calibration, ridge=EXACT)
    layer = pruned[0].attn.proj
    assert layer.bias is None
    want = torch.linalg.lstsq(rows[:, :16], model[0].attn.proj(rows)).solution.T
    torch.testing.assert_close(layer.weight, want, rtol=1e-5, atol=1e-6)
    nothing = kdfast.prune_heads(model, [[], []], compensate=calibration)
    assert nothing[0].attn.proj.weight.shape == (32, 0)


def test_compensated_models_are_saved_whole(tmp_path: Path) -> None:
    model, x = small("vit_small_patch14_reg4_dinov2")
    data = [batch.float() for batch in more(x, 20)]
    calibration = kdfast.calibrate(model, data, progress=False)
    heads = kdfast.select_heads(kdfast.head_scores(model, "reconstruction", calibration), 0.5)
    pruned = kdfast.prune_heads(
        model, heads, compensate=calibration, sequential=True, data=data, progress=False
    )
    kdfast.save_pretrained(pruned, tmp_path / "half")
    assert torch.equal(run(kdfast.load_pretrained(tmp_path / "half"), x), run(pruned, x))


def test_the_model_is_left_as_it_was() -> None:
    model, x = small("swin_tiny_patch4_window7_224")
    model.train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    calibration = kdfast.calibrate(model, [x], progress=False)
    heads = [list(range(len(s.held) // 2)) for s in anatomy_of("t", model).attentions]
    pruned = kdfast.prune_heads(
        model, heads, compensate=calibration, sequential=True, data=[x], progress=False
    )
    assert model.training and pruned.training
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())
    for some in (model, pruned):
        hooks = [m._forward_hooks or m._forward_pre_hooks for m in some.modules()]
        assert not any(hooks)
        assert all(p.requires_grad for p in some.parameters())


def test_moments_of_the_heads_alone(tmp_path: Path) -> None:
    """Without the hidden units heads are compensated the same, and units not at all."""
    model, x = eva()
    data = more(x)
    every, few = (kdfast.calibrate(model, data, mlps=m, progress=False) for m in (True, False))
    assert every.mlps and not few.mlps
    few.save(tmp_path / "few.safetensors")
    few = kdfast.Calibration.load(tmp_path / "few.safetensors", model)
    kept = [[0, 2], [1], [0, 3]]
    for options in ({}, {"sequential": True, "data": data}):
        results = [
            kdfast.prune_heads(model, kept, compensate=c, progress=False, **options).state_dict()
            for c in (every, few)
        ]
        assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())
    for a, b in zip(every.attentions.values(), few.attentions.values(), strict=True):
        assert torch.equal(a.covariance, b.covariance) and a.stream == b.stream
    units = [[0, 1]] * 3
    with pytest.raises(ValueError, match="must know the hidden units to remove some"):
        kdfast.prune_heads(model, kept, mlp=units, compensate=few, data=data)
    with pytest.raises(ValueError, match="mlp_scores: the calibration must have hidden units"):
        kdfast.mlp_scores(model, "reconstruction", few)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        (
            {"compensate": "c"},
            TypeError,
            "compensate must be a result of kdfast.calibrate, got str",
        ),
        ({"sequential": True}, ValueError, "sequential=True needs compensate and data"),
        ({"compensate": 1, "sequential": True}, ValueError, "sequential=True needs data, got None"),
        ({"compensate": 1, "ridge": 0.0}, ValueError, r"ridge must be in \(0, inf\), got 0.0"),
        ({"compensate": 1, "mean_context": True}, ValueError, "mean_context must be False with"),
        ({"compensate": 1, "sequential": True, "data": []}, ValueError, "at least one batch"),
        ({"compensate": 1}, ValueError, r"needs data too where a norm .* blocks.0.mlp"),
    ],
)
def test_rejects(kwargs: dict[str, Any], error: type[Exception], match: str) -> None:
    model, _ = eva()
    if kwargs.get("compensate") == 1:
        kwargs = {**kwargs, "compensate": kdfast.calibrate(model, [torch.randn(3, 3, 40, 40)])}
    with pytest.raises(error, match=match):
        kdfast.prune_heads(model, [[0]] * 3, mlp=[[0, 1]] * 3, progress=False, **kwargs)
