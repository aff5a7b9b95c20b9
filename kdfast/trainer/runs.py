# SPDX-License-Identifier: Apache-2.0
"""Where a run's files go, and what its log starts with."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from kdfast.configs import ChainConfig, Config, ConfigError, save
from kdfast.trainer.logs import LOG, open_log


def run_folder(output: Path, accelerator: Accelerator, missing: str | None) -> Path:
    """Folder of a run, made: ``output``, or ``output-2`` and so on where that holds one already.

    Args:
        output: As the config names it.
        accelerator: All processes get the same answer.
        missing: None: a new run. Otherwise the newest run there is, and this is what to say if
            there is none.

    Raises:
        ConfigError: There is no run to go on with.
    """
    runs = [output, *output.parent.glob(f"{output.name}-[0-9]*")]
    used = [path for path in runs if (path / "config.yaml").is_file()]
    chosen = [output]
    if missing is not None:
        if not used:
            raise ConfigError([f"{missing}there is no run in {output}"])
        chosen = [max(used, key=lambda path: (path / "config.yaml").stat().st_mtime)]
    number = 2
    while missing is None and chosen[0] in used:
        chosen = [output.with_name(f"{output.name}-{number}")]
        number += 1
    broadcast_object_list(chosen)
    if accelerator.is_main_process:
        chosen[0].mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    return chosen[0]


def show_start(
    config: Config | ChainConfig,
    accelerator: Accelerator,
    folder: Path,
    resume: bool,
    what: str,
) -> None:
    """Opens the log, saves the config, and says what is going to happen.

    Args:
        config: Of the run; its note stands out.
        accelerator: The main process writes, the others are silent.
        folder: Of the run.
        resume: Whether it goes on.
        what: One line about data and machine.
    """
    if not accelerator.is_main_process:
        open_log(None)
        return
    open_log(folder)
    save(config, folder / "config.yaml")
    if config.note:
        width = max(map(len, config.note.split(": ")))
        LOG.warning("\n%s\n%s\n%s", "=" * width, config.note.replace(": ", "\n"), "=" * width)
    LOG.info("%s %s in %s", "resuming" if resume else "starting", config.name, folder)
    LOG.info("%s", what)
