# SPDX-License-Identifier: Apache-2.0
"""The distilled links of the ViT chain at 224 x 224, batch 4: a training step, an evaluation pass.

The baseline is what a timm user writes: timm's models, and the distillation loss in plain torch.
Without the cache the teacher runs in every step; with it its logits are read from disk, as in
every epoch after the first.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from bench import session
from bench.compare import Compare
from kdfast.chain.links import LinkModel
from kdfast.chain.objective import Objective
from kdfast.chain.teacher_cache import TeacherCache, teacher_key
from kdfast.configs.chain import ChainDistillConfig
from kdfast.nn import accelerate

CLASSES, TEMPERATURE, ALPHA = 10, 4.0, 0.7
BATCH, SIZE = session.sized((4, 224), (2, 32))
SMALL = {"img_size": 32, "patch_size": 16, "depth": 1, "embed_dim": 32, "num_heads": 2}
LINKS = (1, 2)  # the student's place in the chain; the first model has no teacher
CHAIN = [f"vit_{size}_patch16_224" for size in ("base", "small", "tiny")]
# Of the first step's loss, which kdfast takes in another order.
TOLERANCE = 2e-3


def model(index: int) -> LinkModel:
    torch.manual_seed(index)
    options = session.sized({}, SMALL)
    return LinkModel(timm.create_model(CHAIN[index], num_classes=CLASSES, **options))


class Pictures(torch.utils.data.Dataset[dict[str, Any]]):
    """One batch of pictures, for the cache."""

    variants = 1

    def __init__(self, images: Tensor) -> None:
        self.images = images.cpu()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, at: tuple[int, int]) -> dict[str, Any]:
        return {"image": self.images[at[0]]}


def stepper(module: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A training step with timm's AdamW."""
    optimizer = create_optimizer_v2(module, opt="adamw", lr=1e-6, weight_decay=0.05)

    def step() -> Tensor:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return step


def plain(index: int, images: Tensor, target: Tensor) -> Callable[[], Tensor]:
    """The step in timm and torch."""
    student = model(index).to(images.device).train()
    teacher = model(index - 1).to(images.device).eval().requires_grad_(False)

    def loss() -> Tensor:
        with torch.no_grad():
            t = teacher(images)
        s = student(images)
        soft = F.kl_div(
            F.log_softmax(s / TEMPERATURE, 1),
            F.log_softmax(t / TEMPERATURE, 1),
            reduction="batchmean",
            log_target=True,
        )
        return ALPHA * TEMPERATURE**2 * soft + (1 - ALPHA) * F.cross_entropy(s, target)

    return stepper(student, loss)


def ours(
    index: int, images: Tensor, target: Tensor, cache: TeacherCache | None
) -> Callable[[], Tensor]:
    """The step of the chain's trainer, with ``accelerate=true``."""
    student = model(index).to(images.device).train()
    accelerate(student.net)
    teacher = None
    if cache is None:
        teacher = model(index - 1).to(images.device).eval().requires_grad_(False)
        accelerate(teacher.net)
    config = ChainDistillConfig(temperature=TEMPERATURE, alpha=ALPHA)
    objective = Objective(student, teacher, "multiclass", config, epochs=1, distilled=True).train()

    def loss() -> Tensor:
        kept = None if cache is None else cache.logits(range(len(images)), 0).to(images)
        total: Tensor = objective(images, target, 0, kept)[0]["total"]
        return total

    return stepper(student, loss)


def pictures(device: torch.device) -> tuple[Tensor, Tensor]:
    """A batch, and its labels."""
    torch.manual_seed(7)
    images = torch.rand(BATCH, 3, SIZE, SIZE)
    return images.to(device), torch.randint(0, CLASSES, (BATCH,)).to(device)


@pytest.mark.candidates("kdfast", "timm", "kdfast, cache")
@pytest.mark.parametrize("index", LINKS, ids=["assistant", "student"])
def bench_training_step(compare: Compare, index: int, tmp_path: Path) -> None:
    images, target = pictures(compare.device)
    teacher = model(index - 1).to(images.device).eval()
    key = teacher_key(teacher, {"data": "bench"})
    cache = TeacherCache.build(
        teacher, Pictures(images), tmp_path / "cache", key=key, batch_size=BATCH
    )
    steps = {
        "kdfast": ours(index, images, target, None),
        "timm": plain(index, images, target),
        "kdfast, cache": ours(index, images, target, cache),
    }
    # The steps of the check move all candidates alike, and by little.
    check = session.near(plain(index, images, target)(), TOLERANCE)
    compare("vit_chain", f"{CHAIN[index]} step, batch {BATCH}, {SIZE} px", steps, check=check)


@pytest.mark.candidates("kdfast", "timm")
@pytest.mark.parametrize("index", LINKS, ids=["assistant", "student"])
def bench_evaluation(compare: Compare, index: int) -> None:
    images, _ = pictures(compare.device)
    models = {name: model(index).to(images.device).eval() for name in ("kdfast", "timm")}
    accelerate(models["kdfast"].net)

    def forward(name: str) -> Tensor:
        with torch.inference_mode():
            return models[name](images)

    calls = {name: lambda name=name: forward(name) for name in models}
    case = f"{CHAIN[index]} evaluation, batch {BATCH}, {SIZE} px"
    compare("vit_chain", case, calls, check=session.near(forward("timm"), 1e-3))
