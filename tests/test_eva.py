# SPDX-License-Identifier: Apache-2.0
"""EVAViT against golden tensors of ORION's code, and its geometry against explicit oracles."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from kdfast.models import AttentionTarget, EVAViT, eva_layers, eva_vit_l_orion
from kdfast.models.axial_rope import AxialRope, axial_tables
from kdfast.models.eva_layers import Attention
from kdfast.ops.geometry import Rope
from kdfast.testing import gradients, relative, small_eva


class Golden:
    """Config, weights, input and results of ORION's own code."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            self.config = json.loads(file.metadata()["config"])
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}
        mean = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
        std = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
        self.x = (self.tensors["input_u8"].float() - mean) / std
        self.keep = [self.tensors[f"pruned.keep.{i}"].tolist() for i in range(3)]

    def group(self, prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): t for k, t in self.tensors.items() if k.startswith(prefix)}

    def model(self, **overrides: Any) -> EVAViT:
        return EVAViT(**{**self.config, **overrides}).eval()


@pytest.fixture
def golden(shared: Path) -> Golden:
    return Golden(shared / "eva_vit_golden.safetensors")


def kept_channels(heads: list[int], head_dim: int) -> Tensor:
    return torch.cat([torch.arange(h * head_dim, (h + 1) * head_dim) for h in heads])


def sliced(state: dict[str, Tensor], keep: list[list[int]], head_dim: int) -> dict[str, Tensor]:
    """The full model's tensors without the heads that are not kept."""
    state = dict(state)
    for i, heads in enumerate(keep):
        index = kept_channels(heads, head_dim)
        for name in ("q_proj.weight", "k_proj.weight", "v_proj.weight", "q_bias", "v_bias"):
            key = f"blocks.{i}.attn.{name}"
            if key in state:
                state[key] = state[key][index]
        key = f"blocks.{i}.attn.proj.weight"
        if key in state:
            state[key] = state[key][:, index]
    return state


def test_golden_forward_and_every_gradient(golden: Golden) -> None:
    model = golden.model()
    model.load_state_dict(golden.group("param."))
    out = model(golden.x)
    assert relative(out, golden.tensors["output"]) < 1e-4
    got = gradients(model, (out * golden.tensors["cotangent"]).sum())
    want = golden.group("grad.")
    assert got.keys() == want.keys()
    assert max(relative(got[name], want[name]) for name in want) < 1e-4


def test_golden_pruned_as_mask_of_the_full_model(golden: Golden) -> None:
    model = golden.model()
    model.load_state_dict(golden.group("param."))
    for block, keep in zip(model.blocks, golden.keep, strict=True):
        mask = torch.zeros(192)
        mask[kept_channels(keep, 64)] = 1
        block.attn.proj.register_forward_pre_hook(lambda _, args, m=mask: args[0] * m)
    out = model(golden.x)
    assert relative(out, golden.tensors["pruned.output"]) < 1e-4
    got = gradients(model, (out * golden.tensors["cotangent"]).sum())
    for name, want in golden.group("pruned.grad.").items():
        assert relative(got[name], want) < 1e-4, name


def test_golden_pruned_model(golden: Golden) -> None:
    model = golden.model(heads=golden.keep)
    model.load_state_dict(sliced(golden.group("param."), golden.keep, 64))
    assert model.heads == golden.keep
    assert model.blocks[1].attn.q_proj.weight.shape == (64, 192)
    out = model(golden.x)
    assert relative(out, golden.tensors["pruned.output"]) < 1e-4
    got = gradients(model, (out * golden.tensors["cotangent"]).sum())
    for name, want in sliced(golden.group("pruned.grad."), golden.keep, 64).items():
        assert relative(got[name], want) < 1e-4, name


def test_keeping_every_head_changes_nothing() -> None:
    model, same = small_eva(), small_eva(heads=[[0, 1, 2]] * 3)
    x = torch.randn(1, 3, 96, 96)
    assert torch.equal(model(x), same(x))
    assert model.config == same.config


@pytest.mark.parametrize(
    "heads, total",
    [(16, 303_388_608), (12, 278_210_496), (8, 253_032_384), (4, 227_854_272)],
)
def test_orion_parameter_counts(heads: int, total: int) -> None:
    with torch.device("meta"):
        model = eva_vit_l_orion(heads=range(16 - heads, 16))
    assert sum(p.numel() for p in model.parameters()) == total
    assert len(model.state_dict()) == 459
    attn = model.blocks[5].attn
    assert attn.q_proj.weight.shape == attn.v_proj.weight.shape == (64 * heads, 1024)
    assert attn.proj.weight.shape == (1024, 64 * heads)
    assert attn.head_dim == 64 and attn.heads == list(range(16 - heads, 16))
    glob = [i for i, block in enumerate(model.blocks) if block.attn.window_size == 0]
    assert glob == [2, 5, 8, 11, 14, 17, 20, 23]


def test_orion_parameter_names() -> None:
    with torch.device("meta"):
        model = eva_vit_l_orion()
    block = """norm1.weight norm1.bias norm2.weight norm2.bias attn.q_bias attn.v_bias
        attn.q_proj.weight attn.k_proj.weight attn.v_proj.weight attn.proj.weight attn.proj.bias
        mlp.w1.weight mlp.w1.bias mlp.w2.weight mlp.w2.bias mlp.ffn_ln.weight mlp.ffn_ln.bias
        mlp.w3.weight mlp.w3.bias""".split()
    names = {f"blocks.{i}.{name}" for i in range(24) for name in block}
    names |= {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert set(model.state_dict()) == names
    assert model.state_dict()["blocks.0.mlp.w1.weight"].shape == (2730, 1024)
    assert model.state_dict()["pos_embed"].shape == (1, 197, 1024)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.3 * i / 23 for i in range(24)])
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}


def angle(position: float, channel: int, head_dim: int) -> float:
    """The rotation of one channel, from the definition."""
    pair = channel % (head_dim // 2) // 2
    return position / 10000 ** (2 * pair / (head_dim // 2))


@pytest.mark.parametrize("grid", [(16, 16), (40, 40), (3, 5), (1, 7)], ids=str)
def test_rope_tables(grid: tuple[int, int]) -> None:
    h, w = grid
    cos, sin = axial_tables(grid, 64, 16, True, dtype=torch.float64)
    assert cos.shape == sin.shape == (h * w, 64)
    for row, col in {(0, 0), (h - 1, 0), (0, w - 1), (h // 2, w // 3)}:
        for channel in (0, 1, 2, 31, 32, 45, 63):
            at = row / h * 16 if channel < 32 else col / w * 16
            want = angle(at, channel, 64)
            assert cos[row * w + col, channel].item() == pytest.approx(math.cos(want), abs=1e-12)
            assert sin[row * w + col, channel].item() == pytest.approx(math.sin(want), abs=1e-12)


def test_rope_literals() -> None:
    cos, sin = axial_tables((40, 40), 64, 16, True)
    # Row 2, column 5: positions 0.8 and 2.0; the second frequency is 10000 ** (-1 / 16).
    assert cos[85, :3].tolist() == pytest.approx([0.69670671, 0.69670671, 0.90050234], abs=1e-6)
    assert sin[85, 32:35].tolist() == pytest.approx([0.90929743, 0.90929743, 0.90213125], abs=1e-6)
    whole = axial_tables((3, 3), 8, 16, False)
    assert whole[0, :, 0].tolist() == pytest.approx(
        [math.cos(r) for r in (0, 0, 0, 1, 1, 1, 2, 2, 2)]
    )


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """Rotates by complex multiplication; x (..., n, D), positions (n, 2)."""
    head_dim = x.shape[-1]
    freqs = 10000.0 ** (-torch.arange(head_dim // 4, dtype=x.dtype) / (head_dim // 4))
    turns = torch.cat([positions[:, :1] * freqs, positions[:, 1:] * freqs], 1)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(turns), turns)).flatten(-2)


def padded_attention(attn: Attention, x: Tensor, grid: tuple[int, int], size: int) -> Tensor:
    """ORION's way: pad with zero tokens, cut windows, compute all of them, crop. x (B, N, C)."""
    (h, w), dim = grid, x.shape[-1]
    high, wide = -h % size, -w % size
    image = F.pad(x.view(-1, h, w, dim), (0, 0, 0, wide, 0, high))
    rows, cols = (h + high) // size, (w + wide) // size
    cells = image.view(-1, rows, size, cols, size, dim).transpose(2, 3)
    cells = cells.reshape(-1, size * size, dim)
    k_bias = torch.zeros_like(attn.q_bias)
    split = [
        F.linear(cells, proj.weight, bias).unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)
        for proj, bias in (
            (attn.q_proj, attn.q_bias),
            (attn.k_proj, k_bias),
            (attn.v_proj, attn.v_bias),
        )
    ]
    steps = torch.arange(size, dtype=x.dtype) * 16 / size
    positions = torch.cartesian_prod(steps, steps)
    q, k = rotated(split[0], positions), rotated(split[1], positions)
    weights = (q @ k.transpose(-1, -2) / math.sqrt(attn.head_dim)).softmax(-1)
    out = attn.proj((weights @ split[2]).transpose(1, 2).flatten(2))
    out = out.view(-1, rows, cols, size, size, dim).transpose(2, 3)
    return out.reshape(-1, h + high, w + wide, dim)[:, :h, :w].reshape(x.shape)


@pytest.mark.parametrize("heads", [[0, 1, 2], [1]], ids=str)
@pytest.mark.parametrize("grid", [(5, 7), (4, 9), (3, 2), (8, 4)], ids=str)
def test_window_attention_equals_padded_oracle(grid: tuple[int, int], heads: list[int]) -> None:
    model = small_eva(heads=heads).double()
    attn = model.blocks[0].attn
    x = torch.randn(2, grid[0] * grid[1], 48, dtype=torch.float64, requires_grad=True)
    up = torch.randn_like(x)
    rope = AxialRope(16, 16, True)((4, 4), x)
    inputs = [x, *attn.parameters()]
    got = attn(x, grid, rope)[0]
    want = padded_attention(attn, x, grid, 4)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    got_grads = torch.autograd.grad((got * up).sum(), inputs)
    want_grads = torch.autograd.grad((want * up).sum(), inputs)
    torch.testing.assert_close(got_grads, want_grads, rtol=1e-9, atol=1e-9)


def test_pads_without_bias_are_live_keys_of_value_zero() -> None:
    attn = small_eva(qkv_bias=False).double().blocks[0].attn
    assert attn.q_bias is None and attn.v_bias is None
    x = torch.randn(1, 35, 48, dtype=torch.float64)
    got = attn(x, (5, 7), AxialRope(16, 16, True)((4, 4), x))[0]
    attn.q_bias = attn.v_bias = torch.nn.Parameter(torch.zeros(48, dtype=torch.float64))
    torch.testing.assert_close(got, padded_attention(attn, x, (5, 7), 4))


def test_padded_tokens_are_never_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[torch.Size, Any]] = []

    def spy(
        q: Tensor, k: Tensor, v: Tensor, *, rope: Rope, window: Any, backend: str | None
    ) -> Tensor:
        assert backend is None
        calls.append((q.shape, window))
        return v

    monkeypatch.setattr(eva_layers, "pruned_attention", spy)
    model = small_eva(heads=[[0, 2], [1], [0, 1, 2]])
    model(torch.randn(2, 3, 80, 112))
    assert [shape for shape, _ in calls] == [(2, 2, 35, 16), (2, 1, 35, 16), (2, 3, 35, 16)]
    window = calls[0][1]
    assert (window.grid, window.size) == ((5, 7), 4)
    assert torch.equal(window.pad_value.flatten(), model.blocks[0].attn.v_bias)
    assert calls[2][1] is None


def test_other_square_grid_equals_model_built_for_it() -> None:
    model, other = small_eva(), small_eva(img_size=128)
    x = torch.randn(1, 3, 128, 128)
    torch.testing.assert_close(model(x), other(x), rtol=0, atol=0)
    assert model(torch.randn(1, 3, 80, 112)).shape == (1, 48, 5, 7)


def cubic_matrix(size: int, source: int) -> Tensor:
    """Rows of cubic convolution weights (a = -0.75) with pixel centres, borders repeated."""

    def weight(t: float) -> float:
        a, t = -0.75, abs(t)
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0

    rows = torch.zeros(size, source)
    for i in range(size):
        at = (i + 0.5) * source / size - 0.5
        for j in range(math.floor(at) - 1, math.floor(at) + 3):
            rows[i, min(max(j, 0), source - 1)] += weight(at - j)
    return rows


def test_position_embedding_is_resized_without_the_cls_row() -> None:
    model = small_eva(depth=1, window_block_indexes=()).bfloat16()
    pos = model.pos_embed
    got = model._positions(pos, (9, 20))
    image = pos[0, 1:].float().view(14, 14, 48)
    want = torch.einsum("ij,jkc,lk->ilc", cubic_matrix(9, 14), image, cubic_matrix(20, 14))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got[0], want.reshape(180, 48).bfloat16(), rtol=0.008, atol=1e-6)
    assert torch.equal(model._positions(pos, (14, 14)), pos[:, 1:])
    got.float().sum().backward()
    assert pos.grad[0, 0].abs().max() == 0 and pos.grad[0, 1:].abs().min() > 0


def test_without_position_embedding_and_without_cls_row() -> None:
    assert "pos_embed" not in small_eva(use_abs_pos=False).state_dict()
    assert small_eva(pretrain_use_cls_token=False).pos_embed.shape == (1, 196, 48)
    x = torch.randn(1, 3, 96, 96)
    assert small_eva(use_abs_pos=False)(x).shape == small_eva(pretrain_use_cls_token=False)(x).shape


@pytest.mark.parametrize(
    "overrides, error, message",
    [
        ({"subln": True}, NotImplementedError, "subln must be False, got True"),
        ({"use_rel_pos": True}, NotImplementedError, "use_rel_pos must be False"),
        ({"rope": False}, NotImplementedError, "rope must be True"),
        ({"global_window_size": 14}, NotImplementedError, "global_window_size must be 0, got 14"),
        ({"residual_block_indexes": (1,)}, NotImplementedError, "residual_block_indexes"),
        ({"act_layer": torch.nn.ReLU}, NotImplementedError, "act_layer must be None"),
        ({"norm_layer": torch.nn.LayerNorm}, NotImplementedError, "norm_layer must be None"),
        ({"out_feature": "p5"}, NotImplementedError, "out_feature must be 'last_feat', got 'p5'"),
        ({"depth": 0}, ValueError, "depth must be at least 1, got 0"),
        ({"num_heads": 5}, ValueError, r"embed_dim / num_heads must be a multiple of 4.*48 / 5"),
        ({"num_heads": 8}, ValueError, r"must be a multiple of 4.*48 / 8"),
        ({"img_size": 8}, ValueError, "img_size must be at least patch_size = 16, got 8"),
        ({"mlp_ratio": 0.0}, ValueError, "mlp_ratio must be positive"),
        ({"drop_path_rate": 1.0}, ValueError, r"drop_path_rate must be in \[0, 1\), got 1.0"),
        ({"window_block_indexes": (3,)}, ValueError, r"must be in \[0, 3\), got \[3\]"),
        ({"window_size": 0}, ValueError, "window_size must be at least 1"),
        ({"heads": [[0], [1]]}, ValueError, r"a list per block \(3\).*got 2 entries"),
        ({"heads": []}, ValueError, r"a list per block \(3\).*got 0 entries"),
        ({"mlp_hidden": [5, 5]}, ValueError, r"mlp_hidden must be one width .*got \[5, 5\]"),
        ({"mlp_hidden": -1}, ValueError, r"mlp_hidden must be one width of \[0, "),
        ({"mlp_hidden": [1.0, 1, 1]}, TypeError, "mlp_hidden must be an int or a list of ints"),
        ({"heads": [1, 0]}, ValueError, r"heads\[0\].*ascending order, got \[1, 0\]"),
        ({"heads": [0, 3]}, ValueError, r"heads of \[0, 3\).*got \[0, 3\]"),
        ({"heads": [[0], [0], [1.0]]}, TypeError, r"heads\[2\] must be a list of ints"),
    ],
)
def test_rejects_arguments(overrides: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small_eva(**overrides)


def test_rejects_inputs() -> None:
    model = small_eva()
    with pytest.raises(TypeError, match="x must be floating, got torch.uint8"):
        model(torch.zeros(1, 3, 96, 96, dtype=torch.uint8))
    for shape in ((3, 96, 96), (1, 4, 96, 96), (1, 3, 90, 96), (1, 3, 96, 0)):
        with pytest.raises(ValueError, match="x must be .*multiples of 16, got"):
            model(torch.zeros(shape))
    x = torch.zeros(1, 3, 96, 96)
    with pytest.raises(ValueError, match=r"features must be in \[0, 3\), got \[3\]"):
        model.trace(x, features=[3])
    with pytest.raises(ValueError, match=r"target.qk must have one entry per block \(3\), got 1"):
        model.trace(x, target=AttentionTarget([None], [[0]] * 3))
    with pytest.raises(ValueError, match=r"target.heads must have one entry per block \(3\), got"):
        model.trace(x, target=AttentionTarget([None] * 3, []))


def test_orions_values_of_unused_arguments_are_accepted() -> None:
    norm = partial(torch.nn.LayerNorm, eps=1e-6)
    model = small_eva(norm_layer=norm, act_layer=torch.nn.GELU, residual_block_indexes=())
    assert model.config == small_eva(flash_attn=True, use_rel_pos=False).config
    x = torch.randn(1, 3, 96, 96)
    assert torch.equal(model(x), small_eva(flash_attn=False)(x))


def test_config_is_json_and_rebuilds_the_model() -> None:
    model = small_eva(heads=[[0, 2], [1], [0, 1, 2]])
    config = json.loads(json.dumps(model.config))
    again = EVAViT(**config)
    assert again.config == model.config
    assert again.heads == [[0, 2], [1], [0, 1, 2]]
    again.load_state_dict(model.state_dict())
