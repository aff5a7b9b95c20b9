# SPDX-License-Identifier: Apache-2.0
"""Scores, moments and compensation by several gloo processes, against those of one."""

import pytest
import torch

import kdfast
from kdfast.machine.ranks import Ranks
from kdfast.pruning.moments import Moments
from kdfast.testing.models import small_eva
from kdfast.testing.ranks import in_ranks

BATCHES = [3, 2, 3, 1, 3]
QUIET = {"progress": False}
# Moments are equal up to the order of fp64 sums: so much of their size.
ROUNDING = 1e-12


def data():
    torch.manual_seed(7)
    return [torch.randn(size, 3, 32, 32) for size in BATCHES]


def model():
    return small_eva(img_size=32, patch_size=8).eval()


def dealt(batches, rank, world):
    return batches[rank::world]


def of_all(world, make, tmp_path):
    """What ``make(rank, world)`` gives in each of several processes."""

    def work(rank):
        torch.save(make(rank, world), tmp_path / f"{rank}.pt")

    assert in_ranks(world, work) == [""] * world
    return [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(world)]


METHODS = ["taylor", "gradient", "entropy", "leave_one_out"]


# 2 and 3 processes have uneven shares, and of 7 two have none.
@pytest.mark.parametrize("world", [2, 3, 7])
def test_scores_are_those_of_one_process_bit_for_bit(tmp_path, world):
    def make(rank, world):
        share = dealt(data(), rank, world)
        found = [kdfast.head_scores(model(), method, share, **QUIET) for method in METHODS]
        found.append(kdfast.head_scores(model(), "taylor", share, batches=4, **QUIET))
        found.append(kdfast.mlp_scores(model(), "gradient", share, **QUIET))
        return [(row.scores, row.metadata) for row in found]

    want = make(0, 1)
    assert want[0][1]["batches"] == 5 and want[0][1]["images"] == sum(BATCHES)
    assert want[-2][1]["images"] == sum(BATCHES[:4])
    for got in of_all(world, make, tmp_path):
        for (rows, facts), (wanted, told) in zip(got, want, strict=True):
            assert facts == told
            assert all(torch.equal(a, b) for a, b in zip(rows, wanted, strict=True))


def parts_of(calibration):
    return {**calibration.attentions, **calibration.mlps}


def close(got, want):
    scale = want.abs().max()
    torch.testing.assert_close(got, want, rtol=0, atol=ROUNDING * float(scale))


@pytest.mark.parametrize("world", [2, 3, 7])
def test_moments_are_those_of_one_process(tmp_path, world):
    def make(rank, world):
        found = kdfast.calibrate(model(), dealt(data(), rank, world), **QUIET)
        chosen = [
            function(model(), "reconstruction", found, **QUIET)
            for function in (kdfast.head_scores, kdfast.mlp_scores)
        ]
        return found, chosen

    want, chosen = make(0, 1)
    several = of_all(world, make, tmp_path)
    for got, scores in several:
        assert got.metadata == want.metadata
        for name, moments in parts_of(want).items():
            other = parts_of(got)[name]
            assert (other.tokens, other.weight_norm) == (moments.tokens, moments.weight_norm)
            close(other.mean, moments.mean)
            close(other.covariance, moments.covariance)
            close(other.gain, moments.gain)
            assert other.stream == pytest.approx(moments.stream, rel=ROUNDING)
            # All processes go on with the same numbers.
            assert torch.equal(other.covariance, parts_of(several[0][0])[name].covariance)
        for scored, first, one in zip(scores, several[0][1], chosen, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(scored.scores, first.scores, strict=True))
            assert kdfast.select_heads(scored, keep=0.5) == kdfast.select_heads(one, keep=0.5)


@pytest.mark.parametrize("world", [2, 3, 7])
@pytest.mark.parametrize("how", ["at once", "sequential", "mean", "selections"])
def test_pruned_models_are_those_of_one_process(tmp_path, world, how):
    kept = [[0, 2], [1], [0, 1]]

    def make(rank, world):
        net, share = model().double(), [x.double() for x in dealt(data(), rank, world)]
        if how == "selections":
            return kdfast.evaluate_selections(net, [kept, kept[::-1]], None, share, **QUIET)
        options = {"mean_context": True} if how == "mean" else {}
        if how != "mean":
            options["compensate"] = kdfast.calibrate(net, share, **QUIET)
            options["sequential"] = how == "sequential"
        units = [list(range(0, hidden, 2)) for hidden in net.mlp_hidden]
        pruned = kdfast.prune_heads(net, kept, mlp=units, data=share, **options, **QUIET)
        return pruned.state_dict()

    want = make(0, 1)
    for got in of_all(world, make, tmp_path):
        if how == "selections":
            assert got == want
            continue
        for name, tensor in want.items():
            torch.testing.assert_close(got[name], tensor, rtol=1e-8, atol=1e-8)


def test_moments_of_processes_that_subtract_other_means(tmp_path):
    """As where the first process has no row: sums are moved to one shift."""
    torch.manual_seed(3)
    rows = [torch.randn(50, 4).double() + 3, torch.randn(70, 4).double() - 2]
    whole = Moments()
    whole.add(torch.cat(rows), torch.cat(rows)[:, :2])

    def work(rank):
        sums = Moments()
        if rank:
            sums.add(rows[rank - 1], rows[rank - 1][:, :2])
        sums.sum_over_processes(Ranks.here(), torch.device("cpu"))
        assert sums.count == 120
        for name in ("mean", "covariance", "target_mean", "cross", "target_variance"):
            torch.testing.assert_close(getattr(sums, name)(), getattr(whole, name)())

    assert in_ranks(3, work) == [""] * 3


@pytest.mark.parametrize("call", ["scores", "moments", "compensation"])
def test_an_error_of_one_ends_all(call):
    def work(rank):
        def share():
            yield from dealt(data(), rank, 2)[:1]
            if rank:
                raise OSError("picture 3 is gone")
            yield from dealt(data(), rank, 2)[1:]

        if call == "scores":
            kdfast.head_scores(model(), "entropy", share(), **QUIET)
        if call == "moments":
            kdfast.calibrate(model(), share(), **QUIET)
        known = kdfast.calibrate(model(), dealt(data(), rank, 2), **QUIET)
        options = {"compensate": known, "sequential": True, **QUIET}
        kdfast.prune_heads(model(), [[0], [1], [2]], data=share(), **options)

    found = in_ranks(2, work)
    assert found[1] == "OSError: picture 3 is gone"
    assert "PeerError: process 1 of 2 failed: OSError: picture 3 is gone (on " in found[0]


def test_no_batch_in_any_process_is_an_error_for_all():
    def work(rank):
        kdfast.calibrate(model(), [], **QUIET)

    assert (
        in_ranks(2, work)
        == ["ValueError: calibrate: data must give at least one batch, got none"] * 2
    )


def test_scores_that_are_not_finite_are_an_error_for_all():
    def work(rank):
        batches = data()
        batches[3][0, 0, 0, 0] = torch.nan
        kdfast.head_scores(model(), "taylor", dealt(batches, rank, 2), **QUIET)

    assert all("loss must be finite" in text for text in in_ranks(2, work))
