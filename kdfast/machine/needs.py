# SPDX-License-Identifier: Apache-2.0
"""What a run needs of this machine, and what to do where it is missing."""

import importlib.util
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MISSING, NO_FIT, WRONG = "MISSING", "DOES NOT FIT", "WRONG"


@dataclass(frozen=True)
class Need:
    """One thing that a run needs.

    Attributes:
        name: What it is.
        found: What is there.
        fix: What to do about it; empty if all is well.
        problem: In a word, where there is something to do.
    """

    name: str
    found: str
    fix: str = ""
    problem: str = MISSING


def package_need(modules: Sequence[str]) -> Need | None:
    """The packages of the train extra that are not installed, or None if all are.

    Args:
        modules: Names by which they are imported.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    return Need("packages", f"missing: {', '.join(missing)}", 'pip install -e ".[train]"')


def disk_need(output: str, checkpoint: int, more: int = 0) -> Need:
    """Disk of a run: its last two checkpoints, the one being written, and other files.

    Args:
        output: Folder of the run, which need not exist yet.
        checkpoint: Bytes of a checkpoint.
        more: Bytes of the other files.
    """
    folder = Path(output).expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    need, free = 3 * checkpoint + more, shutil.disk_usage(folder).free
    fix = "" if need < free else "free some space, or --set output=FOLDER on another disk"
    return Need("disk", f"about {gib(need)} needed in {output}, {gib(free)} free", fix, NO_FIT)


def gib(count: float) -> str:
    """Bytes as GiB with one decimal."""
    return f"{count / 2**30:.1f} GiB"
