# SPDX-License-Identifier: Apache-2.0
"""I have a ViT and want it faster, with the same answers: ``python examples/accelerate_vit.py``."""

import statistics
import time
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

import kdfast

MODEL = "vit_small_patch16_224"  # or your own module; pretrained=True downloads its weights
CALLS = 10


def milliseconds(model: nn.Module, images: Tensor, calls: int) -> float:
    """Median time of a call, after one that nobody counts."""
    times = []
    for _ in range(calls + 1):
        start = time.perf_counter()
        model(images)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[1:])


@torch.inference_mode()
def main(name: str = MODEL, calls: int = CALLS, **sizes: Any) -> float:
    """Accelerates a model in place; the largest difference of its outputs."""
    model = timm.create_model(name, **sizes).eval()
    images = torch.randn(1, *resolve_model_data_config(model)["input_size"])
    before, slow = model(images), milliseconds(model, images, calls)

    print(kdfast.accelerate(model))  # what runs fused now, what was left, and why

    after, fast = model(images), milliseconds(model, images, calls)
    difference = float((after - before).abs().max())
    print(f"{name}: {slow:.1f} ms before, {fast:.1f} ms after, largest difference {difference:.1e}")
    maps = kdfast.attention_maps(model, images)  # the model still shows what it looks at
    print(f"attention maps: {len(maps)} of {tuple(next(iter(maps.values())).shape)}")
    return difference


if __name__ == "__main__":
    main()
