# SPDX-License-Identifier: Apache-2.0
"""``python -m kdfast.prune``: score, prune, save, time and judge a ViT without writing code.

See docs/use/pruning.md.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from kdfast.machine.signals import run_command
from kdfast.pruner.checks import UsageError
from kdfast.pruner.run import run
from kdfast.pruning.keep import Keep, parse_keep
from kdfast.pruning.scores import METHODS
from kdfast.sources import MODEL_HELP

DTYPES = ("float32", "bfloat16", "float16")
EXAMPLES = """examples:
  kdfast prune --model vit_small_patch16_224 --pretrained --data pictures --out half
  kdfast prune --model hf:google/vit-base-patch16-224 --data pictures --sweep 0.25,0.5,0.75 \\
      --out sweep
  kdfast prune --model deit_small_patch16_224 --checkpoint tuned.pth --data pictures \\
      --speedup 1.5 --out fast
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m kdfast.prune",
        description="Prunes the attention heads (and MLPs) of a ViT, saves it, times it and says "
        "how far its answers are from the original's.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--model", required=True, help=MODEL_HELP)
    p.add_argument("--checkpoint", metavar="FILE", help="weights for the name in --model")
    p.add_argument("--out", required=True, type=Path, help="folder to write")
    p.add_argument(
        "--keep",
        type=keep,
        help="0.5, if left out: share; 6: heads per block; 6,6,4: of each block; or a JSON file "
        "of kept heads, such as report.json",
    )
    p.add_argument("--mlp-keep", type=keep, help="the same for hidden units; all if left out")
    p.add_argument("--sweep", type=shares, metavar="A,B,C", help="try these for --keep, compare")
    p.add_argument("--method", choices=METHODS, help="score of a head; taylor if left out")
    p.add_argument("--scope", choices=("block", "global"), help="block if left out")
    p.add_argument("--speedup", type=float, help="choose what makes it so many times faster here")
    p.add_argument("--latency-ms", type=float, help="or what makes it take so many milliseconds")
    p.add_argument("--latency-batch", type=int, default=1, help="images of a call, for these two")
    p.add_argument("--latency-dtype", choices=DTYPES, help="type that runs then; the model's own")
    cache = p.add_mutually_exclusive_group()
    cache.add_argument("--cache", type=Path, help="folder of measured latencies")
    cache.add_argument("--no-cache", action="store_true", help="measure them again, keep nothing")
    p.add_argument("--data", type=Path, help="folder of pictures; rendered scenes if left out")
    p.add_argument("--pictures", type=int, default=64, help="to measure the quality on; 0: none")
    p.add_argument("--batches", type=int, default=8, help="batches of pictures to look at")
    p.add_argument("--batch-size", type=int, default=4)
    p.add_argument(
        "--compensate",
        action=argparse.BooleanOptionalAction,
        help="fold what is removed into what stays; on where --data is given",
    )
    p.add_argument("--calibrate", type=int, default=200, help="pictures for --compensate, at most")
    p.add_argument("--sequential", action="store_true", help="a slower and better --compensate")
    p.add_argument("--mean-context", action="store_true", help="fold removed means into biases")
    p.add_argument("--pretrained", action="store_true", help="download the weights of --model")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--rounds", type=int, default=11, help="timing samples of each model")
    p.add_argument("--overwrite", action="store_true", help="replace a model in --out")
    return p


def keep(text: str) -> Keep | Path:
    """``parse_keep`` with the error that argparse shows."""
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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit status is 2 for a request that cannot be met."""
    options = parser().parse_args(argv)
    return run_command(lambda: guarded(options), f"{options.out} holds no new model")


def guarded(options: argparse.Namespace) -> int:
    """The command after its command line: a request that cannot be met is one line."""
    try:
        run(options)
    except UsageError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
