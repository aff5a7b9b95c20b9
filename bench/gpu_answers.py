# SPDX-License-Identifier: Apache-2.0
"""Questions to processes of the device, each asked once: the answers are kept in a file."""

import json
import threading
from typing import Any

from bench.gpu_stages import Settings
from bench.gpu_worker import Worker

# Seconds for one answer.
PATIENCE = 120
# What is left of the time when no question is asked any more, to write the files.
REST = 10
Question = dict[str, Any]
Answer = dict[str, Any]


class OutOfTime(Exception):
    """The command has to end."""


class Answers:
    """Asks each question once: answers are kept in a file, for the next run of the command."""

    def __init__(self, settings: Settings, facts: dict[str, str]) -> None:
        self.settings, self.facts = settings, facts
        self.path = settings.out / f"tune_{settings.name}.jsonl"
        self.known: dict[str, Answer] = {}
        self.asked = 0
        self._lock = threading.Lock()
        self._read()

    def _read(self) -> None:
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        rows = [row for row in map(whole, lines) if row is not None]
        if rows and rows[0] != self.facts:
            print(f"{self.path} is of {rows[0]}: it is begun anew", flush=True)
            rows = []
        self.known = {json.dumps(question): answer for question, answer in rows[1:]}
        text = "".join(json.dumps(row) + "\n" for row in (rows or [self.facts]))
        self.settings.write(self.path.name, text)

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
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([question, found]) + "\n")
        return found


def whole(line: str) -> Any:
    """A line of the file of answers; None for one that a kill has cut off."""
    try:
        return json.loads(line)
    except ValueError:
        return None
