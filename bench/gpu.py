# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.gpu``: every proof that needs a GPU, in one command of at most ten minutes.

Builds kdfast where it is not installed, from this source tree and without network. Then

- without an option: the GPU tests, goals, determinism, memory, and the ops against other libraries
  (bench/gpu_run.py);
- ``--tune``: times block sizes and writes the best as the table of this architecture
  (bench/gpu_tune.py);
- ``--train``: steps of both trainers in bf16 and fp16, against eager (bench/gpu_train.py).

Results are written as they come, so that a command which is stopped has lost the case in work.
``--dry-run`` does the same, small, on a CPU with the Triton kernels in the interpreter.
"""

import argparse
import importlib
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench.gpu_build import build, installed
from bench.gpu_stages import ROOT, Settings


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    part = made.add_mutually_exclusive_group()
    part.add_argument("--tune", action="store_true", help="measure block sizes")
    part.add_argument("--train", action="store_true", help="measure training steps")
    made.add_argument("--dry-run", action="store_true", help="on the CPU, in the interpreter")
    made.add_argument("--out", type=Path, help="folder of the results [bench/results]")
    made.add_argument("--seconds", type=float, default=570, help="time limit of the whole [570]")
    made.add_argument("--build", action="store_true", help="build even if kdfast is installed")
    return made


def main() -> int:
    """Builds and runs one part; 1 if something failed, 2 where it cannot run."""
    started = time.monotonic()
    args = parser().parse_args()
    if not (args.dry_run or torch.cuda.is_available()):
        print("bench.gpu: no CUDA device; --dry-run tries the command without one", file=sys.stderr)
        return 2
    if args.build or not installed():
        if not build(args.seconds):
            return 2
        # Python finds what pip has installed when it starts.
        given = [x for x in sys.argv[1:] if x != "--build"]
        left = f"--seconds={args.seconds - (time.monotonic() - started):.0f}"
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-m", "bench.gpu", *given, left])
    if args.dry_run:
        os.environ["KDFAST_DRY_RUN"] = "1"  # before the sizes of cases are chosen
    name = "dry_run" if args.dry_run else re.sub(r"\W+", "_", torch.cuda.get_device_name()).lower()
    out = args.out
    if out is None:
        out = Path(tempfile.mkdtemp()) if args.dry_run else ROOT / "bench" / "results"
    out.mkdir(parents=True, exist_ok=True)
    part = "bench.gpu_tune" if args.tune else "bench.gpu_train" if args.train else "bench.gpu_run"
    end = started + args.seconds
    return int(importlib.import_module(part).run(Settings(name, out.resolve(), end, args.dry_run)))


if __name__ == "__main__":
    sys.exit(main())
