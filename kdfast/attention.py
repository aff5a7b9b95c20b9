# SPDX-License-Identifier: Apache-2.0
"""``python -m kdfast.attention``: pictures of what a model's heads look at, as PNG files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdfast.machine.signals import run_command
from kdfast.pictures.capture import Attentions, capture
from kdfast.pictures.draw import (
    draw_head,
    draw_heads,
    draw_pruned_heads,
    draw_rollout,
    draw_rollout_change,
    tokens_of,
)
from kdfast.pictures.names import class_names, model_name, prediction
from kdfast.pictures.rollout import FUSIONS
from kdfast.sources import (
    MODEL_HELP,
    SourceError,
    crops_of,
    is_random,
    load_images,
    load_model,
    load_saved,
    transform_of,
)

EXAMPLES = """examples:
  python -m kdfast.attention --model vit_base_patch16_224 --pretrained --image cat.jpg
  python -m kdfast.attention --checkpoint runs/orion50/student.safetensors --image front.jpg
  python -m kdfast.attention --model vit_base_half --image cat.jpg
  python -m kdfast.attention --checkpoint teacher.safetensors --after student.safetensors \\
      --image front.jpg --layers 5,23 --heads 0,3
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m kdfast.attention",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--model", help=MODEL_HELP)
    made.add_argument("--checkpoint", metavar="PATH", help="weights; alone: it says its model")
    made.add_argument("--pretrained", action="store_true", help="download the weights of --model")
    made.add_argument("--after", metavar="PATH", help="file or folder of a pruned model")
    made.add_argument("--image", nargs="+", required=True, metavar="FILE")
    made.add_argument("--output", default="attention", metavar="FOLDER")
    made.add_argument("--layers", type=_numbers, default=[-1], help="such as 0,5,11; default: last")
    made.add_argument("--heads", type=_numbers, default=[], help="draw these heads alone, large")
    made.add_argument("--patch", type=_numbers, help="row,column of the patch that looks")
    made.add_argument("--fusion", choices=FUSIONS, default="mean", help="of heads, in rollout")
    made.add_argument("--discard", type=float, default=0.0, help="smallest share left out")
    return made


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers, got {text!r}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Draw and print the paths; 2 if something that the command line names cannot be used."""
    args = parser().parse_args(argv)
    return run_command(lambda: guarded(args), "the pictures that were drawn are whole")


def guarded(args: argparse.Namespace) -> int:
    """The command after its command line: what cannot be used is one line."""
    try:
        for path in draw(args):
            print(path)
    except (ValueError, TypeError, NotImplementedError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def draw(args: argparse.Namespace) -> list[Path]:
    """Every picture that the command line asks for."""
    if args.patch is not None and len(args.patch) != 2:
        raise SourceError(f"--patch: must be row,column, got {args.patch}")
    for image in args.image:
        if not Path(image).is_file():
            raise SourceError(f"--image: there is no file {image}")
    model = load_model(args.model, args.checkpoint, pretrained=args.pretrained)
    random = is_random(args.model, args.checkpoint, pretrained=args.pretrained)
    if random:
        print("note: random weights; see --pretrained and --checkpoint", file=sys.stderr)
    images = load_images(args.image, transform_of(model))
    crop = crops_of(model, images)
    seen = capture(model, images, crop)
    after = None if args.after is None else capture(load_saved(args.after, "--after"), images, crop)
    title = Path(args.model).name if args.model else model_name(model)
    classes = class_names(model)
    paths: list[Path] = []
    for index, image in enumerate(args.image):
        # Two pictures of one name must not overwrite each other.
        stem = f"{index}-{Path(image).stem}" if len(args.image) > 1 else Path(image).stem
        base = Path(args.output) / stem
        words = [title, Path(image).name]
        if seen.output is not None and not random:
            words.append(f"predicted {prediction(seen.output[index], classes)}")
        paths += _draw_image(args, seen, after, index, base, ", ".join(words))
    return paths


def _draw_image(
    args: argparse.Namespace,
    seen: Attentions,
    after: Attentions | None,
    image: int,
    base: Path,
    title: str,
) -> list[Path]:
    token = tokens_of(seen, args.patch)
    common: dict[str, Any] = {"image": image, "token": token, "title": title}

    def name(what: str) -> Path:
        return base.with_name(f"{base.name}-{what}.png")

    paths = [
        draw_rollout(seen, name("rollout"), fusion=args.fusion, discard=args.discard, **common)
    ]
    for layer in args.layers:
        number = layer % len(seen.layers)
        paths.append(draw_heads(seen, name(f"layer{number}"), layer=layer, **common))
        for head in args.heads:
            target = name(f"layer{number}-head{head}")
            paths.append(draw_head(seen, target, layer=layer, head=head, **common))
        if after is not None:
            target = name(f"layer{number}-pruned")
            paths.append(draw_pruned_heads(seen, after, target, layer=layer, **common))
    if after is not None:
        paths.append(draw_rollout_change(seen, after, name("pruned"), **common))
    return paths


if __name__ == "__main__":
    sys.exit(main())
