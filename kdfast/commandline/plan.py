# SPDX-License-Identifier: Apache-2.0
"""Words of ``kdfast plan``."""

from __future__ import annotations

import argparse

from kdfast.commandline.parser import Parser, add_config, size_of
from kdfast.machine.gpus import GPUS, Gpus, gpus_of

DESCRIPTION = "What a training needs of a GPU, the batch that fits, and the hours."
EXAMPLES = (
    "kdfast plan --config vit_chain --vram 6",
    "kdfast plan --config orion50 --vram 24GiB --set run.batch_size=2",
    "kdfast plan --config orion50_frames --gpu 4x4090",
    "kdfast plan --model vit_base_patch16_224 --teacher vit_large_patch16_224 --batch 8",
    "kdfast plan --config orion50 --processes 8 --shard fsdp",
)
PRECISIONS = ("fp32", "bf16", "fp16")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser("plan", DESCRIPTION, EXAMPLES)
    add_config(made, "name or YAML file; its files are not read")
    made.add_argument("--classes", type=int, default=10, help="of the data of a chain or --model")
    made.add_argument("--model", help="what is trained, without a config: a name or a saved model")
    made.add_argument("--teacher", help="the same of its teacher")
    made.add_argument("--size", type=int, help="side of the images of --model [its own]")
    made.add_argument("--batch", type=int, help="of --model [8]")
    made.add_argument("--precision", choices=PRECISIONS, help="of --model [bf16]")
    made.add_argument("--optimizer", help="of --model, a name of timm [adamw]")
    made.add_argument("--checkpointing", action="store_true", default=None, help="of --model")
    made.add_argument(
        "--vram",
        type=size_of,
        metavar="SIZE",
        help="memory that must be enough, as 6 or 6GiB",
    )
    made.add_argument(
        "--gpu", type=gpus, metavar="[Nx]NAME", help=f"memory and hours for it: {', '.join(GPUS)}"
    )
    made.add_argument(
        "--processes", type=int, metavar="N", help="plan for each of N, with a GPU of its own [1]"
    )
    made.add_argument(
        "--shard",
        choices=("none", "fsdp"),
        help="fsdp: parts of the models on each of --processes [as the config says]",
    )
    made.add_argument("--images", type=int, help="training images of an epoch, for the hours")
    made.add_argument("--modules", action="store_true", help="list the memory by module")
    return made


def gpus(text: str) -> Gpus:
    """``gpus_of`` with the error that argparse shows."""
    try:
        return gpus_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
