# SPDX-License-Identifier: Apache-2.0
"""A training that goes on with another number of processes: each picture once an epoch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from kdfast.configs import ConfigError
from kdfast.data.sampler import EpochSampler
from kdfast.data.shares import Shares
from kdfast.testing.ranks import in_ranks
from kdfast.trainer.commits import load_checkpoint, save_checkpoint
from kdfast.trainer.progress import Progress

WORKER = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_engine import Diary, Loop, job_of, make_accelerator, numbers
from kdfast.trainer import loop

loop.draw_curves = lambda job: None
root, stop, fails = Path(sys.argv[1]), int(sys.argv[3]), sys.argv[4] == "fails"
accelerator = make_accelerator("fp32", "cpu")
rank, world = accelerator.process_index, accelerator.num_processes

class Notes(Diary):
    def on_step(self, step, result):
        with (root / f"seen-{rank}.jsonl").open("a") as file:
            file.write(json.dumps([step, [i for b in result.batches for i in b.index]]) + "\\n")

feed, counter = numbers(count=26, batch_size=2, rank=rank, world=world)
job = job_of(root / "run", Notes(), feed, epochs=2, max_steps=stop, save_every=1)
if fails and rank == world - 1:
    import torch
    forward = job.module.forward
    def limited(images, *rest):
        if len(images) > 1:
            raise torch.OutOfMemoryError("simulated")
        return forward(images, *rest)
    job.module.forward = limited
training = Loop(job, accelerator)
training.fit(resume=True)
print(f"rank {rank} parts {job.step.parts} seen {counter.seen}", flush=True)
"""


def launch(folder: Path, world: int, stop: int, word: str = "") -> str:
    script = folder / "worker.py"
    script.write_text(WORKER)
    python = [sys.executable]
    if world > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    done = subprocess.run(
        [*python, str(script), str(folder), str(Path(__file__).parent), str(stop), word],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def seen(folder: Path) -> dict[int, list[int]]:
    """Indices of each step, sorted."""
    steps: dict[int, list[int]] = {}
    for path in folder.glob("seen-*.jsonl"):
        for line in path.read_text().splitlines():
            step, index = json.loads(line)
            steps[step] = sorted(steps.get(step, []) + index)
    return steps


def weight(folder: Path) -> torch.Tensor:
    return load_checkpoint(folder / "run/last.pt")["module"]["weight"]


@pytest.mark.slow
def test_one_two_three_one(tmp_path: Path) -> None:
    """Stops in mid-epoch; the steps have the pictures of a run of one process, each one once."""
    (tmp_path / "whole").mkdir(), (tmp_path / "parts").mkdir()
    launch(tmp_path / "whole", 1, 99)
    for world, stop in ((1, 2), (2, 4), (3, 8), (1, 99)):
        launch(tmp_path / "parts", world, stop)
    one, two = seen(tmp_path / "whole"), seen(tmp_path / "parts")
    assert one == two and len(one) == 12 and {len(index) for index in one.values()} == {4}
    for epoch in (range(1, 7), range(7, 13)):
        every = [i for step in epoch for i in two[step]]
        assert len(set(every)) == len(every) == 24
    torch.testing.assert_close(weight(tmp_path / "whole"), weight(tmp_path / "parts"))
    state = load_checkpoint(tmp_path / "parts/run/last.pt")
    # Counted by all processes of all parts together.
    assert (state["world"], state["together"], state["step"]) == (1, 4, 12)
    assert state["ranks"][0]["feed"] == {"seen": 48}


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_out_of_memory_in_one_process(tmp_path: Path, world: int) -> None:
    """All agree to halve, and go on with the same pictures a step and the same weights."""
    results = []
    for word in ("", "fails"):
        folder = tmp_path / (word or "whole")
        folder.mkdir()
        out = launch(folder, world, 5, word)
        for rank in range(world):
            assert f"rank {rank} parts {2 if word else 1} " in out
        results.append((seen(folder), weight(folder)))
    assert results[0][0] == results[1][0]
    assert load_checkpoint(tmp_path / "fails/run/last.pt")["parts"] == 2


@pytest.mark.parametrize("step", [None, 2])
def test_processes_that_see_other_checkpoints(tmp_path: Path, step: int | None) -> None:
    """None or an old one, as in a folder of a node's own: an error in all, and nobody waits."""

    class Seen(Progress):
        def __init__(self, rank: int) -> None:
            folder = tmp_path / str(rank)
            self.job = SimpleNamespace(folder=folder, logs=folder, epochs_file="epochs.csv")
            barrier = SimpleNamespace(is_main_process=rank == 0, wait_for_everyone=dist.barrier)
            self.accelerator, self.rank, self.world = barrier, rank, 2

    for rank, saved in enumerate((4, step)):
        folder = tmp_path / str(rank)
        folder.mkdir()
        if saved is not None:
            save_checkpoint(folder, {"step": saved}, best=False)

    def work(rank: int) -> None:
        with pytest.raises(ConfigError, match=f"got checkpoints of these steps in them: 4, {step}"):
            Seen(rank).load()

    assert in_ranks(2, work) == [""] * 2


@pytest.mark.parametrize("together", [4, 6, 7])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_dealt_steps(together: int, world: int) -> None:
    """Every step has the same items in any number of processes."""
    alone = EpochSampler(50, seed=3)
    alone.deal(together)
    whole = list(alone)
    assert len(whole) == len(alone) == 50 // together * together
    parts = []
    for rank in range(world):
        sampler = EpochSampler(50, seed=3, rank=rank, world=world)
        before = sampler.order().tolist()
        sampler.deal(together)
        mine = list(sampler)
        assert len(sampler) == len(mine)
        if together % world == 0:
            assert mine == before[: len(mine)]
        sampler.set_epoch(0, 2 * together)
        share = len(range(rank, together, world))
        assert list(sampler) == mine[2 * share :]
        parts.append([mine[at : at + share] for at in range(0, len(mine), share)])
    for step, shares in enumerate(zip(*parts, strict=True)):
        wanted = whole[step * together : (step + 1) * together]
        assert sorted(sum(shares, [])) == sorted(wanted)
    with pytest.raises(ValueError, match="start must be a multiple of a step"):
        alone.set_epoch(0, together + 1)
    with pytest.raises(ValueError, match="steps must have 1 to 50 samples"):
        alone.deal(51)


def test_shares() -> None:
    shares = Shares(8, 3, 3)
    assert [shares.sizes(rank) for rank in range(3)] == [(3,), (3,), (2,)]
    assert sum(w for rank in range(3) for w in shares.weights(rank)) == pytest.approx(3)
    assert Shares(8, 3, 1).sizes(0) == (3, 3, 2) and Shares(8, 2, 2).weights(1) == (0.5, 0.5)
    with pytest.raises(ValueError, match=r"got 3 processes; these numbers fit: 1, 2, 4$"):
        Shares(4, 1, 3)
