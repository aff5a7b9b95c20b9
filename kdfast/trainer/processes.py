# SPDX-License-Identifier: Apache-2.0
"""Device, precision and processes of a run."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import InitProcessGroupKwargs

from kdfast.configs.fields import ConfigError, as_config_error

# The main process may measure, draw and write pages while the others wait, and one process may read
# a data set much more slowly than another; NCCL gives up after 10 minutes.
PATIENCE = timedelta(hours=1)


def require_several(shard: str, count: int) -> None:
    """Raises ConfigError where models are to be sharded among ``count`` processes, which is 1."""
    if shard != "none" and count == 1:
        raise ConfigError(
            [
                f"shard: {shard} divides models among several processes, as those of `torchrun "
                "--nproc-per-node 2 -m kdfast.train ...`, got one process"
            ]
        )


def warn_of_shared_store() -> None:
    """Says what torchrun needs before it can start processes again for certain.

    They find each other through a store that torchrun keeps, where those started again may read the
    addresses of dead ones (pytorch issue 135712).
    """
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if shared and restarts and os.environ.get("RANK") == "0":
        warnings.warn(
            f"torchrun may fail to start processes again (--max-restarts={restarts}): set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for it; see docs/use/training.md",
            stacklevel=3,
        )


def make_accelerator(precision: str, device: str, shard: str = "none") -> Accelerator:
    """Device and precision of a run, also where this process had others before.

    Args:
        precision: "fp32", "bf16" or "fp16".
        device: "auto", "cpu" or "cuda".
        shard: Whether the models are going to be sharded: "fsdp" or "none".

    Raises:
        ConfigError: The device lacks the precision, processes that were started together do not
            find each other, there is one where models are to be sharded, or Accelerate was told to
            shard them.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        # It would take the student alone, and nothing at all on CPUs: see trainer/sharding.py.
        raise ConfigError(
            ["shard: set it to fsdp instead of `accelerate launch --use_fsdp`, got that flag"]
        )
    warn_of_shared_store()
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
    require_several(shard, started)
    return accelerator
