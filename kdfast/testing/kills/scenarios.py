# SPDX-License-Identifier: Apache-2.0
"""The runs that are killed: small, and with every part that writes files."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

import kdfast.chain.compare
import kdfast.chain.run
import kdfast.chain.summary
import kdfast.prune
import kdfast.pruner.measure
import kdfast.recovery.report
import kdfast.train
from kdfast.chain.teacher_cache import TeacherCache
from kdfast.data.labelled import build_classification
from kdfast.machine.files import replacing
from kdfast.pruning.latency import Latency
from kdfast.pruning.saving import load_pretrained, save_pretrained

MODEL: dict[str, Any] = dict(img_size=32, embed_dim=48, depth=2, num_heads=3, num_classes=7)
RECOVERY = (
    *("output=run", "teacher.cache=run/teachers", "run.device=cpu", "run.save_every=2"),
    *("run.batch_size=4", "run.epochs=2", "run.log_every=2", "data.frames=2", "data.val_frames=1"),
    *("teacher.fit.batch_size=4", "prune.batches=1", "prune.batch_size=2"),
    *("distill.drop_path=0.2", "teacher.fit.model.depth=2", "teacher.fit.model.embed_dim=32"),
    "teacher.fit.model.window_block_indexes=[1]",
)
LINK = "{{img_size: 16, patch_size: 8, embed_dim: {}, depth: 1, num_heads: 2}}"
CHAIN = (
    *("output=run", "device=cpu", "twin=false", "seeds=[3]", "epochs=2", "batch=8", "save_every=2"),
    *("data.size=16", "data.limit=24", "optim.warmup_epochs=1", "optim.ema=0.9", "optim.lr=0.01"),
    *("cache=true", "data.variants=2", "eval_batch=64", "log_every=2"),
    "chain=[vit_base_patch16_224, vit_tiny_patch16_224]",
    f"model_args=[{LINK.format(16)}, {LINK.format(8)}]",
)


class Scenario:
    """Something that is run, killed, and run again.

    Attributes:
        run: Runs it in the working folder; ``again`` says that it was killed before. Returns an
            exit status.
        prepare: Called once in the process that the runs are forked from. Must not run a backward
            pass: torch refuses those in forked processes after one.
        begin: Makes the working folder ready for a new run.
    """

    def __init__(
        self,
        run: Callable[[bool], int],
        prepare: Callable[[], None] = lambda: None,
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        self.run, self.prepare, self.begin = run, prepare, begin


def _words(config: str, changes: Sequence[str]) -> list[str]:
    return ["--config", config, *(word for change in changes for word in ("--set", change))]


def _train(config: str, changes: Sequence[str], again: bool) -> int:
    words = _words(config, changes)
    if not again:
        return kdfast.train.main(words)
    if not any(path.name == "config.yaml" for path in Path("run").glob("*")):
        # It was killed before there was a run: --resume must say so.
        assert kdfast.train.main([*words, "--resume"]) == 2
        return kdfast.train.main(words)
    return kdfast.train.main([*words, "--resume"])


def _drawn(path: Path) -> None:
    with replacing(path) as partial:
        partial.write_bytes(b"drawn")


def _prepare_recovery() -> None:
    module: Any = kdfast.recovery.report
    module.interleave = lambda calls, **_: {name: [(1e-3, True)] for name in calls}


def _prepare_chain() -> None:
    """The same digits for every run, and drawings that take no time."""
    data = build_classification(
        "digits", size=16, seed=3, variants=2, val_fraction=0.05, test_fraction=0.05
    )
    run, summary, compare = kdfast.chain.run, kdfast.chain.summary, kdfast.chain.compare
    changed: Any = run
    changed.read_data = lambda config, seed: data
    changed = summary
    changed.draw_curves = changed.draw_confusion = lambda *args: _drawn(
        next(path for path in reversed(args) if isinstance(path, Path))
    )
    changed.draw_attention = lambda student, data, folder, *_: _drawn(folder / "attention.png")
    changed = compare
    changed.draw_comparison = lambda rows, path, *_: _drawn(path)


class _Pictures(torch.utils.data.Dataset[Any]):
    variants = 2

    def __len__(self) -> int:
        return 40

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Tensor]:
        index, variant = place
        values = np.random.default_rng(100 * variant + index).random((3, 8, 8))
        return {"image": torch.from_numpy(values).float()}


def _build_cache(again: bool) -> int:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(192, 30))
    folder = Path("run/cache")
    options: dict[str, Any] = {"key": {"teacher": "linear"}, "top_k": 4, "batch_size": 16}
    TeacherCache.build(teacher, _Pictures(), folder, rebuild=True, **options)
    return 0


def _begin_cache() -> None:
    """A finished cache of another key, which the run replaces."""
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    TeacherCache.build(teacher, _Pictures(), "run/cache", key={"teacher": "another"})


def _prune(again: bool) -> int:
    words = ["--model", "model", "--out", "run", "--batches", "1", "--batch-size", "2"]
    return kdfast.prune.main([*words, "--keep", "1", "--rounds", "2", "--overwrite"])


def _begin_prune() -> None:
    """A model, and an older result that the run replaces."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **MODEL)
    save_pretrained(model, "model")
    save_pretrained(model, "run")


def whole_or_none(folder: Path) -> None:
    """Asserts that a folder of a model holds a whole one, or says that it holds none."""
    try:
        model = load_pretrained(folder)
    except FileNotFoundError:
        return
    heads = {block.attn.num_heads for block in model.blocks}
    assert heads in ({3}, {1}), heads


def _prepare_prune() -> None:
    module: Any = kdfast.pruner.measure
    fixed = Latency(ms=1.0, iqr=0.0)
    names = ("before", "before, fused", "pruned, fused")
    module.latencies = lambda *_: dict.fromkeys(names, fixed)


SCENARIOS = {
    "recovery": Scenario(functools.partial(_train, "smoke", RECOVERY), _prepare_recovery),
    "chain": Scenario(functools.partial(_train, "vit_chain_digits", CHAIN), _prepare_chain),
    "cache": Scenario(_build_cache, begin=_begin_cache),
    "prune": Scenario(_prune, _prepare_prune, _begin_prune),
}
