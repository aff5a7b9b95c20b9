# SPDX-License-Identifier: Apache-2.0
"""Measured times of blocks, their files, and the best choice within a latency."""

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import kdfast
from kdfast.machine.cache import cache_folder
from kdfast.pruning import block_times, latency_file
from kdfast.pruning.block_times import (
    BlockTimes,
    LatencyTable,
    added,
    monotone,
    unit_grid,
    unit_step,
)
from kdfast.pruning.by_latency import Choice, select, solved, undominated
from kdfast.pruning.families import anatomy_of
from kdfast.pruning.latency_file import Origin, Setting
from tests.test_prune_families import small

pytestmark = pytest.mark.filterwarnings("ignore:calibrate. .* tokens")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures little and badly: what the numbers are does not matter."""
    monkeypatch.setattr("kdfast.machine.timing.SAMPLE_SECONDS", 1e-5)
    monkeypatch.setattr(block_times, "ROUNDS", 2)
    monkeypatch.setattr(block_times, "HEADS", 3)
    monkeypatch.setattr(block_times, "SHARES", (0, 1 / 2, 1))


def planted(model: torch.nn.Module, batch: int = 1, fixed: float = 1.0) -> LatencyTable:
    """A table of a model with 0.3 ms a head and 0.01 ms a hidden unit."""
    anatomy = anatomy_of("test", model)
    groups: dict[tuple[int, int], list[int]] = {}
    widths = [len(s.held) for s in anatomy.mlps] or [0] * len(anatomy.attentions)
    for index, (site, width) in enumerate(zip(anatomy.attentions, widths, strict=True)):
        groups.setdefault((len(site.held), width), []).append(index)
    kinds = [
        BlockTimes(
            blocks,
            [0, heads],
            sorted({0, units}),
            [[0.3 * h + 0.01 * u for u in sorted({0, units})] for h in (0, heads)],
        )
        for (heads, units), blocks in groups.items()
    ]
    dense = fixed + sum(kind.ms[-1][-1] * len(kind.blocks) for kind in kinds)
    setting = Setting.of(model, batch, torch.float32, (32, 32))
    return LatencyTable(dense, fixed, 0.02, kinds, setting, Origin("planted"))


def test_the_solver_finds_what_trying_everything_finds() -> None:
    numbers = random.Random(0)
    for case in range(60):
        rows = []
        for _ in range(numbers.choice([1, 2, 4])):
            every = [
                Choice(h, u, numbers.random() * (h + u), numbers.random() * 10 ** -(h + u))
                for h in range(3)
                for u in range(2)
            ]
            every[0] = Choice(0, 0, 0.0, 1.0)
            rows.append(every)
        dense = 0.5 + sum(max(c.ms for c in row) for row in rows)
        table = LatencyTable(dense, 0.5, 0.0, [], None, Origin(""))  # type: ignore[arg-type]
        possible = [c for c in itertools.product(*rows) if not all(x.empty for x in c)]
        fastest = min(0.5 + sum(x.ms for x in c) for c in possible)
        goal = fastest + (dense - fastest) * numbers.random()
        meeting = [c for c in possible if 0.5 + sum(x.ms for x in c) <= goal]
        best = min(sum(x.loss for x in c) for c in meeting)
        for given in (rows, [undominated(row) for row in rows]):
            found = solved(given, table, goal)
            assert sum(x.loss for x in found) == pytest.approx(best, rel=1e-5), case
            assert 0.5 + sum(x.ms for x in found) <= goal * (1 + 1e-6)
        with pytest.raises(ValueError, match=f"at least {fastest:.2f} ms, a speedup of"):
            solved(rows, table, fastest * 0.98)


def test_choices_that_are_worse_and_slower_go() -> None:
    a, b, c = Choice(1, 0, 1.0, 0.5), Choice(0, 1, 2.0, 0.6), Choice(1, 1, 3.0, 0.0)
    empty = Choice(0, 0, 0.0, 1.0)
    assert undominated([c, b, a, empty]) == [empty, a, c]


def test_interpolation_is_linear_and_never_falls() -> None:
    kind = BlockTimes([0], [0, 2, 6], [0, 10], [[0, 1.0], [2.0, 3.0], [4.0, 9.0]])
    assert [kind.at(h, u) for h, u in ((0, 0), (2, 10), (6, 0))] == [0, 3.0, 4.0]
    assert kind.at(1, 5) == 1.5 and kind.at(4, 10) == 6.0 and kind.at(3, 0) == 2.5
    with pytest.raises(ValueError, match=r"must be in \[0, 6\], got 7"):
        kind.at(7, 0)
    generator = numpy.random.default_rng(0)
    clean = numpy.add.outer(numpy.arange(7.0), 2 * numpy.arange(7.0))
    noisy = clean + generator.normal(size=clean.shape)
    smooth = numpy.array(monotone(noisy.tolist()))
    assert (numpy.diff(smooth, axis=0) >= 0).all() and (numpy.diff(smooth, axis=1) >= 0).all()
    assert smooth[0, 0] == 0
    # It is nearer to the truth than what was measured, up to the constant.
    errors = [x - x.mean() - (clean - clean.mean()) for x in (smooth, noisy)]
    assert numpy.abs(errors[0]).mean() < numpy.abs(errors[1]).mean()
    assert monotone(clean.tolist()) == clean.tolist()
    fine = BlockTimes([0], list(range(7)), list(range(0, 70, 10)), smooth.tolist())
    times = [[fine.at(h, u) for u in range(61)] for h in range(7)]
    assert (numpy.diff(times, axis=0) >= -1e-12).all()
    assert (numpy.diff(times, axis=1) >= -1e-12).all()


def test_times_of_attention_and_mlp_add_up() -> None:
    heads, units = [0, 1, 2, 3, 4], [0, 10, 20, 30, 40]
    clean = numpy.add.outer(2.0 + numpy.array(heads), 0.5 * numpy.array(units))
    clean[0], clean[:, 0] = numpy.arange(5) ** 2, numpy.arange(5) ** 3
    numpy.testing.assert_allclose(added(clean.tolist(), heads, units), clean, atol=1e-12)
    outlier = clean.copy()
    outlier[2, 3] += 50
    numpy.testing.assert_allclose(added(outlier.tolist(), heads, units), clean, atol=1e-12)
    edge = clean.copy()
    edge[0, 3] += 50
    numpy.testing.assert_allclose(added(edge.tolist(), heads, units), edge, atol=1e-12)
    assert added([[0.0, 1.0]], [0], [0, 4]) == [[0.0, 1.0]]


def test_widths_are_what_kernels_like() -> None:
    assert [unit_step(n) for n in (1536, 256, 192, 64, 20, 3)] == [32, 32, 16, 8, 2, 1]
    for count in (1536, 2730, 192, 7, 1):
        grid, step = unit_grid(count), unit_step(count)
        assert grid[0] == 0 and grid[-1] == count and all(x % step == 0 for x in grid[:-1])


def test_selection_is_the_best_of_all() -> None:
    """Against every combination, with losses counted from the calibration's own errors."""
    torch.manual_seed(0)
    model, x = small("vit_small_patch14_reg4_dinov2")
    calibration = kdfast.calibrate(model, [torch.randn_like(x) for _ in range(20)], progress=False)
    table = planted(model)
    found = select(model, calibration, speedup=1.5, table=table, progress=False)
    assert found.predicted_ms <= table.dense_ms / 1.5 and found.speedup >= 1.5
    counts = [len(row) for row in found.heads], [len(row) for row in found.mlp or []]
    assert found.predicted_ms == pytest.approx(table.predict(*counts))
    assert all(row == sorted(set(row)) for row in (*found.heads, *(found.mlp or [])))
    # FLOPs know nothing of these times: the same error costs more under another budget.
    other = select(model, calibration, latency_ms=found.predicted_ms, table=table, progress=False)
    assert other.loss == pytest.approx(found.loss)
    whole = select(model, calibration, latency_ms=table.dense_ms, table=table, progress=False)
    assert whole.loss == 0 and counts != ([len(r) for r in whole.heads], [])
    least = select(model, calibration, latency_ms=table.fixed_ms + 0.4, table=table, progress=False)
    assert sum(map(len, least.heads)) + sum(map(len, least.mlp or [])) > 0
    assert least.empty and least.loss > found.loss
    small_model = kdfast.prune_heads(model, least.heads, mlp=least.mlp, compensate=calibration)
    assert len(kdfast.drop_blocks(small_model).dropped) == len(least.empty)


def test_losses_are_errors_of_the_output() -> None:
    """The sum that is minimised is what the scores add up to at the corners of their curves."""
    model, x = small("vit_small_patch14_reg4_dinov2")
    calibration = kdfast.calibrate(model, [torch.randn_like(x) for _ in range(20)], progress=False)
    nothing = select(model, calibration, latency_ms=1.5, table=planted(model), progress=False)
    scores = [
        function(model, "reconstruction", calibration, progress=False).scores
        for function in (kdfast.head_scores, kdfast.mlp_scores)
    ]
    total = sum(float(row.sum()) for rows in scores for row in rows)
    assert 0 < nothing.loss <= total * (1 + 1e-6)


def test_models_without_prunable_mlps_keep_them() -> None:
    model, x = small("vit_small_patch16_18x2_224")
    assert not anatomy_of("test", model).mlps
    calibration = kdfast.calibrate(model, [torch.randn_like(x) for _ in range(5)], progress=False)
    table = planted(model)
    found = select(model, calibration, speedup=1.2, table=table, progress=False)
    assert found.mlp is None and found.empty == []
    assert table.predict([len(row) for row in found.heads], []) == found.predicted_ms


def test_measured_tables_are_kept(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = small("vit_tiny_patch16_224")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options: dict[str, Any] = {"cache": tmp_path, "progress": False}
    first = kdfast.latency_table(model, **options)
    assert first.origin == Origin("measured now")
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())
    (kind,) = first.kinds
    sizes = anatomy_of("test", model)
    assert kind.blocks == list(range(len(sizes.attentions)))
    assert kind.heads[-1] == len(sizes.attentions[0].held)
    assert kind.units[-1] == len(sizes.mlps[0].held)
    assert first.predict([kind.heads[-1]] * len(kind.blocks), []) == pytest.approx(first.dense_ms)
    assert first.predict([0] * len(kind.blocks), [0] * len(kind.blocks)) == first.fixed_ms > 0
    second = kdfast.latency_table(model, **options)
    assert replace(second, origin=first.origin) == first
    (file,) = (tmp_path / "latency").iterdir()
    assert f"read from {file}" in second.origin.text
    # Other batches, types and threads are other tables; without a cache nothing is written.
    kdfast.latency_table(model, batch=2, **options)
    kdfast.latency_table(model, dtype=torch.bfloat16, **options)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    kdfast.latency_table(model, **options)
    assert len(list((tmp_path / "latency").iterdir())) == 4
    kdfast.latency_table(model, **{**options, "cache": False})
    assert len(list((tmp_path / "latency").iterdir())) == 4


def test_old_and_damaged_files_are_measured_again(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = small("vit_tiny_patch16_224")
    options: dict[str, Any] = {"cache": tmp_path, "progress": False}
    kdfast.latency_table(model, **options)
    (file,) = (tmp_path / "latency").iterdir()
    good = json.loads(file.read_text())

    def changed(**new: Any) -> str:
        return json.dumps({**good, **new})

    old = {**good["setting"], "versions": ["1.0", "0.0", "x"]}
    kind = good["kinds"][0]
    texts = {
        file.read_text()[:-20]: "is damaged",
        "\xff": "is damaged",
        "[]": "is not of format",
        changed(format="other/1"): "is not of format",
        changed(setting=old): "is of other versions",
        changed(setting={}): "does not say what it belongs to",
        changed(dense_ms="fast"): "its numbers are no table",
        changed(kinds=[]): "its numbers are no table",
        changed(kinds=[{**kind, "ms": [[1.0]]}]): "its numbers are no table",
        changed(kinds=[{**kind, "heads": [3, 1]}]): "its numbers are no table",
        changed(kinds=[{**kind, "ms": [[float("nan")] * 3] * 3}]): "its numbers are no table",
    }
    calls = []
    monkeypatch.setattr(
        block_times._Measurement, "table", lambda self, origin: calls.append(origin) or table
    )
    table = replace(planted(model), setting=Setting(**good["setting"]))
    for text, why in texts.items():
        file.write_text(text, encoding="latin-1")
        kdfast.latency_table(model, **options)
        assert calls[-1].again and "measured again: " in calls[-1].text and why in calls[-1].text
        # It took the file's place.
        assert kdfast.latency_table(model, **options).origin.text.startswith("read from")
    assert len(calls) == len(texts)
    data = [torch.randn_like(x) for _ in range(3)]
    calibration = kdfast.calibrate(model, data, progress=False)
    file.write_text("[]")
    table = replace(table, origin=Origin("measured again: it is broken", again=True))
    with pytest.warns(UserWarning, match="select: latencies measured again: it is broken"):
        select(model, calibration, speedup=1.1, cache=tmp_path, progress=False)


def test_models_of_several_kinds_of_blocks(quick: None) -> None:
    model, _ = small("swin_tiny_patch4_window7_224")
    table = kdfast.latency_table(model, cache=False, progress=False)
    assert [kind.blocks for kind in table.kinds] == [[0, 1], [2]]
    anatomy = anatomy_of("test", model)
    heads = [len(site.held) for site in anatomy.attentions]
    units = [len(site.held) for site in anatomy.mlps]
    assert table.predict(heads, units) == pytest.approx(table.dense_ms)


def test_the_folder_of_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KDFAST_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("KDFAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "kdfast"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "kdfast"


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small("vit_tiny_patch16_224")
    calibration = kdfast.calibrate(model, [torch.randn_like(x) for _ in range(3)], progress=False)
    table = planted(model)

    def bad(match: str, kind: type[Exception] = ValueError, **given: Any) -> None:
        options = {"calibration": calibration, "table": table, "progress": False, **given}
        with pytest.raises(kind, match=match):
            select(model, **options)

    bad("one of speedup and latency_ms must be given, got neither")
    bad("one of speedup and latency_ms must be given, got both", speedup=2.0, latency_ms=1.0)
    bad("speedup must be above 1, got 1.0", speedup=1.0)
    bad("latency_ms must be above 0, got -1.0", latency_ms=-1.0)
    bad(r"the goal must be at least \d+\.\d+ ms, a speedup of \d+\.\d+: 1.00 ms", speedup=50.0)
    bad("belong to the table, got both", speedup=2.0, batch=2)
    bad("calibration must be a result of kdfast.calibrate", TypeError, speedup=2.0, calibration=[])
    other, y = small("vit_small_patch14_reg4_dinov2")
    bad("the table must be of a model with", speedup=2.0, table=planted(other))
    moments = kdfast.calibrate(other, [y], progress=False)
    bad("select: the calibration must", speedup=2.0, calibration=moments)
    with pytest.raises(ValueError, match="latency_table: batch must be an int of at least 1"):
        kdfast.latency_table(model, batch=0)
    with pytest.raises(TypeError, match="latency_table: dtype must be a floating type"):
        kdfast.latency_table(model, dtype=torch.int8)
    with pytest.raises(TypeError, match="latency_table: model must be one of"):
        kdfast.latency_table(torch.nn.Linear(2, 2))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    bad("select: needs scipy; pip install", ImportError, speedup=2.0)
    assert latency_file.FORMAT == "kdfast.latency/1"
