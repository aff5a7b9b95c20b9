# SPDX-License-Identifier: Apache-2.0
"""The attention maps and features that a chain compares, against those that the models use."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import kdfast
from kdfast.chain.links import LinkModel
from kdfast.chain.objective import Objective
from kdfast.chain.pairing import attention_pairs, feature_pairs
from kdfast.chain.planning import check_links
from kdfast.configs import ConfigError, load
from kdfast.configs.chain import ChainDistillConfig
from kdfast.matching.capture import Capture, attention_layers
from kdfast.matching.features import timm_features
from kdfast.matching.map_distance import map_distance, relation_heads, turned
from kdfast.nn.heads import AttentionCall
from kdfast.ops.geometry import Rope

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
SWIN = {"img_size": 64, "depths": (2, 1), "embed_dim": 16, "num_heads": (2, 4)}
# One name of each family whose stand-in tells maps, small; and how many maps it has.
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "vit_tiny_patch16_224": (dict(VIT, qk_norm=True), 2),
    "vit_small_patch16_rope_224": (VIT, 2),
    "vit_small_patch16_rope_mixed_224": (VIT, 2),
    "vit_small_patch16_dinov3": (VIT, 2),
    "eva02_tiny_patch14_224": (VIT, 2),
    "eva_large_patch14_196": (VIT, 2),
    "beit_base_patch16_224": (VIT, 2),
    "vit_relpos_small_patch16_224": (VIT, 2),
    "vit_relpos_medium_patch16_rpn_224": (VIT, 2),
    "vit_srelpos_small_patch16_224": (VIT, 2),
    "vit_base_patch16_siglip_224": (VIT, 2),
    "swin_tiny_patch4_window7_224": (dict(SWIN, window_size=4), 3),
    "swinv2_tiny_window8_256": (dict(SWIN, window_size=4), 3),
    "swinv2_cr_tiny_224": (dict(SWIN, window_size=4), 3),
    "tiny_vit_5m_224": (
        {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (1, 2), "window_sizes": (4, 4)}, 1,
    ),
    "davit_tiny": ({"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (2, 4)}, 2),
    "hiera_tiny_224": (
        {"img_size": 64, "stages": (1, 2, 1, 1), "embed_dim": 16, "num_heads": 1}, 2,
    ),
    "maxvit_tiny_rw_224": ({"img_size": 64, "depths": (1,), "embed_dim": (32,)}, 2),
    "coatnet_nano_rw_224": (
        {"img_size": 64, "depths": (1, 1), "embed_dim": (32, 32), "block_type": ("C", "T")}, 1,
    ),
    "gcvit_xxtiny": ({}, 12),
    "nest_tiny": ({"img_size": 112}, 12),
    "visformer_tiny": ({"img_size": 64}, 8),
    "volo_d1_224": ({"img_size": 64}, 14),
    "caformer_s18": ({}, 12),
    "fastvit_sa12": ({"layers": (1, 1, 1, 1)}, 1),
    "pit_ti_224": ({"img_size": 64, "depth": (1, 1, 1)}, 3),
    "crossvit_tiny_240": ({"depth": ((1, 1, 0),)}, 2),
    "mobilevit_xxs": ({}, 9),
    "vit_base_patch16_xp_224": (VIT, 2),
}  # fmt: skip


def build(name: str, **more: Any) -> Any:
    torch.manual_seed(0)
    arguments, _ = MODELS.get(name, ({}, 0))
    net = timm.create_model(name, num_classes=5, **{**arguments, **more}).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            # So that maps are not flat and biases are not zero.
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.05))
    return net


def side_of(name: str) -> int:
    """Side of the images that ``build`` makes a model for."""
    fixed = 224 if name == "gcvit_xxtiny" else 128
    return int(MODELS[name][0].get("img_size", fixed))


class Softmax(TorchFunctionMode):
    """Keeps the result of every softmax under the name of the module that calls it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.maps: dict[str, Tensor] = {}
        self.path: list[str] = []
        self.net = net

    @contextmanager
    def attached(self) -> Iterator["Softmax"]:
        handles = []
        for name, module in self.net.named_modules():
            if isinstance(getattr(module, "fused_attn", None), bool):
                module.fused_attn = False  # type: ignore[assignment]
            handles.append(module.register_forward_pre_hook(lambda *_, n=name: self.path.append(n)))
            handles.append(module.register_forward_hook(lambda *_: self.path.pop() and None))
        with self:
            yield self
        for handle in handles:
            handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "softmax" and self.path:
            name = self.path[-1].removesuffix(".softmax")
            self.maps[name] = out.detach()
        return out


def probabilities(call: AttentionCall) -> Tensor:
    """(B, H, N, N), written out."""
    call = turned(call)
    scores = call.q @ call.k.transpose(-1, -2)
    scores = scores * (call.q.shape[-1] ** -0.5 if call.scale is None else call.scale)
    if call.bias is not None:
        scores = scores + call.bias.repeat(len(scores) // len(call.bias), 1, 1, 1)
    return scores.softmax(-1)


# Some networks of position biases drop at random while training: the maps are still the same.
CASES = [(name, False) for name in MODELS] + [
    (name, True) for name in ("vit_relpos_small_patch16_224", "swinv2_tiny_window8_256")
]


@pytest.mark.parametrize(("name", "training"), CASES)
def test_maps_are_those_that_the_model_uses(name: str, training: bool) -> None:
    net = build(name).double().train(training)
    side = side_of(name)
    names = attention_layers(net, name)
    with Softmax(net).attached() as used, Capture(net, names, [], strict=False) as seen:
        net(torch.randn(2, 3, side, side, dtype=torch.float64))
    calls = {}
    for path in seen.called:
        try:
            calls[path] = seen.call(path)
        except ValueError as error:
            assert str(error) == "its queries are not one per key"
    assert len(calls) == MODELS[name][1]
    for path, call in calls.items():
        got, want = probabilities(call), used.maps[path]
        if want.dim() == 5:
            want = want.transpose(1, 2)  # windows go to the batch
        torch.testing.assert_close(got, want.reshape(got.shape), rtol=1e-6, atol=1e-9)
        assert got.std() > 0.01 * got.mean()


def call(heads: int = 2, dim: int = 8, rope: bool = False, bias: int = 0, **more: Any) -> Any:
    q, k = (torch.randn(4, heads, 9, dim, dtype=torch.float64) for _ in range(2))
    tables = None
    if rope:
        angles = torch.randn(8, dim // 2, dtype=torch.float64).repeat_interleave(2, -1)
        tables = Rope(angles.cos(), angles.sin(), 1)
    added = torch.randn(bias, heads, 9, 9, dtype=torch.float64) if bias else None
    return AttentionCall(q.requires_grad_(), k, tables, None, more.get("scale"), None, added)


@pytest.mark.parametrize("kind", ["kl", "mse"])
@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        ({}, {"heads": 4, "dim": 4}),
        ({"rope": True}, {"rope": True}),
        ({"rope": True}, {"dim": 4}),
        ({}, {"rope": True, "heads": 4}),
        ({"scale": 1.0}, {"scale": 0.1}),
        ({"bias": 2, "rope": True}, {"heads": 4, "bias": 1}),
        ({}, {"heads": 4, "bias": 4}),
        ({"bias": 1}, {"rope": True, "scale": 0.3}),
    ],
    ids=str,
)
def test_distance_of_maps(mine: dict[str, Any], theirs: dict[str, Any], kind: str) -> None:
    student, teacher = call(**mine), call(**theirs)
    got = map_distance(student, teacher, kind)
    heads = [0, 2] if theirs.get("heads") == 4 else [0, 1]
    p, r = probabilities(student), probabilities(teacher)[:, heads].detach()
    want = (r * (r / p).log()).sum(-1).mean() if kind == "kl" else (p - r).square().sum(-1).mean()
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    grads = [torch.autograd.grad(x, student.q, retain_graph=True)[0] for x in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-12)
    assert teacher.q.grad is None


def pair(name: str, **more: Any) -> tuple[LinkModel, LinkModel]:
    student, teacher = LinkModel(build(name)), LinkModel(build(name, **more))
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return student, teacher


def objective(student: LinkModel, teacher: LinkModel, **more: Any) -> Objective:
    config = ChainDistillConfig(**more)
    return Objective(student, teacher, "multiclass", config, epochs=2, distilled=True).eval()


@pytest.mark.parametrize(
    "name",
    ["vit_small_patch16_rope_224", "swin_tiny_patch4_window7_224", "eva_large_patch14_196",
     "tiny_vit_5m_224", "beit_base_patch16_224"],
)  # fmt: skip
@pytest.mark.parametrize("accelerated", [False, True])
def test_attention_term_of_whole_models(name: str, accelerated: bool) -> None:
    student, teacher = pair(name)
    side = side_of(name)
    images, target = torch.rand(2, 3, side, side), torch.tensor([0, 1])
    used = []
    for model in (student, teacher):
        with Softmax(model.net).attached() as seen, torch.no_grad():
            model(images)
        used.append([x for path, x in seen.maps.items() if path.endswith("attn")])
    want = torch.stack(
        # Shifted windows have pairs whose weight underflows to 0 on both sides.
        [
            (r * (r / p.clamp_min(1e-30)).clamp_min(1e-30).log()).sum(-1).mean()
            for p, r in zip(*used, strict=True)
        ]
    ).mean()
    if accelerated:
        for model in (student, teacher):
            # The reference above told them to be eager.
            assert kdfast.accelerate(model.net, replace_eager=True).replaced
    losses, _ = objective(student, teacher, attention=1.0)(images, target, 0)
    torch.testing.assert_close(losses["attention"], want, rtol=1e-3, atol=1e-6)
    assert want > 1e-3


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_rope_224"])
def test_attention_term_under_checkpointing(name: str) -> None:
    student, teacher = pair(name)
    term = objective(student, teacher, attention=1.0).train()
    grads = []
    for recompute in (False, True):
        student.zero_grad()
        student.net.set_grad_checkpointing(recompute)  # type: ignore[operator]
        term(torch.ones(2, 3, 32, 32), torch.tensor([0, 1]), 0)[0]["total"].backward()
        grads.append([p.grad for p in student.parameters() if p.grad is not None])
    assert grads[0] and all(map(torch.equal, *grads))


def test_nothing_is_projected_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = pair("tiny_vit_5m_224")
    term = objective(student, teacher, attention=1.0)
    ran: list[nn.Module] = []
    forward = nn.Linear.forward

    def counted(self: nn.Linear, x: Tensor) -> Tensor:
        ran.append(self)
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    term(torch.rand(2, 3, 128, 128), torch.tensor([0, 1]), 0)
    assert len(ran) == len(set(ran)) > 4


def test_a_users_hook_on_a_projection_counts_once() -> None:
    net = build("vit_tiny_patch16_224")
    net.blocks[1].attn.qkv.register_forward_hook(lambda m, args, out: 2 * out)
    names = attention_layers(net, "vit")
    with Softmax(net).attached() as used, Capture(net, names, []) as seen:
        net(torch.randn(2, 3, 32, 32))
    got = probabilities(seen.qk["blocks.1.attn"])
    torch.testing.assert_close(got, used.maps["blocks.1.attn"])


REFUSED = [
    ("xcit_nano_12_p8_224", {"img_size": 64}, "cait.ClassAttn: a pool.*xcit.XCA: it attends over"),
    ("cait_xxs24_224", {"img_size": 64}, "TalkingHeadAttn: it mixes heads before and after"),
    ("mvitv2_tiny", {"img_size": 64}, "MultiScaleAttention: its keys are pooled"),
    ("levit_128s", {}, "levit.Attention: values are wider"),
    ("convit_tiny", {"img_size": 64}, "convit.GPSA: two softmaxes mixed"),
    ("coat_tiny", {}, "FactorAttnConvRelPosEnc: linear attention"),
    ("edgenext_xx_small", {}, "CrossCovarianceAttn: it attends over channels"),
    ("tnt_s_patch16_224", {}, "tnt.Attention: not a class that kdfast knows"),
    ("samvit_base_patch16", {"depth": 1}, "its position bias depends on the queries"),
    ("resnet18", {}, "it has no attention"),
]


@pytest.mark.parametrize(("name", "arguments", "reason"), REFUSED)
def test_models_without_maps_are_refused_when_the_objective_is_built(
    name: str, arguments: dict[str, Any], reason: str
) -> None:
    with torch.device("meta"):
        teacher = LinkModel(timm.create_model(name, num_classes=5, **arguments))
        student = LinkModel(timm.create_model("vit_tiny_patch16_224", num_classes=5, **VIT))
        with pytest.raises(ValueError, match=f"distill.attention: {name} must have.*{reason}"):
            objective(student, teacher, attention=1.0)


def test_only_maps_of_the_same_tokens_meet() -> None:
    swin = "swin_tiny_patch4_window7_224"
    student, teacher = LinkModel(build(swin)), LinkModel(build(swin, depths=(4, 1)))
    with pytest.raises(ValueError, match=rf"blocks.0.attn of {swin} must .* shifted by \(2, 2\)"):
        objective(student, teacher, attention=1.0)
    objective(student, teacher, attention=1.0, layers="last")
    vit = LinkModel(build("vit_tiny_patch16_224"))
    with pytest.raises(ValueError, match="got 16 windows of 16 tokens and 17 tokens"):
        objective(student, vit, attention=1.0)
    # As many tokens, but Hiera orders them by mask units.
    hiera = LinkModel(
        build("hiera_tiny_224", stages=(1, 1, 1, 1), q_pool=0, mask_unit_attn=4 * (False,))
    )
    plain = LinkModel(
        build(
            "vit_tiny_patch16_224", img_size=64, patch_size=4, class_token=False, global_pool="avg"
        )
    )
    with pytest.raises(
        ValueError, match="got 256 tokens in the order of mask units and 256 tokens"
    ):
        objective(hiera, plain, attention=1.0)
    # MaxViT attends in windows and in grids, both of 16 tokens.
    maxvit = LinkModel(build("maxvit_tiny_rw_224"))
    calls = attention_pairs(maxvit, maxvit, ChainDistillConfig(), None)
    assert [a.split(".")[-2] for a, _ in calls] == ["attn_block", "attn_grid"]
    parallel = LinkModel(build("maxvit_tiny_rw_224", depths=(2,)))
    with pytest.raises(ValueError, match="windows of 4 tokens and .* spread over the image"):
        objective(maxvit, parallel, attention=1.0)


def test_relation_wants_plain_maps() -> None:
    swin = LinkModel(build("swin_tiny_patch4_window7_224"))
    with pytest.raises(ValueError, match="relation splits heads anew, but layers.0.*position bias"):
        objective(swin, swin, attention=1.0, attention_map="relation", relation_heads=4)
    vit = LinkModel(build("vit_tiny_patch16_224"))
    with pytest.raises(ValueError, match="must divide the width 48 of blocks.0.attn of vit_tiny"):
        objective(vit, vit, attention=1.0, attention_map="relation", relation_heads=5)


def test_relation_is_of_rotated_queries_and_keys() -> None:
    student, teacher = pair("vit_small_patch16_rope_224")
    images, target = torch.rand(2, 3, 32, 32), torch.tensor([0, 1])
    term = objective(student, teacher, attention=1.0, attention_map="relation", relation_heads=4)
    got = term(images, target, 0)[0]["attention"]
    expected = []
    for layer in ("blocks.0.attn", "blocks.1.attn"):
        rows = []
        for model in (student, teacher):
            with torch.no_grad(), Capture(model.net, [layer], []) as seen:
                model(images)
            inputs = turned(seen.qk[layer])
            q, k = (relation_heads(x, 4, "it") for x in (inputs.q, inputs.k))
            rows.append((q @ k.transpose(2, 3) * 12**-0.5).log_softmax(-1))
        expected.append((rows[1].exp() * (rows[1] - rows[0])).sum(-1).mean())
    torch.testing.assert_close(got, torch.stack(expected).mean(), rtol=1e-4, atol=1e-6)


FEATURES: list[tuple[str, dict[str, Any]]] = [
    ("swin_tiny_patch4_window7_224", {}),
    ("swinv2_cr_tiny_224", {}),
    ("hiera_tiny_224", {}),
    ("volo_d1_224", {}),
    ("maxvit_tiny_rw_224", {}),
    ("davit_tiny", {}),
    ("samvit_base_patch16", {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3}),
    ("mambaout_femto", {"depths": (1, 1, 1, 1)}),
    # Squares of as many channels as their side has positions.
    ("swin_tiny_patch4_window7_224", {"embed_dim": 16, "img_size": 64}),
    ("resnet10t", {"channels": (32, 16, 8, 4), "block_args": {}}),
]


@pytest.mark.parametrize(("name", "arguments"), FEATURES)
def test_features_are_tokens_in_rows(name: str, arguments: dict[str, Any]) -> None:
    """Against timm's own maps (B, C, h, w) of the same layers."""
    net = build(name, **arguments)
    side = arguments.get("img_size", side_of(name) if name in MODELS else 128)
    rows = timm_features(net, name)
    x = torch.randn(2, 3, side, side)
    with torch.no_grad(), Capture(net, [], [row.module for row in rows]) as seen:
        net(x)
        maps = net.forward_intermediates(x, output_fmt="NCHW", intermediates_only=True)
    maps = [y for y in maps if y.shape[1] in {row.width for row in rows}][-len(rows) :]
    for row, want in zip(rows, maps, strict=True):
        torch.testing.assert_close(seen.features[row.module], want.flatten(2).transpose(1, 2))


def test_features_of_swin_with_another_width() -> None:
    swin = "swin_tiny_patch4_window7_224"
    student, teacher = LinkModel(build(swin)), LinkModel(build(swin, embed_dim=24))
    term = objective(student, teacher, feature=1.0)
    assert [tuple(p.weight.shape) for p in term.projections] == [(24, 16), (48, 32)]  # type: ignore[union-attr,arg-type]
    images = torch.rand(2, 3, 64, 64)
    got = term(images, torch.tensor([0, 1]), 0)[0]["feature"]
    outs = []
    for model in (student, teacher):
        with Capture(model.net, [], ["layers.0", "layers.1"]) as seen:
            model(images)
        outs.append(seen.features)
    norm = [
        F.mse_loss(
            F.layer_norm(p(outs[0][n]), (w,), eps=1e-6), F.layer_norm(outs[1][n], (w,), eps=1e-6)
        )
        for p, n, w in zip(term.projections, outs[0], (24, 48), strict=True)
    ]
    torch.testing.assert_close(got, torch.stack(norm).mean().detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("pit_ti_224", {}, "pit_ti_224: transformers.1 must give one tensor.*gives a tuple"),
        ("crossvit_tiny_240", {}, "crossvit_tiny_240: blocks.1 must give one tensor.*a list"),
        ("mvitv2_tiny", {}, "timm must list features of mvitv2_tiny, lists none"),
        ("swin_tiny_patch4_window7_224", {}, "layers.0 of swin.* 256 and 784"),
        ("hiera_tiny_224", {}, "hiera_tiny_224: it must run on images of 64 x 64"),
    ],
)
def test_features_that_do_not_fit(name: str, arguments: dict[str, Any], reason: str) -> None:
    student = LinkModel(build("swin_tiny_patch4_window7_224"))
    with torch.device("meta"):
        teacher = LinkModel(timm.create_model(name, num_classes=5, **arguments))
    with pytest.raises(ValueError, match=f"distill.feature: .*{reason}"):
        feature_pairs(student, teacher, ChainDistillConfig(), None)


def readable(net: nn.Module) -> Sequence[str]:
    return attention_layers(net, "net")


def test_layers_that_can_be_read_are_taken_from_mixed_models() -> None:
    davit = build("davit_tiny")
    assert {type(davit.get_submodule(name)).__name__ for name in readable(davit)} == {
        "WindowAttention"
    }
    siglip = build("vit_base_patch16_siglip_224")
    assert readable(siglip) == ["blocks.0.attn", "blocks.1.attn"]
    pruned = kdfast.prune_heads(build("vit_tiny_patch16_224"), [[], [0, 2]])
    assert readable(pruned) == ["blocks.1.attn"]
    odd = build("vit_tiny_patch16_224")
    odd.blocks[0].attn.forward = odd.blocks[0].attn.forward
    assert readable(odd) == ["blocks.1.attn"]
    masked = LinkModel(build("vit_tiny_patch16_224", attn_drop_rate=0.1))
    assert len(attention_pairs(masked, masked, ChainDistillConfig(), None)) == 2


def test_a_chain_that_cannot_be_compared_stops_before_its_teacher_is_trained() -> None:
    words = ["distill.attention=1", "chain=[xcit_nano_12_p8_224,vit_tiny_patch16_224]"]
    words += ["model_args=[{img_size: 32}]", "data.size=32", "epochs=2", "batch=4"]
    with pytest.raises(ConfigError, match="xcit_nano_12_p8_224 must have self-attention"):
        check_links(load("vit_chain_digits", words), 10)
    # The teacher alone needs no student.
    check_links(load("vit_chain_digits", [*words, "stage=teacher"]), 10)
    words[1] = "chain=[vit_tiny_patch16_224,vit_relpos_small_patch16_224]"
    with pytest.raises(ConfigError, match="got 4 tokens and 5 tokens"):
        check_links(load("vit_chain_digits", words), 10)
