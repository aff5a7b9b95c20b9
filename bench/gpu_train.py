# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.gpu --train``: training steps in bf16 and fp16 on the device, against eager.

The steps are those of ``kdfast.train``'s two trainers at full size, with random weights and
pictures: orion50's recovery (EVA-ViT-L at 640 x 640, half of the heads, batches of 4, recomputed)
and the last two links of the ViT chain. "eager" is the same with every op's reference, and for the
chain with timm's own modules. Each is a process of its own, which leaves its row behind every few
steps. Where the packages of the extra ``train`` are installed, the trainers themselves take as many
steps of their embedded configs: data, checkpoints and reports included.

``python -m bench.gpu_train TRAINER PRECISION BACKEND UNTIL FILE`` is one such process.
"""

import csv
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import gpu_stages
from bench.gpu_stages import Settings, environment, stage
from bench.gpu_tables import table
from bench.rows import facts_line
from kdfast.machine.facts import machine_facts
from kdfast.machine.needs import package_need
from kdfast.testing import DRY_RUN

STEPS = 2 if DRY_RUN else 200
# The first ones compile, and are left out of the time.
WARM = 1 if DRY_RUN else 10
# Steps between two rows of the file.
EVERY = 1 if DRY_RUN else 20
TRAINERS = ("orion50", "chain small", "chain tiny")
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
BACKENDS = ("kdfast", "eager")
# Configs for the trainers themselves, with what makes them take about STEPS steps.
CONFIGS = {
    "orion50_scenes": ("run.precision", f"run.max_steps={STEPS}", "teacher.fit.epochs=1"),
    "vit_chain_digits": ("precision", "epochs=4", "seeds=[0]", "twin=false"),
}
SMALL_CONFIGS = {"smoke": ("run.precision", f"run.max_steps={STEPS}")}
NEEDED = ("accelerate", "tensorboard", "matplotlib", "cv2", "PIL", "yaml", "rich", "sklearn")
# Of the time, what one process may take, and of that, what it has before its last step.
SHARE, BEGIN = 0.25, 0.9
Loss = Callable[[Tensor], Tensor]


def orion(fused: bool) -> tuple[nn.Module, Loss, list[nn.Module], tuple[int, int]]:
    """What is trained, the loss of pictures, the frozen models, and (pictures, side)."""
    from kdfast.configs.orion50 import orion50
    from kdfast.models.eva import EVAViT, eva_vit_l_orion
    from kdfast.recovery.objective import Distiller

    config = orion50()
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 6, "num_heads": 2}
    small |= {"window_size": 3, "pt_hw_seq_len": 3}
    teacher = eva_vit_l_orion(with_cp=False, drop_path_rate=0.0, **(small if DRY_RUN else {}))
    heads = [held[: len(held) // 2] for held in teacher.heads]
    changes = {"heads": heads, "with_cp": config.run.checkpointing}
    student = EVAViT(**{**teacher.config, **changes})
    distiller = Distiller(student, teacher, None, config.distill)
    size = (2, 32) if DRY_RUN else (config.run.batch_size, config.data.size[0])
    return distiller, lambda x: distiller(x, None, 0)["total"], [teacher], size


def chain(link: int, fused: bool) -> tuple[nn.Module, Loss, list[nn.Module], tuple[int, int]]:
    """The same for a link of the ViT chain."""
    import timm

    from kdfast.configs.vit_chain import vit_chain, vit_chain_digits
    from kdfast.memory.measure import supervised
    from kdfast.nn.accelerate import accelerate

    config = vit_chain_digits() if DRY_RUN else vit_chain()
    teacher, student = (
        timm.create_model(
            config.chain[place],
            num_classes=10,
            **(config.model_args[place] if config.model_args else {}),
        )
        for place in (link - 1, link)
    )
    if fused:
        for model in (teacher, student):
            accelerate(model)
    step = supervised(student, teacher)
    batch = config.batch[link] if isinstance(config.batch, tuple) else 2
    size = (int(batch), config.data.size)

    def loss(pictures: Tensor) -> Tensor:
        labels = torch.arange(len(pictures), device=pictures.device) % 10
        return step.loss(pictures, labels)

    return student, loss, [teacher], size


BUILD = {"orion50": orion, "chain small": partial(chain, 1), "chain tiny": partial(chain, 2)}


def measure(trainer: str, precision: str, backend: str, until: float, path: Path) -> None:
    """Takes steps on one batch, and writes what there is every few of them.

    Args:
        trainer: Of TRAINERS.
        precision: Of PRECISIONS; fp16 with loss scaling.
        backend: Of BACKENDS; the process has KDFAST_BACKEND to go with it.
        until: Unix time after which no step begins.
        path: The file for the row.
    """
    device = torch.device("cpu" if DRY_RUN else "cuda")
    torch.manual_seed(0)
    module, loss, frozen, (count, side) = BUILD[trainer](backend == "kdfast")
    for model in (module, *frozen):
        model.to(device)
    optimizer = torch.optim.AdamW(module.parameters(), lr=2e-4, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16" and not DRY_RUN)
    pictures = torch.randn(count, 3, side, side, device=device)
    module.train()
    row: dict[str, Any] = {"trainer": trainer, "precision": precision, "backend": backend}
    row |= {"batch": count, "side": side, "steps": 0}
    started, losses = time.perf_counter(), []
    for step in range(1, STEPS + 1):
        if time.time() > until:
            break
        with torch.autocast(device.type, PRECISIONS[precision]):
            value = loss(pictures)
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        losses.append(value.detach())
        if step == WARM or step % EVERY == 0 or step == STEPS:
            seen = torch.stack(losses).float().tolist()
            row |= {"steps": step, "first_loss": seen[0], "last_loss": seen[-1]}
            row["finite"] = all(x - x == 0 for x in seen)
            if step == WARM:
                started = time.perf_counter()
            else:
                row["ms"] = 1e3 * (time.perf_counter() - started) / (step - WARM)
            if device.type == "cuda":
                row["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
            gpu_stages.replace(path, json.dumps(row) + "\n")


class Report:
    """The two files, written anew whenever there is more."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self.facts = {"machine": machine_facts(), "dry_run": settings.dry}
        self.stages: dict[str, Any] = {}
        self.notes: list[str] = []
        self.runs: list[dict[str, Any]] = []

    def write(self) -> str:
        """Writes what there is; the Markdown."""
        files = sorted(self.folder.glob("*.json"))
        rows = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        results = self.facts | {"rows": rows, "trainers": self.runs, "stages": self.stages}
        results["notes"] = self.notes
        name = f"train_{self.settings.name}"
        self.settings.write(f"{name}.json", json.dumps(results, indent=1) + "\n")
        text = markdown(results)
        self.settings.write(f"{name}.md", text)
        return text


def markdown(results: dict[str, Any]) -> str:
    """The report."""
    rows = results["rows"]
    ms = {(r["trainer"], r["precision"], r["backend"]): r.get("ms") for r in rows}
    header = ["trainer", "precision", "backend", "batch", "side", "steps", "ms a step"]
    header += ["eager / kdfast", "peak, MiB", "loss, first and last"]
    lines = []
    for r in rows:
        pair = [ms.get((r["trainer"], r["precision"], backend)) for backend in BACKENDS]
        ratio = f"{pair[1] / pair[0]:.2f}" if all(pair) and r["backend"] == "kdfast" else ""
        lines.append(
            [r[k] for k in ("trainer", "precision", "backend", "batch", "side", "steps")]
            + [f"{r['ms']:.1f}" if "ms" in r else "", ratio]
            + [f"{r['peak_mib']:.0f}" if "peak_mib" in r else ""]
            + [f"{r['first_loss']:.4g}, {r['last_loss']:.4g}" if r["steps"] else ""]
        )
    note = "A dry run: times mean nothing.\n\n" if results["dry_run"] else ""
    parts = [f"# Training steps\n\n{note}{facts_line(results['machine'])}.", table(header, lines)]
    if results["trainers"]:
        header = ["config", "precision", "steps", "pictures a second", "peak, MiB"]
        lines = [
            [run[k] for k in ("config", "precision", "steps", "images_per_s", "memory_mib")]
            for run in results["trainers"]
        ]
        parts.append(f"## The trainers themselves\n\n{table(header, lines)}")
    failed = [f"{k}: {v['code']}" for k, v in results["stages"].items() if v["code"] != 0]
    parts.append("\n".join(f"- {x}" for x in [*failed, *results["notes"]]) or "Nothing failed.")
    return "\n\n".join(parts) + "\n"


def run(settings: Settings) -> int:
    """Runs everything in its order; 1 if a process failed or found a loss that is not finite."""
    with tempfile.TemporaryDirectory() as name:
        report = Report(settings, Path(name))
        runs = [(t, p, b) for p in PRECISIONS for t in TRAINERS for b in BACKENDS]
        if settings.dry:
            runs = runs[::5]
        for place, (trainer, precision, backend) in enumerate(runs):
            share = SHARE * settings.left if place < len(runs) - 1 else settings.left
            file = report.folder / f"{place:02d}.json"
            command = ["-m", "bench.gpu_train", trainer, precision, backend]
            command += [str(time.time() + BEGIN * share), str(file)]
            title = f"{trainer}, {precision}, {backend}"
            env = environment(settings.dry)
            env["KDFAST_BACKEND"] = "reference" if backend == "eager" else "auto"
            report.stages[title] = stage(title, [command], share, env, report.write)
            report.write()
        themselves(report)
        text = report.write()
        rows = json.loads((settings.out / f"train_{settings.name}.json").read_text())["rows"]
    print(text)
    bad = any(s["code"] != 0 for s in report.stages.values())
    return int(bad or not all(row.get("finite", False) for row in rows))


def themselves(report: Report) -> None:
    """Runs ``kdfast.train`` where its packages are installed, and reads what it logged."""
    settings = report.settings
    if missing := package_need(NEEDED):
        report.notes.append(f"the trainers themselves were not run: {missing.found}")
        return
    configs = SMALL_CONFIGS if settings.dry else CONFIGS
    for config, (precise, *changes) in configs.items():
        for precision in list(PRECISIONS)[: 1 if settings.dry else None]:
            folder = report.folder / f"{config}_{precision}"
            command = ["-m", "kdfast.train", "--config", config]
            for change in (f"{precise}={precision}", f"output={folder}", *changes):
                command += ["--set", change]
            title = f"{config}, {precision}"
            env = environment(False)  # on a CPU its own kernels, which have bf16
            report.stages[title] = stage(title, [command], settings.left / 2, env)
            report.runs += logged(folder, config, precision)
            report.write()


def logged(folder: Path, config: str, precision: str) -> list[dict[str, Any]]:
    """The last row of every log of steps of a run."""
    found = []
    for file in sorted(folder.rglob("steps.csv")):
        with file.open(encoding="utf-8", newline="") as lines:
            rows = list(csv.DictReader(lines))
        if rows:
            where = " ".join(file.relative_to(folder).parts[:-1])
            row = {"config": f"{config} {where}".strip(), "precision": precision}
            row |= {"steps": rows[-1]["step"]}
            found.append(row | {key: rows[-1][key] for key in ("images_per_s", "memory_mib")})
    return found


if __name__ == "__main__":
    trainer, precision, backend, until, file = sys.argv[1:]
    measure(trainer, precision, backend, float(until), Path(file))
