# SPDX-License-Identifier: Apache-2.0
"""Every class that accelerate replaces against its original: values, all gradients, compile."""

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from timm.layers import Attention, AttentionPoolLatent, AttentionRope, RmsNorm
from timm.layers.diff_attention import DiffAttention
from timm.layers.pos_embed_rel import RelPosBias, RelPosBiasTf, RelPosMlp
from timm.models import beit, fastvit, maxxvit, metaformer, nest, tiny_vit, visformer, volo
from timm.models.cait import ClassAttn
from timm.models.crossvit import CrossAttention
from timm.models.davit import WindowAttention
from timm.models.eva import EvaAttention
from timm.models.gcvit import WindowAttentionGlobal
from timm.models.hiera import MaskUnitAttention
from timm.models.hieradet_sam2 import MultiScaleAttention
from timm.models.swin_transformer import WindowAttention as SwinAttention
from timm.models.swin_transformer_v2 import WindowAttention as SwinV2Attention
from timm.models.swin_transformer_v2_cr import WindowMultiHeadAttention
from timm.models.vision_transformer import ParallelScalingBlock
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import Tensor, nn
from torchvision.models.swin_transformer import (
    ShiftedWindowAttention,
    ShiftedWindowAttentionV2,
)

import kdfast
from kdfast.nn import FusedAttention
from kdfast.testing import assert_no_worse, run

Make = Callable[[], nn.Module]
LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)
B, N, C = 2, 11, 24


def table(*lead: int, prefix: int = 1, dim: int = 8, half: bool = False) -> Tensor:
    """Sines, then cosines, (*lead, N - prefix, 2 * dim), as timm's rotary embeddings give them."""
    angles = torch.randn(*lead, N - prefix, dim // 2, generator=torch.Generator().manual_seed(2))
    angles = torch.cat((angles, angles), -1) if half else angles.repeat_interleave(2, -1)
    return torch.cat((angles.sin(), angles.cos()), -1)


def mask(windows: int, tokens: int) -> Tensor:
    """(G, N, N) as Swin makes it for shifted windows, some pairs at -100."""
    part = torch.randint(0, 2, (windows, tokens), generator=torch.Generator().manual_seed(3))
    return -100.0 * (part[:, :, None] != part[:, None, :])


def rope(**kwargs: Any) -> nn.Module:
    return AttentionRope(C, 3, norm_layer=LAYER_NORM, **kwargs)


def eva(**kwargs: Any) -> nn.Module:
    return EvaAttention(C, 3, norm_layer=LAYER_NORM, **kwargs)


# A maker, then further inputs, or ("shape", ...) of the input and perhaps further inputs.
CASES: dict[str, tuple[Any, ...]] = {
    "plain": (lambda: Attention(C, 3), ()),
    "everything": (
        lambda: Attention(
            C, 3, attn_head_dim=10, dim_out=20, qkv_bias=True, qk_norm=True, scale_norm=True,
            gated=True, norm_layer=LAYER_NORM,
        ),
        (),
    ),
    "rms q/k norm": (lambda: Attention(C, 3, qk_norm=True, norm_layer=RmsNorm), ()),
    "one head of odd size": (lambda: Attention(7, 1), ()),
    "no output bias": (lambda: Attention(C, 4, proj_bias=False), ()),
    "rope": (rope, (table(),)),
    "rope without tables": (rope, ()),
    "rope half, no prefix": (
        lambda: rope(rotate_half=True, num_prefix_tokens=0), (table(prefix=0, half=True),)
    ),
    "rope all options": (
        lambda: rope(qk_norm=True, scale_norm=True, gated=True, attn_head_dim=12, dim_out=20),
        (table(dim=12),),
    ),
    "rope per head": (rope, (table(3),)),
    "rope per head and image": (rope, (table(B, 3),)),
    "rope per image": (rope, (table(B, 1),)),
    "rope split": (lambda: rope(qkv_fused=False, qkv_bias=False), (table(),)),
    "rope grouped": (
        lambda: AttentionRope(C, 6, num_kv_heads=2, qkv_fused=False, attn_head_dim=8), (table(),)
    ),
    "eva02": (lambda: eva(qkv_fused=False), (table(),)),
    "eva": (lambda: eva(scale_norm=False), (table(),)),
    "eva without bias": (lambda: eva(qkv_bias=False, scale_norm=False), (table(),)),
    "eva separate bias": (lambda: eva(qkv_bias_separate=True), (table(),)),
    "dinov3": (
        lambda: eva(rotate_half=True, num_prefix_tokens=5, scale_norm=False),
        (table(prefix=5, half=True),),
    ),
    "eva gated q/k norm": (lambda: eva(gated=True, qk_norm=True), (table(),)),
    "parallel": (lambda: ParallelScalingBlock(C, 3, qk_norm=True, norm_layer=LAYER_NORM), ()),
    "parallel biased": (lambda: ParallelScalingBlock(C, 3, qkv_bias=True, init_values=0.1), ()),
    "latent pool": (lambda: AttentionPoolLatent(C, num_heads=3, mlp_ratio=2), ()),
    "latent pool, all options": (
        lambda: AttentionPoolLatent(
            C, 20, num_heads=3, latent_len=2, latent_dim=10, feat_size=N, pos_embed="abs",
            pool_type="avg", norm_layer=LAYER_NORM,
        ),
        (),
    ),
    "latent pool, not pooled": (
        lambda: AttentionPoolLatent(C, num_heads=3, latent_len=2, pool_type="", qkv_bias=False), ()
    ),
    "class attention": (lambda: ClassAttn(C, 3, qkv_bias=True), ()),
    "class attention of VOLO": (lambda: volo.ClassAttention(C, 3, head_dim=10), ()),
    "cross attention": (lambda: CrossAttention(C, 3, qkv_bias=True), ()),
    "differential": (lambda: DiffAttention(C, 3, qkv_bias=True, qk_norm=True), ()),
    "differential, two scalars": (lambda: DiffAttention(C, 2, dual_lambda=True, depth=3), ()),
    "windows of DaViT": (lambda: WindowAttention(C, (3, 3), 3), ()),
    "mask units": (
        lambda: MaskUnitAttention(C, 18, 3, window_size=2, use_mask_unit_attn=True),
        ("shape", 2, 8, C),
    ),
    "Hiera, global": (lambda: MaskUnitAttention(C, 24, 3), ()),
    "SAM 2": (lambda: MultiScaleAttention(C, 18, 3), ("shape", 2, 3, 5, C)),
    "MetaFormer": (lambda: metaformer.Attention(C, head_dim=8), ()),
    "NesT": (lambda: nest.Attention(C, 3, qkv_bias=True), ("shape", 2, 4, 5, C)),
    "Visformer": (lambda: visformer.Attention(C, 3, head_dim_ratio=0.5), ("shape", 2, C, 3, 5)),
    "VOLO": (lambda: volo.Attention(C, 3, qkv_bias=True), ("shape", 2, 3, 5, C)),
    "FastViT": (lambda: fastvit.Attention(C, head_dim=8), ("shape", 2, C, 3, 5)),
    "Swin": (lambda: SwinAttention(C, 3, window_size=(3, 4)), ("shape", 2, 12, C)),
    "Swin, shifted": (
        lambda: SwinAttention(C, 2, head_dim=10, window_size=3),
        ("shape", 6, 9, C), (mask(3, 9),),
    ),
    "Swin v2": (lambda: SwinV2Attention(C, (3, 3), 3), ("shape", 4, 9, C), (mask(2, 9),)),
    "Swin v2 cr": (
        lambda: WindowMultiHeadAttention(C, 3, (3, 3)).eval(), ("shape", 4, 9, C), (mask(2, 9),)
    ),
    "BEiT": (lambda: beit.Attention(C, 3, qkv_bias=True, window_size=(2, 5)), ()),
    "BEiT, shared bias": (
        lambda: beit.Attention(C, 3), ("shape", B, N, C), (torch.randn(1, 3, N, N),)
    ),
    "BEiT, both biases": (
        lambda: beit.Attention(C, 3, qkv_bias=True, qkv_bias_separate=True, window_size=(2, 5)),
        ("shape", B, N, C), (torch.randn(1, 3, N, N),),
    ),
    "relative positions": (
        lambda: RelPosAttention(
            C, 3, qk_norm=True, rel_pos_cls=partial(RelPosBias, (2, 5), prefix_tokens=1)
        ),
        (),
    ),
    "relative positions by a network": (
        lambda: RelPosAttention(C, 3, rel_pos_cls=partial(RelPosMlp, (3, 3))).eval(),
        ("shape", 2, 9, C),
    ),
    "MaxViT": (
        lambda: maxxvit.AttentionCl(
            C, dim_head=8, head_first=False, rel_pos_cls=partial(RelPosBiasTf, (3, 3))
        ),
        ("shape", 2, 3, 3, C),
    ),
    "CoAtNet": (
        lambda: maxxvit.Attention2d(C, 16, dim_head=8, rel_pos_cls=partial(RelPosBias, (3, 3))),
        ("shape", 2, C, 3, 3),
    ),
    "GC ViT": (lambda: WindowAttentionGlobal(C, 3, (3, 3), use_global=False), ("shape", 4, 9, C)),
    "GC ViT, queries of the image": (
        lambda: WindowAttentionGlobal(C, 3, (3, 3)), ("shape", 4, 9, C), (torch.randn(2, 9, C),)
    ),
    "torchvision's Swin": (
        lambda: ShiftedWindowAttention(C, [3, 4], [0, 0], 3), ("shape", 2, 5, 7, C)
    ),
    "torchvision's Swin, shifted": (
        lambda: ShiftedWindowAttention(C, [3, 4], [1, 2], 3, qkv_bias=False), ("shape", 2, 5, 7, C)
    ),
    "torchvision's Swin, shifted one way": (
        lambda: ShiftedWindowAttention(C, [4, 2], [2, 1], 3), ("shape", 2, 4, 7, C)
    ),
    "torchvision's Swin v2": (
        lambda: ShiftedWindowAttentionV2(C, [3, 3], [1, 1], 3), ("shape", 2, 6, 7, C)
    ),
    "TinyViT": (lambda: tiny_vit.Attention(C, 8, 3, 1, (3, 4)), ("shape", 2, 12, C)),
    "parallel one output": (lambda: ParallelScalingBlock(C, 3, fuse_out_proj=True), ()),
}  # fmt: skip


def build(case: str) -> tuple[nn.Sequential, list[Tensor]]:
    """The module, its parameters far from their special values, and its inputs, in fp64."""
    make, extra, *more = CASES[case]
    holder = nn.Sequential(make()).double()
    with torch.no_grad():
        for parameter in holder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    if extra[:1] == ("shape",):
        given = [x.double() for x in (more[0] if more else ())]
        return holder, [torch.randn(extra[1:], dtype=torch.float64), *given]
    linears = [m for m in holder.modules() if isinstance(m, nn.Linear)]
    width = max(m.in_features for m in linears if m.in_features in (7, C))
    return holder, [torch.randn(B, N, width, dtype=torch.float64), *extra]


def others(inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """All but the first; rotary tables stay fp32, as in timm."""
    return [x.to(dtype) if x.dtype == torch.float64 else x for x in inputs[1:]]


def step(holder: nn.Sequential, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of the input and of all parameters."""
    holder = copy.deepcopy(holder).to(dtype)
    names = [name for name, _ in holder.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        state = {n.removeprefix("0."): p for n, p in zip(names, parameters, strict=True)}
        return torch.func.functional_call(holder[0], state, (x, *others(inputs, dtype)))

    return run(call, [inputs[0].to(dtype), *(p.detach() for p in holder.parameters())])


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case: str) -> None:
    holder, inputs = build(case)
    exact = step(holder, inputs, torch.float64)
    plain = {dtype: step(holder, inputs, dtype) for dtype in (torch.float32, torch.bfloat16)}
    keys = list(holder.state_dict())
    assert kdfast.accelerate(holder).complete
    assert list(holder.state_dict()) == keys
    names = ["out", "dx", *(name for name, _ in holder.named_parameters())]
    for dtype, eager in plain.items():
        for name, *triple in zip(names, step(holder, inputs, dtype), exact, eager, strict=True):
            if name.endswith(NO_GRADIENT):
                continue
            if triple[0].numel() == 1:
                # One number is one draw of the error: eager may be lucky.
                rtol = 16 * torch.finfo(dtype).eps
                torch.testing.assert_close(triple[0].double(), triple[1], rtol=rtol, atol=0)
            else:
                assert_no_worse(f"{name} {dtype}", *triple)


# A key bias, or that of the keys' norm, moves all scores of a query alike, so its gradient is 0 and
# all that is seen is noise.
NO_GRADIENT = ("k_proj.bias", "0.k.bias", "0.wk.bias", "0.k_norm.bias")


@pytest.mark.parametrize("case", CASES)
def test_eval_and_restore(case: str) -> None:
    holder, inputs = build(case)
    holder.float().eval()
    x = inputs[0].float()
    want = holder[0](x, *others(inputs, torch.float32))
    report = kdfast.accelerate(holder)
    assert len(report.replaced) == 1
    with torch.no_grad():
        torch.testing.assert_close(
            holder[0](x, *others(inputs, torch.float32)), want, rtol=1e-4, atol=1e-5
        )
    assert kdfast.restore(holder) == report.count
    assert torch.equal(holder[0](x, *others(inputs, torch.float32)), want)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    "case",
    ["Swin, shifted", "Swin v2", "BEiT, both biases", "MaxViT", "GC ViT, queries of the image"],
)
def test_bias_reaches_the_compiled_kernel(case: str) -> None:
    """backend="fused" is the op or an error: outputs, and the gradient of every bias."""
    holder, inputs = build(case)
    want = step(holder, inputs, torch.float64)
    assert kdfast.accelerate(holder, backend="fused").complete
    torch.testing.assert_close(step(holder, inputs, torch.float64), want, rtol=1e-8, atol=1e-10)


SLOW = [
    pytest.param(case, marks=pytest.mark.slow)
    for case in (
        "rope grouped",
        "rope per head",
        "parallel",
        "latent pool",
        "NesT",
        "differential",
        "Swin, shifted",
        "Swin v2",
        "BEiT, both biases",
        "GC ViT, queries of the image",
        "TinyViT",
    )
]


@pytest.mark.parametrize("case", ["eva02", *SLOW])
def test_compile(case: str) -> None:
    holder, inputs = build(case)
    holder.float()
    args = (inputs[0].float(), *others(inputs, torch.float32))
    kdfast.accelerate(holder)
    want = holder[0](*args)
    compiled = torch.compile(holder[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), want, rtol=1e-4, atol=1e-5)
    compiled(*args).sum().backward()


@pytest.mark.parametrize("case", ["everything", *SLOW])
def test_export_needs_no_kdfast(case: str) -> None:
    holder, inputs = build(case)
    holder.float()
    args = (inputs[0].float(), *others(inputs, torch.float32))
    kdfast.accelerate(holder)
    program = torch.export.export(holder[0], args)
    torch.testing.assert_close(program.module()(*args), holder[0](*args), rtol=1e-4, atol=1e-5)
    assert "kdfast" not in str(program.graph)


@pytest.mark.parametrize("case", ["everything", "rope all options", "eva02", "parallel"])
def test_autocast(case: str) -> None:
    holder, inputs = build(case)
    holder.float()
    x = inputs[0].float()
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        want = holder[0](x, *others(inputs, torch.float32))
        kdfast.accelerate(holder)
        out = holder[0](x, *others(inputs, torch.float32))
    assert out.dtype == want.dtype
    torch.testing.assert_close(out, want, rtol=3e-2, atol=3e-2)


def test_learned_tables_get_their_gradient() -> None:
    holder, inputs = build("rope per head")
    tables = [inputs[1].double().requires_grad_() for _ in range(2)]
    weight = torch.randn(B, N, C, dtype=torch.float64)
    (holder[0](inputs[0], tables[0]) * weight).sum().backward()
    kdfast.accelerate(holder)
    (holder[0](inputs[0], tables[1]) * weight).sum().backward()
    torch.testing.assert_close(tables[1].grad, tables[0].grad)


PRUNED = {
    "everything": [1], "rope per head": [0, 2], "rope grouped": [3, 4, 5], "eva": [2],
    "eva02": [0, 1], "eva separate bias": [1, 2], "class attention": [0, 2],
    "cross attention": [1], "class attention of VOLO": [2], "latent pool": [0, 1],
    "latent pool, all options": [], "mask units": [0, 2],
    "Swin": [], "Swin, shifted": [1], "Swin v2": [0, 2], "Swin v2 cr": [2],
    "BEiT, both biases": [1], "BEiT, shared bias": [0, 2], "relative positions": [0, 2],
    "relative positions by a network": [1], "TinyViT": [0], "differential": [1, 2], "FastViT": [],
    "VOLO": [0, 2], "torchvision's Swin, shifted": [1], "torchvision's Swin v2": [0, 2],
    "Hiera, global": [1], "SAM 2": [0], "MetaFormer": [1, 2], "windows of DaViT": [], "dinov3": [],
}  # fmt: skip


@pytest.mark.parametrize("case", PRUNED)
def test_keep_heads(case: str) -> None:
    """Equal to the whole module with the contexts of the other heads at zero."""
    heads = PRUNED[case]
    holder, inputs = build(case)
    kdfast.accelerate(holder)
    attn = holder[0]
    assert isinstance(attn, FusedAttention)
    if "norm.weight" in attn.axes:
        attn.norm = nn.Identity()
    mask = torch.zeros(attn.num_heads, 1, dtype=torch.float64)
    mask[heads] = 1
    hook = attn.projection().register_forward_pre_hook(
        lambda _, args: (args[0].unflatten(-1, (len(mask), -1)) * mask).flatten(-2)
    )
    want = attn(*inputs)
    hook.remove()
    before = {name: parameter.shape for name, parameter in attn.named_parameters()}
    attn.keep_heads(heads)
    torch.testing.assert_close(attn(*inputs), want)
    for name, axis in attn.axes.items():
        if name in before:
            size = attn.get_parameter(name).shape[axis.dim]
            assert size * len(mask) == before[name][axis.dim] * len(heads), name


def test_keep_heads_needs_whole_groups() -> None:
    holder, _ = build("rope grouped")
    kdfast.accelerate(holder)
    with pytest.raises(ValueError, match="whole groups of 3 that share a key/value head"):
        holder[0].keep_heads([0, 1, 3])
    holder, _ = build("parallel")
    kdfast.accelerate(holder)
    with pytest.raises(NotImplementedError, match="ParallelScalingBlock cannot be removed"):
        holder[0].keep_heads([0])


def test_scale_norm_shrinks_with_the_heads() -> None:
    holder, inputs = build("eva02")
    kdfast.accelerate(holder)
    holder[0].keep_heads([0, 2])
    assert holder[0].norm.normalized_shape == (16,) and holder[0].norm.weight.shape == (16,)
    assert torch.isfinite(holder[0](*inputs)).all()


def test_project_is_before_the_rotation() -> None:
    holder, inputs = build("eva02")
    kdfast.accelerate(holder)
    call = holder[0].project(*inputs)
    torch.testing.assert_close(call.k.transpose(1, 2).flatten(2), holder[0].k_proj(inputs[0]))
    assert call.rope is not None and call.rope.prefix == 1 and call.scale == 8**-0.5
    torch.testing.assert_close(
        kdfast.pruned_attention(call.q, call.k, call.v, rope=call.rope, scale=call.scale),
        holder[0].attend(call).unflatten(-1, (3, 8)).transpose(1, 2),
    )
