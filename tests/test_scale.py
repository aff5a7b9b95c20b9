# SPDX-License-Identifier: Apache-2.0
"""docs/scale.md: its tables come from the inputs, and hundreds of ranks read every picture once."""

import dataclasses
import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import _should_compress

cache = importlib.import_module("bench.scale_cache")
model = importlib.import_module("bench.scale_model")
order = importlib.import_module("bench.scale_order")
scale = importlib.import_module("bench.scale")
settings = importlib.import_module("bench.scale_settings")
tables = importlib.import_module("bench.scale_tables")

INPUTS = json.loads(scale.INPUTS.read_text(encoding="utf-8"))
CHOSEN = settings.Assumptions()
EVERY = settings.settings(CHOSEN)
SLOW, FAST = model.SLOW, model.FAST


def test_page_is_what_the_inputs_say() -> None:
    text = scale.PAGE.read_text(encoding="utf-8")
    made = tables.blocks(INPUTS, CHOSEN)
    assert [name for name in made if f"<!-- {name} -->" not in text] == []
    assert scale.filled(text, made) == text, "python -m bench.scale"


def test_counted_work_is_the_sum_of_its_parts() -> None:
    for work in INPUTS["work"].values():
        parts = work["teacher_forward"] + 3 * work["student_forward"]
        assert parts == pytest.approx(work["step"], rel=0.1)
        assert work["step_checkpointed"] > work["step"]
        shapes = sum(math.prod(shape) * count for shape, count in work["shapes"])
        assert shapes == work["trained_params"]


def vit(tokens: int, width: int, blocks: int, inputs: int, classes: int) -> int:
    """FLOP of a picture by hand: four projections, an MLP of four widths, two products of maps."""
    block = 12 * tokens * width**2 + 2 * tokens**2 * width
    return 2 * (blocks * block + (tokens - 1) * inputs * width + width * classes)


def eva(kept: float) -> int:
    """The same of ORION's EVA-ViT-L, with a part of its heads."""
    side, width, hidden, blocks, window = 40, 1024, 2730, 24, 16
    # Windows at the edge are smaller: nothing is padded.
    sides = [window, window, side - 2 * window]
    local = sum((a * b) ** 2 for a in sides for b in sides)
    attended = (blocks // 3) * side**4 + (blocks - blocks // 3) * local
    linear = blocks * side**2 * (4 * kept * width**2 + 3 * width * hidden)
    return round(2 * (linear + 2 * kept * width * attended + side**2 * 768 * width))


def test_counted_work_is_that_of_formulas_by_hand() -> None:
    work = INPUTS["work"]
    assert work["orion50"]["teacher_forward"] == pytest.approx(eva(1.0), rel=1e-3)
    assert work["orion50"]["student_forward"] == pytest.approx(eva(0.5), rel=1e-3)
    large, small = vit(197, 1024, 24, 768, 1000), vit(197, 384, 12, 768, 1000)
    assert work["vit_l_to_s"]["teacher_forward"] == pytest.approx(large, rel=1e-3)
    assert work["vit_l_to_s"]["student_forward"] == pytest.approx(small, rel=1e-3)
    # A map of the last block in bf16, and eight such maps beside queries and keys of 8 heads.
    one = 2 * 1024 * 40**2
    assert INPUTS["features"] == {"output": one, "all": 8 * one + 24 * 2 * 2 * 8 * 64 * 40**2}
    # Logits in float16, the largest in float32, a checksum; with classes left out their odds too.
    assert [row["row_bytes"] for row in INPUTS["cache"]] == [2 * 1000 + 8, 16 * (2 + 2) + 12]


def test_hours_are_work_by_rate() -> None:
    step = model.step_of(EVERY[0], INPUTS, CHOSEN, 1, SLOW)
    rough = 234_769 * 6 * 3 * INPUTS["work"]["orion50"]["step"] / (989e12 * 0.25) / 3600
    assert model.hours(EVERY[0], step, 3) == pytest.approx(rough, rel=0.01)


def test_a_gpu_alone_exchanges_nothing_and_more_exchange_more() -> None:
    for case in (SLOW, FAST):
        steps = [model.step_of(EVERY[0], INPUTS, CHOSEN, n, case) for n in (1, 8, 64, 512)]
        assert steps[0].reduce == steps[0].exposed == 0
        times = [step.reduce for step in steps]
        assert times == sorted(times)
    size = 10**9
    alone = dataclasses.replace(CHOSEN, hop_us=(0.0, 0.0), link_share=(1.0, 1.0))
    within = model.reduce_seconds(size, alone, 8, SLOW)
    assert within == pytest.approx(2 * 7 / 8 * size / 450e9)
    across = model.reduce_seconds(size, alone, 16, SLOW)
    assert across == pytest.approx(2 * 15 / 16 * size / 400e9)


def test_the_backward_hides_the_reduction_but_for_its_last_bucket() -> None:
    fast = model.step_of(EVERY[0], INPUTS, CHOSEN, 8, FAST)
    buckets = math.ceil(4 * INPUTS["work"]["orion50"]["trained_params"] / model.BUCKET)
    assert fast.exposed == pytest.approx(fast.reduce / buckets)
    slow = model.step_of(EVERY[0], INPUTS, CHOSEN, 8, SLOW)
    assert slow.exposed == slow.reduce


def test_steps_are_as_long_as_their_longest_part() -> None:
    step = model.Step(8, 4, compute=3.0, reduce=2.0, exposed=1.0, launch=0.5, data=1.0)
    assert (step.seconds, step.limit, step.pictures) == (4.0, "compute", 1.0)
    more = {"data": 9.0, "launch": 8.0}
    assert dataclasses.replace(step, **more).limit == "loading"
    assert dataclasses.replace(step, launch=8.0).limit == "launches"
    assert dataclasses.replace(step, exposed=3.5).limit == "all-reduce"


def test_batches_end_at_the_largest_step() -> None:
    for setting in EVERY:
        for gpus in (1, 8, 64, 512):
            batch = model.batch_of(setting, INPUTS, gpus)
            assert batch == 1 or batch * gpus <= setting.limit
    assert model.batch_of(EVERY[0], INPUTS, 10_000) == 1


def test_compressed_bytes_follow_torchs_rule() -> None:
    shapes = [([1024, 512], 3), ([1024], 2), ([6, 5], 1), ([8, 3, 16, 16], 1)]
    for rank in (1, 4, 64):
        total = 0
        for shape, count in shapes:
            rows, columns = shape[0], math.prod(shape[1:])
            smaller, whole, small = _should_compress(rows, columns, rank, model.LEAST_COMPRESSION)
            total += 4 * count * (small if smaller and len(shape) > 1 else whole)
        assert model.sgd_bytes(shapes, rank) == total


def test_a_cache_pays_by_what_it_saves_in_an_epoch() -> None:
    setting = EVERY[1]
    never = {**INPUTS, "data": {"imagenet": {"cpu_ms": 1e6}}}
    assert model.break_even(setting, never, CHOSEN, 8, FAST) == math.inf
    free = {**INPUTS, "data": {"imagenet": {"cpu_ms": 0.0}}}
    assert model.move_seconds(setting, free, CHOSEN, 1, None, FAST) == 0.0
    # The fill is one forward of the teacher, which every later epoch saves.
    assert model.break_even(setting, free, CHOSEN, 1, FAST) == pytest.approx(1, rel=0.05)


def test_assumptions_are_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, picture = tmp_path / "page.md", tmp_path / "scale.png"
    page.write_text("<!-- scale imagenet -->\n<!-- end -->\n", encoding="utf-8")
    at = ["--page", str(page), "--picture", str(picture)]
    assert scale.main([*at, "--gpus", "1", "2", "--share", "0.1", "0.1"]) == 0
    rows = page.read_text(encoding="utf-8").splitlines()
    assert len(rows) == 6 and rows[4].startswith("| 2 | ")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "written" in capsys.readouterr().out
    assert scale.main(["--page", str(tmp_path / "new.md"), *at[2:]]) == 0
    assert (tmp_path / "new.md").read_text("utf-8") == scale.PAGE.read_text("utf-8")
    assert "new.md: written" in capsys.readouterr().out
    for wrong, words in {
        "--share 0.3": "argument --share: expected 2 arguments",
        "--share 0.3 1.2": "--share: must be above 0 and at most 1, got 0.3 1.2",
        "--gpus 8 0": "--gpus: must be above 0, got 8 0",
        "--launch-ms -1 0": "--launch-ms: must be 0 or more, got -1 0",
    }.items():
        with pytest.raises(SystemExit, match="2"):
            scale.main(wrong.split())
        assert words in capsys.readouterr().err


def test_picture_is_small() -> None:
    assert scale.PICTURE.stat().st_size < 100_000


@pytest.mark.parametrize(
    ("value", "text"), [(math.inf, "never"), (0, "0"), (1234.5, "1,234"), (0.0123, "0.012")]
)
def test_numbers_have_two_digits(value: float, text: str) -> None:
    assert tables.number(value) == text


def check(found: dict[str, Any]) -> None:
    """Every picture at most once, ranks alike, and a restart changes nothing."""
    assert found["twice"] == found["lost"] == found["gained"] == found["uneven"] == 0
    assert found["fewest"] == found["most"]
    assert found["unread"] < found["together"]
    assert found["unread"] == found["pictures"] - sum(found["steps"]) * found["together"]


@pytest.mark.parametrize("pictures", [1000, 1024, 1111])
@pytest.mark.parametrize("worlds", [(1, 2, 3, 1), (16, 5, 7, 16), (6, 12)])
def test_ranks_read_every_picture_once_across_restarts(
    pictures: int, worlds: tuple[int, ...]
) -> None:
    check(order.simulate("a", pictures, 48, worlds))


def test_wrong_orders_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    made = order.feed_of

    def confused(pictures: int, rank: int, world: int, together: int, seed: int) -> Any:
        # One rank takes what another one takes, as with a sampler that was not told its rank.
        return made(pictures, max(rank, 1) if world > 1 else rank, world, together, seed)

    monkeypatch.setattr(order, "feed_of", confused)
    found = order.simulate("a", 1000, 48, (4, 2, 4))
    assert found["twice"] and found["unread"] > found["together"]
    with pytest.raises(ValueError, match="must give every process one, got 17 processes"):
        order.ordered(100, 16, [order.Part(17)])


def test_a_step_is_shared_out_as_evenly_as_it_goes() -> None:
    found = order.simulate("a", 1000, 48, (5, 7, 5))
    assert found["twice"] == found["lost"] == found["gained"] == found["uneven"] == 0
    # Nine or ten of 48 pictures in each of twenty steps.
    assert (found["fewest"], found["most"]) == (180, 200)


def check_cache(found: dict[str, Any]) -> None:
    """Every row once, by ranks of like load; after kills all rows, and nothing else, are there."""
    for name in ("twice", "missing", "misnamed", "wrong", "different"):
        assert found[name] == 0, name
    assert found["most"] - found["fewest"] <= 1
    assert found["shards"] == [world - 1 for world in found["worlds"][:-1]]
    # The batch of every torn row.
    assert found["again"] == sum(found["shards"]) * found["batch"]


@pytest.mark.parametrize("worlds", [(2, 3, 2), (16, 3, 16), (5, 1, 4)])
def test_ranks_fill_a_cache_once_across_kills(worlds: tuple[int, ...]) -> None:
    found = cache.simulate_cache("a", 1000, 4, worlds)
    if 1 in worlds:
        # A rank alone writes no shard, and a kill finds its rows where they belong.
        assert found["shards"][worlds.index(1)] == 0
    check_cache(found)


def test_wrong_caches_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Confused(cache.Teacher):  # type: ignore[name-defined, misc]
        def __call__(self, images: Any) -> Any:
            return super().__call__(images) + 1

    monkeypatch.setattr(cache, "Teacher", Confused)
    found = cache.simulate_cache("a", 60, 4, (2, 3))
    assert found["wrong"] == 120 and found["different"] == 0


def test_an_error_of_a_rank_is_told(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("not a folder", encoding="utf-8")
    with pytest.raises(RuntimeError, match="a rank of 3 failed"):
        cache.built(tmp_path / "c", 60, 4, 3, None)
    with pytest.raises(ValueError, match="must have one of its 7 batches"):
        cache.simulate_cache("a", 60, 4, (8, 2))


def test_whole_sets_were_read_and_cached_once() -> None:
    for found in INPUTS["simulations"]:
        assert found["twice"] == found["lost"] == found["gained"] == found["uneven"] == 0
        assert found["unread"] < found["together"]
    check_cache(INPUTS["cache_simulation"])


# Whole sets are simulated by ``python -m bench.scale --measure``.
@pytest.mark.slow
@pytest.mark.parametrize(("pictures", "together"), [(100_000, 4096), (100_003, 512)])
def test_512_ranks_read_pictures_once(pictures: int, together: int) -> None:
    check(order.simulate("a", pictures, together, (512, 48, 512)))


@pytest.mark.slow
def test_512_ranks_fill_a_cache_once() -> None:
    check_cache(cache.simulate_cache("a", 200_000, 64, (512, 48, 512)))
