# SPDX-License-Identifier: Apache-2.0
"""Words of ``kdfast data``."""

from __future__ import annotations

import argparse
from pathlib import Path

from kdfast.commandline.parser import Parser, SubParser

DESCRIPTION = "Checks a data root of ORION, makes its infos, or writes a small synthetic one."
EXAMPLES = (
    "kdfast data sample --out data/sample",
    "kdfast data infos --root data/sample",
    "kdfast data check --root data/bench2drive",
    "kdfast data infos --root data/bench2drive --train data/infos/b2d_infos_train.pkl \\\n"
    "      --val data/infos/b2d_infos_val.pkl --maps data/infos/b2d_map_infos.pkl",
)
# The synthetic set: those of ``SampleOptions``.
SAMPLE = {"clips": 4, "val_clips": 1, "frames": 30, "seed": 0}
SIZE = (450, 800)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser("data", DESCRIPTION, EXAMPLES, alone=True)
    commands = made.add_subparsers(dest="command", required=True, parser_class=SubParser)
    check = commands.add_parser("check", help="what is there, what is missing, how to get it")
    infos = commands.add_parser("infos", help="make infos and maps from a download or pickles")
    for command in (check, infos):
        command.add_argument("--root", type=Path, required=True, help="folder that holds v1")
        command.add_argument("--split-file", type=Path, help="JSON list of validation clips")
    check.add_argument("--chat", type=Path, help="folder of Chat-B2D [ROOT/chat-B2D]")
    infos.add_argument("--train", type=Path, help="b2d_infos_train.pkl, instead of annotations")
    infos.add_argument("--val", type=Path, help="b2d_infos_val.pkl, instead of annotations")
    infos.add_argument(
        "--maps", type=Path, help="b2d_map_infos.pkl or a folder of HD maps [ROOT/maps]"
    )
    infos.add_argument("--workers", type=int, default=2, help="processes [2]")
    infos.add_argument(
        "--no-depth", action="store_true", help="keep boxes that are behind something"
    )
    sample = commands.add_parser("sample", help="write a small synthetic dataset")
    sample.add_argument("--out", type=Path, required=True, help="its root")
    for name, value in SAMPLE.items():
        flag = f"--{name.replace('_', '-')}"
        sample.add_argument(flag, type=int, default=value, help=f"[{value}]")
    sample.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=SIZE,
        metavar=("H", "W"),
        help=f"of pictures [{SIZE[0]} {SIZE[1]}]",
    )
    return made
