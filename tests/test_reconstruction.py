# SPDX-License-Identifier: Apache-2.0
"""Calibrations, orders of removal and scores by what remains after compensation."""

import itertools
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kdfast
from kdfast.pruning.compensate import RIDGE, SiteError
from kdfast.pruning.eliminate import best_sets, inverse, slice_path, slopes, unit_path
from kdfast.pruning.moments import Moments
from kdfast.pruning.reconstruction import weighted
from tests.test_prune_families import small, torchvision_vit


def matrices(width: int, outputs: int = 7) -> tuple[Tensor, Tensor]:
    """Covariance of correlated channels and the weight that reads them, fp64."""
    mix = torch.randn(width, width, dtype=torch.float64)
    c = mix @ mix.T / width
    return c, torch.randn(outputs, width, dtype=torch.float64)


def remaining(c: Tensor, weight: Tensor, removed: list[int], ridge: float) -> float:
    """tr(W_R S W_R^T) by the Schur complement."""
    c = c + ridge * c.diagonal().mean() * torch.eye(len(c), dtype=torch.float64)
    kept = [i for i in range(len(c)) if i not in set(removed)]
    schur = c[removed][:, removed]
    if kept:
        schur = schur - c[removed][:, kept] @ torch.linalg.solve(
            c[kept][:, kept], c[kept][:, removed]
        )
    return ((weight[:, removed] @ schur) * weight[:, removed]).sum().item()


def test_unit_path_takes_the_cheapest_each_time() -> None:
    """Against Schur complements of every candidate, and over several panels of removals."""
    c, weight = matrices(200)
    path = unit_path(inverse(c, 1e-3), weight.T @ weight)
    assert sorted(path.order) == list(range(200))
    assert all(a <= b for a, b in itertools.pairwise(path.errors))
    for count in (1, 2, 70, 150, 200):
        want = remaining(c, weight, path.order[:count], 1e-3)
        assert path.errors[count - 1] == pytest.approx(want, rel=1e-8)
    for count in (0, 66, 190):
        gone = path.order[:count]
        costs = {
            i: remaining(c, weight, [*gone, i], 1e-3) for i in range(200) if i not in set(gone)
        }
        assert path.order[count] == min(costs, key=costs.__getitem__)


def test_slices_and_sets() -> None:
    c, weight = matrices(24)
    a, g = inverse(c, 1e-3), weight.T @ weight
    channels = torch.arange(24).view(6, 4)

    def error(gone: Any) -> float:
        return remaining(c, weight, channels[list(gone)].flatten().tolist(), 1e-3)

    path = slice_path(a, g, 4)
    assert sorted(path.order) == list(range(6))
    for count in range(1, 7):
        assert path.errors[count - 1] == pytest.approx(error(path.order[:count]), rel=1e-8)
    best = best_sets(a, g, 4)
    assert best is not None
    for count, (least, gone) in enumerate(best):
        every = {s: error(s) if s else 0.0 for s in itertools.combinations(range(6), count)}
        assert tuple(gone) == min(every, key=every.__getitem__)
        assert least == pytest.approx(every[tuple(gone)], rel=1e-8, abs=1e-12)
    assert best_sets(torch.eye(13), torch.eye(13), 1) is None


def test_slopes_are_those_of_the_convex_curve_below() -> None:
    assert slopes([1.0, 3.0, 6.0]) == [1.0, 2.0, 3.0]
    assert slopes([4.0, 4.0, 6.0, 12.0]) == [2.0, 2.0, 2.0, 6.0]
    assert slopes([]) == []


def test_moments_of_pieces_are_those_of_all_rows() -> None:
    """A mean a thousand times the deviation costs no digits in fp32; autocast and tf32 neither."""
    torch.manual_seed(0)
    x = (1000 + torch.randn(3000, 500)).float()
    y = torch.randn(3000, 3)
    sums = Moments()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for start, end in ((0, 10), (10, 10), (10, 2000), (2000, 3000)):
            sums.add(x[start:end], y[start:end])
    exact, other = x.double(), y.double()
    torch.testing.assert_close(sums.mean(), exact.mean(0), rtol=1e-9, atol=0)
    torch.testing.assert_close(sums.covariance(), exact.T.cov(correction=0), rtol=0, atol=2e-6)
    assert torch.equal(sums.covariance(), sums.covariance().T)
    both = torch.cat((other, exact), 1).T.cov(correction=0)
    torch.testing.assert_close(sums.cross(), both[:3, 3:], rtol=0, atol=2e-6)
    torch.testing.assert_close(
        sums.target_variance(), other.var(0, correction=0), rtol=1e-6, atol=0
    )
    with pytest.raises(ValueError, match="at least one row"):
        Moments().mean()


def vit() -> tuple[torch.nn.Module, list[Tensor]]:
    model, x = small("vit_small_patch14_reg4_dinov2")
    return model, [torch.randn_like(x) for _ in range(20)]


def test_selection_is_the_order_of_removal() -> None:
    model, data = vit()
    calibration = kdfast.calibrate(model, data, progress=False)
    scores = kdfast.mlp_scores(model, "reconstruction", calibration, progress=False)
    moments = list(calibration.mlps.values())[1]
    site = kdfast.pruning.families.anatomy_of("test", model).mlps[1]
    weight = weighted(site, moments)
    path = unit_path(inverse(moments.covariance, RIDGE), weight.T @ weight)
    for keep in (1, 17, 128, 255):
        kept = kdfast.select_heads(scores, keep)[1]
        assert kept == sorted(path.order[256 - keep :])
    # Straight from data, the same.
    again = kdfast.mlp_scores(model, "reconstruction", data, progress=False)
    assert all(map(torch.equal, scores.scores, again.scores))
    assert again.metadata["images"] == 40


def test_heads_are_the_best_of_all_sets(tmp_path: Path) -> None:
    model, data = vit()
    calibration = kdfast.calibrate(model, data, progress=False)
    scores = kdfast.head_scores(model, "reconstruction", calibration, progress=False)
    scores.save(tmp_path / "scores.json")
    scores = kdfast.HeadScores.load(tmp_path / "scores.json")
    for count in range(1, 4):
        chosen = kdfast.select_heads(scores, count)
        for block in range(2):
            errors = {}
            for kept in itertools.combinations(range(4), count):
                rows = [list(range(4)), list(range(4))]
                rows[block] = list(kept)
                found: list[SiteError] = []
                kdfast.prune_heads(model, rows, compensate=calibration, errors=found)
                errors[kept] = found[0].compensated
            best = min(errors, key=errors.__getitem__)
            assert errors[tuple(chosen[block])] == pytest.approx(errors[best], rel=1e-2)


def test_global_budgets_go_where_the_stream_suffers_most() -> None:
    """A block whose branch hardly reaches the stream gives up its heads and units."""
    model, data = vit()
    with torch.no_grad():
        for gamma in (model.blocks[1].ls1.gamma, model.blocks[1].ls2.gamma):
            gamma.mul_(1e-3)
    calibration = kdfast.calibrate(model, data, progress=False)
    heads = kdfast.head_scores(model, "reconstruction", calibration, progress=False)
    units = kdfast.mlp_scores(model, "reconstruction", calibration, progress=False)
    assert kdfast.select_heads(heads, 0.5, "global", 0) == [[0, 1, 2, 3], []]
    chosen = kdfast.select_heads(units, 0.5, "global", 0)
    assert len(chosen[0]) > 250 and sum(map(len, chosen)) == 256
    relative = kdfast.select_heads(units, 0.5, "global", 0, relative=True)
    assert abs(len(relative[0]) - 128) < 64


def test_heads_and_units_share_a_budget_of_flops() -> None:
    """Against a walk through all steps, and by what the report counts."""
    model, data = vit()
    calibration = kdfast.calibrate(model, data, progress=False)
    heads = kdfast.head_scores(model, "reconstruction", calibration, progress=False)
    units = kdfast.mlp_scores(model, "reconstruction", calibration, progress=False)
    for keep in (0.3, 0.6):
        kept, mlp = kdfast.select_together(model, heads, units, keep)
        report = kdfast.pruning_report(kdfast.prune_heads(model, kept, mlp=mlp), [0.5]).full
        full = kdfast.pruning_report(model, [0.5]).full
        share = (report.flops - report.embed) / (full.flops - full.embed)
        assert keep - 0.1 < share <= keep
        # The dearest of what went is cheaper, for each FLOP, than the cheapest of what stayed.
        block = full.blocks[0]
        cost = (block.gemm + block.attention) / 4, block.mlp / 256
        gone, stayed = [], []
        for scores, rows, each in ((heads, kept, cost[0]), (units, mlp, cost[1])):
            for values, row in zip(scores.scores, rows, strict=True):
                ranked = (values / each).sort().values.tolist()
                gone += ranked[: len(values) - len(row)]
                stayed += ranked[len(values) - len(row) :]
        assert max(gone) <= min(stayed)
    every = kdfast.select_together(model, heads, units, 1.0)
    assert every == ([list(range(4))] * 2, [list(range(256))] * 2)
    with pytest.raises(ValueError, match=r"keep must be in \(0, 1\], got 1.5"):
        kdfast.select_together(model, heads, units, 1.5)
    with pytest.raises(ValueError, match="heads must be scored by 'reconstruction', got 'magnit"):
        kdfast.select_together(model, kdfast.head_scores(model, "magnitude"), units, 0.5)
    with pytest.raises(ValueError, match=r"units must have \[256, 256\] scores per block"):
        kdfast.select_together(model, heads, heads, 0.5)


def test_save_and_load(tmp_path: Path) -> None:
    model, data = vit()
    calibration = kdfast.calibrate(model, data, progress=False)
    path = tmp_path / "moments.safetensors"
    calibration.save(path)
    loaded = kdfast.Calibration.load(path, model)
    assert loaded.metadata == calibration.metadata
    for part in ("attentions", "mlps"):
        for name, moments in getattr(calibration, part).items():
            other = getattr(loaded, part)[name]
            assert torch.equal(other.covariance, moments.covariance)
            assert torch.equal(other.mean, moments.mean) and torch.equal(other.gain, moments.gain)
            assert (other.tokens, other.stream) == (moments.tokens, moments.stream)
    kdfast.Calibration.load(path, model.bfloat16())
    smaller = kdfast.prune_heads(model, [[0], [1, 2]])
    with pytest.raises(ValueError, match=r"must have 64 channels|must have 16 channels"):
        kdfast.Calibration.load(path, smaller)
    with pytest.raises(ValueError, match=r"must know encoder.layers"):
        kdfast.Calibration.load(path, torchvision_vit()[0])
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight.mul_(1.1)
    with pytest.raises(ValueError, match=r"must be of these weights.*blocks.1.mlp"):
        kdfast.Calibration.load(path, model)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        kdfast.Calibration.load(path, model)
    with pytest.raises(FileNotFoundError, match="must be a file"):
        kdfast.Calibration.load(tmp_path / "none", model)
    kdfast.save_pretrained(model, tmp_path / "model")
    with pytest.raises(ValueError, match=r"must have format 'kdfast.calibration/1', got None"):
        kdfast.Calibration.load(tmp_path / "model" / "model.safetensors", model)


def test_few_tokens_are_a_warning_with_a_number() -> None:
    model, data = vit()
    # 9 tokens an image and 256 hidden units: 512 tokens are 57 images.
    with pytest.warns(UserWarning, match=r"256 channels and saw 18 tokens.*512, that is 57 images"):
        kdfast.calibrate(model, data[:1], progress=False)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "match"),
    [
        (("taylor",), {}, TypeError, "data must be batches for 'taylor', got a Calibration"),
        (
            ("reconstruction",),
            {"batches": 2},
            ValueError,
            "batches must be None with a calibration",
        ),
        (("reconstruction",), {"loss": len}, ValueError, "loss must be None for 'reconstruction'"),
    ],
)
def test_rejects(args: Any, kwargs: Any, error: type[Exception], match: str) -> None:
    model, data = vit()
    calibration = kdfast.calibrate(model, data, progress=False)
    for function in (kdfast.head_scores, kdfast.mlp_scores):
        with pytest.raises(error, match=match):
            function(model, *args, calibration, progress=False, **kwargs)
    with pytest.raises(ValueError, match="what enters the projection of .* must be finite"):
        kdfast.calibrate(model, [data[0] * torch.nan], progress=False)


SHARE = """
import sys, torch, torch.distributed as dist, kdfast
from tests.test_reconstruction import vit
rank, port, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
model, data = vit()
dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
share = data[:3] if rank == 0 else data[3:]
calibration = kdfast.calibrate(model, share, progress=False)
if rank == 0:
    calibration.save(out)
dist.destroy_process_group()
"""


def test_processes_add_up(tmp_path: Path) -> None:
    model, data = vit()
    want = kdfast.calibrate(model, data, progress=False)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    path = tmp_path / "both.safetensors"
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    children = [
        subprocess.Popen([sys.executable, "-c", SHARE, str(rank), port, str(path)], env=environment)
        for rank in range(2)
    ]
    assert [child.wait(timeout=300) for child in children] == [0, 0]
    got = kdfast.Calibration.load(path, model)
    assert got.metadata == want.metadata
    for part in ("attentions", "mlps"):
        for name, moments in getattr(want, part).items():
            other = getattr(got, part)[name]
            assert other.tokens == moments.tokens
            torch.testing.assert_close(other.mean, moments.mean, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(other.covariance, moments.covariance, rtol=1e-5, atol=1e-7)
            assert other.stream == pytest.approx(moments.stream, rel=1e-9)
