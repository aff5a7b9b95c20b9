# SPDX-License-Identifier: Apache-2.0
"""The accounting against literals and against torch's own FLOP counter."""

import json
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kdfast.models import EVAViT, eva_vit_l_orion
from kdfast.pruning import PruningReport, prune_heads, pruning_report
from kdfast.testing import tiny_eva

# Heads per block -> parameters of the backbone, its attentions, and one window block's attention.
PARAMS = {
    16: (303_388_608, 100_737_024, 4_197_376),
    12: (278_210_496, 75_558_912, 3_148_288),
    8: (253_032_384, 50_380_800, 2_099_200),
    4: (227_854_272, 25_202_688, 1_050_112),
}
# Heads per block -> GFLOP per 640 x 640 image with pads computed, and without.
GFLOP = {
    16: ("1185.757", "1074.356"),
    12: ("1050.969", "967.418"),
    8: ("916.181", "860.480"),
    4: ("781.393", "753.542"),
}
# (heads, padded) -> GFLOP of window GEMMs and attention, global GEMMs and attention.
PARTS = {
    (16, True): ("309.238", "38.655", "107.374", "83.886"),
    (8, True): ("154.619", "19.327", "53.687", "41.943"),
    (16, False): ("214.748", "21.743", "107.374", "83.886"),
    (8, False): ("107.374", "10.872", "53.687", "41.943"),
}


@pytest.fixture(scope="module")
def orion() -> PruningReport:
    with torch.device("meta"):
        return pruning_report(eva_vit_l_orion())


def tiny() -> EVAViT:
    return tiny_eva(0.2).float().eval()


def test_orion_parameters(orion: PruningReport) -> None:
    costs = dict(zip((4, 8, 12, 16), orion.pruned, strict=True))
    for heads, (params, attention, block) in PARAMS.items():
        assert costs[heads].heads == 24 * heads
        assert costs[heads].params == params
        assert costs[heads].attention_params == attention
        assert costs[heads].blocks[0].attention_params == block
        assert costs[heads].blocks[0].params == block + 8_402_600
    assert orion.full.blocks == costs[16].blocks


def test_orion_flops(orion: PruningReport) -> None:
    costs = dict(zip((4, 8, 12, 16), orion.pruned, strict=True))
    for heads, want in GFLOP.items():
        got = (costs[heads].flops_padded, costs[heads].flops)
        assert tuple(f"{flops / 1e9:.3f}" for flops in got) == want
    for (heads, padded), want in PARTS.items():
        parts = {k: f"{v / 1e9:.3f}" for k, v in costs[heads].parts(padded).items()}
        names = ("window_gemm", "window_attention", "global_gemm", "global_attention")
        assert tuple(parts[name] for name in names) == want
        assert (parts["embed"], parts["mlp"]) == ("2.517", "644.088")
    half = costs[8]
    assert f"{orion.full.flops_padded / half.flops_padded:.3f}" == "1.294"
    assert f"{orion.full.flops_padded / half.flops:.3f}" == "1.378"
    assert f"{orion.flops_without_heads / 1e9:.2f}" == "646.60"
    window, whole = half.blocks[0], half.blocks[2]
    assert (window.window, whole.window) == (16, 0)
    assert f"{window.flops_padded / 1e9:.2f} {window.flops / 1e9:.2f}" == "37.71 34.23"
    assert f"{whole.flops_padded / 1e9:.2f} {whole.flops / 1e9:.2f}" == "38.79 38.79"


def test_orion_table(orion: PruningReport) -> None:
    lines = str(orion).splitlines()
    half = next(line for line in lines if line.split()[:1] == ["50%"])
    assert half.split() == [
        *("50%", "192", "253,032,384", "16.60%", "50,380,800"),
        *("458.090", "1.294x", "430.240", "1.378x"),
    ]
    assert any(line.endswith("2,5,8,11,14,17,20,23") and "global" in line for line in lines)
    assert lines[-1].startswith("without any head: 323.30 GMACs, 1.834x")


def test_json(orion: PruningReport) -> None:
    content = json.loads(orion.to_json())
    assert content["image_size"] == [640, 640]
    assert content["full"]["params"] == 303_388_608
    half = content["pruned"][1]
    assert half["keep"] == 0.5
    assert half["heads"] == 192
    assert len(half["blocks"]) == 24
    assert half["blocks"][23]["heads"] == 8
    assert half["flops"] == sum(half["parts"].values())
    assert half["flops_padded"] == sum(half["parts_padded"].values())


@pytest.mark.parametrize("size", [20, (20, 28), (8, 40)])
@pytest.mark.parametrize("keep", [[[0, 1, 2, 3]] * 3, [[1, 3], [2], [0, 1, 3]]])
def test_products_match_torchs_counter(keep: list[list[int]], size: Any) -> None:
    """Linear layers and the patch convolution; torch does not look into the attention op."""
    model = prune_heads(tiny(), keep)
    full = pruning_report(model, (), image_size=size).full
    height, width = (size, size) if isinstance(size, int) else size
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, 3, height, width))
    counts = counter.get_flop_counts()["Global"]
    names = {"addmm", "mm", "convolution"}
    want = sum(n for op, n in counts.items() if op.__name__.split(".")[0] in names)
    assert full.embed + sum(b.gemm + b.mlp for b in full.blocks) == want
    assert full.params == sum(p.numel() for p in model.parameters())


def test_attention_by_hand() -> None:
    # A 5 x 7 grid in windows of 3: 9 + 9 + 3 tokens in the first row, 6 + 6 + 2 in the second.
    report = pruning_report(tiny(), [[1, 2, 4]], image_size=(20, 28))
    one, two, four = report.pruned[0].blocks
    pairs = 81 + 81 + 9 + 36 + 36 + 4
    assert one.attention == 4 * 16 * pairs
    assert two.attention == 2 * 4 * 16 * pairs
    assert two.attention_padded == 2 * 4 * 16 * 6 * 81
    assert two.gemm == 2 * 35 * 4 * 64 * 32
    assert two.gemm_padded == 2 * 54 * 4 * 64 * 32
    assert four.attention == four.attention_padded == 4 * 4 * 16 * 35**2
    assert four.gemm == four.gemm_padded
    assert one.mlp == two.mlp == 2 * 35 * 3 * 64 * 128


def test_is_relative_to_the_heads_that_are_left() -> None:
    model = prune_heads(tiny(), [[1, 3], [2], [0, 1, 2, 3]])
    report = pruning_report(model, [0.5, 1, [2, 1, 3]])
    assert [b.heads for b in report.full.blocks] == [2, 1, 4]
    assert [[b.heads for b in cost.blocks] for cost in report.pruned] == [
        [1, 1, 2],
        [1, 1, 1],
        [2, 1, 3],
    ]
    pruned = prune_heads(model, [[0], [0], [1, 2]])
    assert report.pruned[0].params == sum(p.numel() for p in pruned.parameters())
    assert "50%" in str(report) and "1 heads" in str(report) and "list" in str(report)


def test_leaves_the_model_alone() -> None:
    model = tiny().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruning_report(model)
    assert model.training and model.heads == [[0, 1, 2, 3]] * 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("keep", "size", "error", "match"),
    [
        ([5], None, ValueError, r"pruning_report: keep must be in \[0, 4\] for block 0, got 5"),
        ([1.5], None, ValueError, r"in \(0, 1\], got 1.5"),
        (["a"], None, TypeError, "int, a float or a list"),
        ([0.5], 18, ValueError, r"image_size must be positive multiples of 4, got \(18, 18\)"),
        ([0.5], (0, 4), ValueError, r"image_size must be positive multiples of 4, got \(0, 4\)"),
    ],
)
def test_rejects(keep: Any, size: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        pruning_report(tiny(), keep, image_size=size)


def test_unknown_family_is_named() -> None:
    with pytest.raises(
        TypeError,
        match="pruning_report: model must be one of EVAViT, .*, got .*Linear, which holds no",
    ):
        pruning_report(nn.Linear(2, 2))
