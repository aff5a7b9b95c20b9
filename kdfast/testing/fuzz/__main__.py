# SPDX-License-Identifier: Apache-2.0
"""Random calls of all ops, valid and invalid: ``python -m kdfast.testing.fuzz --calls 20000``.

A valid call must give the reference's results and gradients, leave its inputs as they are, and need
no more than it is given. Then the registered ops that it ran are called with some arguments
changed: each must be refused by an exception, or fill every element of its results. ``make fuzz``
does this under AddressSanitizer and UndefinedBehaviorSanitizer, which end the process at the first
wrong access or overflow; the call is then the last line of the file ``--log``.
"""

import argparse
import collections
import os
import sys
import time
import warnings
from typing import Any

import torch
from torch import Tensor

import kdfast
from kdfast.testing.fuzz.draw import Call, Draw
from kdfast.testing.fuzz.raw import REFUSALS, Recorder, changed, tame, tensors

RAW_CALLS = 12  # for each valid one


class Fuzz:
    """Counts calls and faults."""

    def __init__(self, seed: int, log: str | None) -> None:
        self.seed = seed
        self.counts: collections.Counter[str] = collections.Counter()
        self.faults: list[str] = []
        self.log = None if log is None else os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)

    @property
    def calls(self) -> int:
        """Calls so far."""
        return sum(self.counts.values())

    def note(self, text: str) -> None:
        """Writes what is about to run, in place of what ran before."""
        if self.log is not None:
            os.pwrite(self.log, text.ljust(600).encode()[:600], 0)

    def fault(self, index: int, text: str) -> None:
        """Keeps and prints a fault."""
        self.faults.append(text)
        print(f"FAULT (--only {index} --seed {self.seed}): {text}", flush=True)

    def run(self, index: int) -> None:
        """One valid call and several changed ones, which ``index`` draws."""
        draw = Draw(f"{self.seed}:{index}")
        call = draw.call()
        self.note(f"{index} {call.name} {[(x.dtype, tuple(x.shape)) for x in call.inputs]}")
        recorder = Recorder()
        try:
            faults = check(call, draw.dtype, recorder)
        except Exception as error:
            faults = [f"raised {type(error).__name__}: {error}"]
        for text in faults:
            self.fault(index, f"{call.name}: {text}")
        self.counts["valid"] += 1
        for _ in range(RAW_CALLS if recorder.calls else 0):
            func, args = draw.random.choice(recorder.calls)
            args, text = changed(func, args, draw.random)
            self.note(f"{index} {text}")
            self.raw(index, func, args, text)

    def raw(self, index: int, func: Any, args: list[Any], text: str) -> None:
        """One call of a registered op with anything."""
        try:
            with torch.no_grad():
                results = tensors(func(*args))
        except REFUSALS:
            self.counts["refused"] += 1
            return
        except Exception as error:
            self.fault(index, f"{text}: raised {type(error).__name__}: {error}")
            return
        self.counts["accepted"] += 1
        if not tame(args) or "=0.0" in text:  # an eps of 0 divides by no variance
            return
        for x in results:
            # Fresh memory is NaN here, so what no kernel wrote is too.
            if not x.is_meta and x.is_floating_point() and x.isnan().any() and not _means(args):
                self.fault(index, f"{text}: NaN in a result {tuple(x.shape)}")
                return


def _means(args: list[Any]) -> bool:
    """Whether a mean over no rows may be among the results, which is NaN."""
    given = [x for x in tensors(args) if x.dtype == torch.int64]
    return any(x.numel() == 0 for x in tensors(args)) or bool(given)


def check(call: Call, dtype: torch.dtype, recorder: Recorder) -> list[str]:
    """What is wrong with a valid call."""
    before = [x.clone() for x in call.inputs]
    with recorder:
        fused = results(call, call.inputs, "fused")
    faults = [
        f"input {i} was changed"
        for i, (x, was) in enumerate(zip(call.inputs, before, strict=True))
        if not torch.equal(x, was)
    ]
    eager = results(call, call.inputs, "reference")
    exact = results(call, call.cast(torch.float64), "reference")
    for i, (a, b, c) in enumerate(zip(fused, exact, eager, strict=True)):
        if a.shape != b.shape:
            faults.append(f"result {i} is {tuple(a.shape)}, want {tuple(b.shape)}")
        elif wrong := _error(a, b, c, dtype):
            faults.append(f"result {i} {wrong}")
    return faults


def results(call: Call, inputs: list[Tensor], backend: str) -> list[Tensor]:
    """Results and gradients."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    out = call.function(*leaves, backend=backend)
    outputs = tensors(list(out) if isinstance(out, tuple) else [out])
    draw = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=torch.float64)
    for x in outputs:
        if x.requires_grad:
            weight = torch.rand(x.shape, generator=draw, dtype=torch.float64).to(x.dtype)
            total = total + (x * weight).sum().double()
    if total.requires_grad:
        total.backward()
    grads = [x.grad for x in leaves if x.grad is not None]
    return [*(x.detach() for x in outputs), *grads]


def _error(got: Tensor, exact: Tensor, eager: Tensor, dtype: torch.dtype) -> str | None:
    got, eager = got.double(), eager.double()
    if not torch.equal(got.isnan(), exact.isnan()) or not torch.equal(got.isinf(), exact.isinf()):
        if torch.equal(got.isfinite(), eager.isfinite()):
            return None
        return f"is finite elsewhere: {int(got.isfinite().sum())} of {got.numel()}"
    there = exact.isfinite()
    got, exact, eager = got[there], exact[there], eager[there]
    if got.numel() == 0:
        return None
    error, size = (got - exact).abs().max().item(), exact.abs().max().item()
    # In fp64 the reference is exact by definition, so its error is no yardstick.
    steps = 512 if dtype == torch.float64 else 64
    limit = 8 * (eager - exact).abs().max().item() + steps * torch.finfo(dtype).eps * (size + 1)
    return f"is off by {error:.2e}, eager by {limit:.2e}" if error > limit else None


def main() -> int:
    """Runs the command; 1 if there were faults."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m kdfast.testing.fuzz")
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the index that a fault names")
    parser.add_argument("--log", help="file that holds the call that is running")
    args = parser.parse_args()
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory becomes NaN
    warnings.simplefilter("ignore")
    fuzz, start, index = Fuzz(args.seed, args.log), time.monotonic(), args.only or 0
    while fuzz.calls < args.calls:
        fuzz.run(index)
        index += 1
        if args.only is not None:
            break
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(fuzz.counts.items()))
    seconds = time.monotonic() - start
    faults = f"{len(fuzz.faults)} faults"
    print(f"{fuzz.calls} calls ({kinds}), {faults}, {seconds:.0f} s, seed {args.seed}")
    print(f"kdfast {kdfast.__version__}, {kdfast.ops._library.CPU_ISA}, torch {torch.__version__}")
    return 1 if fuzz.faults else 0


if __name__ == "__main__":
    sys.exit(main())
