# SPDX-License-Identifier: Apache-2.0
"""What a training run needs: packages, checkpoint, data, memory and disk, and what to do if not."""

import importlib.util
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from kdfast import data
from kdfast.models import EVAViT
from kdfast.models.checkpoint import load_orion_backbone
from kdfast.pruning import pruning_report

if TYPE_CHECKING:
    from kdfast.configs import ChainConfig, Config

# What a run imports beyond kdfast's own dependencies, by module name.
TRAIN_MODULES = ("accelerate", "tensorboard", "matplotlib", "cv2", "PIL", "yaml", "rich")
CHAIN_MODULES = ("sklearn", "torchmetrics")

FIXES = {
    "teacher.checkpoint": "ORION's is Orion.pth of huggingface.co/poleyzdk/Orion; "
    "or --set teacher.checkpoint=FILE",
    "data.root": "Bench2Drive's base set (docs/use/data.md); or --set data.kind=images "
    "--set data.root=FOLDER for any pictures",
}


@dataclass(frozen=True)
class Need:
    """One thing that a run needs.

    Attributes:
        name: What it is.
        found: What is there.
        fix: What to do about it; empty if all is well.
    """

    name: str
    found: str
    fix: str = ""


def print_needs(source: str, changes: Sequence[str] = ()) -> int:
    """Prints what a run of a config needs, one line each; 1 if something is missing.

    Args:
        source: Name of a config or path of a YAML file.
        changes: ``a.b=value``, as after ``--set``.
    """
    print(f"\nA run of {source}")
    missing = [name for name in TRAIN_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        _show(Need("packages", f"missing: {', '.join(missing)}", 'pip install -e ".[train]"'))
        return 1
    from kdfast.configs import ConfigError, load
    from kdfast.configs.chain import ChainConfig

    try:
        config = load(source, changes)
    except ConfigError as error:
        for problem in error.problems:
            key, _, text = problem.partition(": ")
            _show(Need(key, text, FIXES.get(key, "see docs/use/training.md for the keys")))
        return 1
    if config.note:
        print(f"  note    {config.note}")
    if config.note and not isinstance(config, ChainConfig):
        print("          to run on your own: --set teacher.checkpoint=FILE --set data.root=FOLDER")
    needs = chain_needs(config) if isinstance(config, ChainConfig) else run_needs(config)
    for need in needs:
        _show(need)
    return int(any(need.fix for need in needs))


def run_needs(config: "Config") -> list[Need]:
    """Checkpoint, data, memory and disk of a run of ``config``."""
    try:
        model, checkpoint = _teacher(config)
    except (OSError, ValueError) as error:
        found = f"{config.teacher.checkpoint}: {error}"
        return [Need("checkpoint", found, "--set teacher.checkpoint=FILE"), _data(config)]
    report = pruning_report(model, keep=(config.prune.keep,), image_size=config.data.size)
    teacher, student = report.full.params, report.pruned[0].params
    return [
        checkpoint,
        _data(config),
        _memory(config, needed_memory(config, model, teacher, student)),
        _disk(config.output, student),
    ]


def chain_needs(config: "ChainConfig") -> list[Need]:
    """Packages, data and disk of a chain of distillations."""
    missing = [name for name in CHAIN_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        return [Need("packages", f"missing: {', '.join(missing)}", 'pip install -e ".[train]"')]
    from kdfast.data.labelled import describe_classification

    spec = config.data
    root = None if spec.root is None else Path(spec.root).expanduser()
    seed = config.seeds[0] if spec.seed is None else spec.seed
    try:
        found = describe_classification(
            spec.kind, root, size=spec.size, seed=seed, val_fraction=spec.val_fraction
        )
        images = Need("data", found)
    except (OSError, ValueError, ImportError) as error:
        fix = "--set data.root=FOLDER, or --set data.kind=digits (docs/use/classification_data.md)"
        images = Need("data", str(error), fix)
    return [images, _disk(config.output, _largest_link(config))]


def _largest_link(config: "ChainConfig") -> int:
    """Parameters of the chain's largest model."""
    import timm

    from kdfast.configs.chain import per_link

    sizes = []
    for number, name in enumerate(config.chain):
        args = per_link(config.model_args, number) if config.model_args else {}
        with torch.device("meta"):
            model = timm.create_model(name, **args)
        sizes.append(sum(p.numel() for p in model.parameters()))
    return max(sizes)


def _teacher(config: "Config") -> tuple[EVAViT, Need]:
    path = config.teacher.checkpoint
    if path is not None:
        model = load_orion_backbone(Path(path).expanduser())
        heads = max(len(h) for h in model.heads)
        return model, Need("checkpoint", f"{path}: {len(model.heads)} blocks of {heads} heads")
    if config.teacher.fit is None:
        raise ValueError("neither teacher.checkpoint nor teacher.fit is set")
    from kdfast.configs import plain

    with torch.device("meta"):
        model = EVAViT(**plain(config.teacher.fit.model))
    return model, Need("checkpoint", "none: a small teacher is trained first, and kept")


def _data(config: "Config") -> Need:
    spec = config.data
    if spec.kind == "scenes":
        return Need("data", f"scenes, rendered here: {spec.frames} frames of six views")
    try:
        images = data.build(kind=spec.kind, root=spec.root, split="train", size=spec.size)
    except (OSError, ValueError) as error:
        return Need("data", str(error), "--set data.root=FOLDER")
    return Need("data", f"{spec.kind} in {spec.root}: {len(images):,} items to train on")


def needed_memory(config: "Config", model: EVAViT, teacher: int, student: int) -> int:
    """Rough bytes of a training step.

    fp32 weights: 4 bytes a parameter for the teacher; 16 for the student with its gradient and
    AdamW's two moments. Activations: of every block the residual stream and the teacher's q and k;
    the interior of a block (taken as 12 streams and 4 MLP rows) once with checkpointing, for every
    block without. The eager reference of an op adds its N x N maps of one block to that.
    """
    shape, depth = model.config, len(model.heads)
    item = 4 if config.run.precision == "fp32" else 2
    tokens = config.run.batch_size
    for side in config.data.size:
        tokens *= side // shape["patch_size"]
    width, hidden = shape["embed_dim"], int(shape["embed_dim"] * shape["mlp_ratio"])
    interior = tokens * (12 * width + 4 * hidden) * item
    kept = 3 * depth * tokens * width * item
    blocks = 1 if config.run.checkpointing else depth
    return 4 * teacher + 16 * student + kept + blocks * interior


def _memory(config: "Config", need: int) -> Need:
    if config.run.device != "cpu" and torch.cuda.is_available():
        free, where = torch.cuda.mem_get_info()[0], "on the GPU"
    else:
        free, where = psutil.virtual_memory().available, "of memory"
    fix = "" if need < free else "--set run.batch_size=1 --set run.checkpointing=true"
    return Need("memory", f"about {gib(need)} needed, {gib(free)} {where} free", fix)


def _disk(output: str, student: int) -> Need:
    folder = Path(output).expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    # Weights and AdamW's two moments: the last two checkpoints and the one being written.
    need, free = 3 * 12 * student, shutil.disk_usage(folder).free
    fix = "" if need < free else "free some space, or --set output=FOLDER on another disk"
    return Need("disk", f"about {gib(need)} needed in {output}, {gib(free)} free", fix)


def gib(count: float) -> str:
    """Bytes as GiB with one decimal."""
    return f"{count / 2**30:.1f} GiB"


def _show(need: Need) -> None:
    print(f"  {'MISSING' if need.fix else 'ok     '} {need.name:<20}{need.found}")
    if need.fix:
        print(f"{'':30}to do: {need.fix}")
