# SPDX-License-Identifier: Apache-2.0
"""Words of ``kdfast data``."""

from __future__ import annotations

import argparse
from pathlib import Path

from kdfast.commandline.parser import Parser, SubParser, place

DESCRIPTION = (
    "Checks a data root of ORION, makes its infos, or writes a small synthetic one; packs a folder "
    "of pictures into tar shards."
)
EXAMPLES = (
    "kdfast data sample --out data/sample",
    "kdfast data infos --root data/sample",
    "kdfast data check --root data/bench2drive",
    "kdfast data shard imagenet --out imagenet_shards",
    "kdfast data shard OWNER/NAME --kind huggingface --out shards",
    "kdfast data infos --root data/bench2drive --train data/infos/b2d_infos_train.pkl \\\n"
    "      --val data/infos/b2d_infos_val.pkl --maps data/infos/b2d_map_infos.pkl",
)
SHARD_SIZE = 500
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
    _add_shard(commands.add_parser("shard", help="pack a folder of pictures into tar shards"))
    return made


def _add_shard(shard: argparse.ArgumentParser) -> None:
    shard.add_argument(
        "source", metavar="SOURCE", type=place, help="folder of pictures, or a Hugging Face dataset"
    )
    shard.add_argument("--out", type=place, required=True, help="folder of the shards, or its URL")
    shard.add_argument(
        "--kind",
        choices=("imagefolder", "images", "bench2drive", "huggingface"),
        help="what SOURCE is: classes, pictures without labels, Bench2Drive, a dataset of Hugging "
        "Face by parquet files, their URL or its name [as it looks]",
    )
    shard.add_argument("--image-key", metavar="COLUMN", help="of huggingface [the only one]")
    shard.add_argument("--label-key", metavar="COLUMN", help="of huggingface [label, if there]")
    size = shard.add_mutually_exclusive_group()
    size.add_argument(
        "--samples-per-shard",
        type=int,
        metavar="N",
        help="samples of a shard at most [what --shard-size takes]",
    )
    size.add_argument(
        "--shard-size",
        type=int,
        default=SHARD_SIZE,
        metavar="MB",
        help=f"megabytes of a shard at most [{SHARD_SIZE}]",
    )
