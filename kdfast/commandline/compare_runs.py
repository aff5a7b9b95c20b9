# SPDX-License-Identifier: Apache-2.0
"""Words of ``kdfast compare-runs``."""

from __future__ import annotations

import argparse
from pathlib import Path

from kdfast.commandline.parser import Parser

DESCRIPTION = "One table over the models of several finished runs, such as a CNN and a ViT chain."
EXAMPLES = (
    "kdfast compare-runs runs/vit_chain runs/cnn_chain",
    "kdfast compare-runs runs/distil runs/distil-2 --out table.csv",
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser("compare-runs", DESCRIPTION, EXAMPLES)
    made.add_argument("runs", nargs="+", type=Path, metavar="FOLDER", help="of a finished run")
    made.add_argument("--out", type=table_file, metavar="FILE", help="the table as .csv or .json")
    return made


def table_file(text: str) -> Path:
    """A file that a table can be written to."""
    if Path(text).suffix not in (".csv", ".json"):
        raise argparse.ArgumentTypeError(f"must end in .csv or .json, got {text!r}")
    return Path(text)
