# SPDX-License-Identifier: Apache-2.0
"""``python -m kdfast.info``: versions, hardware and its limits, what is fused, what a run needs."""

import argparse
import importlib
import importlib.metadata
import platform
import shutil
import sys
import textwrap
from collections.abc import Sequence

import psutil
import torch

from kdfast._version import __version__
from kdfast.commandline.info import parser
from kdfast.machine.facts import cpu_name
from kdfast.machine.memory import resident_bytes
from kdfast.machine.needs import MISSING, WRONG, Need, gib, package_need
from kdfast.machine.peak import library_rates, peak_flops
from kdfast.machine.signals import run_command
from kdfast.machine.timing import timed_sample
from kdfast.ops import OPS, _library
from kdfast.ops._blocks import tables_in_use
from kdfast.ops._matmul import CHOICES
from kdfast.ops._processor import processor

PACKAGES = (
    "torch",
    "timm",
    "triton",
    "accelerate",
    "safetensors",
    "numpy",
    "opencv-python-headless",
)
# What every training run imports beyond kdfast's own dependencies, and what a chain does besides.
TRAIN_MODULES = ("accelerate", "tensorboard", "matplotlib", "cv2", "PIL", "yaml", "rich")
CHAIN_MODULES = ("sklearn", "torchmetrics")
FIXES = {
    "teacher.checkpoint": "ORION's is Orion.pth of huggingface.co/poleyzdk/Orion; "
    "or --set teacher.checkpoint=FILE",
    "data.root": "Bench2Drive's base set (docs/use/data.md); or --set data.kind=images "
    "--set data.root=FOLDER for any pictures",
}
# Columns before what is said of a need, and its further lines that are shown.
INDENT, SHOWN = 36, 5
# Columns that a text gets at least, and those of a file.
MIN_WIDTH, FILE = 30, 100_000
Rows = list[tuple[str, str]]


def versions() -> Rows:
    """Name and version of kdfast, Python and every package that matters, installed or not."""
    rows = [("kdfast", __version__), ("python", platform.python_version())]
    for name in PACKAGES:
        try:
            rows.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    return rows


def hardware() -> Rows:
    """CPU, instruction set, threads, memory and GPUs."""
    rows = [("cpu", f"{cpu_name()}, {processor().name}")]
    rows.append(("threads", str(torch.get_num_threads())))
    if _library.EXTENSION:
        names = ", ".join(_library.EXTENSION.available_isas())
        rows.append(("cpu isa", f"{_library.EXTENSION.cpu_isa()} (this CPU runs: {names})"))
    memory = psutil.virtual_memory()
    rows.append(("memory", f"{gib(memory.available)} free of {gib(memory.total)}"))
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        rows.append((f"gpu {i}", f"{p.name}, sm_{p.major}{p.minor}, {gib(p.total_memory)}"))
    if not torch.cuda.device_count():
        built = torch.version.cuda is not None
        rows.append(("gpu", "none found" if built else "this torch is built without CUDA"))
    return rows


def limits() -> Rows:
    """Rate of products that the CPU's threads can reach, and what the best library reaches."""
    dtypes = (torch.float32, torch.bfloat16)
    measured: list[dict[str, float]] = []
    _, quiet = timed_sample(lambda: measured.extend(map(library_rates, dtypes)), 1)
    rows = []
    for dtype, rates in zip(dtypes, measured, strict=True):
        name, rate = max(rates.items(), key=lambda item: item[1])
        text = f"best library {rate / 1e9:.0f} GFLOP/s ({name})"
        if _library.EXTENSION:
            peak = peak_flops(dtype)
            text = f"peak {peak / 1e9:.0f} GFLOP/s, {text}, {rate / peak:.0%} of it"
        rows.append((str(dtype).removeprefix("torch."), text))
    if not quiet:
        rows.append(("busy", "others used the cores meanwhile: libraries can reach more"))
    return rows


def memory() -> Rows:
    """RAM, what this process took of it, and for every GPU what is allocated, reserved, in all."""
    ram = psutil.virtual_memory()
    rows = [("RAM", f"{gib(ram.available)} free of {gib(ram.total)}")]
    now, peak = resident_bytes()
    rows.append(("this process", f"{gib(now)} now, {gib(peak)} at its peak"))
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        peak = torch.cuda.max_memory_allocated(i)
        rows.append((f"gpu {i}", f"{gib(free)} free of {gib(total)}, all processes together"))
        rows.append(
            (
                f"gpu {i}, this process",
                f"{gib(torch.cuda.memory_allocated(i))} allocated (peak {gib(peak)}), "
                f"{gib(torch.cuda.memory_reserved(i))} reserved",
            )
        )
    if not torch.cuda.device_count():
        rows.append(("gpu", "none found"))
    return rows


def extension() -> Rows:
    """What the compiled extension was built with, or why there is none."""
    if _library.EXTENSION is None:
        return [
            ("kdfast._C", "not built: pure Python, every op runs its eager reference on the CPU"),
            ("to build it", "install a C++20 compiler, then pip install --no-build-isolation -e ."),
        ]
    facts = _library.EXTENSION.build_info()
    built = f"built by {facts['compiler']} with torch {facts['torch']}, for 2.10 and newer"
    rows = [("kdfast._C", built)]
    if facts["cuda"]:
        rows.append(("CUDA C++", f"built by nvcc {facts['cuda']} for {facts['cuda_archs']}"))
    else:
        rows.append(("CUDA C++", "left out; set CUDACXX and KDFAST_CUDA=ON, install again"))
    return rows


def ops() -> Rows:
    """For every op: on which devices a compiled kernel runs, and why not on the others."""
    rows = []
    for op in OPS:
        module = importlib.import_module(f"kdfast.ops.{op}")
        states = []
        for device in ("cpu", "cuda"):
            reason = None if device in module.FUSED_ON else "no compiled kernel"
            if _library.DEFAULT_BACKEND == "reference":
                reason = "KDFAST_BACKEND=reference"
            states.append(f"{device} {'fused' if reason is None else f'reference ({reason})'}")
        rows.append((op, ", ".join(states)))
    return rows


def linear_layers() -> Rows:
    """For every dtype: which library multiplies in linear layers on the CPU, and why."""
    rows = []
    for dtype, chosen in CHOICES.items():
        uses = {
            "forward": chosen.forward,
            "inference": chosen.packed,
            "input gradient": chosen.input_gradient,
            "weight gradient": chosen.weight_gradient,
            "tall weight gradient": chosen.tall_gradient,
        }
        libraries = {name: "oneDNN" if onednn else "torch" for name, onednn in uses.items()}
        if len(set(libraries.values())) == 1:
            text = f"{libraries['forward']} for all products"
        else:
            text = ", ".join(f"{name} {library}" for name, library in libraries.items())
        rows.append((str(dtype).removeprefix("torch."), f"{text}: {chosen.reason}"))
    return rows


def print_needs(source: str, changes: Sequence[str] = ()) -> int:
    """Prints what a run of a config needs, one line each; 1 if something is missing.

    Args:
        source: Name of a config or path of a YAML file.
        changes: ``a.b=value``, as after ``--set``.
    """
    print(f"\nA run of {source}")
    needs = _needs(source, changes)
    for need in needs:
        state = need.problem if need.fix else "ok"
        _print_row(f"  {state:<14}{need.name:<20}", _shortened(need.found))
        if need.fix:
            _print_row(" " * INDENT, f"to do: {need.fix}")
    return int(any(need.fix for need in needs))


def _shortened(text: str) -> str:
    """A text without most of its further lines."""
    first, *more = text.splitlines() or [""]
    rest = [f"... and {len(more) - SHOWN:,} more"] if len(more) > SHOWN else []
    return "\n".join([first, *(line.strip() for line in more[:SHOWN]), *rest])


def _needs(source: str, changes: Sequence[str]) -> list[Need]:
    """The needs of a run; the runs are imported here, where their packages are known to be."""
    if missing := package_need(TRAIN_MODULES):
        return [missing]
    from kdfast.configs import ChainConfig, ConfigError, load

    try:
        config = load(source, changes)
    except ConfigError as error:
        pairs = (problem.partition(": ")[::2] for problem in error.problems)
        other = "the keys are explained in docs/use/training.md, those of chains in vit_chain.md"
        return [
            Need(key, text, FIXES.get(key, other), MISSING if "no such" in text else WRONG)
            for key, text in pairs
        ]
    if config.note:
        _print_row("  note    ", config.note)
    if isinstance(config, ChainConfig):
        if missing := package_need(CHAIN_MODULES):
            return [missing]
        from kdfast.chain.needs import chain_needs

        return chain_needs(config)
    if config.note:
        own = "to run on your own: --set teacher.checkpoint=FILE --set data.root=FOLDER"
        _print_row(" " * 10, own)
    from kdfast.recovery.needs import recovery_needs

    return recovery_needs(config)


def _print(title: str, rows: Rows) -> None:
    print(f"\n{title}")
    for name, text in rows:
        _print_row(f"  {name:<24}", text)


def _print_row(head: str, text: str) -> None:
    """A text beside its name, in as many lines of the terminal as it takes; in files in one."""
    columns = shutil.get_terminal_size(fallback=(FILE, 0)).columns
    width = max(MIN_WIDTH, columns - 1 - len(head))
    lines = [piece for line in text.splitlines() for piece in _pieces(line, width)]
    print(f"\n{'':{len(head)}}".join([head + "".join(lines[:1]), *lines[1:]]))


def _pieces(line: str, width: int) -> list[str]:
    """A line in pieces that fit; paths and flags stay whole."""
    return textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report; 1 if a run of ``--config`` lacks something."""
    args = parser().parse_args(argv)
    return run_command(lambda: report(args), "the report is not complete")


def report(args: argparse.Namespace) -> int:
    """The command after its command line."""
    if args.memory:
        _print("Memory", memory())
        return 0
    sections = {"Versions": versions, "Hardware": hardware, "Limits of matrix products": limits}
    sections |= {"Build": extension, "Ops": ops, "Linear layers on the CPU": linear_layers}
    sections["Block sizes of attention on GPUs"] = tables_in_use
    for title, rows in sections.items():
        _print(title, rows())
    return 0 if args.config is None else print_needs(args.config, args.changes)


if __name__ == "__main__":
    sys.exit(main())
