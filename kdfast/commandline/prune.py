# SPDX-License-Identifier: Apache-2.0
"""Words of ``kdfast prune``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from kdfast.commandline.models import MODEL_HELP
from kdfast.commandline.parser import Parser

if TYPE_CHECKING:
    from kdfast.pruning.keep import Keep

DESCRIPTION = (
    "Prunes the attention heads (and MLPs) of a ViT, saves it, times it and says how far its "
    "answers are from the original's."
)
EXAMPLES = (
    "kdfast prune --model vit_small_patch16_224 --pretrained --data pictures --out half",
    "kdfast prune --model hf:google/vit-base-patch16-224 --data pictures \\\n"
    "      --sweep 0.25,0.5,0.75 --out sweep",
    "kdfast prune --model deit_small_patch16_224 --checkpoint tuned.pth --data pictures \\\n"
    "      --speedup 1.5 --out fast",
)
METHODS = ("magnitude", "gradient", "taylor", "entropy", "leave_one_out", "reconstruction")
DTYPES = ("float32", "bfloat16", "float16")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = Parser("prune", DESCRIPTION, EXAMPLES)
    p.add_argument("--model", required=True, help=MODEL_HELP)
    p.add_argument("--checkpoint", metavar="FILE", help="weights for the name in --model")
    p.add_argument("--out", required=True, type=Path, help="folder to write")
    p.add_argument(
        "--keep",
        type=keep,
        help="0.5: share; 6: heads per block; 6,6,4: of each block; or a JSON file of kept "
        "heads, such as report.json [0.5]",
    )
    p.add_argument("--mlp-keep", type=keep, help="the same for hidden units [all]")
    p.add_argument("--sweep", type=shares, metavar="A,B,C", help="try these for --keep, compare")
    about = f"score of a head: {', '.join(METHODS)} [taylor]"
    p.add_argument("--method", choices=METHODS, metavar="NAME", help=about)
    p.add_argument("--scope", choices=("block", "global"), help="of what the share is kept [block]")
    p.add_argument("--speedup", type=float, help="choose what makes it so many times faster here")
    p.add_argument("--latency-ms", type=float, help="or what makes it take so many milliseconds")
    p.add_argument("--latency-batch", type=int, default=1, help="images of a call, for these two")
    p.add_argument("--latency-dtype", choices=DTYPES, help="type that runs then [the model's own]")
    cache = p.add_mutually_exclusive_group()
    cache.add_argument("--cache", type=Path, help="folder of measured latencies [in ~/.cache]")
    cache.add_argument("--no-cache", action="store_true", help="measure them again, keep nothing")
    p.add_argument("--data", type=Path, help="folder of pictures [rendered scenes]")
    p.add_argument("--pictures", type=int, default=64, help="to judge the quality by; 0: none")
    p.add_argument("--batches", type=int, default=8, help="batches of pictures to look at")
    p.add_argument("--batch-size", type=int, default=4, help="pictures of such a batch")
    p.add_argument(
        "--compensate",
        action=argparse.BooleanOptionalAction,
        help="fold what is removed into what stays [on where --data is given]",
    )
    p.add_argument("--calibrate", type=int, default=200, help="pictures for --compensate, at most")
    p.add_argument("--sequential", action="store_true", help="a slower and better --compensate")
    p.add_argument("--mean-context", action="store_true", help="fold removed means into biases")
    p.add_argument("--pretrained", action="store_true", help="download the weights of --model")
    p.add_argument("--seed", type=int, default=0, help="of random weights and noise")
    p.add_argument("--rounds", type=int, default=11, help="timing samples of each model")
    p.add_argument("--overwrite", action="store_true", help="replace a model in --out")
    return p


def keep(text: str) -> Keep | Path:
    """``parse_keep`` with the error that argparse shows."""
    # Imported here: it brings torch, which the help does without.
    from kdfast.pruning.keep import parse_keep

    try:
        return parse_keep(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def shares(text: str) -> list[int | float]:
    """Values of ``--keep`` that are tried one after the other."""
    found = [keep(part) for part in text.split(",")]
    numbers = [value for value in found if isinstance(value, int | float)]
    if len(numbers) < len(found) or len(set(numbers)) < len(numbers) or len(numbers) < 2:
        raise argparse.ArgumentTypeError(
            f"must be two or more different shares or numbers, such as 0.25,0.5,0.75, got {text!r}"
        )
    return numbers
