# SPDX-License-Identifier: Apache-2.0
"""Selection and surgery: a pruned model is the full one with the other heads silenced."""

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import kdfast
from kdfast.models import EVAViT
from kdfast.pruning import HeadScores, prune_heads, select_heads
from kdfast.testing import tiny_eva

HEADS, HEAD_DIM = 4, 16
# Different numbers of heads per block, and not the first ones.
KEEP = [[1, 3], [2], [0, 1, 3]]
HEAD_TENSORS = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "q_bias", "v_bias")
tiny = partial(tiny_eva, 0.3)


def channels(heads: list[int]) -> Tensor:
    return torch.cat([torch.arange(h * HEAD_DIM, (h + 1) * HEAD_DIM) for h in heads])


def silence(model: EVAViT, keep: list[list[int]]) -> EVAViT:
    """A copy whose other heads write nothing: their context is zeroed before ``proj``."""
    model = copy.deepcopy(model)
    for block, heads in zip(model.blocks, keep, strict=True):
        mask = torch.zeros(block.attn.proj.in_features, dtype=torch.float64)
        mask[channels(heads)] = 1
        block.attn.proj.register_forward_pre_hook(lambda _, args, m=mask: args[0] * m)
    return model


def kept_slices(named: dict[str, Tensor], keep: list[list[int]]) -> dict[str, Tensor]:
    named = dict(named)
    for i, heads in enumerate(keep):
        for name in HEAD_TENSORS:
            key = f"blocks.{i}.attn.{name}"
            if key in named:
                named[key] = named[key][channels(heads)]
        key = f"blocks.{i}.attn.proj.weight"
        named[key] = named[key][:, channels(heads)]
    return named


def run(model: EVAViT, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and the gradients of a fixed projection of it."""
    out = model(x)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).double()
    named = dict(model.named_parameters())
    grads = torch.autograd.grad((out * weight).sum(), list(named.values()))
    return out, dict(zip(named, grads, strict=True))


@pytest.mark.parametrize("grid", [(3, 3), (5, 7), (2, 6)])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_equals_the_full_model_with_silenced_heads(grid: tuple[int, int], qkv_bias: bool) -> None:
    model = tiny(qkv_bias=qkv_bias)
    x = torch.randn(2, 3, 4 * grid[0], 4 * grid[1], dtype=torch.float64)
    out, grads = run(prune_heads(model, KEEP), x)
    want, full = run(silence(model, KEEP), x)
    torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-10)
    sliced = kept_slices(full, KEEP)
    assert grads.keys() == sliced.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, sliced[name], rtol=1e-8, atol=1e-9, msg=name)


def test_silenced_heads_matter() -> None:
    """The oracle above can fail: other heads, another output."""
    model = tiny()
    x = torch.randn(1, 3, 20, 20, dtype=torch.float64)
    right = prune_heads(model, KEEP)(x)
    for keep in ([[1, 2], [2], [0, 1, 3]], [[1, 3], [3], [0, 1, 3]], [[1, 3], [2], [0, 1, 2]]):
        assert (silence(model, keep)(x) - right).abs().max() > 1e-2


def test_golden_output_of_the_original_code(shared: Path) -> None:
    with safe_open(shared / "eva_vit_golden.safetensors", framework="pt") as file:
        model = EVAViT(**json.loads(file.metadata()["config"])).eval()
        parameters = [key for key in file.keys() if key.startswith("param.")]
        model.load_state_dict({k.removeprefix("param."): file.get_tensor(k) for k in parameters})
        keep = [file.get_tensor(f"pruned.keep.{i}").tolist() for i in range(3)]
        pixels, want = file.get_tensor("input_u8"), file.get_tensor("pruned.output")
    mean = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
    std = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
    with torch.no_grad():
        out = prune_heads(model, keep)((pixels.float() - mean) / std)
    assert ((out - want).norm() / want.norm()).item() < 1e-4


def test_all_heads_kept_is_bitwise_the_same_and_shares_no_memory() -> None:
    model = tiny()
    x = torch.randn(1, 3, 20, 28, dtype=torch.float64)
    same = prune_heads(model, [[0, 1, 2, 3]] * 3)
    assert torch.equal(same(x), model(x))
    assert same.config == model.config
    state = model.state_dict()
    assert same.state_dict().keys() == state.keys()
    for name, tensor in same.state_dict().items():
        assert torch.equal(tensor, state[name]), name
        assert tensor.data_ptr() != state[name].data_ptr(), name


def test_shapes_heads_and_untouched_original() -> None:
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruned = prune_heads(model, KEEP)
    assert pruned.heads == KEEP
    assert pruned.config["heads"] == KEEP
    attn = pruned.blocks[1].attn
    assert attn.head_dim == HEAD_DIM
    assert attn.q_proj.weight.shape == attn.v_proj.weight.shape == (16, 64)
    assert attn.q_bias.shape == (16,)
    assert attn.proj.weight.shape == (64, 16)
    assert torch.equal(attn.proj.bias, model.blocks[1].attn.proj.bias)
    # Two weights, by literal position: row 0 of head 2, column 5 of head 3.
    assert torch.equal(attn.k_proj.weight[0], model.blocks[1].attn.k_proj.weight[32])
    proj = pruned.blocks[0].attn.proj.weight
    assert torch.equal(proj[:, 21], model.blocks[0].attn.proj.weight[:, 53])
    assert model.heads == [[0, 1, 2, 3]] * 3
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_rotary_tables_are_made_where_the_weights_are() -> None:
    model = tiny()
    tables = prune_heads(model, KEEP).rope._tables
    assert tables.keys() == model.rope._tables.keys()
    assert {table.device.type for table in tables.values()} == {"cpu"}


def test_rebuilds_from_its_config() -> None:
    pruned = prune_heads(tiny(), KEEP)
    again = EVAViT(**json.loads(json.dumps(pruned.config))).double()
    again.load_state_dict(pruned.state_dict())
    x = torch.randn(1, 3, 20, 20, dtype=torch.float64)
    assert torch.equal(again(x), pruned(x))


def test_twice_is_once() -> None:
    model = tiny()
    first = prune_heads(model, [[0, 1, 3], [1, 2, 3], [0, 1, 2, 3]])
    twice = prune_heads(first, [[1, 2], [1], [0, 1, 3]])
    once = prune_heads(model, KEEP)
    assert twice.heads == once.heads == KEEP
    for name, tensor in twice.state_dict().items():
        assert torch.equal(tensor, once.state_dict()[name]), name


def test_order_of_a_selection_has_no_meaning() -> None:
    model = tiny()
    shuffled = prune_heads(model, [[3, 1], [2], [3, 0, 1]])
    assert shuffled.heads == KEEP
    for name, tensor in prune_heads(model, KEEP).state_dict().items():
        assert torch.equal(shuffled.state_dict()[name], tensor), name


def test_keeps_modes_flags_and_dtypes() -> None:
    model = tiny(drop_path_rate=0.2).train()
    model.blocks[1].eval()
    model.blocks[2].norm1.float()
    for parameter in model.patch_embed.parameters():
        parameter.requires_grad_(False)
    model.blocks[0].attn.q_proj.weight.requires_grad_(False)
    model.with_cp = True
    pruned = prune_heads(model, KEEP)
    assert pruned.training and pruned.blocks[0].training and not pruned.blocks[1].mlp.training
    assert not pruned.blocks[1].training
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert sum(not flag for flag in flags.values()) == 3
    assert {name: p.requires_grad for name, p in pruned.named_parameters()} == flags
    assert pruned.with_cp
    assert {n: p.dtype for n, p in pruned.named_parameters()} == {
        n: p.dtype for n, p in model.named_parameters()
    }
    assert all(type(p) is nn.Parameter and p.is_leaf for p in pruned.parameters())


def test_frozen_model_stays_frozen() -> None:
    pruned = prune_heads(tiny(frozen=True), KEEP)
    assert not pruned.train().training
    assert not any(p.requires_grad for p in pruned.parameters())


@pytest.mark.parametrize(
    ("selection", "error", "match"),
    [
        ([[0]], ValueError, r"one list per block \(3\), got 1"),
        ([[0], [4], [0]], ValueError, r"selection\[1\] must be in \[0, 4\), got \[4\]"),
        ([[0], [0], [1, 1]], ValueError, r"selection\[2\] must not repeat"),
        ([[0], [0.5], [1]], TypeError, r"selection\[1\] must hold ints"),
        ([0, 1, 2], TypeError, "must be a list of lists"),
        ({0: [1]}, TypeError, "must be a list of lists"),
    ],
)
def test_prune_rejects(selection: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        prune_heads(tiny(), selection)


def test_unknown_family_is_named() -> None:
    with pytest.raises(
        TypeError,
        match="must be one of EVAViT, .*, got torch.nn.*TransformerEncoder.*MultiheadAttention: ",
    ):
        prune_heads(nn.TransformerEncoderLayer(8, 2), [[0]])


def scores(*rows: list[float]) -> HeadScores:
    return HeadScores([torch.tensor(row, dtype=torch.float64) for row in rows], "given")


# Block means 4, 1 and 2: relative to them, block 1 has the best and the worst heads.
TABLE = scores([1, 7, 5, 3], [0.1, 0.5, 3.3, 0.1], [2, 2, 2, 2])


@pytest.mark.parametrize(
    ("keep", "scope", "min_heads", "want"),
    [
        (2, "block", 1, [[1, 2], [1, 2], [0, 1]]),
        (0.5, "block", 1, [[1, 2], [1, 2], [0, 1]]),
        (0.6, "block", 1, [[1, 2], [1, 2], [0, 1]]),
        (0.625, "block", 1, [[1, 2, 3], [0, 1, 2], [0, 1, 2]]),
        (1.0, "block", 1, [[0, 1, 2, 3]] * 3),
        (4, "block", 1, [[0, 1, 2, 3]] * 3),
        (0.1, "block", 1, [[1], [2], [0]]),
        (0.1, "block", 2, [[1, 2], [1, 2], [0, 1]]),
        ([1, 3, 2], "block", 1, [[1], [0, 1, 2], [0, 1]]),
        # Relative: 0.25 1.75 1.25 0.75 | 0.1 0.5 3.3 0.1 | 1 1 1 1.
        (2, "global", 1, [[1, 2], [2], [0, 1, 2]]),
        (0.5, "global", 1, [[1, 2], [2], [0, 1, 2]]),
        (2, "global", 2, [[1, 2], [1, 2], [0, 1]]),
        (1, "global", 1, [[1], [2], [0]]),
        (3, "global", 1, [[1, 2, 3], [1, 2], [0, 1, 2, 3]]),
        (4, "global", 1, [[0, 1, 2, 3]] * 3),
    ],
)
def test_select(keep: Any, scope: str, min_heads: int, want: list[list[int]]) -> None:
    assert select_heads(TABLE, keep, scope, min_heads) == want


def test_select_ties_go_to_the_lower_head_then_block() -> None:
    flat = scores([1, 1, 1], [1, 1, 1])
    assert select_heads(flat, 2) == [[0, 1], [0, 1]]
    assert select_heads(flat, 0.5, "global") == [[0, 1], [0]]


def test_select_from_lists_tensors_and_uneven_blocks() -> None:
    assert select_heads([[1, 2, 3], torch.tensor([5.0, 4.0])], 0.5) == [[1, 2], [0]]
    assert select_heads([[1, 2, 3], [5, 4]], 0.6, "global") == [[1, 2], [0]]


def test_select_global_gives_a_dead_block_the_minimum() -> None:
    assert select_heads([[0, 0, 0], [1, 2, 3]], 2, "global") == [[0], [0, 1, 2]]


@pytest.mark.parametrize(
    ("keep", "scope", "min_heads", "error", "match"),
    [
        (0, "block", 1, ValueError, r"keep must be in \[1, 4\] for block 0, got 0"),
        (5, "block", 1, ValueError, r"keep must be in \[1, 4\] for block 0, got 5"),
        (1, "block", 2, ValueError, r"keep must be in \[2, 4\]"),
        (0.0, "block", 1, ValueError, r"in \(0, 1\], got 0.0"),
        (8.0, "block", 1, ValueError, r"in \(0, 1\], got 8.0"),
        (float("nan"), "global", 1, ValueError, r"in \(0, 1\], got nan"),
        ([1, 2], "block", 1, ValueError, r"one entry per block \(3\), got 2"),
        ([1, 2, 9], "block", 1, ValueError, r"\[1, 4\] for block 2, got 9"),
        ([1, 2, 0.5], "block", 1, TypeError, "one int per block"),
        (True, "block", 1, TypeError, "int, a float or a list, got True"),
        ("8", "block", 1, TypeError, "int, a float or a list, got '8'"),
        ([1, 2, 3], "global", 1, TypeError, "int or a float in global scope"),
        (5, "global", 1, ValueError, "3 to 12 heads in all, got 5 x 3 blocks"),
        (0, "global", 1, ValueError, "3 to 12 heads in all"),
        (1, "global", 2, ValueError, "6 to 12 heads in all"),
        (2, "layer", 1, ValueError, "scope must be one of"),
        (2, "block", -1, ValueError, r"min_heads must be in \[0, 4\]"),
        (2, "block", 5, ValueError, r"min_heads must be in \[0, 4\]"),
        (2, "block", 1.0, TypeError, "min_heads must be an int"),
    ],
)
def test_select_rejects(
    keep: Any, scope: str, min_heads: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        select_heads(TABLE, keep, scope, min_heads)


def test_select_rejects_scores_without_an_order() -> None:
    with pytest.raises(ValueError, match="must be finite"):
        select_heads([[1.0, float("nan")]], 1)
    with pytest.raises(ValueError, match=r"keep must be in \[0, 0\] for block 1, got 1"):
        select_heads([[1.0], []], 1)
    with pytest.raises(ValueError, match="must not be negative in global scope, got -1.0 in b"):
        select_heads([[1.0, 2.0], [-1.0, 2.0]], 1, "global")


def test_public_names() -> None:
    assert kdfast.prune_heads is prune_heads
    assert kdfast.select_heads is select_heads
    with pytest.raises(AttributeError, match="no attribute 'prune_head'"):
        kdfast.prune_head  # noqa: B018
