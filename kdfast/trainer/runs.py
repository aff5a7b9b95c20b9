# SPDX-License-Identifier: Apache-2.0
"""Where a run's files go, and what its log starts with."""

from __future__ import annotations

import errno
import fcntl
import glob
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import count, takewhile
from pathlib import Path
from typing import Any, TextIO

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from kdfast.configs.fields import ConfigError
from kdfast.machine.files import clear_partials
from kdfast.machine.ranks import Ranks
from kdfast.trainer import launches
from kdfast.trainer.logs import LOG, open_log

# Files that a run has before it computes anything: one that never began leaves only these.
CONFIG, LOG_FILE = "config.yaml", "train.log"
BEGUN = {CONFIG, LOG_FILE, launches.FILE}
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_held: TextIO | None = None
_made: Path | None = None


def started_again(output: Path, accelerator: Accelerator) -> bool:
    """Whether these processes follow others of the same launch, which began a run here.

    Args:
        output: As the config names it.
        accelerator: All processes get the same answer.
    """
    launch = launches.launch_of(Ranks.here())
    answer = [accelerator.is_main_process and _launched(output, launch) is not None]
    broadcast_object_list(answer)
    return answer[0]


def run_folder(output: Path, accelerator: Accelerator, missing: str | None) -> Path:
    """Folder of a run, made: ``output``, or ``output-2`` and so on where that holds one already.

    The folder is this process's until ``release_folder``: another run takes the next one. Where
    ``started_again`` says so, it is that of the run which was begun.

    Args:
        output: As the config names it.
        accelerator: All processes get the same answer.
        missing: None: a new run. Otherwise the newest run there is, and this is what to say if
            there is none.

    Raises:
        ConfigError: There is no run to go on with, another process is at it, or the folder cannot
            be written or is not seen by all processes.
    """
    release_folder()
    answer: list[Any] = [None]
    launch = launches.launch_of(Ranks.here())
    if accelerator.is_main_process:
        try:
            answer = [_chosen(output, missing, launch)]
        except ConfigError as error:
            answer = [error.problems]
    broadcast_object_list(answer)
    if isinstance(answer[0], list):
        raise ConfigError(answer[0])
    chosen: Path = answer[0]
    _check_seen(chosen)
    return chosen


def release_folder() -> None:
    """Let other processes use the folder of the last run of this one."""
    global _held, _made
    if _held is not None:
        _held.close()
        _held = _made = None


def refuse_other(what: object, found: Sequence[str]) -> None:
    """Raises ConfigError if a run would not go on as it began; says how it does.

    Args:
        what: What was made otherwise.
        found: Result of ``differences``.
    """
    if not found:
        return
    lines = [f"--resume: {what} was made with {line}" for line in found]
    if _held is not None:
        own = Path(_held.name).with_name(CONFIG)
        lines[-1] += f"\n    to go on as it began: --config {own} --resume"
    raise ConfigError(lines)


def own_output(config: str) -> str | None:
    """The folder of the run whose saved config this is, wherever it was moved; None: of none."""
    path = Path(config).expanduser()
    return str(path.parent) if path.name == CONFIG and path.with_name(LOG_FILE).is_file() else None


def discard_folder() -> None:
    """Removes the folder that this process made for a run which was refused before it began."""
    if _made is None or not _made.is_dir():
        return
    files = list(_made.iterdir())
    if all(file.name in BEGUN for file in files):
        for file in files:
            file.unlink()
        _made.rmdir()


def _chosen(output: Path, missing: str | None, launch: launches.Launch) -> Path:
    path = _launched(output, launch)
    if path is not None:
        _go_on_in(path)
    else:
        path = _new(output) if missing is None else _newest(output, missing)
    launch.write(path)
    return path


def _check_seen(path: Path) -> None:
    """Raises ConfigError, in all processes, where one of them does not see the run's folder.

    It would begin anew where the others go on.
    """
    found = Ranks.here().shared(lambda: (socket.gethostname(), (path / LOG_FILE).is_file()))
    blind = dict.fromkeys(host for host, sees in found if not sees)
    if blind:
        raise ConfigError(
            [f"output: must be a folder that all processes see, got {path}, {', '.join(blind)} not"]
        )


def _launched(output: Path, launch: launches.Launch) -> Path | None:
    """The first run that the launch began and that its present processes have not gone on with."""
    made = takewhile(Path.is_dir, _names(output))
    return next((path for path in made if _began(path) and launch.began(path)), None)


def _new(output: Path) -> Path:
    return next(path for path in _names(output) if not _began(path) and _take(path))


def _names(output: Path) -> Iterator[Path]:
    """Folders of runs, in the order in which they are taken."""
    yield output
    for number in count(2):
        yield output.with_name(f"{output.name}-{number}")


def _newest(output: Path, missing: str) -> Path:
    runs = [output, *output.parent.glob(f"{glob.escape(output.name)}-[0-9]*")]
    named = [path for path in runs if (path / CONFIG).is_file()]
    used = [path for path in named if _began(path)] or named
    if not used:
        raise ConfigError(
            [f"{missing}there is no run in {output}; --config RUN/{CONFIG} names a run by itself"]
        )
    path = max(used, key=lambda path: (path / CONFIG).stat().st_mtime)
    _go_on_in(path)
    return path


def _go_on_in(path: Path) -> None:
    if not _take(path):
        raise ConfigError([f"output: another process is still writing to {path}"])


def _began(path: Path) -> bool:
    """Whether a folder holds a run; a config that was refused at the start leaves none."""
    if not (path / CONFIG).is_file():
        return False
    return any(file.name not in BEGUN for file in path.iterdir())


def _take(path: Path) -> bool:
    """Make a folder and lock its log, or say that another process has it."""
    global _held, _made
    new = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        log = (path / LOG_FILE).open("a", encoding="utf-8")
    except OSError as error:
        raise ConfigError([f"output: {path} cannot be written: {error.strerror}"]) from error
    try:
        # The system gives it back when the process dies, however it dies.
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            log.close()
            if isinstance(error, BlockingIOError):
                return False
            raise
        text = f"{path}: this file system has no locks; let no other run write here"
        warnings.warn(text, stacklevel=2)
    _held, _made = log, path if new else None
    return True


def show_start(
    folder: Path,
    accelerator: Accelerator,
    *,
    name: str,
    note: str,
    what: str,
    save: Callable[[Path], None],
    resume: bool,
) -> None:
    """Opens the log, saves the config of a new run, and says what is going to happen.

    Args:
        folder: Folder of the run.
        accelerator: The main process writes, the others are silent.
        name: Name of the run's config.
        note: Stands out in the log; may be empty.
        what: Lines about models, data and machine.
        save: Writes the config to a file; not called where the run goes on, because its config
            may still be refused.
        resume: Whether the run goes on.
    """
    if not accelerator.is_main_process:
        open_log(None)
        return
    open_log(folder)
    for path in clear_partials(folder):
        LOG.info("removed %s, which a killed process had left", path)
    if not resume:
        save(folder / CONFIG)
    if note:
        width = max(map(len, note.split(": ")))
        LOG.warning("\n%s\n%s\n%s", "=" * width, note.replace(": ", "\n"), "=" * width)
    LOG.info("%s %s in %s", "resuming" if resume else "starting", name, folder)
    for line in what.splitlines():
        LOG.info("%s", line)
    LOG.info("to watch it: tensorboard --logdir %s", folder)
