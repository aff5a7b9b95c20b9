# SPDX-License-Identifier: Apache-2.0
"""The view dataset that a config names: pictures, shards, Bench2Drive cameras or scenes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdfast.data.scenes.dataset import Scenes
from kdfast.data.shards.places import holds_shards
from kdfast.data.views.base import ViewDataset
from kdfast.data.views.bench2drive import Bench2Drive
from kdfast.data.views.sharded import HubImages, ShardedBench2Drive, ShardedImages
from kdfast.data.views.unlabelled import UnlabelledImages

KINDS = ("images", "webdataset", "huggingface", "bench2drive", "scenes")
_OPTIONS = {
    "images": {"root", "photometric", "val_fraction"},
    "webdataset": {"root", "photometric", "val_fraction", "image_key"},
    "huggingface": {"root", "photometric", "val_fraction", "image_key"},
    "bench2drive": {"root", "photometric", "split_file"},
    "scenes": {"frames"},
}


def build(
    *,
    kind: str,
    root: str | Path | None = None,
    split: str = "train",
    size: tuple[int, int] = (640, 640),
    augment: bool = False,
    seed: int = 0,
    photometric: bool = False,
    val_fraction: float | None = None,
    split_file: str | Path | None = None,
    frames: int | None = None,
    image_key: str | None = None,
) -> ViewDataset:
    """Make a dataset; docs/use/data.md describes the kinds.

    Args:
        kind: "images", "webdataset", "huggingface", "bench2drive" or "scenes".
        root: Data folder, of ``webdataset`` also a pattern or URL, of ``huggingface`` also a name
            on the hub; ``scenes`` has none.
        split: "train" or "val".
        size: (height, width) of the items; the height even.
        augment: Random crop (mirroring for ``scenes``); leave it off for evaluation.
        seed: Seed of every random draw.
        photometric: ORION's colour distortion on top of the crop; needs ``augment``.
        val_fraction: Part of pictures without splits of their own that is "val"; 0.1 if None.
        split_file: JSON list of the validation clips of ``bench2drive``.
        frames: Number of frames of ``scenes``, six views each.
        image_key: Field of ``webdataset``, or column of ``huggingface``, with the picture; None:
            the only one of its type.

    Returns:
        A map-style dataset; see ``ViewDataset`` for its items.

    Raises:
        FileNotFoundError: The folder or every picture in it is missing.
        ValueError: The kind is unknown, an option belongs to another kind or is out of range.
    """
    _check_options(
        kind,
        {
            "root": root is not None,
            "photometric": photometric,
            "val_fraction": val_fraction is not None,
            "split_file": split_file is not None,
            "frames": frames is not None,
            "image_key": image_key is not None,
        },
    )
    if min(size) < 2 or size[0] % 2:
        raise ValueError(f"size: must be positive with an even height, got {size}")
    if photometric and not augment:
        raise ValueError("photometric: needs augment=True, got augment=False")
    common: dict[str, Any] = {"split": split, "size": size, "augment": augment, "seed": seed}
    if kind == "scenes":
        return Scenes(frames=frames, **common)
    if kind == "bench2drive":
        sharded = holds_shards(root)
        drive: Callable[..., ViewDataset] = ShardedBench2Drive if sharded else Bench2Drive
        return drive(root, split_file=split_file, photometric=photometric, **common)
    fraction = 0.1 if val_fraction is None else val_fraction
    common |= {"photometric": photometric, "val_fraction": fraction}
    if kind == "webdataset":
        return ShardedImages(root, image_key=image_key, **common)
    if kind == "huggingface":
        return HubImages(root, image_key=image_key, **common)
    return UnlabelledImages(root, **common)


def _check_options(kind: str, given: dict[str, bool]) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind: must be one of {KINDS}, got {kind!r}")
    foreign = sorted(name for name, used in given.items() if used and name not in _OPTIONS[kind])
    if foreign:
        raise ValueError(
            f"build: kind {kind!r} takes {sorted(_OPTIONS[kind])}, got {', '.join(foreign)}"
        )
