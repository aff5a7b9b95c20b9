# SPDX-License-Identifier: Apache-2.0
"""``python -m kdfast.data``: check a data root, convert its infos, or write a synthetic one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from kdfast.data.files import CorruptDataError
from kdfast.data.orion.check import Finding, check_root, find_split
from kdfast.data.orion.prepare import (
    clips_of,
    infos_from_download,
    infos_from_pickle,
    maps_from,
    unknown_types,
)
from kdfast.data.orion.sample import SampleOptions, write_sample
from kdfast.machine.signals import run_command

EXAMPLES = """examples:
  python -m kdfast.data sample --out data/sample
  python -m kdfast.data infos --root data/sample
  python -m kdfast.data check --root data/bench2drive
  python -m kdfast.data infos --root data/bench2drive --train data/infos/b2d_infos_train.pkl \\
      --val data/infos/b2d_infos_val.pkl --maps data/infos/b2d_map_infos.pkl
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m kdfast.data",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = made.add_subparsers(dest="command", required=True)
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
    standard = SampleOptions()
    for name in ("clips", "val-clips", "frames", "seed"):
        value = getattr(standard, name.replace("-", "_"))
        sample.add_argument(f"--{name}", type=int, default=value, help=f"[{value}]")
    sample.add_argument(
        "--size", type=int, nargs=2, default=standard.size, metavar=("H", "W"), help="of pictures"
    )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0; 1 if a check found something missing; 2 if the request cannot be met; 128 plus the signal
        if it was stopped.
    """
    args = parser().parse_args(argv)
    kept = {
        "check": "not everything was looked at",
        "infos": "the same command goes on with the clips that are not done",
        "sample": f"{getattr(args, 'out', '')} is not whole, delete it",
    }
    return run_command(lambda: _guarded(args), kept[args.command])


def _guarded(args: argparse.Namespace) -> int:
    try:
        return {"check": _check, "infos": _infos, "sample": _sample}[args.command](args)
    except (OSError, ValueError, CorruptDataError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _check(args: argparse.Namespace) -> int:
    findings = check_root(args.root, args.split_file, args.chat)
    width = max(len(one.what) for one in findings)
    for one in findings:
        print(f"{one.what:{width}}  {one.state:8} {one.found}")
        if one.remedy:
            print(f"{'':{width}}  {'':8} -> {one.remedy}")
    lacking = [one for one in findings if _lacks(one)]
    if lacking:
        print(f"training with the heads needs {', '.join(one.what for one in lacking)}")
    return 1 if lacking else 0


def _lacks(one: Finding) -> bool:
    return one.needed and one.state != "ok"


def _infos(args: argparse.Namespace) -> int:
    if args.workers < 1:
        raise ValueError(f"--workers: must be at least 1, got {args.workers}")
    root = args.root.expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"--root: must be a folder that holds v1, got {root}")
    pickles = {name: getattr(args, name) for name in ("train", "val") if getattr(args, name)}
    if pickles:
        written = [infos_from_pickle(path, root, split) for split, path in pickles.items()]
    else:
        split_file = args.split_file or find_split(root)
        if split_file is None:
            raise FileNotFoundError(
                f"--split-file: must name the list of validation clips, got none below {root}; "
                f"ORION has it as data/splits/bench2drive_base_train_val_split.json"
            )
        clips = clips_of(root, split_file)
        depth = not args.no_depth
        written = infos_from_download(root, clips, workers=args.workers, use_depth=depth)
    without = unknown_types(written)
    written.append(maps_from(args.maps or root / "maps", root))
    for path in written:
        print(path)
    if without:
        print(f"without a class, taken for background: {', '.join(without)}")
    return 0


def _sample(args: argparse.Namespace) -> int:
    size = (args.size[0], args.size[1])
    options = SampleOptions(args.clips, args.val_clips, args.frames, size, args.seed)
    print(write_sample(args.out.expanduser(), options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
