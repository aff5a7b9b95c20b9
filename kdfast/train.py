# SPDX-License-Identifier: Apache-2.0
"""``python -m kdfast.train --config NAME``: run the training that a config describes.

A config of a pruning run goes to ``kdfast.recovery`` (docs/use/training.md), a config of a chain
of distillations to ``kdfast.chain`` (docs/use/vit_chain.md).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import timedelta

if __name__ == "__main__" and "OMP_WAIT_POLICY" not in os.environ:
    # OpenMP reads this when torch is loaded, and its default, spinning, makes a step ten times
    # slower as soon as another process wants one of the cores (docs/use/training.md).
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import InitProcessGroupKwargs

from kdfast.configs import CONFIGS, ChainConfig, Config, ConfigError, load
from kdfast.configs.fields import as_config_error
from kdfast.data.files import CorruptDataError
from kdfast.machine.signals import run_command
from kdfast.recovery.run import run_recovery
from kdfast.trainer.logs import close_log
from kdfast.trainer.loop import NonFiniteLoss
from kdfast.trainer.runs import discard_folder, release_folder

# The main process may fill a teacher cache while the others wait; NCCL gives up after 10 minutes.
PATIENCE = timedelta(days=2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a config.

    Args:
        argv: Command line without the program; that of the process if None.

    Returns:
        0; 1 if the training broke or a file could not be written; 2 if the config, the data or a
        checkpoint cannot be used; 128 plus the signal if one came: what was saved stays.
    """
    parser = argparse.ArgumentParser(prog="python -m kdfast.train", description=__doc__)
    names = ", ".join(CONFIGS)
    parser.add_argument("--config", required=True, help=f"one of {names}, or a YAML file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=VALUE", help="change a value of it"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue the newest run of the config's output"
    )
    args = parser.parse_args(argv)
    return run_command(lambda: guarded(args), "what was done is saved, go on with --resume")


def guarded(args: argparse.Namespace) -> int:
    """The command after its command line: errors that a user can mend are one line."""
    try:
        status = run(load(args.config, args.set), resume=args.resume)
        if dist.is_initialized():
            dist.destroy_process_group()
        return status
    except (ConfigError, CorruptDataError, NonFiniteLoss, OSError) as error:
        discard_folder()
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    finally:
        close_log()
        release_folder()


def run(config: Config | ChainConfig, *, resume: bool = False) -> int:
    """Everything that ``main`` does after the command line; raises instead of printing."""
    if isinstance(config, ChainConfig):
        # Imported here: metrics take seconds to import, and pruning runs need none.
        from kdfast.chain.run import run_chain

        accelerator = make_accelerator(config.precision, config.device)
        return run_chain(config, accelerator, resume=resume)
    accelerator = make_accelerator(config.run.precision, config.run.device)
    if config.data.kind == "frames":
        # Imported here: matching and metrics take a second to import.
        from kdfast.recovery.orion.run import run_frames

        return run_frames(config, accelerator, resume=resume)
    return run_recovery(config, accelerator, resume=resume)


def make_accelerator(precision: str, device: str) -> Accelerator:
    """Device and precision of a run, also where this process had others before.

    Raises:
        ConfigError: The device lacks the precision, or processes that were started together do not
            find each other.
    """
    if not dist.is_initialized():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    # Accelerate joins the processes of torchrun without a GPU only where it is told so.
    cpu = device == "cpu" or not torch.accelerator.is_available()
    with as_config_error():
        accelerator = Accelerator(
            mixed_precision="no" if precision == "fp32" else precision,
            cpu=cpu,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != started:
        raise ConfigError(
            [
                f"device: {started} processes were started together (WORLD_SIZE), "
                f"but {accelerator.num_processes} found each other on {accelerator.device}"
            ]
        )
    return accelerator


if __name__ == "__main__":
    sys.exit(main())
