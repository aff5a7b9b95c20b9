# SPDX-License-Identifier: Apache-2.0
"""Questions to processes of the device, each asked once: the answers are kept in a file."""

import json
import threading
from pathlib import Path
from typing import Any

from bench.gpu_stages import ROOT, Settings, replace
from bench.gpu_worker import Worker

# Seconds for one answer.
PATIENCE = 120
# What is left of the time when no question is asked any more, to write the files.
REST = 10
KEPT = ROOT / "build" / "gpu"
Question = dict[str, Any]
Answer = dict[str, Any]


class OutOfTime(Exception):
    """The command has to end."""


class Answers:
    """Asks each question once: answers are kept in a file, for the next run of the command.

    A second copy is in a folder of the checkout, for a next run whose results go elsewhere.
    """

    def __init__(self, settings: Settings, facts: dict[str, str], kept: Path | None = KEPT) -> None:
        """Reads what an earlier run has left.

        Args:
            settings: Where the file goes.
            facts: What answers depend on besides the question: those of others are dropped.
            kept: Folder of the second copy; None in a dry run.
        """
        self.settings, self.facts = settings, facts
        self.path = settings.out / f"tune_{settings.name}.jsonl"
        self.copies = [self.path]
        if kept is not None and not settings.dry:
            kept.mkdir(parents=True, exist_ok=True)
            self.copies.append(kept / self.path.name)
        self.known: dict[str, Answer] = {}
        self.asked = 0
        self._lock = threading.Lock()
        self._read()

    def _read(self) -> None:
        found = next((path for path in self.copies if path.exists()), None)
        lines = found.read_text(encoding="utf-8").splitlines() if found else []
        rows = [row for row in map(whole, lines) if row is not None]
        if rows and rows[0] != self.facts:
            print(f"{found} is of {rows[0]}: it is begun anew", flush=True)
            rows = []
        self.known = {json.dumps(question): answer for question, answer in rows[1:]}
        text = "".join(json.dumps(row) + "\n" for row in (rows or [self.facts]))
        for path in self.copies:
            replace(path, text)

    def ask(self, worker: Worker, question: Question) -> Answer:
        """The answer; ``error`` alone if there is none.

        Raises:
            OutOfTime: There is no time for it.
        """
        key = json.dumps(question)
        if key in self.known:
            return self.known[key]
        left = self.settings.left - REST
        if left <= 0:
            raise OutOfTime
        found = worker.answer(question, min(PATIENCE, left))
        if "error" in found and left <= PATIENCE and self.settings.left <= REST:
            raise OutOfTime  # it was stopped, and may be right
        with self._lock:
            self.known[key] = found
            self.asked += 1
            for path in self.copies:
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([question, found]) + "\n")
        return found


def whole(line: str) -> Any:
    """A line of the file of answers; None for one that a kill has cut off."""
    try:
        return json.loads(line)
    except ValueError:
        return None
