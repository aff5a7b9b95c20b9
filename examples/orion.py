# SPDX-License-Identifier: Apache-2.0
"""I have ORION and want its image encoder smaller, back in ORION's own file:

``python examples/orion.py Orion.pth OUT`` keeps half of the heads. Without a file it makes a small
encoder with random weights, to show the way. To train it: ``kdfast train --config orion50``.
"""

import json
import sys
from pathlib import Path

import torch

import kdfast
from kdfast.models import EVAViT, load_orion_backbone, save_backbone
from kdfast.pruning.selection_file import read_selection

KEEP = 0.5
SMALL = {"img_size": 64, "embed_dim": 128, "depth": 3, "num_heads": 4, "window_size": 2}


def main(checkpoint: Path | None, out: Path) -> tuple[Path, Path]:
    """Prunes the encoder; the files for kdfast's trainers and for ORION's code."""
    if checkpoint is None:
        encoder = EVAViT(**SMALL, window_block_indexes=[0, 1])  # type: ignore[arg-type]
    else:
        encoder = load_orion_backbone(checkpoint)
    encoder.eval()
    side = encoder.config["img_size"]

    scores = kdfast.head_scores(encoder)  # by the weights; "taylor" and others look at pictures
    out.mkdir(parents=True, exist_ok=True)
    heads = out / "heads.json"  # edit it, or write your own: --set prune.heads=heads.json
    heads.write_text(json.dumps(kdfast.select_heads(scores, keep=KEEP)))
    kept = read_selection(heads, [len(row) for row in encoder.heads])
    scores.plot(out / "heads.png", kept=kept)

    student = kdfast.prune_heads(encoder, kept)
    print(kdfast.pruning_report(encoder, [KEEP]))
    with torch.no_grad():
        features = student(torch.randn(1, 3, side, side))
    print(f"features {tuple(features.shape)}, as before")

    save_backbone(student, out / "student.safetensors", orion_keys=True)
    whole, builder = kdfast.export_orion(student, out / "orion_half.pth", base=checkpoint)
    print(f"{whole} is for ORION's own code, with {builder.name} beside it")
    return out / "student.safetensors", whole


if __name__ == "__main__":
    if len(sys.argv) > 3:
        sys.exit(__doc__)
    given = [Path(word) for word in sys.argv[1:]]
    main(given[0] if given else None, given[1] if len(given) > 1 else Path("runs/orion_example"))
