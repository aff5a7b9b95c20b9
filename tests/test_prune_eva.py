# SPDX-License-Identifier: Apache-2.0
"""EVA-ViT without heads in a block, with narrower MLPs, and with means folded into biases."""

import copy
import json
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast.models import EVAViT, eva_vit_l_orion
from kdfast.pruning import (
    head_scores,
    mlp_scores,
    prune_heads,
    pruning_report,
    select_heads,
)
from kdfast.testing import tiny_eva

HEADS, HEAD_DIM, HIDDEN = 4, 16, 40
UNITS = [list(range(0, HIDDEN, 2)), [3, 5, 39], list(range(HIDDEN))]
tiny = partial(tiny_eva, 0.3, mlp_ratio=HIDDEN / 64)


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 20, 28, dtype=torch.float64)


def without(model: EVAViT, keep: list[list[int]]) -> EVAViT:
    """A copy whose output projections do not read the other heads."""
    model = copy.deepcopy(model)
    for block, heads in zip(model.blocks, keep, strict=True):
        mask = torch.zeros(HEADS, HEAD_DIM, dtype=torch.float64)
        mask[heads] = 1
        with torch.no_grad():
            block.attn.proj.weight.mul_(mask.flatten())
    return model


class NarrowMlp(nn.Module):
    """The SwiGLU of some hidden units, written out; the norm sees those units only."""

    def __init__(self, mlp: Any, units: list[int]) -> None:
        super().__init__()
        self.mlp, self.units = mlp, units

    def forward(self, x: Tensor) -> Tensor:
        mlp, u = self.mlp, self.units
        gate = F.linear(x, mlp.w1.weight[u], mlp.w1.bias[u])
        value = F.linear(x, mlp.w2.weight[u], mlp.w2.bias[u])
        norm = F.layer_norm(
            F.silu(gate) * value, (len(u),), mlp.ffn_ln.weight[u], mlp.ffn_ln.bias[u], 1e-6
        )
        return F.linear(norm, mlp.w3.weight[:, u], mlp.w3.bias)


@pytest.mark.parametrize("keep", [[[1, 3], [], [0]], [[], [], []]])
def test_blocks_without_heads(keep: list[list[int]]) -> None:
    model, x = tiny(), images()
    pruned = prune_heads(model, keep)
    assert pruned.heads == keep == pruned.config["heads"]
    want = without(model, keep)
    torch.testing.assert_close(pruned(x), want(x), rtol=1e-10, atol=1e-10)
    attn = pruned.blocks[1].attn
    assert attn.q_proj.weight.shape == (0, 64) and attn.proj.weight.shape == (64, 0)
    out, q, _, loss = attn(torch.randn(1, 9, 64).double(), (3, 3), None)
    assert q.shape == (1, 0, 9, 16) and loss is None
    assert torch.equal(out, attn.proj.bias.expand(1, 9, 64))
    again = EVAViT(**json.loads(json.dumps(pruned.config))).double()
    again.load_state_dict(pruned.state_dict())
    assert torch.equal(again(x), pruned(x))


def test_block_without_heads_trains_scores_and_prunes_again() -> None:
    model, x = prune_heads(tiny(), [[1, 3], [], [0, 2]]), images()
    model(x).square().mean().backward()
    assert model.blocks[1].attn.proj.bias.grad.abs().sum() > 0
    trace = model.trace(x, qk=True)
    assert [pair[0].shape[1] for pair in trace.qk if pair is not None] == [2, 0, 2]
    for method in ("magnitude", "taylor", "entropy", "leave_one_out"):
        scores = head_scores(model, method, None if method == "magnitude" else [x], progress=False)
        assert [len(row) for row in scores.scores] == [2, 0, 2]
    assert select_heads(scores, 0.5) == [
        [int(scores.scores[0].argmax())],
        [],
        [int(scores.scores[2].argmax())],
    ]
    assert select_heads(scores, 2 / 3, "global", 0, relative=False)[1] == []
    assert prune_heads(model, [[1], [], []]).heads == [[3], [], []]


def test_select_may_empty_a_block() -> None:
    table = [[1.0, 2.0], [8.0, 9.0]]
    assert select_heads(table, 0.5, "global", min_heads=0, relative=False) == [[], [0, 1]]
    assert select_heads(table, 0, min_heads=0) == [[], []]
    assert select_heads([[1.0, -2.0], [-1.0, 3.0]], 1, "global", relative=False) == [[0], [1]]


def test_mlp_units() -> None:
    model, x = tiny(), images()
    pruned = prune_heads(model, [[1, 3], [2], [0, 1, 3]], mlp=UNITS)
    assert pruned.mlp_hidden == pruned.config["mlp_hidden"] == [20, 3, 40]
    want = without(model, [[1, 3], [2], [0, 1, 3]])
    for block, units in zip(want.blocks, UNITS, strict=True):
        block.mlp = NarrowMlp(block.mlp, units)
    torch.testing.assert_close(pruned(x), want(x), rtol=1e-10, atol=1e-10)
    assert (pruned(x) - without(model, pruned.heads)(x)).abs().max() > 1e-2
    only = prune_heads(model, None, mlp=UNITS)
    assert only.heads == model.heads and only.mlp_hidden == [20, 3, 40]
    assert prune_heads(only, None, mlp=[[0, 19], [1], [7]]).mlp_hidden == [2, 1, 1]
    assert torch.equal(only.blocks[1].mlp.w3.weight, model.blocks[1].mlp.w3.weight[:, [3, 5, 39]])


def test_half_of_the_heads_and_units_is_half_of_the_model() -> None:
    with torch.device("meta"):
        model = eva_vit_l_orion()
    report = pruning_report(model, [0.5], mlp_keep=0.5)
    half = report.pruned[0]
    assert report.full.params == 303_388_608
    # Per block: attention 2,099,200; 1365 units of 3 * 1024 + 2 + 2; 1024; two norms of 2048.
    block = 2_099_200 + 1365 * 3076 + 1024 + 4096
    assert [b.params for b in half.blocks] == [block] * 24
    # A whole block holds 4,197,376 in its attention and 8,402,600 outside.
    assert half.params == 303_388_608 - 24 * (4_197_376 + 8_402_600 - block)
    assert f"{half.params / 1e6:.1f}" == "152.3"
    assert half.mlp_keep == 0.5 and "50% + mlp 50%" in str(report)
    assert half.blocks[0].mlp == 2 * 1600 * 3 * 1024 * 1365
    with torch.device("meta"):
        built = eva_vit_l_orion(heads=list(range(8)), mlp_hidden=1365)
    assert half.params == sum(p.numel() for p in built.parameters())


@pytest.mark.parametrize("method", ["magnitude", "gradient", "taylor"])
def test_mlp_scores_find_dead_units(method: str) -> None:
    model, x = tiny(), images(1)
    with torch.no_grad():
        model.blocks[1].mlp.w3.weight[:, 7] = 0
    scores = mlp_scores(model, method, None if method == "magnitude" else [x], progress=False)
    assert [len(row) for row in scores.scores] == [HIDDEN] * 3
    assert scores.scores[1].argmin() == 7 and scores.scores[1][7] == 0
    assert scores.metadata["part"] == "mlp"
    kept = select_heads(scores, 39)
    assert 7 not in kept[1] and len(kept[1]) == 39


def test_mlp_taylor_is_context_times_gradient() -> None:
    model, x = tiny().eval(), images(2)
    loss = lambda out, batch: out.square().mean()  # noqa: E731
    got = mlp_scores(model, "taylor", [x], loss=loss, progress=False).scores[1]
    want = torch.zeros(HIDDEN, dtype=torch.float64)
    for image in x.split(1):
        seen: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Tensor], seen: list[Tensor] = seen) -> None:
            args[0].retain_grad()
            seen.append(args[0])

        handle = model.blocks[1].mlp.w3.register_forward_pre_hook(keep)
        model(image).square().mean().backward()
        handle.remove()
        want += (seen[0] * seen[0].grad).abs().mean((0, 1)) / 2
    torch.testing.assert_close(got, want.detach(), rtol=1e-9, atol=1e-14)


def test_mlp_magnitude_is_a_geometric_mean() -> None:
    model = tiny()
    mlp, got = model.blocks[2].mlp, mlp_scores(model, "magnitude").scores[2]
    for unit in (0, 17, 39):
        factors = [
            torch.cat((mlp.w1.weight[unit], mlp.w1.bias[unit, None])).norm(),
            torch.cat((mlp.w2.weight[unit], mlp.w2.bias[unit, None])).norm(),
            mlp.ffn_ln.weight[unit].abs(),
            mlp.w3.weight[:, unit].norm(),
        ]
        assert got[unit].item() == pytest.approx(torch.stack(factors).prod().item() ** 0.25)


def test_mean_context() -> None:
    """The same as the original whose removed channels are their mean, whatever the image."""
    model, data = tiny().eval(), [images(3), images(1)]
    keep = [[1, 3], [], [0, 1, 3]]
    pruned = prune_heads(
        model, keep, mlp=UNITS[:2] + [[0, 1]], mean_context=True, data=data, progress=False
    )
    plain = prune_heads(model, keep, mlp=UNITS[:2] + [[0, 1]])
    seen: dict[nn.Module, Tensor] = {}

    def watch(module: nn.Module, args: tuple[Tensor]) -> None:
        seen[module] = torch.cat((seen[module], args[0])) if module in seen else args[0]

    layers = [layer for block in model.blocks for layer in (block.attn.proj, block.mlp.w3)]
    for layer in layers:
        layer.register_forward_pre_hook(watch)
    with torch.no_grad():
        for batch in data:
            model(batch)
    for index, rows in enumerate(zip(keep, UNITS[:2] + [[0, 1]], strict=True)):
        pairs = (
            (model.blocks[index].attn.proj, pruned.blocks[index].attn.proj, rows[0], HEAD_DIM),
            (model.blocks[index].mlp.w3, pruned.blocks[index].mlp.w3, rows[1], 1),
        )
        for old, new, kept, size in pairs:
            mean = seen[old].mean((0, 1)).view(-1, size).clone()
            mean[kept] = 0
            want = old.bias + old.weight @ mean.flatten()
            torch.testing.assert_close(new.bias, want, rtol=1e-10, atol=1e-12)
            assert (want - old.bias).abs().max() > 1e-3 or len(kept) == len(mean)
    x = images(4)
    with torch.no_grad():
        far = (plain(x) - model(x)).norm()
        assert (pruned(x) - model(x)).norm() < far


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"mean_context": True}, ValueError, "data must be given with mean_context=True"),
        ({"data": [1]}, ValueError, "data must be given with mean_context=True or compensate, and"),
        ({"mean_context": True, "data": []}, ValueError, "prune_heads: data must give at least"),
        ({"mlp": [[0], [0]]}, ValueError, r"mlp must have one list per block \(3\), got 2"),
        ({"mlp": [[0], [40], [0]]}, ValueError, r"mlp\[1\] must be in \[0, 40\)"),
        ({"mlp": [0, 1, 2]}, TypeError, "mlp must be a list of lists"),
    ],
)
def test_rejects(kwargs: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        prune_heads(tiny(), None, progress=False, **kwargs)


@pytest.mark.parametrize(
    ("args", "error", "match"),
    [
        (("entropy", [1]), ValueError, "mlp_scores: method must be one of"),
        (("magnitude", [1]), ValueError, "mlp_scores: data must be None for 'magnitude'"),
        (("taylor", None), ValueError, "mlp_scores: data must be given for 'taylor'"),
        (("taylor", ["x"]), TypeError, "mlp_scores: a batch must be .* got str"),
    ],
)
def test_mlp_scores_rejects(args: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        mlp_scores(tiny(), *args, progress=False)
