# SPDX-License-Identifier: Apache-2.0
"""Pictures that are kept in memory as bytes, and batches of them for the trainer's loop.

B batch, (H, W) pixels, (h, w) pixels of a crop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdfast.data.sampler import EpochSampler
from kdfast.trainer.feed import Batch, Feed

# Crops of uint8 pictures: (pictures, their indices, epoch) -> pictures (B, 3, h, w) in [0, 1].
Augment = Callable[[Tensor, "np.ndarray[Any, np.dtype[np.int64]]", int], Tensor]


class Pictures:
    """Items for ``Feed``, made a whole batch at a time.

    Attributes:
        images: (N, 3, H, W) uint8.
        labels: (N,) int64, or None.
    """

    def __init__(self, images: Tensor, labels: Tensor | None, augment: Augment) -> None:
        self.images, self.labels, self.augment = images, labels, augment
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.images)

    def set_epoch(self, epoch: int) -> None:
        """See ``EpochDataset``."""
        self.epoch = epoch

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        """A batch; PyTorch's loader asks for it by this name."""
        rows = np.asarray(indices, np.int64)
        images = self.augment(self.images[rows], rows, self.epoch)
        labels = None if self.labels is None else self.labels[rows]
        return {"images": images, "labels": labels, "index": rows.tolist()}


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pictures (B, 3, H, W), uint8 or in [0, 1], as a model takes them."""
    shift, scale = (torch.tensor(x).view(3, 1, 1) for x in (mean, std))
    values = images.float() / 255 if images.dtype == torch.uint8 else images
    return (values - shift) / scale


def training_feed(
    pictures: Pictures, batch: int, seed: int, mean: Sequence[float], std: Sequence[float]
) -> Feed[Pictures]:
    """Shuffled whole batches of normalised pictures.

    Raises:
        ValueError: There are fewer pictures than a batch has.
    """

    def to_batch(item: dict[str, Any], epoch: int, number: int) -> Batch:
        index = item["index"]
        names = [f"picture {i}" for i in index]
        return Batch(normalised(item["images"], mean, std), item["labels"], index, names)

    return Feed(
        pictures,
        EpochSampler(len(pictures), seed=seed),
        to_batch,
        key="batch",
        batch_size=batch,
        train=True,
        device=torch.device("cpu"),
        seed=seed,
        collate=lambda item: item,
    )
