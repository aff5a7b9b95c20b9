# SPDX-License-Identifier: Apache-2.0
"""I have a timm model and a folder of pictures, and want half of its heads gone:

``python examples/prune_and_distil.py PICTURES`` prunes, compensates, distils and saves. No labels.
Folders "train" and "val" in it are taken as such; otherwise a tenth is held out to measure on.
"""

import sys
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor

import kdfast

MODEL, PRETRAINED = "vit_small_patch16_224", True  # the weights are downloaded once
KEEP, EPOCHS, LR, BATCH = 0.5, 3, 1e-5, 16
LOOKED_AT = 256  # pictures for scores and compensation; more of them change little


def pictures(folder: Path, model: Any) -> Tensor:
    """Pictures from all over a folder, as the model takes them."""
    transform = create_transform(**resolve_model_data_config(model))
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in (".jpg", ".jpeg", ".png")]
    some = files[:: max(1, len(files) // LOOKED_AT)]
    return torch.stack([transform(Image.open(path).convert("RGB")) for path in some])


def main(folder: Path, out: Path, epochs: int = EPOCHS, **model: Any) -> tuple[float, float]:
    """Cosine to the original before and after the distillation, on pictures held out."""
    settings = {"model_name": MODEL, "pretrained": PRETRAINED, **model}
    teacher: Any = timm.create_model(**settings).eval()
    own = folder / "train"
    images = pictures(own if own.is_dir() else folder, teacher).split(BATCH)

    scores = kdfast.head_scores(teacher, "taylor", images)
    kept = kdfast.select_heads(scores, keep=KEEP)
    calibration = kdfast.calibrate(teacher, images)  # folds what is cut into the rest
    student: Any = kdfast.prune_heads(teacher, kept, compensate=calibration)

    run = kdfast.distil(
        student, teacher, folder, output=str(out), epochs=epochs, lr=LR, batch_size=BATCH
    )
    assert run is not None  # only max_steps ends a run before its results
    scores.plot(run.folder / "heads.png", kept=kept)
    _, before, after = (line.quality["cosine"] for line in run.lines)
    print(f"cosine to the original, pictures held out: {before:.4f} pruned, {after:.4f} distilled")
    print(f"kdfast.load_pretrained reads {run.saved}; {run.folder / 'report.html'} shows the run")
    return before, after


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(f"{MODEL}_half"))
