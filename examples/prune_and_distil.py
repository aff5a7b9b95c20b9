# SPDX-License-Identifier: Apache-2.0
"""I have a timm model and a folder of pictures, and want half of its heads gone:

``python examples/prune_and_distil.py PICTURES`` prunes, compensates, distils and saves. No labels.
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
from torch.nn.functional import cosine_similarity

import kdfast

MODEL, PRETRAINED = "vit_small_patch16_224", True  # the weights are downloaded once
KEEP, EPOCHS, LR, BATCH = 0.5, 3, 1e-5, 16


def pictures(folder: Path, model: Any) -> Tensor:
    """All pictures of a folder and its folders, as the model takes them."""
    transform = create_transform(**resolve_model_data_config(model))
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in (".jpg", ".jpeg", ".png")]
    return torch.stack([transform(Image.open(path).convert("RGB")) for path in files])


@torch.no_grad()
def likeness(student: Any, teacher: Any, images: Tensor) -> float:
    """Mean cosine of what both models return."""
    return float(cosine_similarity(student.eval()(images), teacher(images)).mean())


def main(folder: Path, out: Path, epochs: int = EPOCHS, **model: Any) -> tuple[float, float]:
    """Likeness to the original before and after the distillation, on pictures held out."""
    settings = {"model_name": MODEL, "pretrained": PRETRAINED, **model}
    teacher: Any = timm.create_model(**settings).eval().requires_grad_(False)
    images = pictures(folder, teacher)
    learn = torch.arange(len(images)) % 8 > 0  # every eighth picture is held out
    held, train = images[~learn], images[learn]

    scores = kdfast.head_scores(teacher, "taylor", train.split(BATCH))
    kept = kdfast.select_heads(scores, keep=KEEP)
    calibration = kdfast.calibrate(teacher, train.split(BATCH))  # folds what is cut into the rest
    student: Any = kdfast.prune_heads(teacher, kept, compensate=calibration)
    student.requires_grad_(True)
    before = likeness(student, teacher, held)

    optimizer = torch.optim.AdamW(student.parameters(), lr=LR)
    for epoch in range(epochs):
        for batch in train[torch.randperm(len(train))].split(BATCH):
            tokens = [net.forward_features(batch) for net in (student.train(), teacher)]
            logits = student.forward_head(tokens[0]), teacher.forward_head(tokens[1])
            loss = kdfast.feature_loss(*tokens, normalize="layer")
            loss = loss + kdfast.kd_loss(*logits, temperature=2.0, alpha=1.0)[0]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}")
    after = likeness(student, teacher, held)
    print(f"cosine to the original, pictures held out: {before:.4f} pruned, {after:.4f} distilled")
    print(f"saved in {kdfast.save_pretrained(student, out)}: kdfast.load_pretrained reads it")
    scores.plot(out / "heads.png", kept=kept)
    return before, after


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(f"{MODEL}_half"))
