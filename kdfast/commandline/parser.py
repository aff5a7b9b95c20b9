# SPDX-License-Identifier: Apache-2.0
"""The parser that all commands have, and the types of their options."""

from __future__ import annotations

import argparse
import difflib
import re
import textwrap
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NoReturn

UNITS = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
# Flags that other tools have for what is called otherwise here.
SYNONYMS = {
    "--weights": "--checkpoint",
    "--ckpt": "--checkpoint",
    "--initial-checkpoint": "--checkpoint",
    "--images": "--image",
    "--data-dir": "--data",
    "--dataset": "--data",
    "--output-dir": "--output",
    "--out-dir": "--output",
    "--img-size": "--size",
    "--image-size": "--size",
    "--batch-size": "--batch",
    "--gpus": "--gpu",
    "--num-classes": "--classes",
    "--num-workers": "--workers",
    "--ratio": "--keep",
    "--pruning-ratio": "--keep",
    "--keep-ratio": "--keep",
    "--config-file": "--config",
}
# Of these pairs a command has the one or the other.
_EITHER = {"--output": "--out", "--out": "--output", "--batch": "--batch-size"}


class _Help(argparse.RawDescriptionHelpFormatter):
    """Descriptions that fit into the terminal; indented lines stay lines; defaults in brackets."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if action.nargs == 0 or action.default in (None, argparse.SUPPRESS, []):
            return text
        return text if "[" in text else f"{text} [%(default)s]".lstrip()

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        found: list[str] = []
        for indented, lines in groupby(text.splitlines(), lambda line: line[:1] in ("", " ")):
            if indented:
                found += [piece for line in lines for piece in _wrapped(line, width)]
            else:
                found += textwrap.wrap(" ".join(lines), width, break_on_hyphens=False)
        return "\n".join(indent + line for line in found)


def _wrapped(line: str, width: int) -> list[str]:
    """An indented line; of a table the second column stays one, commands go on after ``\\``."""
    if len(line) <= width:
        return [line]
    if line.startswith("  kdfast "):
        # A flag and its value stay together.
        pieces = textwrap.wrap(
            re.sub(r"( --\S+) (?=[^- ])", "\\1\0", line),
            width - 2,
            subsequent_indent="      ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        return " \\\n".join(pieces).replace("\0", " ").split("\n")
    column = re.match(r" +(\S+(?: \S+)*  +)?", line)
    deep = " " * (column.end() if column else 0)
    return textwrap.wrap(line, width, subsequent_indent=deep, break_on_hyphens=False)


class _Answering(argparse.ArgumentParser):
    """Says for a flag that it does not know which one is meant."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse, with another error for flags that are not known."""
        found, left = self.parse_known_args(args, namespace)
        self.refuse(left)
        return found

    def refuse(self, left: Sequence[str]) -> None:
        """Ends the program if words are left that belong to no option."""
        if left:
            flags = [word for word in left if word.startswith("--")]
            self.error("; ".join(map(self.unknown, flags or left[:1])))

    def unknown(self, word: str) -> str:
        """The complaint about a word that is no option, with what is meant."""
        flag = word.partition("=")[0]
        if not flag.startswith("-"):
            return f"{word!r} belongs to no option"
        meant = self.meant(flag)
        return f"{flag}: unknown option" + (f"; did you mean {meant}?" if meant else "")

    def meant(self, flag: str) -> str | None:
        """The option that stands here for ``flag``, or None."""
        known = [name for name in self._option_string_actions if name.startswith("--")]
        name = flag.lower().replace("_", "-")
        for tried in (name, SYNONYMS.get(name, ""), _EITHER.get(SYNONYMS.get(name, name), "")):
            if tried in known:
                return tried
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        return close[0] if close else None

    def error(self, message: str) -> NoReturn:
        """One line, and where to find more."""
        self.exit(2, f"error: {message}\n(all options: {self.prog} --help)\n")


class SubParser(_Answering):
    """The parser of a command of a command, for ``add_subparsers(parser_class=...)``."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse, but its own errors for what it does not know."""
        found, left = super().parse_known_args(args, namespace)
        self.refuse(left)
        return found, []


class Parser(_Answering):
    """The parser of a command."""

    def __init__(self, name: str, description: str, examples: Sequence[str] = ()) -> None:
        """Set up.

        Args:
            name: The command, as it is typed after ``kdfast``.
            description: What it does.
            examples: Whole command lines, printed at the end of the help.
        """
        # The terminal says where a line ends.
        lines = [" ".join(example.replace("\\\n", " ").split()) for example in examples]
        text = "\n".join(["examples:", *(f"  {line}" for line in lines)])
        super().__init__(
            prog=f"kdfast {name}".strip(),
            description=description,
            epilog=text if examples else None,
            formatter_class=_Help,
            allow_abbrev=False,
        )


def add_config(parser: argparse.ArgumentParser, about: str, *, required: bool = False) -> None:
    """Adds ``--config`` and ``--set``, whose values are in ``config`` and ``changes``."""
    parser.add_argument("--config", metavar="NAME", required=required, help=about)
    parser.add_argument(
        "--set",
        dest="changes",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a key of it; the value is YAML",
    )


def size_of(text: str) -> int:
    """Bytes of a size such as 6GiB, 6G or 6144MiB; a number alone is GiB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if found is None or float(found[1]) <= 0:
        raise argparse.ArgumentTypeError(f"must be a size such as 6GiB, got {text!r}")
    return int(float(found[1]) * UNITS[found[2] or "g"])


def whole_numbers(text: str) -> list[int]:
    """Numbers such as 0,5,11."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers, got {text!r}") from None
