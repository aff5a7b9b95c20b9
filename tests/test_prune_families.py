# SPDX-License-Identifier: Apache-2.0
"""Pruned models of timm, torchvision and Hugging Face equal the originals with silenced slices."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models import fastvit, metaformer, nest, volo
from timm.models.hieradet_sam2 import MultiScaleAttention
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

import kdfast
from kdfast.nn import FusedAttention
from kdfast.nn.table import FUSED
from kdfast.pruning import (
    evaluate_selections,
    head_scores,
    mlp_scores,
    prune_heads,
    pruning_report,
    select_heads,
)
from kdfast.pruning.adapter import Site
from kdfast.pruning.families import anatomy_of
from kdfast.pruning.vit_adapter import stand_ins

STAGES = {"depths": (2, 1), "embed_dim": 32, "num_heads": (2, 4), "depth": None}
# Name, arguments and image side: every class of attention, of MLP and of position table.
SMALL: dict[str, tuple[dict[str, Any], int]] = {
    "vit_tiny_patch16_224": ({"img_size": 32}, 32),
    "deit_tiny_distilled_patch16_224": ({"img_size": 32}, 32),
    "vit_small_patch14_reg4_dinov2": ({"img_size": 28, "embed_dim": 64, "num_heads": 4}, 28),
    "vit_giant_patch14_dinov2": ({"img_size": 28, "embed_dim": 48, "num_heads": 4}, 28),
    "vit_base_patch16_siglip_224": ({"img_size": 32, "embed_dim": 64, "num_heads": 4}, 32),
    "vit_base_patch16_clip_quickgelu_224": (
        {"img_size": 32, "embed_dim": 64, "num_heads": 4},
        32,
    ),
    "beit3_base_patch16_224": ({"img_size": 32, "embed_dim": 64, "num_heads": 4}, 32),
    "eva02_tiny_patch14_224": ({"img_size": 28}, 28),
    "eva02_base_patch14_224": ({"img_size": 28, "embed_dim": 64, "num_heads": 4}, 28),
    "vit_small_patch16_dinov3": ({"img_size": 32, "embed_dim": 64, "num_heads": 4}, 32),
    "vit_small_patch16_rope_mixed_224": ({"img_size": 32, "embed_dim": 64, "num_heads": 4}, 32),
    "vit_pe_spatial_tiny_patch16_512": ({"img_size": 32, "embed_dim": 64, "num_heads": 4}, 32),
    "vit_small_patch16_18x2_224": ({"img_size": 32, "embed_dim": 64, "num_heads": 4}, 32),
    "flexivit_small": ({"img_size": 32, "embed_dim": 64, "num_heads": 4}, 32),
    "vit_dwee_patch16_reg1_gap_256": ({"img_size": 32, "embed_dim": 64, "num_heads": 4}, 32),
    "beit_base_patch16_224": ({"img_size": 32, "embed_dim": 64, "num_heads": 4}, 32),
    "vit_relpos_small_patch16_224": ({"img_size": 32, "embed_dim": 64, "num_heads": 4}, 32),
    "swin_tiny_patch4_window7_224": ({**STAGES, "img_size": 56}, 56),
    "swinv2_tiny_window8_256": ({**STAGES, "img_size": 64}, 64),
    "swinv2_cr_tiny_ns_224": ({**STAGES, "img_size": 64, "window_size": 8}, 64),
    "tiny_vit_5m_224": (
        {**STAGES, "embed_dims": (32, 64), "window_sizes": (4, 4), "embed_dim": None},
        32,
    ),
    "davit_tiny": ({**STAGES, "embed_dims": (32, 64), "embed_dim": None}, 28),
    "hiera_tiny_224": (
        {"stages": (1, 1, 1, 2), "embed_dim": 16, "num_heads": 2, "img_size": 64, "depth": None},
        64,
    ),
}
# Classes of models that have no small variant, alone in a block, and the shape of an image's input.
BLOCKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MetaFormer": (lambda: metaformer.Attention(32, head_dim=8), (9, 32)),
    "SAM 2": (lambda: MultiScaleAttention(32, 32, 4), (3, 5, 32)),
    "VOLO": (lambda: volo.Attention(32, 4), (3, 5, 32)),
    "FastViT": (lambda: fastvit.Attention(32, head_dim=8), (32, 3, 5)),
    "torchvision's Swin": (lambda: ShiftedWindowAttention(32, [3, 3], [1, 1], 4), (5, 7, 32)),
    "torchvision's Swin v2": (lambda: ShiftedWindowAttentionV2(32, [3, 3], [1, 1], 4), (5, 7, 32)),
}
# Files of timm, how many of their names are pruned, and how many refused with a reason: parallel
# scaling blocks, differential ones among them.
REGISTRY = {"vision_transformer": (158, 5), "deit": (16, 0), "eva": (65, 0), "beit": (7, 0)}


def small(name: str) -> tuple[nn.Module, Tensor]:
    arguments, side = SMALL[name]
    torch.manual_seed(0)
    given = {name: x for name, x in {"depth": 2, **arguments}.items() if x is not None}
    model = timm.create_model(name, num_classes=5, **given).eval()
    randomise(model)
    return model, torch.randn(2, 3, side, side)


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """No parameter is zero or one, so that none can be forgotten unnoticed."""
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def run(model: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(1)  # ViT-MAE shuffles its tokens
    return first(model(x))


def channels(site: Site, keep: list[int]) -> Tensor:
    width = torch.arange(len(site.held) * site.size)
    return width.view(-1, site.size)[keep].flatten()


def silenced(model: nn.Module, keep: list[list[int]], units: list[list[int]] | None) -> nn.Module:
    """A copy of the original whose projections do not read the other slices.

    Where a norm comes before the projection, it is computed from the kept channels alone.
    """
    anatomy = anatomy_of("oracle", model)
    sites = list(zip(anatomy.attentions, keep, strict=True))
    if units is not None:
        sites += list(zip(anatomy.mlps, units, strict=True))
    model = copy.deepcopy(model)
    for site, kept in sites:
        index = channels(site, kept)
        leaf = next(n for n, m in site.module.named_children() if m is site.projection)
        module = model.get_submodule(site.name)
        weight = module.get_submodule(leaf).weight
        mask = torch.zeros(weight.shape[1])
        mask[index] = 1
        with torch.no_grad():
            weight.mul_(mask)
        if site.norm is not None and kept:
            module.norm.register_forward_hook(partial_norm(index))
    return model


def partial_norm(index: Tensor) -> Callable[[Any, Any, Tensor], Tensor]:
    def hook(norm: Any, args: tuple[Tensor], out: Tensor) -> Tensor:
        x = args[0][..., index]
        assert isinstance(norm, nn.LayerNorm)
        y = (x - x.mean(-1, keepdim=True)) / (
            x.var(-1, correction=0, keepdim=True) + norm.eps
        ).sqrt()
        result = torch.zeros_like(out)
        result[..., index] = y * norm.weight[index] + norm.bias[index]
        return result

    return hook


def check(model: nn.Module, x: Tensor) -> None:
    anatomy = anatomy_of("test", model)
    sites, mlps = anatomy.attentions, anatomy.mlps
    rows = [torch.arange(len(site.held)).view(-1, site.group) for site in sites]
    uneven = [row[i % 2 :: 2].flatten().tolist() for i, row in enumerate(rows)]
    uneven[0] = uneven[0][: sites[0].group]
    none = [[], *uneven[1:]]
    units = [list(range(1, len(site.held), 3)) for site in mlps] or None
    with torch.no_grad():
        whole = run(model, x)
        for keep, some in ((uneven, None), (none, units)):
            pruned = prune_heads(model, keep, mlp=some)
            got, want = run(pruned, x), run(silenced(model, keep, some), x)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5 * want.abs().max().item())
            assert (got - whole).abs().max() > 1e-3 * whole.abs().max()
            held_now = [site.held for site in anatomy_of("test", pruned).attentions]
            assert held_now == keep
        assert torch.equal(run(model, x), whole)


@pytest.mark.parametrize("name", SMALL)
def test_timm(name: str) -> None:
    check(*small(name))


class Block(nn.Module):
    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(x)


def blocks(name: str) -> tuple[nn.Module, Tensor]:
    make, shape = BLOCKS[name]
    torch.manual_seed(0)
    model = nn.Sequential(Block(make()), Block(make())).eval()
    randomise(model)
    return model, torch.randn(2, *shape)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name: str) -> None:
    check(*blocks(name))


def test_every_prunable_class_is_pruned_here() -> None:
    """docs/use/support.md marks classes by ``unprunable``; the tests above prune all the others."""
    models = [*map(small, SMALL), *map(blocks, BLOCKS), torchvision_vit()]
    pruned = {
        fused.source
        for model, _ in models
        for _, fused in stand_ins(model)
        if isinstance(fused, FusedAttention)
    }
    assert pruned == {source for source, kind in FUSED.items() if kind.unprunable is None}
    refused = nn.Sequential(Block(nest.Attention(32, 4)))
    with pytest.raises(TypeError, match="nest.Attention: its output projection interleaves the"):
        prune_heads(refused, [[0]])
    assert all(kind.axes for kind in FUSED.values() if kind.unprunable is None)


def smallest(name: str) -> tuple[nn.Module, Tensor]:
    with torch.device("meta"):
        # Sapiens-2 shares keys between queries, with a list per block in the full size.
        shared = {"num_kv_heads": 2} if "sapiens2" in name else {}
        patch = timm.create_model(name, depth=1, **shared).patch_embed.patch_size[0]
    sizes: dict[str, Any] = {"depth": 2, "embed_dim": 64, "num_heads": 4, **shared}
    if "vit_giant_patch14" in name:
        sizes["embed_dim"] = 48  # their packed SwiGLU needs an even width
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, img_size=2 * patch, **sizes).eval()
    randomise(model)
    return model, torch.randn(1, 3, 2 * patch, 2 * patch)


@pytest.mark.slow
@pytest.mark.parametrize("module", REGISTRY)
def test_registry_of_timm(module: str) -> None:
    pruned, refused, failed = 0, 0, {}
    for name in timm.list_models(module=module):
        try:
            model, x = smallest(name)
        except (TypeError, RuntimeError, AssertionError) as error:
            failed[name] = f"cannot be built small: {error}"
            continue
        try:
            anatomy_of("test", model)
        except TypeError:
            refused += 1
            continue
        try:
            check(model, x)
            pruned += 1
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
    assert not failed
    assert (pruned, refused) == REGISTRY[module]


HF = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32}
HF_MLP = {"intermediate_size": 48, "patch_size": 8}
HF_RATIO = {"mlp_ratio": 2, "patch_size": 8}
HUGGING_FACE: dict[str, tuple[str, dict[str, Any]]] = {
    "ViTForImageClassification": ("ViTConfig", HF_MLP),
    "DeiTModel": ("DeiTConfig", HF_MLP),
    "Dinov2Model": ("Dinov2Config", HF_RATIO),
    "Dinov2ForImageClassification": ("Dinov2Config", {**HF_RATIO, "use_swiglu_ffn": True}),
    "Dinov2WithRegistersModel": ("Dinov2WithRegistersConfig", HF_RATIO),
    "DINOv3ViTModel": ("DINOv3ViTConfig", {**HF_MLP, "use_gated_mlp": True}),
    "CLIPVisionModel": ("CLIPVisionConfig", HF_MLP),
    "SiglipVisionModel": ("SiglipVisionConfig", HF_MLP),
    "IJepaModel": ("IJepaConfig", HF_MLP),
    "ViTMAEModel": ("ViTMAEConfig", {**HF_MLP, "mask_ratio": 0.0}),
}


def hugging_face(name: str) -> tuple[nn.Module, Tensor]:
    transformers = pytest.importorskip("transformers")
    config, extra = HUGGING_FACE[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**HF, **extra)).eval()
    randomise(model)
    return model, torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face(name: str) -> None:
    check(*hugging_face(name))


def torchvision_vit() -> tuple[nn.Module, Tensor]:
    vision = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = vision.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=5).eval()
    randomise(model)
    return model, torch.randn(2, 3, 32, 32)


def test_torchvision() -> None:
    check(*torchvision_vit())


def test_grouped_queries_go_in_groups() -> None:
    arguments = {"num_kv_heads": 2, "qkv_fused": False}
    from timm.layers import AttentionRope

    model = nn.Sequential()
    model.add_module("attn", AttentionRope(32, 4, num_prefix_tokens=0, **arguments).eval())
    x = torch.randn(2, 5, 32)
    pruned = prune_heads(model, [[0, 1]])
    torch.testing.assert_close(pruned(x), silenced(model, [[0, 1]], None)(x))
    assert pruned.attn.k_proj.weight.shape == (8, 32)
    with pytest.raises(ValueError, match=r"selection\[0\] must hold whole groups of 2"):
        prune_heads(model, [[0, 2]])
    scores = head_scores(model, "magnitude")
    assert scores.metadata["groups"] == [2]
    one, two = scores.scores[0].view(2, 2).sum(1).tolist()
    assert select_heads(scores, 0.5) == [[0, 1] if one > two else [2, 3]]
    with pytest.raises(ValueError, match="keep must be a multiple of 2"):
        select_heads(scores, 1)
    # The best set of two heads where all sets were tried: one group, not both.
    scores = head_scores(model, "reconstruction", [torch.randn(4, 30, 32)], progress=False)
    one, two = scores.scores[0].view(2, 2).sum(1).tolist()
    assert select_heads(scores, 0.5) == [[0, 1] if one > two else [2, 3]]
    assert select_heads(scores, 1.0) == [[0, 1, 2, 3]]


def test_magnitude_where_heads_are_packed_one_by_one_or_normalised() -> None:
    """TinyViT's rows are (H, 3, D); cosines hide the size of queries and keys."""
    model, _ = small("tiny_vit_5m_224")
    attn = anatomy_of("test", model).attentions[0].module
    count = len(anatomy_of("test", model).attentions[0].held)
    weight, bias = attn.qkv.weight.double(), attn.qkv.bias.double()
    rows = torch.cat((weight, bias[:, None]), 1).view(count, 3, -1, weight.shape[1] + 1)
    want = []
    for head, (q, k, v) in enumerate(rows):
        out = attn.proj.weight.double().view(weight.shape[1], count, -1)[:, head]
        want.append(((out @ v).norm() * (q.T @ k).norm()).sqrt())
    scores = head_scores(model, "magnitude")
    torch.testing.assert_close(scores.scores[0], torch.stack(want).detach())
    model, _ = small("swinv2_tiny_window8_256")
    before = head_scores(model, "magnitude").scores
    with torch.no_grad():
        model.layers[0].blocks[0].attn.qkv.weight[:32] *= 3
    torch.testing.assert_close(head_scores(model, "magnitude").scores, before)


def test_scores_of_windows_are_means_over_images() -> None:
    """Twice the same picture scores as once, and gates add up over the windows of an image."""
    model, x = small("swin_tiny_patch4_window7_224")

    def loss(output: Tensor, batch: Tensor) -> Tensor:
        return output.square().sum(1).mean()

    for method in ("taylor", "entropy"):
        given = {"loss": loss} if method == "taylor" else {}
        once = head_scores(model, method, [x[:1]], progress=False, **given)
        twice = head_scores(model, method, [x[[0, 0]]], progress=False, **given)
        torch.testing.assert_close(once.scores, twice.scores, rtol=1e-4, atol=1e-9)
        if method == "entropy":
            assert all(0 <= share <= 1 for row in once.scores for share in row.tolist())
    with kdfast.HeadGates(model) as gates:
        loss(model(x), x).backward()
    site = anatomy_of("test", model).attentions[0]
    grads = []
    for scale in (1 + 1e-3, 1 - 1e-3):
        twin = copy.deepcopy(model).double()
        with torch.no_grad():
            twin.get_submodule(site.name).proj.weight[:, channels(site, [1])] *= scale
            grads.append(twin(x.double()).square().sum(1))
    want = (grads[0] - grads[1]) / 2e-3 / len(x)
    torch.testing.assert_close(gates.last[0][1], want.sum(), rtol=1e-3, atol=1e-6)
    # The gradient of an image's own loss, which the mean over the batch divides.
    torch.testing.assert_close(gates.scores().scores[0][1], want.abs().sum(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", ["magnitude", "gradient", "taylor", "entropy", "leave_one_out"])
@pytest.mark.parametrize("build", ["timm", "eva", "torchvision", "hf"])
def test_scores_of_a_dead_head_are_last(build: str, method: str) -> None:
    """Through every library's own modules: the dead head is found, the model left as it was."""
    makers: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
        "timm": lambda: small("vit_small_patch14_reg4_dinov2"),
        "eva": lambda: small("vit_small_patch16_dinov3"),
        "torchvision": torchvision_vit,
        "hf": lambda: hugging_face("DINOv3ViTModel"),
    }
    model, x = makers[build]()
    site = anatomy_of("test", model).attentions[1]
    with torch.no_grad():
        site.projection.weight[:, channels(site, [2])] = 0
        for name, (axis, tensor) in site.tensors().items():
            if method == "entropy" and ("q" in name or "in_proj" in name):
                rows = tensor.view(axis.parts, len(site.held), site.size, -1)
                rows[0, 2] = 0
    modules = [type(module) for module in model.modules()]
    data = None if method == "magnitude" else [x]
    scores = head_scores(model, method, data, progress=False)
    assert scores.scores[1].argmin() == 2 and scores.scores[1][2] < 1e-5
    assert [type(module) for module in model.modules()] == modules
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["beit3_base_patch16_224", "vit_small_patch16_rope_mixed_224"])
def test_evaluation_without_building_is_that_of_the_pruned_model(name: str) -> None:
    model, x = small(name)
    selections = [[[0, 1, 3], [0, 1, 2, 3]], [[0, 1, 2, 3], [2]], [[1], []], [[0, 1, 2, 3]] * 2]

    def metric(output: Tensor, batch: Tensor) -> Tensor:
        return output.square().mean()

    got = evaluate_selections(model, selections, metric, [x[:1], x[1:]], progress=False)
    with torch.no_grad():
        want = [metric(prune_heads(model, kept)(x), x).item() for kept in selections]
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-4, atol=1e-6)


def test_report_against_torchs_counter() -> None:
    model = timm.create_model("vit_base_patch16_224")
    report = pruning_report(model, [0.5], mlp_keep=0.5)
    # 17.56 GMAC, as published; 85,798,656 parameters and a head of 769,000.
    assert report.full.params == 86_567_656
    assert report.full.flops == 35_127_656_448
    assert report.full.embed == 2 * (196 * 768 * 768 + 768 * 1000)
    half = report.pruned[0]
    assert half.heads == 72 and half.attention_params == 12 * (3 * 384 * 769 + 385 * 768)
    pruned = prune_heads(model, [[0, 2, 4, 6, 8, 10]] * 12, mlp=[list(range(1536))] * 12)
    assert half.params == sum(p.numel() for p in pruned.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        pruned.to("meta")(torch.empty(1, 3, 224, 224, device="meta"))
    assert half.flops == counter.get_total_flops()


@pytest.mark.parametrize("build", ["torchvision", "hf"])
def test_report_of_other_libraries(build: str) -> None:
    model = (torchvision_vit if build == "torchvision" else lambda: hugging_face("DeiTModel"))()[0]
    report = pruning_report(model, [2, 0])
    tokens, hidden = (17, 64) if build == "torchvision" else (18, 48)
    block = report.full.blocks[0]
    assert block.gemm == 2 * tokens * 4 * 32 * 32
    assert block.attention == 4 * 32 * tokens**2
    assert block.mlp == 2 * tokens * 2 * 32 * hidden
    assert [b.attention for b in report.pruned[0].blocks] == [block.attention // 2] * 2
    assert [b.attention + b.gemm for b in report.pruned[1].blocks] == [0, 0]
    assert "GMACs padded" not in str(report)


def test_the_original_is_untouched_and_steps_compose() -> None:
    model, x = small("vit_small_patch16_rope_mixed_224")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    once = prune_heads(model, [[1, 3], [2]])
    steps = prune_heads(prune_heads(model, [[0, 1, 3], [1, 2]]), [[1, 2], [1]])
    with torch.no_grad():
        torch.testing.assert_close(steps(x), once(x), rtol=0, atol=0)
    assert not any(isinstance(module, FusedAttention) for module in model.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    pointers = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not pointers & {tensor.data_ptr() for tensor in once.state_dict().values()}


def test_trains_after_pruning() -> None:
    model, x = small("eva02_tiny_patch14_224")
    units = select_heads(mlp_scores(model, "taylor", [x], progress=False), 0.5)
    pruned = prune_heads(model, [[0], [1, 2]], mlp=units).train()
    optimizer = torch.optim.SGD(pruned.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = pruned(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    assert all(p.grad is not None for p in pruned.parameters() if p.requires_grad and p.numel())


def test_accelerated_models_prune_the_same() -> None:
    model, x = small("vit_tiny_patch16_224")
    want = prune_heads(model, [[0, 2], [1]])
    kdfast.accelerate(model)
    got = prune_heads(model, [[0, 2], [1]])
    assert got.state_dict().keys() == want.state_dict().keys()
    report = kdfast.accelerate(want)
    assert [type(m) for m in got.modules()] == [type(m) for m in want.modules()] and report.blocks
    with torch.no_grad():
        assert torch.equal(got(x), want(x))
