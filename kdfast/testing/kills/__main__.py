# SPDX-License-Identifier: Apache-2.0
"""``python -m kdfast.testing.kills``: kill at file operations, resume, compare bit for bit."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from kdfast.testing.kills.scenarios import SCENARIOS, Scenario, whole_or_none
from kdfast.testing.kills.shim import KILLED, Shim
from kdfast.testing.kills.state import difference, state_of

# Seconds after which a run counts as stuck.
PATIENCE = 600


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each scenario; 1 if a kill lost or changed something."""
    parser = argparse.ArgumentParser(prog="python -m kdfast.testing.kills", description=__doc__)
    parser.add_argument("--only", choices=SCENARIOS, action="append", help="a scenario [all]")
    parser.add_argument("--every", type=int, default=1, help="kill at every n-th operation [1]")
    parser.add_argument("--first", type=int, default=0, help="number of the first operation [0]")
    args = parser.parse_args(argv)
    # One thread: sums have one order, and a forked process has no other threads.
    torch.set_num_threads(1)
    faults = 0
    for name in args.only or SCENARIOS:
        faults += campaign(name, SCENARIOS[name], args.first, args.every)
    return 1 if faults else 0


def campaign(name: str, scenario: Scenario, first: int, every: int) -> int:
    """Kill one scenario at operations ``first``, ``first + every``, ...; returns the faults."""
    began, faults, kills = time.monotonic(), 0, 0
    scenario.prepare()
    with tempfile.TemporaryDirectory(prefix="kdfast-kills-") as root:
        log, work = Path(root, "log"), Path(root, "work")
        operations = _whole(scenario, work, log)
        wanted = state_of(work)
        for at in range(first, len(operations), every):
            kills += 1
            fault = _killed(scenario, work, log, at, wanted)
            if fault:
                faults += 1
                print(f"{name}: killed before {at}, {operations[at]}: {fault}", flush=True)
    seconds = time.monotonic() - began
    print(
        f"{name}: {len(operations)} operations, {kills} kills, {faults} faults, {seconds:.0f} s",
        flush=True,
    )
    return faults


def _whole(scenario: Scenario, work: Path, log: Path) -> list[str]:
    """Run without a kill; the operations in their order."""

    def counted() -> int:
        scenario.begin()
        shim = Shim(work, None)
        status = scenario.run(False)
        done = list(shim.done)
        (log.parent / "operations").write_text("\n".join(done))
        return status

    work.mkdir()
    status = _fork(counted, work, log)
    if status:
        raise RuntimeError(f"the run failed with {status}:\n{log.read_text()[-3000:]}")
    return (log.parent / "operations").read_text().splitlines()


def _killed(scenario: Scenario, work: Path, log: Path, at: int, wanted: dict[str, object]) -> str:
    """Kill a new run at an operation and go on; what is wrong then, or nothing."""

    def dies() -> int:
        scenario.begin()
        Shim(work, at)
        return scenario.run(False)

    shutil.rmtree(work)
    work.mkdir()
    status = _fork(dies, work, log)
    if status != KILLED:
        return f"it ended with {status} instead of being killed: {log.read_text()[-500:]}"
    if Path(work, "model").exists():
        whole_or_none(work / "run")
    status = _fork(lambda: scenario.run(True), work, log)
    if status:
        return f"it does not go on, status {status}: {log.read_text()[-500:]}"
    return difference(wanted, state_of(work))


def _fork(action: Callable[[], int], work: Path, log: Path) -> int:
    """Exit status of an action in a process of its own, whose output goes to a file."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    status = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        signal.alarm(PATIENCE)
        os.chdir(work)
        status = action()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
