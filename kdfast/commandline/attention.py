# SPDX-License-Identifier: Apache-2.0
"""Words of ``kdfast attention``."""

from __future__ import annotations

import argparse

from kdfast.commandline.models import MODEL_HELP
from kdfast.commandline.parser import Parser, whole_numbers

DESCRIPTION = "Pictures of what a model's heads look at, as PNG files."
EXAMPLES = (
    "kdfast attention --model vit_base_patch16_224 --pretrained --image cat.jpg",
    "kdfast attention --checkpoint runs/orion50/student.safetensors --image front.jpg",
    "kdfast attention --model vit_base_half --image cat.jpg",
    "kdfast attention --checkpoint teacher.safetensors --after student.safetensors \\\n"
    "      --image front.jpg --layers 5,23 --heads 0,3",
)
FUSIONS = ("mean", "max", "min")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser("attention", DESCRIPTION, EXAMPLES)
    made.add_argument("--model", help=MODEL_HELP)
    made.add_argument("--checkpoint", metavar="PATH", help="weights; alone: it says its model")
    made.add_argument("--pretrained", action="store_true", help="download the weights of --model")
    made.add_argument("--after", metavar="PATH", help="the pruned model: a folder or a file")
    made.add_argument("--image", nargs="+", required=True, metavar="FILE")
    made.add_argument("--output", default="attention", metavar="FOLDER", help="to write")
    made.add_argument("--layers", type=whole_numbers, default=[-1], help="such as 0,5,11 [last]")
    made.add_argument("--heads", type=whole_numbers, default=[], help="draw these alone, large")
    made.add_argument("--patch", type=whole_numbers, help="row,column of the patch that looks")
    made.add_argument("--fusion", choices=FUSIONS, default="mean", help="of heads, in rollout")
    made.add_argument("--discard", type=float, default=0.0, help="smallest share left out")
    return made
