# SPDX-License-Identifier: Apache-2.0
"""What is counted and measured for docs/scale.md: work, memory, pictures, cache, order of data.

Times are CPU seconds of one thread, the median of some calls: waiting for a core is not in them,
what another program takes from shared caches and from the other half of a core is.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.rows import rounded
from bench.scale_cache import simulate_cache
from bench.scale_order import simulate
from bench.scale_settings import (
    CLASSES,
    H100,
    IMAGENET,
    TOP_K,
    TRAIN_VIEWS,
    Assumptions,
    configs,
)
from kdfast.chain.cache_files import Writer
from kdfast.chain.cache_rows import Layout
from kdfast.chain.cache_shards import Shard, take
from kdfast.chain.planning import chain_steps
from kdfast.chain.teacher_cache import TeacherCache
from kdfast.configs import ChainConfig, Config
from kdfast.configs.orion50 import orion50
from kdfast.data.labelled import build_classification
from kdfast.data.sampler import EpochSampler
from kdfast.data.views.bench2drive import CAMERAS, Bench2Drive
from kdfast.machine.facts import machine_facts
from kdfast.memory.measure import GIB, MemoryPlan
from kdfast.memory.search import largest
from kdfast.memory.steps import PlannedStep
from kdfast.pruning import pruning_report
from kdfast.recovery.objective import feature_layers
from kdfast.recovery.planning import recovery_step

# Batch of the plans whose work is counted: per picture it does not depend on it.
COUNTED = 4
CANDIDATES = [2**i for i in range(12)]
# Side lengths and bytes of a file: ImageNet's mean, and Bench2Drive's cameras at quality 20.
IMAGENET_FILE = (375, 500), 110_000
BENCH2DRIVE_FILE = (900, 1600), None
QUALITY = 20
FILES, REPEATS = 12, 5
# Rows of the small cache, and of a batch that is read from it.
ROWS, READ = 4096, 256
# Processes of a simulated run, which stops and goes on twice; 48 divide neither steps nor batches.
WORLDS = (512, 48, 512)
# Pictures a call of a simulated teacher.
CACHE_BATCH = 64
# Pictures of the sets whose order is drawn.
DRAWN = (IMAGENET, 10_000_000)


def measure(command: str) -> dict[str, Any]:
    """Everything that a page needs; takes some minutes."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    return {
        "machine": {**machine_facts(), "command": command},
        "work": {name: work_of(config) for name, config in configs().items()},
        "data": {"imagenet": imagenet_rate(), "bench2drive": bench2drive_rate()},
        "features": feature_bytes(),
        "cache": [cache_rate(top_k) for top_k in (None, TOP_K)],
        "order": [order_cost(pictures) for pictures in DRAWN],
        "simulations": simulations(),
        "cache_simulation": simulate_cache("ImageNet-1k", IMAGENET, CACHE_BATCH, WORLDS),
    }


def simulations() -> list[dict[str, Any]]:
    """An epoch of both sets."""
    chosen = Assumptions()
    return [
        simulate("ImageNet-1k", IMAGENET, chosen.imagenet_limit, WORLDS),
        simulate("Bench2Drive, views", TRAIN_VIEWS, chosen.orion_limit, WORLDS),
    ]


def work_of(config: Config | ChainConfig) -> dict[str, Any]:
    """Operations, parameters and memory of a step, by the planner that ``kdfast plan`` asks."""
    if isinstance(config, ChainConfig):
        step = chain_steps(config, CLASSES)[1]
        cached = chain_steps(replace(config, cache=True), CLASSES)[1]
        with torch.device("meta"):
            models: list[Any] = [
                timm.create_model(name, num_classes=CLASSES) for name in config.chain
            ]
    else:
        step, cached = recovery_step(config), None
        with torch.device("meta"):
            built: Any = step.build(False)
        models = [built.teachers[0], built.module.student]
    forward = [pruning_report(model, (), image_size=step.image_size).full for model in models]
    with torch.device("meta"):
        trained = [p for p in step.build(False).module.parameters() if p.requires_grad]
    plain, again = (step.plan(COUNTED, checkpointing) for checkpointing in (False, True))
    found: dict[str, Any] = {
        "title": step.title,
        "image_size": list(step.image_size),
        "teacher_forward": forward[0].flops,
        "student_forward": forward[1].flops,
        "step": plain.flops // COUNTED,
        "step_checkpointed": again.flops // COUNTED,
        "teacher_params": forward[0].params,
        "trained_params": sum(p.numel() for p in trained),
        # Shapes say what a gradient's compression can leave out.
        "shapes": [[list(k), n] for k, n in Counter(tuple(p.shape) for p in trained).items()],
        "plans": [plan_row(plain), plan_row(again), *fitting(step)],
    }
    if cached is not None:
        found["step_cached"] = cached.plan(COUNTED, False).flops // COUNTED
        found["plans_cached"] = fitting(cached)
    return found


def feature_bytes() -> dict[str, int]:
    """What ORION's teacher hands to the objective for a picture, in bf16."""
    config = orion50()
    with torch.device("meta"):
        built: Any = recovery_step(config).build(False)
    teacher, student = built.teachers[0], built.module.student
    side = config.data.size[0] // teacher.config["patch_size"]
    output = 2 * teacher.config["embed_dim"] * side**2
    maps = output * (1 + len(feature_layers(teacher, config.distill.feature_layers)))
    head = teacher.config["embed_dim"] // teacher.config["num_heads"]
    # Queries and keys of the heads that the student keeps: maps of attention are made of them.
    pairs = sum(2 * 2 * len(heads) * head * side**2 for heads in student.heads)
    return {"output": output, "all": maps + pairs}


def fitting(step: PlannedStep) -> list[dict[str, Any]]:
    """The plan of the largest batch that fits a GPU."""
    best = largest(step.plan, H100.gib * GIB, CANDIDATES)
    return [plan_row(step.plan(best.batch, best.checkpointing))]


def plan_row(plan: MemoryPlan) -> dict[str, Any]:
    """What is kept of a plan."""
    return {
        "batch": plan.batch,
        "checkpointing": plan.checkpointing,
        "peak_bytes": plan.peak_bytes,
        "categories": {name: size for name, size in plan.categories.items() if size},
    }


def cpu_seconds(call: Callable[[], Any]) -> float:
    """Median of the CPU seconds of some calls, after one that is not counted."""
    call()
    taken = []
    for _ in range(REPEATS):
        began = time.process_time()
        call()
        taken.append(time.process_time() - began)
    return statistics.median(taken)


def picture(rng: np.random.Generator, sides: tuple[int, int]) -> NDArray[np.uint8]:
    """(h, w, 3) with the spectrum of photographs: amplitudes fall as 1 / frequency."""
    height, width = sides
    distance = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    distance[0, 0] = 1
    grey, *colours = (
        np.fft.irfft2(np.fft.rfft2(rng.standard_normal(sides)) / distance, sides) for _ in range(4)
    )
    layers = np.stack([grey + 0.3 * colour for colour in colours], -1)
    low, high = np.percentile(layers, (1, 99))
    scaled: NDArray[np.uint8] = ((layers - low) / (high - low) * 255).clip(0, 255).astype(np.uint8)
    return scaled


def encoded(image: NDArray[np.uint8], size: int | None) -> bytes:
    """The picture as JPEG, at the quality whose file is nearest to ``size``; None: at QUALITY."""

    def at(quality: int) -> bytes:
        return bytes(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1])

    if size is None:
        return at(QUALITY)
    return min((at(quality) for quality in range(5, 100)), key=lambda x: abs(len(x) - size))


@contextmanager
def pictures(names: list[str], sides: tuple[int, int], size: int | None) -> Iterator[Path]:
    """A folder with JPEG files of these names."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(picture(rng, sides), size))
        yield Path(folder)


def imagenet_rate() -> dict[str, Any]:
    """A picture of a folder of classes, read, decoded, resized, cropped and jittered."""
    sides, size = IMAGENET_FILE
    names = [f"{part}/{c}/{i}.jpg" for part in ("train", "val") for c in "ab" for i in range(FILES)]
    with pictures(names, sides, size) as root:
        train = build_classification("imagefolder", root, size=224, seed=0, memory=0).train
        places = list(range(len(train)))
        seconds = cpu_seconds(lambda: train.__getitems__(places)) / len(places)
        return picture_row(root, sides, seconds)


def bench2drive_rate() -> dict[str, Any]:
    """A view, read, decoded, distorted, resized, cropped, stretched and normalised."""
    sides, size = BENCH2DRIVE_FILE
    names = [f"v1/clip/camera/{c}/{i:05d}.jpg" for c in CAMERAS for i in range(2)]
    with pictures(names, sides, size) as root:
        data = Bench2Drive(root, split="train", size=(640, 640), augment=True, photometric=True)
        seconds = cpu_seconds(lambda: [data[i] for i in range(len(data))]) / len(data)
        return picture_row(root, sides, seconds)


def picture_row(root: Path, sides: tuple[int, int], seconds: float) -> dict[str, Any]:
    """What is kept of a pipeline."""
    sizes = [path.stat().st_size for path in root.rglob("*.jpg")]
    found = {"sides": list(sides), "file_bytes": int(statistics.mean(sizes))}
    return {**found, **rounded({"cpu_ms": 1e3 * seconds})}


class _Rows:
    """A dataset of numbers in place of pictures."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": torch.tensor([index])}


def cache_rate(top_k: int | None) -> dict[str, Any]:
    """A row of a teacher cache: its bytes, read with its checksum, and taken from a shard."""

    def teacher(index: Tensor) -> Tensor:
        return torch.randn(len(index), CLASSES, generator=torch.Generator().manual_seed(0))

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        rows: Any = _Rows()
        cache = TeacherCache.build(teacher, rows, Path(folder, "c"), key={"a": 1}, top_k=top_k)
        index = torch.from_numpy(rng.permutation(ROWS)[:READ])
        seconds = cpu_seconds(lambda: [cache.logits(index, 0) for _ in range(16)]) / (16 * READ)
        files = sum(path.stat().st_size for path in cache.directory.glob("*.npy"))
        taken = take_seconds(Path(folder, "d"), cache.layout) / ROWS
    found = {"top_k": top_k, "classes": CLASSES, "row_bytes": round(files / ROWS)}
    return {**found, **rounded({"cpu_us": 1e6 * seconds, "take_us": 1e6 * taken})}


def take_seconds(directory: Path, layout: Layout) -> float:
    """CPU seconds in which one process moves ``ROWS`` rows of a shard into a cache."""
    empty = replace(layout, classes=0)
    pairs = [(row, 0) for row in range(ROWS)]
    logits = torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(0))
    taken = []
    for number in range(REPEATS + 1):
        at = directory.with_name(f"{directory.name}{number}")
        with Writer(at, {}, empty) as writer:
            shard = Shard(at, {}, empty, rank=1, rows=ROWS)
            shard.write(pairs, logits)
            shard.close()
            # The first rows make the files, as those of the first process do.
            writer.write(pairs[:1], logits[:1])
            began = time.process_time()
            for _ in take(writer, writer.partial / shard.path.name):
                pass
            taken.append(time.process_time() - began)
    return statistics.median(taken[1:])


def order_cost(pictures: int) -> dict[str, Any]:
    """Drawing the order of an epoch for one of 512 processes."""
    sampler = EpochSampler(pictures, world=512)
    return {"pictures": pictures, **rounded({"cpu_s": cpu_seconds(sampler.order)})}
