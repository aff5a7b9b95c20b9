# SPDX-License-Identifier: Apache-2.0
"""Blocks of shifted windows fused in inference, and position biases that are computed once."""

import copy
from typing import Any

import pytest
import torch
from timm.models.beit import Attention as BeitAttention
from timm.models.swin_transformer import SwinTransformerBlock as TimmBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block as TimmBlockV2
from timm.models.tiny_vit import Attention as TinyAttention
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformerBlock as TorchvisionBlock
from torchvision.models.swin_transformer import SwinTransformerBlockV2 as TorchvisionBlockV2

import kdfast
from kdfast.nn import block as block_module
from kdfast.nn import timm_bias, torchvision_swin
from kdfast.ops import _remembered
from kdfast.testing import assert_no_worse

C, HEADS = 96, 3
SIZE = (14, 21)

pytestmark = pytest.mark.usefixtures("ran")


def timm_block(shift: int = 0, size: tuple[int, int] = SIZE, **options: Any) -> nn.Module:
    return TimmBlock(C, size, HEADS, window_size=7, shift_size=shift, **options)


def torchvision_block(shift: int = 0, **options: Any) -> nn.Module:
    return TorchvisionBlock(C, HEADS, [7, 7], [shift, shift], **options)


CASES = {
    "timm": lambda: timm_block(),
    "timm shifted": lambda: timm_block(3, drop_path=0.1, proj_drop=0.1),
    "timm without bias": lambda: timm_block(3, qkv_bias=False),
    "torchvision": lambda: torchvision_block(),
    "torchvision shifted": lambda: torchvision_block(3, dropout=0.1, stochastic_depth_prob=0.1),
}


def build(make: Any) -> Any:
    """A holder of a block, far from its initial values, in evaluation."""
    torch.manual_seed(4)
    holder = nn.Sequential(make())
    with torch.no_grad():
        for parameter in holder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return holder.eval()


def maps(batch: int = 2, size: tuple[int, int] = SIZE) -> Tensor:
    return torch.randn(batch, *size, C, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def output(model: nn.Module, x: Tensor) -> Tensor:
    for module in model.modules():
        getattr(module, "attention_bias_cache", {}).clear()  # timm's own, which may be stale
    out: Tensor = model(x)
    return out


def same(model: nn.Module, x: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(output(model, x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("case", CASES)
def test_values(case: str, mode: str, ran: list[Any]) -> None:
    plain = build(CASES[case])
    dtype = torch.bfloat16 if mode == "bf16" else torch.float32
    x = maps().to(dtype)
    exact = output(copy.deepcopy(plain).double(), x.double())
    plain.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        eager = output(plain, x)
        report = kdfast.accelerate(plain)
        assert len(report.blocks) == 2 and not report.blocks_left, report
        for _ in range(2):
            fused = output(plain, x)
            assert fused.shape == eager.shape and fused.dtype == eager.dtype
            eps = torch.finfo(torch.float32 if mode == "fp32" else torch.bfloat16).eps
            assert_no_worse(f"{case} {mode}", fused, exact, eager, eps=eps)
    assert type(plain[0]) in ran
    assert kdfast.restore(plain) == report.count


@pytest.mark.parametrize("case", ["timm shifted", "torchvision shifted"])
def test_any_strides_and_batches(case: str, ran: list[Any]) -> None:
    holder = build(CASES[case])
    inputs = [
        maps(3),
        maps(2).transpose(1, 2).contiguous().transpose(1, 2),
        maps(1).expand(2, *SIZE, C),
        torch.randn(2, C, *SIZE).permute(0, 2, 3, 1),
    ]
    wanted = [output(holder, x) for x in inputs]
    kdfast.accelerate(holder)
    for x, want in zip(inputs, wanted, strict=True):
        before = x.clone()
        same(holder, x, want)
        assert torch.equal(x, before)
    assert type(holder[0]) in ran


def test_blocks_that_run_their_own_code(ran: list[Any]) -> None:
    hooked, watched = build(CASES["timm"]), build(CASES["timm shifted"])
    hooked[0].norm1.register_forward_hook(lambda *_: None)
    watched[0].attn.register_forward_hook(lambda *_: None)
    dropping = build(CASES["torchvision shifted"])
    dropping[0].attn.train()
    cases = [
        (hooked, SIZE),
        (watched, SIZE),
        (build(lambda: timm_block(3, dynamic_mask=True)), SIZE),
        # Windows that do not fill the map.
        (build(lambda: timm_block(0, (15, 20))), (15, 20)),
        (build(lambda: timm_block(3, (15, 20))), (15, 20)),
        (build(CASES["torchvision shifted"]), (15, 20)),
        (build(lambda: timm_block(0, norm_layer=lambda n, **_: nn.RMSNorm(n))), SIZE),
    ]
    for holder, size in cases:
        x = maps(size=size)
        want = output(holder, x)
        kdfast.accelerate(holder)
        ran.clear()
        same(holder, x, want)
        assert type(holder[0]) not in ran
    kdfast.accelerate(dropping)
    ran.clear()
    output(dropping, maps())
    assert type(dropping[0]) not in ran


def test_a_map_of_another_size_is_refused_as_by_timm() -> None:
    holder = build(CASES["timm shifted"])
    x = maps(size=(28, 28))
    with pytest.raises(RuntimeError):
        output(holder, x)
    kdfast.accelerate(holder)
    with pytest.raises((RuntimeError, ValueError)):
        output(holder, x)
    # Where there is no mask, any whole number of windows will do.
    holder = build(CASES["timm"])
    want = output(holder, x)
    kdfast.accelerate(holder)
    same(holder, x, want)


@pytest.mark.parametrize("kept", [[0, 2], []], ids=str)
@pytest.mark.parametrize("case", ["timm shifted", "torchvision shifted"])
def test_removed_heads(case: str, kept: list[int], ran: list[Any]) -> None:
    holder = build(CASES[case])
    kdfast.accelerate(holder)
    output(holder, maps())
    holder[0].attn.keep_heads(kept)
    ran.clear()
    got = output(holder, maps())
    assert (type(holder[0]) in ran) == bool(kept)
    want = holder(maps()).detach()  # with gradients: the block's own code
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["timm shifted", "torchvision shifted"])
def test_compile_and_export(case: str, ran: list[Any]) -> None:
    holder = build(CASES[case])
    x = maps()
    want = output(holder, x)
    kdfast.accelerate(holder)
    output(holder, x)
    ran.clear()
    compiled = torch.compile(holder[0], backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), want, rtol=1e-4, atol=1e-4)
        program = torch.export.export(holder, (x,))
    assert "kdfast" not in str(program.graph) and "mkldnn" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), want, rtol=1e-4, atol=1e-4)
    assert not ran


# --- position biases are computed once ---

BIASED = {
    "timm": lambda: timm_block(3),
    "timm v2": lambda: TimmBlockV2(C, SIZE, HEADS, window_size=7, shift_size=3),
    "torchvision": lambda: torchvision_block(3),
    "torchvision v2": lambda: TorchvisionBlockV2(C, HEADS, [7, 7], [3, 3]),
    "BEiT": lambda: BeitAttention(C, HEADS, window_size=SIZE, qkv_bias=True),
    "TinyViT": lambda: TinyAttention(C, C // HEADS, HEADS, attn_ratio=1, resolution=SIZE),
}
# Where each keeps what its bias comes from.
TABLES = {
    "timm v2": "attn.cpb_mlp.0.weight",
    "torchvision v2": "attn.cpb_mlp.0.weight",
    "BEiT": "relative_position_bias_table",
    "TinyViT": "attention_biases",
}


def biased(case: str) -> tuple[Any, Tensor]:
    tokens = SIZE[0] * SIZE[1] + (case == "BEiT")
    x = torch.randn(2, tokens, C) if case in ("BEiT", "TinyViT") else maps()
    return build(BIASED[case]), x


def table_of(case: str, holder: Any) -> nn.Parameter:
    name = TABLES.get(case, "attn.relative_position_bias_table")
    found: nn.Parameter = holder[0].get_parameter(name)
    return found


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every time that a bias was computed."""
    calls: list[int] = []

    def counting(module: Any, x: Any, tensors: Any, make: Any, **options: Any) -> Tensor:
        def counted() -> Tensor:
            calls.append(1)
            out: Tensor = make()
            return out

        return _remembered.remembered(module, x, tensors, counted, **options)

    for file in (timm_bias, torchvision_swin):
        monkeypatch.setattr(file, "remembered", counting)
    return calls


@pytest.mark.parametrize("case", BIASED)
def test_biases_follow_their_tables(case: str, made: list[int]) -> None:
    holder, x = biased(case)
    twin = copy.deepcopy(holder)
    kdfast.accelerate(holder)
    for _ in range(3):
        same(holder, x, output(twin, x))
    assert len(made) == 1

    def edit(table: nn.Parameter) -> None:
        table.mul_(1.5)

    def through_data(table: nn.Parameter) -> None:
        table.data.copy_(table.data.flip(0))

    for change in (edit, through_data):
        with torch.no_grad():
            for model in (holder, twin):
                change(table_of(case, model))
        same(holder, x, output(twin, x))
    state = {
        k: v + 0.01 * torch.randn_like(v)
        for k, v in twin.state_dict().items()
        if v.is_floating_point()
    }
    for model in (holder, twin):
        model.load_state_dict(state, strict=False)
    same(holder, x, output(twin, x))
    assert len(made) == 4
    made.clear()
    same(copy.deepcopy(holder), x, output(twin, x))
    assert len(made) == 1
    assert len(holder.state_dict()) == len(twin.state_dict())


@pytest.mark.parametrize("case", BIASED)
def test_biases_have_gradients_and_other_dtypes(case: str, made: list[int]) -> None:
    holder, x = biased(case)
    twin = copy.deepcopy(holder)
    kdfast.accelerate(holder)
    output(holder, x)
    for model in (holder, twin):
        model(x).square().sum().backward()
        getattr(model[0], "attention_bias_cache", {}).clear()
    got, want = table_of(case, holder).grad, table_of(case, twin).grad
    assert got is not None and want is not None
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
    low, exact = x.bfloat16(), output(copy.deepcopy(twin).double(), x.bfloat16().double())
    eager = output(twin.bfloat16(), low)
    holder.bfloat16()
    for _ in range(2):
        assert_no_worse(case, output(holder, low), exact, eager, eps=torch.finfo(low.dtype).eps)


def test_biases_are_computed_where_somebody_looks(made: list[int]) -> None:
    holder, x = biased("timm v2")
    kdfast.accelerate(holder)
    seen: list[int] = []
    holder[0].attn.cpb_mlp.register_forward_hook(lambda *_: seen.append(1))
    for _ in range(2):
        output(holder, x)
    assert len(seen) == len(made) == 2
    made.clear()
    with torch.inference_mode():
        fresh = build(BIASED["timm"])
    kdfast.accelerate(fresh)
    for _ in range(2):  # tensors without a version counter
        output(fresh, x)
    assert len(made) == 2


def test_biases_differ_by_size_of_map(made: list[int]) -> None:
    holder = build(BIASED["torchvision"])
    twin = copy.deepcopy(holder)
    kdfast.accelerate(holder)
    for size in (SIZE, (28, 14), SIZE, (7, 7), (15, 20)):
        x = maps(size=size)
        same(holder, x, output(twin, x))
    assert len(made) == 5


def test_weights_of_functional_calls(made: list[int]) -> None:
    holder, x = biased("timm")
    kdfast.accelerate(holder)
    for seed in range(3):
        torch.manual_seed(seed)
        weights = {k: torch.randn_like(v) * 0.1 for k, v in holder.named_parameters()}
        with torch.no_grad():
            got = torch.func.functional_call(holder, weights, (x,))
            twin = copy.deepcopy(holder)
            twin.load_state_dict(weights, strict=False)
            kdfast.restore(twin)
            torch.testing.assert_close(got, twin(x), rtol=1e-4, atol=1e-4)


def test_orders_are_permutations() -> None:
    order = block_module.window_order((14, 21), (7, 7), (3, 2))
    assert order is not None and order.tokens == 49
    assert torch.equal(order.places[order.inverse], torch.arange(14 * 21))
    assert block_module.window_order((14, 20), (7, 7), (0, 0)) is None


def test_reports_say_where_windows_fill_the_map(ran: list[Any]) -> None:
    holder = build(lambda: timm_block(3, (15, 20)))
    report = kdfast.accelerate(holder)
    (row,) = report.blocks_left
    assert row.detail == "windows of 7 x 7 do not fill its map of 15 x 20; its own code runs"
    output(holder, maps(size=(15, 20)))
    assert type(holder[0]) not in ran
    (block, _) = kdfast.accelerate(build(CASES["torchvision"])).blocks
    assert block.detail == "fused in inference where windows fill the map"
