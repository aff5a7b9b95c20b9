# SPDX-License-Identifier: Apache-2.0
"""``python -m kdfast.data``: check, convert or make up a data root, or pack pictures in shards."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from kdfast.commandline.data import parser
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
from kdfast.data.packing import plan_shards
from kdfast.data.shards.hub import is_hub
from kdfast.data.shards.stream import KIND, Source, write_stream
from kdfast.data.shards.write import Limits, write_shards
from kdfast.machine.signals import run_command


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
        "shard": "the same command goes on with the shards that are not done",
    }
    return run_command(lambda: _guarded(args), kept[args.command])


def _guarded(args: argparse.Namespace) -> int:
    try:
        commands = {"check": _check, "infos": _infos, "sample": _sample, "shard": _shard}
        return commands[args.command](args)
    except (OSError, ValueError, ImportError, CorruptDataError) as error:
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


def _shard(args: argparse.Namespace) -> int:
    for name in ("samples_per_shard", "shard_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag}: must be at least 1, got {value}")
    count = args.samples_per_shard
    size = None if count is not None else args.shard_size * 10**6
    limits = Limits(count, size)
    out = args.out.expanduser() if isinstance(args.out, Path) else args.out
    if args.kind == KIND or (args.kind is None and is_hub(args.source)):
        source = Source(args.source, args.image_key, args.label_key)
        print(write_stream(source, out, limits, lambda *shard: print(_line(*shard), flush=True)))
        return 0
    if args.image_key or args.label_key:
        raise ValueError("--image-key and --label-key: only for a Hugging Face dataset")
    plan = plan_shards(Path(args.source), args.kind, limits)
    samples = sum(map(len, plan.shards.values()))
    classes = f" of {len(plan.classes)} classes" if plan.classes else ""
    total = len(plan.shards)
    print(f"{args.source}: {plan.kind}, {samples:,} samples{classes} in {total} shards")
    done = 0

    def told(name: str, size: int, before: bool) -> None:
        nonlocal done
        done += 1
        print(f"{done:{len(str(total))}} of {total}  {_line(name, size, before)}", flush=True)

    print(write_shards(plan, out, told))
    return 0


def _line(name: str, size: int, before: bool) -> str:
    return f"{name}  {size / 1e6:,.1f} MB{', was there' if before else ''}"


if __name__ == "__main__":
    sys.exit(main())
