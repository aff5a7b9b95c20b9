# SPDX-License-Identifier: Apache-2.0
"""Every kernel that has to compile, and what its binary must keep to.

A case is a call of an op (bench.aot) in one dtype, size and set of options on one architecture.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bench import aot
from bench.gpu_tables import arch_name
from kdfast.kernels._blocks import FOLDER

# In the order of what they say. Ampere's tensor cores and Hopper's first, then Blackwell's; sm_86
# and sm_89 run the instructions of sm_80 on less shared memory.
ARCHS = (90, 80, 100, 86, 89, aot.AMD)
DTYPES = ("bfloat16", "float32", "float16")
HEAD_DIMS = (64, 72, 80, 88, 96, 128, 24, 16)
# Kernels that multiply on tensor cores.
STREAMING = ("fwd_kernel", "_distance_kernel", "bwd_kernel", "_bias_grad_kernel")
# Kernels that move whole rows.
WIDE = (*STREAMING, "rotate_kernel", "_positions_kernel", "_rows_kernel")
WIDE += ("_fwd_kernel", "_bwd_kernel")
Options = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One call to compile."""

    arch: int
    op: str
    dtype: str
    dim: int
    options: str = ""  # NAME=VALUE of the op's function in bench.aot, separated by spaces

    def __str__(self) -> str:
        words = (arch_name(self.arch), self.op, self.dtype, str(self.dim), self.options)
        return " ".join(words).strip()

    def values(self) -> Options:
        """The options as arguments."""
        pairs = (pair.split("=") for pair in self.options.split())
        return {n: int(v) if v.isdigit() else v for n, v in pairs}


def cases() -> list[Case]:
    """All of them, the most telling first: bf16 on every architecture before fp32 and fp16."""
    found = [
        Case(arch, op, dtype, dim, " ".join(f"{n}={v}" for n, v in options.items()))
        for arch in ARCHS
        for dtype in DTYPES
        for op, dim, options in calls(arch, dtype)
    ]

    def rank(case: Case) -> tuple[Any, ...]:
        attention = case.op in ("pruned_attention", "attention_distill")
        first = case.dtype == "bfloat16" and case.arch in (80, 90)
        return not first, case.dtype != "bfloat16", attention, ARCHS.index(case.arch)

    return sorted(found, key=rank)


def calls(arch: int, dtype: str) -> Iterator[tuple[str, int, Options]]:
    """Op, size and options of what is compiled for one architecture in one dtype.

    bf16, in which most models are trained, has every window, kind of distance and target; fp32,
    whose products are three of TF32, and fp16 every head dim, rotary layout and entry of the table
    of blocks. AMD has the head dims; its products have no TF32 of that kind, so none of fp32.
    """
    half, nvidia = dtype == "bfloat16", arch != aot.AMD
    yield from losses(half, nvidia)
    if not nvidia and dtype == "float32":
        return
    dims = HEAD_DIMS if half or nvidia else (64, 88)
    for dim in dims:
        yield "pruned_attention", dim, {}
    yield "pruned_attention", 64, {"window": 16}
    for dim in dims:
        yield "attention_distill", dim, {}
    if half:
        yield "pruned_attention", 64, {"bias": 1}
        yield "attention_distill", 64, {"kind": "cosine", "temperature": 2}
    if nvidia:
        yield from variants(half)


def variants(half: bool) -> Iterator[tuple[str, int, Options]]:
    """The same of attention with other lengths, rotations and maps."""
    yield "pruned_attention", 64, {"layout": "half", "tokens": 197}
    yield "pruned_attention", 64, {"layout": "", "tokens": 577}
    for dim in (88, 128) if half else (64, 88, 128):
        yield "pruned_attention", dim, {"bias": 1}
    # Shorter sequences take smaller blocks.
    for dim in (64, 128):
        yield "pruned_attention", dim, {"tokens": 20}
        yield "pruned_attention", dim, {"bias": 1, "tokens": 20}
        yield "attention_distill", dim, {"tokens": 20}
    yield "pruned_attention", 128, {"tokens": 197}
    yield "pruned_attention", 64, {"bias": 1, "tokens": 197}
    yield "attention_distill", 64, {"kind": "kl", "temperature": 2}
    if half:
        yield "attention_distill", 64, {"window": 16}
        # The padded tokens of a window are terms of the distance, of another kind for "kl".
        yield "attention_distill", 64, {"window": 16, "kind": "cosine", "temperature": 2}
        yield "attention_distill", 64, {"teacher_dim": 88}
        for kind in ("reverse_kl", "jsd", "mse", "logit_mse"):
            yield "attention_distill", 64, {"kind": kind, "temperature": 2}


def losses(half: bool, every: bool) -> Iterator[tuple[str, int, Options]]:
    """The same of everything but attention: rows of one tile and more, aligned and not."""
    yield "kd_loss", 1000, {"target": "indices"}
    yield "kd_loss", 21841, {"target": "indices"}
    yield "kd_loss", 1000, {"target": "indices", "inplace": 1}
    yield "feature_loss", 1024, {"kind": "cosine", "normalize": "channel"}
    for channels in (2730, 2048):
        yield "swiglu_norm", channels, {}
    if not every:
        return
    for classes in (2, 100, 8192, 131072):
        yield "kd_loss", classes, {"target": "indices"}
    for channels in (192, 8192):
        yield "swiglu_norm", channels, {}
    for features in (192, 1000, 8192):
        yield "feature_loss", features, {"kind": "mse", "normalize": "layer"}
    if half:
        for target in ("", "probabilities"):
            for classes in (1000, 21841):
                yield "kd_loss", classes, {"target": target}
        for kind in ("mse", "cosine", "smooth_l1"):
            for normalize in ("none", "layer", "channel"):
                if (kind, normalize) != ("cosine", "channel"):
                    yield "feature_loss", 1024, {"kind": kind, "normalize": normalize}


def core(case: Case) -> bool:
    """Whether the case has to be current for ``make test``: bf16 on Ampere and Hopper."""
    return case.arch in (80, 90) and case.dtype == "bfloat16"


def traced_as(case: Case) -> Case:
    """The case with the same trace.

    Triton's IR is the same for all of NVIDIA's architectures that have no table of their own.
    """
    alike = [arch for arch in ARCHS if arch != aot.AMD and not has_table(arch)]
    return dataclasses.replace(case, arch=alike[0]) if case.arch in alike else case


def has_table(arch: int) -> bool:
    """Whether block sizes that were measured on the architecture are part of the package."""
    return (FOLDER / f"{arch_name(arch)}.json").is_file()


@functools.cache
def trace(case: Case) -> str:
    """A hash of what the compiler sees of the case: as long as it stays, so do the instructions.

    Registers may be counted otherwise by a few where only the order of arguments has changed.
    """
    if case != traced_as(case):
        return trace(traced_as(case))
    with aot.trace_only(case.arch) as made:
        aot.OPS[case.op](getattr(torch, case.dtype), case.dim, **case.values())
    return hashlib.sha256("".join(sorted(set(made))).encode()).hexdigest()[:16]


def violations(case: Case, row: dict[str, Any]) -> list[str]:
    """What a compiled kernel does not keep to of docs/internals/gpu.md."""
    name, found = row["name"], []
    # The blocks are chosen for NVIDIA's GPUs; what AMD's spill is shown, but no failure.
    if case.arch != aot.AMD and row["spill_bytes"] > aot.SPILL_BUDGET:
        found.append(f"{row['spill_bytes']} bytes of registers spilled")
    if row["shared_bytes"] > aot.SHARED_LIMIT[case.arch]:
        found.append(f"{row['shared_bytes']} bytes of shared memory")
    if (row["tensor_core"] > 0) != (name in STREAMING):
        found.append(f"{row['tensor_core']} tensor-core instructions")
    attention = name in STREAMING or name == "rotate_kernel"
    # Narrower rows, and rows that start at odd addresses, have no 16 bytes for a thread; nor have
    # those of losses for the wider waves of AMD.
    rows = case.arch != aot.AMD and case.dim >= 1000 and case.dim % 8 == 0
    aligned = case.dim >= 64 if attention else rows
    if name in WIDE and aligned and not row["loads_16"]:
        found.append("no 16-byte loads")
    return found


def describe(case: Case, row: dict[str, Any]) -> str:
    """A kernel in words."""
    return f"{case}, {row['name']}" + (f" of {row['part']}" if row["part"] else "")
