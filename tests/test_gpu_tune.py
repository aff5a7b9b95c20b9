# SPDX-License-Identifier: Apache-2.0
"""The rules of `python -m bench.gpu --tune`: what is tried, what wins, what is asked again."""

import importlib
import json
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def bench() -> Any:
    """Gives modules of bench/."""
    return lambda name: importlib.import_module(f"bench.{name}")


@pytest.fixture
def settings(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of a card, with the copies of its answers in a folder of the test."""
    answers = bench("gpu_answers")
    monkeypatch.setattr(answers.Answers.__init__, "__defaults__", (tmp_path / "kept",))
    return bench("gpu_stages").Settings("card", tmp_path, time.monotonic() + 1000, False)


def test_every_entry_of_the_table_is_measured(bench: Any) -> None:
    cases = bench("gpu_tune_cases")
    blocks = importlib.import_module("kdfast.kernels._blocks")
    waves = cases.entries()
    found = [entry.key for wave in waves for entry in wave]
    assert len(found) == len(set(found)) and set(found) == set(blocks.BLOCKS)
    # What models are trained in comes first.
    assert [entry.key for entry in waves[0]] == [("fwd", 64, 2), ("dkdv", 64, 2), ("dq", 64, 2)]
    assert [key[2] for key in found] == sorted(key[2] for key in found)


def test_checks_see_the_numbers_that_are_timed(bench: Any) -> None:
    """The compiler knows of a whole number whether it is 1 and whether 16 divides it."""
    for setup in bench("gpu_tune_cases").SETUPS:
        shape = setup.shape
        full, few = (n * shape.heads * shape.tokens for n in (shape.batch, setup.images))
        assert (full % 16 == 0) == (few % 16 == 0), setup
        turns = [n // setup.biases for n in (shape.batch, setup.images) if setup.biases]
        assert [n == 1 for n in turns] in ([], [False, False], [False, True]), setup


def test_neighbours_differ_in_one_thing_and_can_be_launched(bench: Any) -> None:
    cases = bench("gpu_tune_cases")
    blocks = importlib.import_module("kdfast.kernels._blocks")
    for key, start in blocks.BLOCKS.items():
        found = list(cases.neighbours(start))
        assert start not in found and len(set(found)) == len(found)
        for other in found:
            blocks.blocks_of(blocks.name_of(key), other._asdict())
            parts = zip(start, other, strict=True)
            assert sum(a != b for a, b in parts) == 1, (key, other)


@pytest.mark.parametrize(
    ("times", "gain"),
    [
        ([[(100, 2), (80, 2)]], 0.2),
        ([[(100, 30), (80, 30)]], None),  # within the spread
        ([[(100, 2), (80, 2)], [(100, 2), (100, 2)]], 0.1),
        ([[(100, 2), (80, 2)], [(100, 2), (110, 2)]], None),  # a call is slower
        ([[(100, 2), None]], None),  # a call does not run
        ([[(100, 2), (120, 2)]], None),
    ],
)
def test_what_wins(bench: Any, times: Any, gain: float | None) -> None:
    found = bench("gpu_tune").won(times)
    assert found == (None if gain is None else pytest.approx(gain))


def test_wins_of_flash_are_neighbouring_lengths(bench: Any) -> None:
    tune = bench("gpu_tune")
    assert tune.flash_wins("bfloat16", 64, []) == []
    (win,) = tune.flash_wins("bfloat16", 64, [(197, 768), (257, 1024)])
    assert win == ("bfloat16", 64, 197, 257, 1024)


class Asked:
    """A worker that remembers its questions."""

    def __init__(self, answer: dict[str, Any]) -> None:
        self.found, self.questions = answer, list[Any]()

    def answer(self, question: Any, seconds: float) -> dict[str, Any]:
        self.questions.append(question)
        return self.found


def test_answers_are_kept(bench: Any, settings: Any) -> None:
    answers = bench("gpu_answers")
    facts, question = {"arch": "sm_90"}, {"do": "check", "setup": 0}
    worker = Asked({"right": True})
    for _ in range(2):
        assert answers.Answers(settings, facts).ask(worker, question) == {"right": True}
    assert worker.questions == [question]
    path = settings.out / "tune_card.jsonl"
    # Of a process that was killed while it wrote.
    path.write_text(path.read_text() + '[{"do": "che')
    assert answers.Answers(settings, facts).ask(worker, question) == {"right": True}
    assert len(path.read_text().splitlines()) == 2
    # Another card or compiler.
    answers.Answers(settings, {"arch": "sm_80"}).ask(worker, question)
    assert worker.questions == [question] * 2
    assert json.loads(path.read_text().splitlines()[0]) == {"arch": "sm_80"}
    # Results that go elsewhere.
    path.unlink()
    answers.Answers(settings, {"arch": "sm_80"}).ask(worker, question)
    assert worker.questions == [question] * 2
    assert path.read_text() == (settings.out / "kept" / path.name).read_text()


def test_nothing_is_asked_when_time_is_up(bench: Any, tmp_path: Path) -> None:
    answers, stages = bench("gpu_answers"), bench("gpu_stages")
    settings = stages.Settings("card", tmp_path, time.monotonic() + 5, False)
    worker = Asked({"right": True})
    with pytest.raises(answers.OutOfTime):
        answers.Answers(settings, {}, None).ask(worker, {"do": "check"})
    assert not worker.questions


class Device:
    """Workers for whom fewer columns are faster, and 4 warps wrong."""

    def answer(self, question: Any, seconds: float) -> dict[str, Any]:
        if question["do"] == "check":
            wrong = question["blocks"]["rows"][0][1] == 4
            return {"error": "AssertionError: result 0"} if wrong else {"right": True}
        return {"us": [[100.0 + v["cols"], 1.0] for v in question["variants"]]}


def test_the_search_ends_at_the_best_that_is_right(
    bench: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune, answers = bench("gpu_tune"), bench("gpu_answers")
    blocks = importlib.import_module("kdfast.kernels._blocks")
    cases = bench("gpu_tune_cases")
    monkeypatch.setattr(tune, "installed", lambda: None)
    monkeypatch.setattr(tune.Tuner, "waves", lambda self: cases.entries()[:1])
    kept = answers.Answers(settings, {"arch": "sm_75", "device": "card"})
    found = tune.Tuner(settings, "sm_75", kept, [Device(), Device()])
    found.run()
    first = ("fwd", 64, 2)
    # From 64 columns three rounds of halving would go below 16.
    assert found.best[first].cols == 16 and found.best[first].rows == blocks.BLOCKS[first].rows
    assert any("128, 4" in words for words in found.wrong)
    table = blocks.read_table(settings.out / "sm_75.json", "sm_75", "test")
    assert table.blocks == found.best and "measured on card" in table.source
    assert "kept" in (settings.out / "tune_card.md").read_text()


def test_blocks_that_lose_at_the_end_are_not_kept(bench: Any, settings: Any) -> None:
    tune, answers = bench("gpu_tune"), bench("gpu_answers")
    kept = answers.Answers(settings, {"arch": "sm_75", "device": "card"})
    found = tune.Tuner(settings, "sm_75", kept, [Asked({"us": [[100, 9], [99, 9]]})])
    entry = bench("gpu_tune_cases").entries()[0][0]
    found.settle(entry, found.start[entry.key]._replace(cols=32))
    assert found.best == found.start
    assert "no more than the spread" in found.report("complete")
