# SPDX-License-Identifier: Apache-2.0
"""``python -m kdfast.evaluate``: a pruned backbone of ORION against its teacher, frame by frame.

Boxes as nuScenes measures them, lanes by their Chamfer distance, and the features of every block,
through the same frozen heads on the same held-out frames (docs/use/orion.md).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch.distributed as dist

from kdfast.commandline.evaluate import parser
from kdfast.configs import CONFIGS, ChainConfig, Config, ConfigError, load
from kdfast.configs.fields import as_config_error
from kdfast.data.files import CorruptDataError
from kdfast.machine.ranks import PeerError
from kdfast.machine.signals import run_command
from kdfast.models.eva import EVAViT
from kdfast.trainer.processes import make_accelerator


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write it with a picture.

    Returns:
        0; 2 if the request cannot be met; 128 plus the signal if it was stopped.
    """
    args = parser().parse_args(argv)
    return run_command(lambda: _guarded(args), "nothing was written")


def _guarded(args: argparse.Namespace) -> int:
    try:
        status = run(args)
        if dist.is_initialized():
            dist.destroy_process_group()
        return status
    except (ConfigError, ValueError, OSError, CorruptDataError, PeerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    """Everything that ``main`` does after the command line; raises instead of printing."""
    config = load(args.config, args.changes)
    _check(config, args)
    assert isinstance(config, Config)
    # Imported here: matching and metrics take a second to import.
    from kdfast.recovery.orion.evaluate import FrameEvaluator
    from kdfast.recovery.orion.feed import build_frames, frame_feed
    from kdfast.recovery.orion.run import draw_results, first_images, report_frames
    from kdfast.recovery.orion.teacher import get_frame_teacher
    from kdfast.sources import load_saved

    accelerator = make_accelerator("fp32", config.run.device)
    with as_config_error():
        data = build_frames(config, accelerator)
        teacher, heads = get_frame_teacher(
            config, accelerator, data, args.out / "teacher", resume=False
        )
    models = {"teacher": teacher}
    for path in args.checkpoint:
        name = path.parent.name if path.stem == "student" else path.stem
        model = load_saved(path)
        if not isinstance(model, EVAViT):
            got = type(model).__name__
            raise ValueError(f"--checkpoint: {path} must be a backbone of ORION, got a {got}")
        models[name or path.stem] = model.to(accelerator.device)
    args.out.mkdir(parents=True, exist_ok=True)
    limit = None if args.frames is None else args.frames * data.held_out.dataset.views
    evaluate = FrameEvaluator(accelerator, data.held_out, heads, limit)
    scores = {name: evaluate.scores(model) for name, model in models.items()}
    if accelerator.is_main_process:
        feed = frame_feed(config, data.held_out.dataset, None, accelerator.device)
        alone = FrameEvaluator(accelerator, feed, heads, limit)
        print(report_frames(args.out, models, scores, first_images(alone), teacher))
        picture = draw_results(args.out / "frames.png", models, alone)
        for path in (args.out / "frames.json", picture):
            print(path)
    accelerator.wait_for_everyone()
    return 0


def _check(config: Config | ChainConfig, args: argparse.Namespace) -> None:
    if isinstance(config, ChainConfig) or config.data.kind != "frames":
        kind = "a chain" if isinstance(config, ChainConfig) else config.data.kind
        fitting = [name for name, make in CONFIGS.items() if _has_frames(make())]
        raise ValueError(
            f"--config: must be a run with data.kind frames ({', '.join(fitting)}), got {kind}"
        )
    if args.frames is not None and args.frames < 1:
        raise ValueError(f"--frames: must be at least 1, got {args.frames}")
    absent = [str(path) for path in args.checkpoint if not path.exists()]
    if absent:
        raise ValueError(f"--checkpoint: no such file: {', '.join(absent)}")


def _has_frames(config: Config | ChainConfig) -> bool:
    return isinstance(config, Config) and config.data.kind == "frames"


if __name__ == "__main__":
    sys.exit(main())
