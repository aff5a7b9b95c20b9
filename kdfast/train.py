# SPDX-License-Identifier: Apache-2.0
"""``python -m kdfast.train --config NAME``: run the training that a config describes.

A config of a pruning run goes to ``kdfast.recovery`` (docs/use/training.md), a config of a chain
of distillations to ``kdfast.chain`` (docs/use/vit_chain.md).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kdfast.commandline.train import parse

if __name__ == "__main__":
    # Answers --help before torch is imported, which takes seconds.
    parse(None)
    # OpenMP reads this when torch is loaded, and its default, spinning, makes a step ten times
    # slower as soon as another process wants one of the cores (docs/use/training.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.distributed as dist

from kdfast.configs import ChainConfig, ConfigError, as_yaml, load
from kdfast.data.files import CorruptDataError
from kdfast.machine.signals import run_command
from kdfast.recovery.run import run_recovery
from kdfast.trainer.logs import close_log
from kdfast.trainer.loop import NonFiniteLoss
from kdfast.trainer.processes import make_accelerator
from kdfast.trainer.runs import discard_folder, own_output, release_folder

if TYPE_CHECKING:
    from kdfast.configs import Config


def main(argv: Sequence[str] | None = None) -> int:
    """Run a config.

    Args:
        argv: Command line without the program; that of the process if None.

    Returns:
        0; 1 if the training broke or a file could not be written; 2 if the config, the data or a
        checkpoint cannot be used; 128 plus the signal if one came: what was saved stays.
    """
    args = parse(argv)
    return run_command(lambda: guarded(args), "what was done is saved, go on with --resume")


def guarded(args: argparse.Namespace) -> int:
    """The command after its command line: errors that a user can mend are one line."""
    try:
        status = asked(args)
        if dist.is_initialized():
            dist.destroy_process_group()
        return status
    except (ConfigError, CorruptDataError, NonFiniteLoss, FloatingPointError, OSError) as error:
        discard_folder()
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    finally:
        close_log()
        release_folder()


def asked(args: argparse.Namespace) -> int:
    """Run the config, or say about it what was asked for."""
    config = resumed(args.config, args.changes) if args.resume else load(args.config, args.changes)
    if args.print_config:
        print(as_yaml(config), end="")
        return 0
    if args.dry_run:
        return dry_run(config)
    return run(config, resume=args.resume)


def resumed(source: str, changes: Sequence[str]) -> Config | ChainConfig:
    """The config of a run that goes on: one that a run saved is that of this run, to its end."""
    own = own_output(source)
    if own is None:
        return load(source, changes)
    end = "max_steps" if isinstance(load(source, files=False), ChainConfig) else "run.max_steps"
    return load(source, [f"output={json.dumps(own)}", f"{end}=null", *changes])


def dry_run(config: Config | ChainConfig) -> int:
    """Build everything, take a step of each training on noise, and say so; leaves no files.

    Raises:
        ConfigError: The data or a link cannot be used.
        FloatingPointError: The loss of a step is not finite.
    """
    # Imported here: a run needs none of it.
    from kdfast.memory.steps import device_of
    from kdfast.memory.trial import try_step

    if config.note:
        print(f"note: {config.note}")
    if isinstance(config, ChainConfig):
        from kdfast.chain.planning import chain_steps, check_links
        from kdfast.chain.run import read_data

        data = read_data(config, config.seeds[0])
        print(
            f"data: {data.name}, {len(data.class_names)} classes; {len(data.train):,} images to "
            f"train on, {len(data.val):,} to choose by, {len(data.test):,} to test on"
        )
        check_links(config, len(data.class_names))
        steps, device = chain_steps(config, len(data.class_names)), config.device
    else:
        from kdfast.recovery.planning import recovery_step

        steps, device = [recovery_step(config)], config.run.device
    for step in steps:
        print(try_step(step, torch.device(device_of(device))), flush=True)
    print(f"a run writes to {config.output}; nothing was written, and the images were noise")
    return 0


def run(config: Config | ChainConfig, *, resume: bool = False) -> int:
    """Everything that ``main`` does after the command line; raises instead of printing."""
    if isinstance(config, ChainConfig):
        # Imported here: metrics take seconds to import, and pruning runs need none.
        from kdfast.chain.run import run_chain

        _choose_kernels(config.deterministic)
        accelerator = make_accelerator(config.precision, config.device)
        return run_chain(config, accelerator, resume=resume)
    _choose_kernels(config.run.deterministic)
    accelerator = make_accelerator(config.run.precision, config.run.device)
    if config.data.kind == "frames":
        # Imported here: matching and metrics take a second to import.
        from kdfast.recovery.orion.run import run_frames

        return run_frames(config, accelerator, resume=resume)
    return run_recovery(config, accelerator, resume=resume)


def _choose_kernels(deterministic: bool) -> None:
    """Let cuDNN take the same kernels in every run, or time them and take the fastest."""
    if not torch.cuda.is_available():
        return
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic


if __name__ == "__main__":
    sys.exit(main())
