# SPDX-License-Identifier: Apache-2.0
"""Frames for a run with the heads, and what the heads remember between its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from kdfast.configs.recovery import Config
from kdfast.data import build
from kdfast.data.orion.frames import FrameBatch, OrionFrames, collate_frames
from kdfast.data.orion.prepare import new_sample
from kdfast.data.orion.sample import SampleOptions
from kdfast.data.orion.sequences import SequenceSampler
from kdfast.data.views.base import CorruptCounter
from kdfast.data.views.gridmask import GridMask
from kdfast.models.orion import HeadsMemory
from kdfast.recovery.data import Views, view_feed
from kdfast.trainer.feed import Batch, Feed
from kdfast.trainer.logs import LOG

Frames = Feed[OrionFrames]
# What a run makes for itself: 240 training frames and 40 to measure on.
SAMPLE = SampleOptions(clips=14, val_clips=2, frames=20, size=(180, 320))


class Streams:
    """What the heads remember of the frames before, for the student and for the teacher.

    A part of every checkpoint: a run that goes on remembers what it had seen.
    """

    def __init__(self, device: torch.device) -> None:
        """Remember nothing."""
        self.device = device
        self.student: HeadsMemory | None = None
        self.teacher: HeadsMemory | None = None

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Both memories, as tensors by name."""
        memories = {"student": self.student, "teacher": self.teacher}
        return {name: held.state() for name, held in memories.items() if held is not None}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Go back to a state of ``state_dict``."""
        for name in ("student", "teacher"):
            held = HeadsMemory.from_state(state[name]).to(self.device) if name in state else None
            setattr(self, name, held)


class _Counter:
    """Unreadable pictures and the memory of the heads: both belong to a place in the data."""

    def __init__(self, corrupt: CorruptCounter, streams: Streams) -> None:
        self.corrupt, self.streams = corrupt, streams

    def state_dict(self) -> dict[str, Any]:
        return {"corrupt": self.corrupt.state_dict(), "streams": self.streams.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.corrupt.load_state_dict(state["corrupt"])
        self.streams.load_state_dict(state["streams"])

    def merged(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        raise ValueError(
            "data.kind=frames: what the heads remember belongs to the slots of its process; go on "
            f"with as many processes as before, {len(states)}"
        )


@dataclass(frozen=True)
class FrameData:
    """Feeds of a run with the heads; the unlabelled ones are single views of the same frames.

    Attributes:
        train: Training frames in sequences, augmented and masked.
        scoring: Views as they are, for head scores; every process sees all of them.
        calibration: The same, shared among the processes, for the compensation.
        held_out: Validation frames, clip after clip, whole clips for each process.
        streams: What the heads remember in training.
    """

    train: Frames
    scoring: Views
    calibration: Views
    held_out: Frames
    streams: Streams

    def fingerprint(self) -> str:
        """Names the training data: other data, other name."""
        infos = self.train.dataset.infos
        return f"{len(infos)} frames of {infos.clips[0]} to {infos.clips[-1]}"


def build_frames(config: Config, accelerator: Accelerator) -> FrameData:
    """Datasets and feeds of the config.

    Raises:
        FileNotFoundError: A folder or file is missing; the message says what belongs there.
        ValueError: A split is too small.
    """
    data, device = config.data, accelerator.device
    root = Path(str(data.root)).expanduser()
    if data.sample and not root.exists():
        if accelerator.is_main_process:
            LOG.info("writing the synthetic set of `kdfast data sample` to %s", root)
            new_sample(root, SAMPLE)
        accelerator.wait_for_everyone()
    shared = {"rank": accelerator.process_index, "world": accelerator.num_processes}
    streams = Streams(device)
    train = OrionFrames(
        root,
        split="train",
        size=data.size,
        augment=data.augment,
        photometric=data.photometric,
        seed=config.seed,
    )
    held_out = OrionFrames(root, split="val", size=data.size, seed=config.seed)
    views = build(kind="bench2drive", root=root, split_file=data.split_file, size=data.size)
    common: dict[str, Any] = {"device": device, "workers": data.workers, "seed": config.seed}
    few = config.prune.batch_size
    return FrameData(
        frame_feed(config, train, streams, device, **shared),
        view_feed(views, batch_size=few, train=False, **common),
        view_feed(views, batch_size=few, train=False, whole_frames=False, **common, **shared),
        frame_feed(config, held_out, None, device, **shared),
        streams,
    )


def frame_feed(
    config: Config,
    dataset: OrionFrames,
    streams: Streams | None,
    device: torch.device,
    *,
    batch_size: int | None = None,
    rank: int = 0,
    world: int = 1,
) -> Frames:
    """Feed of frames whose images are (B * 6, 3, H, W) and whose labels are the heads' ``Batch``.

    Args:
        config: Sequences, masks, loader.
        dataset: The frames.
        streams: What the heads remember in training; None: frames for evaluation, whole clips in
            their order, one stream a process.
        device: Where the batches go.
        batch_size: Streams of this process in training; that of ``config.run`` if None.
        rank: This process.
        world: Number of processes.

    Raises:
        ValueError: There are fewer sequences than streams.
    """
    data, train = config.data, streams is not None
    size = (batch_size or config.run.batch_size) if train else 1
    sampler = SequenceSampler(
        dataset.infos,
        size,
        length=data.sequence if train else 0,
        stride=data.stride,
        seed=config.seed,
        rank=rank,
        world=world,
        shuffle=train,
    )
    corrupt = CorruptCounter(len(dataset) * dataset.views)
    names = dataset.infos.pictures
    mask = GridMask(config.seed, rank, prob=data.gridmask) if train and data.gridmask else None

    def to_batch(found: FrameBatch, epoch: int, number: int) -> Batch:
        counted = {"corrupt": list(found.corrupt), "path": [""] * found.images.shape[:2].numel()}
        corrupt.update(counted)
        images = found.images.flatten(0, 1).to(device, non_blocking=True)
        if mask is not None:
            images = mask(images, epoch=epoch, step=number)
        # One entry an image, as of every feed.
        index = found.index.repeat_interleave(dataset.views).tolist()
        paths = [str(dataset.root / name) for at in found.index.tolist() for name in names(at)]
        return Batch(images, found.batch.to(device), index, paths)

    return Feed(
        dataset,
        sampler,
        to_batch,
        key="run.batch_size",
        batch_size=size,
        train=True,
        device=device,
        workers=data.workers,
        seed=config.seed,
        counter=None if streams is None else _Counter(corrupt, streams),
        collate=collate_frames,
    )
