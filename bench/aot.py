# SPDX-License-Identifier: Apache-2.0
"""Compiles what an op would launch on CUDA, for a GPU that need not be here.

``python -m bench.aot pruned_attention --arch 90`` prints one JSON line per kernel. In a process of
its own: it replaces Triton's driver.
"""

import argparse
import functools
import hashlib
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ir, make_backend
from triton.runtime.jit import JITFunction

from bench.gpu_tables import arch_name
from kdfast.kernels import _attention_call
from kdfast.ops import attention_distill, feature_loss, kd_loss, pruned_attention, swiglu_norm
from kdfast.ops._attention_args import geometry_args
from kdfast.ops.geometry import Rope, Window

AMD = 942  # gfx942, MI300; all others are compute capabilities
# Shared memory of one block, bytes (CUDA programming guide, compute capabilities).
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
SHARED_LIMIT[AMD] = 64 << 10
# Warps and KiB of shared memory of one SM; its registers are 65536 everywhere.
SM_WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64}
SM_SHARED = {80: 164 << 10, 86: 100 << 10, 89: 100 << 10, 90: 228 << 10, 100: 228 << 10}
# Bytes of local memory that a thread may have: a few registers outside the loop cost nothing that
# shows.
SPILL_BUDGET = 64
# Options of a launch that a binary depends on beside its IR.
LAUNCH = ("num_warps", "num_ctas", "num_stages", "maxnreg", "enable_fp_fusion")
# A line of Triton's IR that defines a constant: its name and its value.
CONSTANT = re.compile(r"^ *(%[a-z]\w*) = arith\.constant (.*)\n", re.MULTILINE)
TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA)\b")


@dataclass(frozen=True)
class Compiled:
    """One kernel compiled for one architecture, and what the binary says about itself."""

    name: str
    arch: int
    warps: int
    constants: dict[str, Any]
    registers: int
    spill_bytes: int  # of local memory per thread
    shared_bytes: int
    tensor_core: int  # instructions
    loads_16: int  # 16-byte loads from global memory, asynchronous ones included
    loads: int
    sass_lines: int

    @property
    def occupancy(self) -> float:
        """Resident warps over the warps that an SM (a CU of AMD) can hold."""
        if self.arch == AMD:
            # Four SIMDs with eight waves each at most, and 512 registers a lane.
            waves = 4 * min(8, 512 // max(8, -(-self.registers // 8) * 8))
            blocks = min(waves // self.warps, (64 << 10) // max(self.shared_bytes, 1))
            return blocks * self.warps / 32
        registers = -(-self.registers * 32 // 256) * 256 * self.warps
        fitting = [65536 // max(registers, 1), 32]
        # A block's shared memory is charged with 1 KiB of the system's.
        fitting.append(SM_SHARED[self.arch] // (self.shared_bytes + 1024))
        return min(min(fitting) * self.warps, SM_WARPS[self.arch]) / SM_WARPS[self.arch]


class _Driver:
    """As much of a driver as compilation asks for."""

    def __init__(self, arch: int, device: int) -> None:
        self.arch, self.device = arch, device

    def get_current_target(self) -> GPUTarget:
        if self.arch == AMD:
            return GPUTarget("hip", "gfx942", 64)
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compile_only(arch: int) -> Iterator[list[Compiled]]:
    """Makes launches on CPU tensors compile for ``arch`` instead; collects what they made.

    Raises:
        RuntimeError: Triton is in interpreter mode.
    """
    made: list[Compiled] = []
    run = JITFunction.run

    def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        constants = {n: v for n, v in options.items() if n.isupper()}
        made.append(inspect(kernel, arch, constants))
        return kernel

    with _driver(arch, arch), mock.patch.object(JITFunction, "run", compile_instead):
        yield made


@contextmanager
def trace_only(arch: int) -> Iterator[list[str]]:
    """Makes launches on CPU tensors stop at Triton's IR for ``arch``; collects a hash of each.

    The hash covers all that the instructions of the binary depend on but the architecture and the
    compiler itself: the IR after inlining, see ``canonical``, and the options of the launch.
    Neither names nor comments nor the way in which the text is divided into functions count, nor
    in which order or groups the arguments come. A trace takes a tenth of a second, a binary
    seconds.

    Raises:
        RuntimeError: Triton is in interpreter mode.
    """
    made: list[str] = []
    run = JITFunction.run

    def warm_up(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **options)

    def trace(
        self: Any,
        key: Any,
        signature: Any,
        device: int,
        constants: Any,
        options: Any,
        attributes: Any,
        warmup: bool,
    ) -> None:
        target = triton.runtime.driver.active.get_current_target()
        backend = make_backend(target)
        source = self.ASTSource(self, signature, constants, attributes)
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
        stages: dict[str, Any] = {}
        backend.add_stages(stages, options, source.language)
        module = stages["ttir"](source.make_ir(target, options, functions, modules, context), {})
        launch = {name: getattr(options, name) for name in LAUNCH if hasattr(options, name)}
        text = f"{launch}\n{canonical(module.str_nodebug())}"
        made.append(hashlib.sha256(text.encode()).hexdigest())

    # Not the device of ``compile_only``, for which Triton keeps what was compiled in this process.
    with (
        _driver(arch, -arch),
        mock.patch.object(JITFunction, "run", warm_up),
        mock.patch.object(JITFunction, "_do_compile", trace),
    ):
        yield made


def canonical(module: str) -> str:
    """A module of Triton's IR with its arguments numbered by their first use.

    Those that are not used are left out; values of loops are numbered with them. Constants stand
    where they are used. What remains decides about the instructions: where an argument lies in the
    parameters of a kernel, and which constant was met first, does not.

    Args:
        module: Text with one function, as ``str_nodebug`` gives it.
    """
    head, opening, rest = module.partition("(")
    arguments, body = rest.split(") attributes ", 1)
    typed = dict(re.findall(r"(%arg\d+): ((?:[^,{]|\{[^}]*\})+)", arguments))
    constants = dict(CONSTANT.findall(body))
    body = CONSTANT.sub("", body)
    body = re.sub(r"%[a-z]\w*", lambda found: constants.get(found[0], found[0]), body)
    used = dict.fromkeys(re.findall(r"%arg\d+", body))
    names = {name: f"%arg{place}" for place, name in enumerate(used)}
    signature = ", ".join(f"{names[name]}: {typed[name]}" for name in used if name in typed)
    body = re.sub(r"%arg\d+", lambda found: names[found[0]], body)
    return f"{head}{opening}{signature}) attributes {body}"


@contextmanager
def _driver(arch: int, device: int) -> Iterator[None]:
    if triton.knobs.runtime.interpret:
        raise RuntimeError("bench.aot: cannot compile with TRITON_INTERPRET set")
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(_Driver(arch, device))
    try:
        # The blocks of that architecture's table.
        with mock.patch.object(_attention_call, "architecture", lambda _: arch_name(arch)):
            yield
    finally:
        triton.runtime.driver._active = before


def inspect(kernel: Any, arch: int, constants: dict[str, Any]) -> Compiled:
    """Resources and instructions of a compiled kernel, read from its binary."""
    if arch == AMD:
        return _inspect_amd(kernel, constants)
    usage, sass = _dump(kernel.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"bench.aot: cuobjdump printed no resource usage: {usage!r}")
    registers, stack, _, local = map(int, found.groups())
    lines = [line for line in sass.splitlines() if re.search(r"/\*[0-9a-f]{4,}\*/\s+\S", line)]
    loads = [x for x in lines if re.search(r"\b(LDG|LDGSTS)\b", x)]
    return Compiled(
        name=kernel.metadata.name,
        arch=arch,
        warps=kernel.metadata.num_warps,
        constants=constants,
        registers=registers,
        spill_bytes=stack + local,
        shared_bytes=kernel.metadata.shared,
        tensor_core=sum(bool(TENSOR_CORE.search(x)) for x in lines),
        loads_16=sum(".128" in x for x in loads),
        loads=len(loads),
        sass_lines=len(lines),
    )


def _inspect_amd(kernel: Any, constants: dict[str, Any]) -> Compiled:
    """``inspect`` from the assembly text, which states the resources."""
    lines = kernel.asm["amdgcn"].splitlines()
    stated = dict(
        re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", "\n".join(lines))
    )
    loads = [x for x in lines if re.search(r"\b(global|buffer)_load_", x)]
    return Compiled(
        name=kernel.metadata.name,
        arch=AMD,
        warps=kernel.metadata.num_warps,
        constants=constants,
        registers=int(stated["vgpr_count"]),
        spill_bytes=int(stated["private_segment_fixed_size"]),
        shared_bytes=kernel.metadata.shared,
        tensor_core=sum("v_mfma" in x for x in lines),
        loads_16=sum("_load_dwordx4" in x for x in loads),
        loads=len(loads),
        sass_lines=sum(x.startswith("\t") and not x.startswith("\t.") for x in lines),
    )


@functools.lru_cache(maxsize=16)
def _dump(cubin: bytes) -> tuple[str, str]:
    """Resource usage and instructions; the same kernel often comes again within a call."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        return _cuobjdump("-res-usage", file.name), _cuobjdump("-sass", file.name)


def _cuobjdump(option: str, path: str) -> str:
    tool = triton.knobs.nvidia.cuobjdump.path
    if shutil.which(tool) is None:
        raise RuntimeError(f"bench.aot: no cuobjdump at {tool}")
    done = subprocess.run([tool, option, path], capture_output=True, text=True, check=True)
    return done.stdout


def compile_attention(
    dtype: torch.dtype,
    dim: int,
    *,
    tokens: int = 257,
    layout: str = "interleaved",
    window: int = 0,
    bias: int = 0,
) -> None:
    """Launches ``pruned_attention`` and its backward from a packed projection, one head of two.

    With ``window``, the tokens are ORION's 40 x 40 grid, with live padding; with ``bias``, there is
    one bias in the dtype of the projection.
    """
    grid = (40, 40) if window else None
    tokens = 1600 if window else tokens
    q, k, v = torch.zeros(1, tokens, 3, 2, dim, dtype=dtype).permute(2, 0, 3, 1, 4).unbind()
    rope = None
    if layout:
        table = torch.zeros(window**2 or tokens, dim)
        rope = Rope(table, table, 0 if window else 1, layout)
    windows = None if grid is None else Window(grid, window, torch.zeros(2, dim))
    added = torch.zeros(1, 2, tokens, tokens, dtype=dtype) if bias else None
    arguments = ([1], *geometry_args(rope, windows, dim**-0.5), added)
    out, lse = pruned_attention._cuda(q, k, v, *arguments)
    pruned_attention._cuda_bwd(out, q, k, v, out, lse, *arguments, bool(bias))


def compile_distill(
    dtype: torch.dtype,
    dim: int,
    *,
    tokens: int = 257,
    kind: str = "kl",
    temperature: int = 1,
    window: int = 0,
    teacher_dim: int = 0,
) -> None:
    """Launches ``attention_distill`` and its backward, with RoPE on both sides.

    ``window`` as in ``compile_attention``; the teacher's heads have the student's size unless
    ``teacher_dim`` is given.
    """
    tokens = 1600 if window else tokens

    def side(dim: int) -> tuple[list[torch.Tensor], tuple[Any, ...]]:
        packed = torch.zeros(1, tokens, 3, 2, dim, dtype=dtype).permute(2, 0, 3, 1, 4)
        table = torch.zeros(window**2 or tokens, dim)
        windows = Window((40, 40), window, torch.zeros(2, dim)) if window else None
        return list(packed.unbind()), geometry_args(Rope(table, table), windows, dim**-0.5)

    (q, k, v), student = side(dim)
    (tq, tk, _), teacher = side(teacher_dim or dim)
    every = (q, k, v, tq, tk, [1], [1], *student, *teacher[:5], float(temperature), kind)
    out, loss, stats = attention_distill._cuda(*every)
    attention_distill._cuda_bwd(out, loss, out, stats, *every)


def compile_kd_loss(
    dtype: torch.dtype, classes: int, *, rows: int = 64, target: str = "", inplace: int = 0
) -> None:
    """Launches ``kd_loss`` with its gradient; ``target``: none, "indices" or "probabilities".

    With ``inplace`` as ``linear_kd_loss`` launches it for the logits of a chunk.
    """
    logits = torch.zeros(rows, classes, dtype=dtype)
    targets = {"indices": torch.zeros(rows, dtype=torch.int64), "probabilities": logits.float()}
    every = (logits, logits, targets.get(target), 4.0, 0.7, "batchmean", 0.1, -100)
    if inplace:
        kd_loss._cuda_inplace(*every)
    else:
        kd_loss._cuda(*every, True)


def compile_feature_loss(
    dtype: torch.dtype, features: int, *, kind: str = "mse", normalize: str = "none"
) -> None:
    """Launches ``feature_loss`` with its gradient."""
    x = torch.zeros(64, features, dtype=dtype)
    feature_loss._cuda(x, x, kind, normalize, True)


def compile_swiglu_norm(dtype: torch.dtype, channels: int) -> None:
    """Launches ``swiglu_norm`` and its backward, from a packed projection."""
    gate, value = torch.zeros(64, 2 * channels, dtype=dtype).chunk(2, -1)
    weight = torch.zeros(channels, dtype=dtype)
    out, mean, rstd = swiglu_norm._cuda(gate, value, weight, weight, 1e-6)
    swiglu_norm._cuda_bwd(out, gate, value, weight, mean, rstd)


OPS: dict[str, Callable[..., None]] = {
    "pruned_attention": compile_attention,
    "attention_distill": compile_distill,
    "kd_loss": compile_kd_loss,
    "feature_loss": compile_feature_loss,
    "swiglu_norm": compile_swiglu_norm,
}


def main() -> None:
    """Prints what ``--arch`` makes of every kernel of one call of an op."""
    parser = argparse.ArgumentParser(prog="python -m bench.aot")
    parser.add_argument("op", choices=OPS)
    parser.add_argument("--arch", type=int, choices=SHARED_LIMIT, default=90)
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--dim", type=int, default=64, help="head dim, classes, features or channels"
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="of the op")
    args = parser.parse_args()
    options = dict(pair.split("=") for pair in args.set)
    values = {n: int(v) if v.isdigit() else v for n, v in options.items()}
    with compile_only(args.arch) as made:
        OPS[args.op](getattr(torch, args.dtype), args.dim, **values)
    for kernel in made:
        print(json.dumps(asdict(kernel) | {"occupancy": kernel.occupancy}))


if __name__ == "__main__":
    main()
