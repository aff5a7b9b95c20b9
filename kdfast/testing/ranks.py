# SPDX-License-Identifier: Apache-2.0
"""Runs a function in several processes that gloo joins, as torchrun would."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist


def in_ranks(world: int, work: Callable[[int], object], *, seconds: float = 120.0) -> list[str]:
    """Run ``work(rank)`` in forked processes; what each of them ended with, by rank.

    Nothing is imported again, so it takes less than a second.

    Args:
        world: Number of processes.
        work: What a process does; torch has one thread there.
        seconds: After so many all that still run are killed.

    Returns:
        "" for success, else the last line of the traceback, "exit N", or "killed by N".

    Raises:
        TimeoutError: A process did not end.
    """
    with tempfile.TemporaryDirectory(prefix="kdfast-ranks-") as folder:
        files = [Path(folder, f"error-{rank}") for rank in range(world)]
        address = f"file://{folder}/rendezvous"
        children = [_fork(rank, world, address, work, files[rank]) for rank in range(world)]
        statuses: dict[int, int] = {}
        end = time.monotonic() + seconds
        while len(statuses) < world and time.monotonic() < end:
            for rank, child in enumerate(children):
                if rank not in statuses and (found := os.waitpid(child, os.WNOHANG))[0]:
                    statuses[rank] = os.waitstatus_to_exitcode(found[1])
            time.sleep(0.01)
        hanging = [rank for rank in range(world) if rank not in statuses]
        for rank in hanging:
            os.kill(children[rank], signal.SIGKILL)
            os.waitpid(children[rank], 0)
        if hanging:
            raise TimeoutError(f"processes {hanging} did not end within {seconds:.0f} s")
        return [_ending(statuses[rank], files[rank]) for rank in range(world)]


def started(
    module: str, function: str, *words: str, world: int = 2, seconds: float = 500.0
) -> None:
    """Call a function in new processes with the environment that torchrun gives; all must succeed.

    Args:
        module: Name of the module, which this process could import.
        function: Its name there; it gets the words.
        words: What it is called with.
        world: Number of processes, of one thread each.
        seconds: That all have.

    Raises:
        RuntimeError: A process failed; what they wrote to stderr is the message.
        subprocess.TimeoutExpired: One did not end.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    common["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    code = f"import sys; from {module} import {function}; {function}(*sys.argv[1:])"
    children = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code, *words],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        errors = [child.communicate(timeout=seconds)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    if any(child.returncode for child in children):
        raise RuntimeError("\n".join(errors)[-6000:])


def _ending(status: int, file: Path) -> str:
    if status < 0:
        return f"killed by {-status}"
    if file.is_file():
        return file.read_text(encoding="utf-8").strip().splitlines()[-1]
    return f"exit {status}" if status else ""


def _fork(rank: int, world: int, address: str, work: Callable[[int], object], errors: Path) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        torch.set_num_threads(1)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group("gloo", address, rank=rank, world_size=world)
        work(rank)
        status = 0
    except BaseException:
        errors.write_text(traceback.format_exc(), encoding="utf-8")
    finally:
        os._exit(status)
