# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.gpu --tune``: measures block sizes, and writes the table of this architecture.

From the blocks in use it changes one thing at a time: columns, stages, warps, rows. Processes
compile all candidates at once and check their results against the reference; then the device is
left to one process that times those that are right, in turns with the blocks in use. The better
ones are where the next round starts. At the end each entry is timed once more beside what it was,
and kept where it wins by more than the spread of the samples.

ARCH.json is the table, rewritten after every wave of entries; tune_NAME.jsonl has every answer, so
that the same command goes on where it was stopped.
"""

import json
import os
import queue
import statistics
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from typing import Any

import torch
import triton

from bench.gpu_answers import Answer, Answers, OutOfTime, Question
from bench.gpu_source import fingerprint
from bench.gpu_stages import Settings, environment
from bench.gpu_tables import table as markdown
from bench.gpu_tune_cases import (
    FLASH_DIMS,
    FLASH_DTYPES,
    FLASH_TOKENS,
    Entry,
    changes,
    entries,
    neighbours,
    setups,
)
from bench.gpu_worker import Worker
from kdfast.kernels import _blocks
from kdfast.kernels._blocks import Blocks, Flash, Table, name_of
from kdfast.ops._flash import installed

ROUNDS = 3
# Processes that compile at most, with so many GiB of the device for each.
WORKERS, WORKER_GIB = 15, 4
# Questions of one process.
LASTS = 200
# In a dry run: entries, candidates and rounds.
DRY_ENTRIES, DRY_CANDIDATES = 2, 2
INTERPRETED = "interpreter"


class Tuner:
    """The search, and what it has found so far.

    Attributes:
        best: The blocks of each entry, as found so far.
        rows: For each entry that was timed to the end: what it was, what won, and the times.
    """

    def __init__(self, settings: Settings, arch: str, answers: Answers, workers: list[Worker]):
        self.settings, self.arch, self.answers, self.workers = settings, arch, answers, workers
        start = _blocks.table("" if settings.dry else arch)
        self.start, self.best = dict(start.blocks), dict(start.blocks)
        self.rows: list[dict[str, Any]] = []
        self.wrong: dict[str, str] = {}
        self.flash: list[Flash] = []
        self.flash_rows: list[dict[str, Any]] = []

    def waves(self) -> list[list[Entry]]:
        """The entries; in a dry run few."""
        return [entries()[0][:DRY_ENTRIES]] if self.settings.dry else entries()

    def run(self) -> None:
        """Searches all waves, writing the files after each.

        Raises:
            OutOfTime: It is not complete.
        """
        for wave in self.waves():
            found = {entry: self.start[entry.key] for entry in wave}
            for number in range(1 if self.settings.dry else ROUNDS):
                if not self.round(found, number):
                    break
            for entry, blocks in found.items():
                self.settle(entry, blocks)
            self.write()
        self.ask_flash()
        self.write()

    def round(self, found: dict[Entry, Blocks], number: int) -> bool:
        """Tries the neighbours of the blocks of every entry; whether one became better."""
        tried = {entry: self.candidates(entry, blocks) for entry, blocks in found.items()}
        count = sum(map(len, tried.values()))
        print(f"== {', '.join(name_of(e.key) for e in tried)}: round {number}, {count}", flush=True)
        right = self.checked(found, tried)
        better = False
        for entry, candidates in right.items():
            wins = self.compared(entry, [found[entry], *candidates])
            if wins and wins[0][1] != found[entry]:
                found[entry], better = wins[0][1], True
        return better

    def candidates(self, entry: Entry, blocks: Blocks) -> list[Blocks]:
        """Neighbours that change a launch of some call of the entry."""
        every = [
            other
            for other in neighbours(blocks)
            if any(changes(blocks, other, setups()[place]) for place in entry.setups)
        ]
        return every[:DRY_CANDIDATES] if self.settings.dry else every

    def checked(
        self, found: dict[Entry, Blocks], tried: dict[Entry, list[Blocks]]
    ) -> dict[Entry, list[Blocks]]:
        """The candidates that give right results in every call that they change."""
        questions = [
            (entry, blocks, self.question(entry, place, do="check", blocks=blocks._asdict()))
            for entry, candidates in tried.items()
            for blocks in candidates
            for place in entry.setups
            if changes(found[entry], blocks, setups()[place])
        ]
        bad = set()
        answers = self.together([question for _, _, question in questions])
        for (entry, blocks, question), answer in zip(questions, answers, strict=True):
            if "error" in answer:
                bad.add((entry, blocks))
                words = f"{name_of(entry.key)} {blocks}, {setups()[question['setup']]}"
                self.wrong[words] = answer["error"]
        return {e: [b for b in candidates if (e, b) not in bad] for e, candidates in tried.items()}

    def question(self, entry: Entry, place: int, **more: Any) -> Question:
        """About one call of an entry."""
        named = {"setup": place, "direction": entry.direction, "key": name_of(entry.key)}
        # As they come back from the file.
        return dict(json.loads(json.dumps(named | more)))

    def together(self, questions: Sequence[Question]) -> list[Answer]:
        """Answers by all processes."""
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for place in range(len(questions)):
            waiting.put(place)
        found: list[Answer | None] = [None] * len(questions)

        def work(worker: Worker) -> None:
            try:
                while True:
                    place = waiting.get_nowait()
                    found[place] = self.answers.ask(worker, questions[place])
            except (queue.Empty, OutOfTime):
                return

        threads = [threading.Thread(target=work, args=(worker,)) for worker in self.workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if None in found:
            raise OutOfTime
        return [answer for answer in found if answer is not None]

    def compared(self, entry: Entry, variants: Sequence[Blocks]) -> list[tuple[float, Blocks]]:
        """The variants that win against the first one, the best first, with their mean gain."""
        if len(variants) < 2:
            return []
        times = [self.times(entry, place, variants) for place in entry.setups]
        found = []
        for i, blocks in enumerate(variants[1:], 1):
            gain = won([[row[0], row[i]] for row in times])
            if gain is not None:
                found.append((gain, blocks))
        return sorted(found, key=lambda pair: -pair[0])

    def times(self, entry: Entry, place: int, variants: Sequence[Blocks], last: str = "") -> Any:
        """Median and spread of each variant in one call; None for one that does not run."""
        blocks = [blocks._asdict() for blocks in variants]
        question = self.question(entry, place, do="time", variants=blocks, last=last)
        answer = self.answers.ask(self.workers[0], question)
        if "error" in answer:
            self.wrong[f"timing {name_of(entry.key)}, {setups()[place]}"] = answer["error"]
            return [None] * len(variants)
        return answer["us"]

    def settle(self, entry: Entry, blocks: Blocks) -> None:
        """Times an entry once more beside what it was, and keeps it only if it wins again."""
        before = self.start[entry.key]
        if blocks == before:
            return
        times = [self.times(entry, place, [before, blocks], "last") for place in entry.setups]
        gain = won(times)
        if gain is not None:
            self.best[entry.key] = blocks
        names = [str(setups()[place]) for place in entry.setups]
        row = {"entry": name_of(entry.key), "before": before._asdict(), "after": blocks._asdict()}
        self.rows.append(row | {"gain": gain, "us": dict(zip(names, times, strict=True))})

    def ask_flash(self) -> None:
        """Where flash-attn is faster, forward and with the gradients, by more than the spread."""
        if installed() is None:
            print("flash-attn is not installed, so it is not measured", flush=True)
            return
        for dtype in FLASH_DTYPES:
            for dim in FLASH_DIMS:
                run: list[tuple[int, int]] = []
                for tokens, matrices in FLASH_TOKENS.items():
                    question = {"flash": [dtype, dim, tokens, matrices]}
                    answer = self.answers.ask(self.workers[0], question)
                    self.flash_rows.append({"call": question["flash"]} | answer)
                    if "error" in answer or not all(faster(x) for x in answer.values()):
                        self.flash += flash_wins(dtype, dim, run)
                        run = []
                    else:
                        run.append((tokens, matrices))
                self.flash += flash_wins(dtype, dim, run)

    def write(self, note: str = "complete") -> None:
        """Writes the table, and what was measured."""
        facts = {key: str(value) for key, value in self.answers.facts.items() if key != "arch"}
        facts["date"] = time.strftime("%Y-%m-%d")
        found = Table(self.best, "", installed() or "", tuple(self.flash))
        self.settings.write(f"{self.arch}.json", _blocks.text_of(self.arch, facts, found))
        self.settings.write(f"tune_{self.settings.name}.md", self.report(note))

    def report(self, note: str) -> str:
        """What was measured, as Markdown."""
        rows = [
            [row["entry"], *(shown(row[k]) for k in ("before", "after")), name, *text_of(times)]
            + ["kept" if row["gain"] is not None else "no more than the spread"]
            for row in self.rows
            for name, times in row["us"].items()
        ]
        header = ["entry", "before", "after", "call", "us before", "us after", "verdict"]
        parts = [f"# Block sizes of {self.arch}\n\n{self.answers.facts}, {note}."]
        parts.append(f"## Candidates that won a round\n\n{markdown(header, rows)}")
        flash = [
            [*row["call"], row.get("error") or {k: row[k] for k in ("forward", "both")}]
            for row in self.flash_rows
        ]
        header = ["dtype", "head dim", "tokens", "heads of all images", "us: kdfast, flash-attn"]
        parts.append(f"## flash-attn {installed() or 'is not installed'}\n\n")
        parts[-1] += markdown(header, flash)
        lines = "\n".join(f"- {words}: {why}" for words, why in self.wrong.items()) or "None."
        parts.append(f"## Candidates that failed\n\n{lines}")
        return "\n\n".join(parts) + "\n"


def won(times: Iterable[Sequence[Sequence[float] | None]]) -> float | None:
    """Mean gain of the second of two variants over all calls, None if it is not above the spread.

    No call may be slower by more than the spread of its samples.

    Args:
        times: For each call (median, spread) of both.
    """
    gains, spreads = [], []
    for before, after in times:
        if before is None or after is None:
            return None
        gains.append(1 - after[0] / before[0])
        spreads.append((before[1] + after[1]) / 2 / before[0])
        if gains[-1] < -spreads[-1]:
            return None
    gain = statistics.mean(gains)
    return gain if gain > statistics.mean(spreads) else None


def faster(pair: Sequence[Sequence[float]]) -> bool:
    """Whether the second of two (median, spread) is smaller by more than the spread."""
    return won([pair]) is not None


def flash_wins(dtype: str, dim: int, run: Sequence[tuple[int, int]]) -> list[Flash]:
    """The entry of neighbouring lengths at which flash-attn won; none if there are none."""
    if not run:
        return []
    tokens, matrices = zip(*run, strict=True)
    return [Flash(dtype, dim, min(tokens), max(tokens), max(matrices))]


def shown(blocks: dict[str, Any]) -> str:
    """Blocks in a table."""
    rows = ", ".join(f"{size} by {warps} warps" for size, warps in blocks["rows"])
    return f"{rows}; {blocks['cols']} columns; {blocks['stages']} stages"


def text_of(times: Sequence[Sequence[float] | None]) -> list[str]:
    """Medians and spreads in a table."""
    return ["fails" if x is None else f"{x[0]:.1f} +- {x[1]:.1f}" for x in times]


def worker_count(dry: bool) -> int:
    """Processes that compile: as many as there are cores and memory of the device for."""
    if dry:
        return 1
    gib = torch.cuda.get_device_properties(0).total_memory >> 30
    return max(1, min(WORKERS, len(os.sched_getaffinity(0)) - 1, gib // WORKER_GIB))


def facts_of(dry: bool) -> tuple[str, dict[str, str]]:
    """The architecture, and what answers depend on besides the question."""
    arch = INTERPRETED if dry else _blocks.architecture(torch.device("cuda", 0))
    device = "none" if dry else torch.cuda.get_device_name()
    facts = {"arch": arch, "device": device, "torch": torch.__version__}
    return arch, facts | {"triton": triton.__version__, "sources": fingerprint("attention_distill")}


def run(settings: Settings) -> int:
    """Measures as much as there is time for; 1 if that is not everything."""
    arch, facts = facts_of(settings.dry)
    answers = Answers(settings, facts)
    with ExitStack() as stack:
        workers = [
            stack.enter_context(
                closing(Worker("bench.gpu_tune_worker", environment(settings.dry), "tuning", LASTS))
            )
            for _ in range(worker_count(settings.dry))
        ]
        tuner = Tuner(settings, arch, answers, workers)
        note = "complete"
        try:
            tuner.run()
        except OutOfTime:
            note = "not complete: no time left; the same command goes on"
        tuner.write(note)
    print(tuner.report(note))
    print(
        f"wrote {settings.out / f'{arch}.json'}: copy it to kernels/tables/, or set KDFAST_BLOCKS"
    )
    return int(note != "complete")
