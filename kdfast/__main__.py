# SPDX-License-Identifier: Apache-2.0
"""``kdfast COMMAND`` or ``python -m kdfast COMMAND``: all commands under one name.

Each is a module that runs by itself too: ``kdfast train`` is ``python -m kdfast.train``.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from kdfast._version import __version__
from kdfast.commandline.parser import Parser
from kdfast.machine.spelling import did_you_mean


class Command(NamedTuple):
    """A command.

    Attributes:
        module: Its ``main`` runs it.
        about: What it does.
        trains: Its threads share the cores with loaders, and sleep while they wait.
    """

    module: str
    about: str
    trains: bool = False


COMMANDS = {
    "train": Command("kdfast.train", "run a training that a config describes", trains=True),
    "prune": Command("kdfast.prune", "score, prune, save and time a model"),
    "distill": Command("kdfast.distill", "win back what pruning lost", trains=True),
    "compare": Command("kdfast.compare", "time your model in every way to run it on this machine"),
    "compare-runs": Command("kdfast.compare_runs", "one table over several finished runs"),
    "attention": Command("kdfast.attention", "draw what the heads of a model look at"),
    "plan": Command("kdfast.plan", "memory and hours of a training, before it is started"),
    "info": Command("kdfast.info", "this machine, what runs fused on it, what a run lacks"),
    "data": Command("kdfast.data.__main__", "check, convert or make up data for ORION"),
    "evaluate": Command("kdfast.evaluate", "boxes, lanes and features of a pruned ORION"),
}
DESCRIPTION = "Prunes Vision Transformers, distils the loss away, and runs them fast."
EXAMPLES = (
    "kdfast train --config vit_chain --data my_pictures",
    "kdfast prune --model deit_small_patch16_224 --pretrained --keep 0.5 --out half",
)


def parser() -> argparse.ArgumentParser:
    """The command line in front of the command's own."""
    made = Parser("", DESCRIPTION, EXAMPLES)
    made.add_argument("--version", action="version", version=f"kdfast {__version__}")
    commands = made.add_subparsers(
        title="commands", metavar="COMMAND", parser_class=argparse.ArgumentParser
    )
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.about, add_help=False)
    made.usage = "kdfast COMMAND ... | --help | --version"
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        Its status; 2 if there is no such command.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in COMMANDS:
        return run(words[0], words[1:])
    made = parser()
    if not words:
        made.print_help()
        return 2
    if not words[0].startswith("-"):
        hint = did_you_mean(words[0], COMMANDS)
        made.error(f"{words[0]!r} is no command ({', '.join(COMMANDS)}){hint}")
    made.parse_args(words)
    return 0


def run(name: str, words: Sequence[str]) -> int:
    """Run a command; its help and its errors come before anything heavy is imported."""
    own = f"kdfast.commandline.{name.replace('-', '_')}"
    if importlib.util.find_spec(own) is not None:
        importlib.import_module(own).parser().parse_args(words)
    command = COMMANDS[name]
    if command.trains and "torch" not in sys.modules:
        # OpenMP reads this when torch is loaded (docs/use/training.md).
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        module = importlib.import_module(command.module)
    except ModuleNotFoundError as error:
        absent = (error.name or "").partition(".")[0]
        if absent in ("", "kdfast"):
            raise
        print(
            f"error: kdfast {name}: needs the package {absent}, got none; run `pip install "
            f"'kdfast[train]'`",
            file=sys.stderr,
        )
        return 2
    status: int = module.main(words)
    return status


if __name__ == "__main__":
    sys.exit(main())
