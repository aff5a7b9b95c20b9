# SPDX-License-Identifier: Apache-2.0
"""Words of ``kdfast train``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from kdfast.commandline.parser import Parser, add_config
from kdfast.configs import CONFIGS, ChainConfig, Config
from kdfast.configs.fields import keys
from kdfast.configs.flags import FLAGS
from kdfast.configs.key_help import key_help
from kdfast.configs.synonyms import is_key, meant

DESCRIPTION = """Runs the training that a config describes: a pruning run (orion50, ...) prunes a
teacher and wins the loss back, a chain (vit_chain, cnn_chain, ...) distils from model to model."""
EXAMPLES = (
    "kdfast train --config vit_chain --data my_pictures --epochs 20 --pretrained",
    "kdfast train --config orion50 --set teacher.checkpoint=orion.pth --set run.batch_size=2",
    "kdfast train --config vit_chain --resume",
    "kdfast train --config cnn_chain --dry-run",
)


class _Change(argparse.Action):
    """Appends a flag and its value to the changes, among those of ``--set``."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        flag = FLAGS[self.dest]
        value = flag.alone if values in (None, []) else values
        namespace.changes = [*namespace.changes, f"--{self.dest}={value}"]


class TrainParser(Parser):
    """Knows keys of configs too, which others have as flags."""

    def meant(self, flag: str) -> str | None:
        """The option that stands here for ``flag``, or the key of a chain or of a pruning run."""
        name = flag.lower().replace("_", "-")
        if name in self._option_string_actions:
            return name
        known = {kind: keys(kind) for kind in (ChainConfig, Config)}
        found = {kind: meant(flag, kind, known[kind]) for kind in known}
        for word, row in FLAGS.items():
            if row.chain == found[ChainConfig] and row.alone is None:
                return f"--{word}"
        answers = [a for k, a in found.items() if a is not None and is_key(a, known[k])]
        if answers:
            ends = (a if "=" in a else f"{a}=VALUE" for a in dict.fromkeys(answers))
            return " or ".join(f"--set {end}" for end in ends)
        return super().meant(flag)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = TrainParser("train", DESCRIPTION, EXAMPLES)
    add_config(made, f"one of {', '.join(CONFIGS)}, or a YAML file")
    made.add_argument("--resume", action="store_true", help="go on with the newest run of output")
    made.add_argument("--print-config", action="store_true", help="print all keys, run nothing")
    made.add_argument("--dry-run", action="store_true", help="build all, try one step of each")
    made.add_argument(
        "--help-keys",
        nargs="?",
        const="",
        metavar="PREFIX",
        help="list the keys of --config that begin so: type, default, meaning",
    )
    group = made.add_argument_group("keys by the names that other trainers have for them")
    for name, flag in FLAGS.items():
        word: dict[str, Any] = {"metavar": flag.metavar}
        if flag.metavar is None:
            word = {"nargs": 0}
        elif flag.alone is not None:
            word["nargs"] = "?"
        group.add_argument(f"--{name}", action=_Change, dest=name, help=flag.about, **word)
    return made


def _keys(made: argparse.ArgumentParser, config: str | None, prefix: str) -> str:
    """What ``--help-keys`` prints: keys of a config, or of both kinds where none is named."""
    kinds = {"of a chain (vit_chain)": "vit_chain", "of a pruning run (orion50)": "orion50"}
    named = kinds if config is None else {f"of {config}": config}
    for name in named.values():
        if name not in CONFIGS:
            made.error(f"--config: must be one of {', '.join(CONFIGS)}, got {name!r}")
    texts = {title: key_help(CONFIGS[name](), prefix) for title, name in named.items()}
    found = [f"keys {title}\n\n{text}\n" for title, text in texts.items() if text]
    if not found:
        answers: list[str] = []
        for kind in (type(CONFIGS[name]()) for name in named.values()):
            near = meant(prefix, kind, keys(kind))
            answers += [near] if near and is_key(near, keys(kind)) else []
        close = f"; did you mean {answers[0].partition('=')[0]}?" if answers else ""
        made.error(f"--help-keys: no key begins with {prefix!r}{close}")
    return "\n".join(found)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; the list of keys, which needs nothing else, is printed here."""
    made = parser()
    args = made.parse_args(argv)
    if args.help_keys is not None:
        print(_keys(made, args.config, args.help_keys), end="")
        made.exit()
    if args.config is None:
        made.error(f"--config: must be one of {', '.join(CONFIGS)}, or a YAML file")
    return args
