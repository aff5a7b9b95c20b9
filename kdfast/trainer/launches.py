# SPDX-License-Identifier: Apache-2.0
"""Runs whose processes torchrun starts again, with the same command line, after one of them died.

Such a run goes on. It is known by the agents, the processes that start those of a machine: an agent
lives as long as its launch, and its identity needs no option of torchrun. The number of restarts in
the environment would not do, because it counts those of one machine, and not those after a machine
came or went.
"""

from __future__ import annotations

import json
import os
import socket
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from kdfast.machine.files import write_text
from kdfast.machine.ranks import Ranks

FILE = "launch.json"
# Seconds between what a system may say at two times about the start of a process.
UNSURE = 5.0


class Life(NamedTuple):
    """A process, told apart from later ones of its number.

    Attributes:
        host: Its machine.
        pid: Its number there.
        began: When it began, in seconds since 1970.
    """

    host: str
    pid: int
    began: float

    def is_same(self, other: Life) -> bool:
        """Whether both are one process."""
        return self[:2] == other[:2] and abs(self.began - other.began) < UNSURE


class Launch(NamedTuple):
    """Who runs a run.

    Attributes:
        agents: Of the machines; none where no launcher starts processes again.
        main: The run's first process.
    """

    agents: list[Life]
    main: Life

    def began(self, folder: Path) -> bool:
        """Whether earlier processes of this launch ran the run of a folder."""
        before = _read(folder / FILE)
        if before is None or before.main.is_same(self.main):
            return False
        return any(mine.is_same(other) for mine in self.agents for other in before.agents)

    def write(self, folder: Path) -> None:
        """Say in a folder whose run it is; nothing where it would not be asked for."""
        if self.agents:
            write_text(folder / FILE, json.dumps(self._asdict()) + "\n")


def launch_of(ranks: Ranks) -> Launch:
    """That of these processes, all of which call it."""
    found = ranks.shared(lambda: (_agent(), _life(os.getpid())))
    agents = dict.fromkeys(agent for agent, _ in found if agent is not None)
    return Launch(list(agents), found[0][1])


def _agent() -> Life | None:
    return _life(os.getppid()) if "TORCHELASTIC_RUN_ID" in os.environ else None


def _life(pid: int) -> Life:
    return Life(socket.gethostname(), pid, psutil.Process(pid).create_time())


def _read(path: Path) -> Launch | None:
    """What ``write`` wrote; None where there is nothing, or nothing readable, with a warning."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        return Launch([Life(*agent) for agent in content["agents"]], Life(*content["main"]))
    except FileNotFoundError:
        return None
    except (KeyError, OSError, TypeError, ValueError) as error:
        text = f"{path} cannot be read, so its run does not go on by itself: {error!r}"
        warnings.warn(text, stacklevel=2)
        return None
