# SPDX-License-Identifier: Apache-2.0
"""``python -m kdfast.attention``: pictures of what a model's heads look at, as PNG files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdfast.commandline.attention import parser
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
from kdfast.sources import (
    SourceError,
    crops_of,
    is_random,
    load_images,
    load_model,
    load_saved,
    transform_of,
)


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
