# SPDX-License-Identifier: Apache-2.0
"""The engine alone, on a job of a few numbers: steps, watches, feeds, what a resume compares."""

import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdfast.chain.step import LinkStep, mixup_of
from kdfast.configs import ChainConfig, Config, ConfigError, plain
from kdfast.configs.chain import ChainOptimConfig
from kdfast.configs.distil import DistilConfig
from kdfast.configs.fields import defaults_of
from kdfast.configs.recovery import RunConfig
from kdfast.data.sampler import EpochSampler
from kdfast.nn.frozen import Frozen
from kdfast.trainer import loop as loop_file
from kdfast.trainer import window as window_file
from kdfast.trainer.commits import load_checkpoint
from kdfast.trainer.feed import Batch, Feed
from kdfast.trainer.job import Job, Length
from kdfast.trainer.logs import read_rows
from kdfast.trainer.loop import Loop
from kdfast.trainer.processes import make_accelerator
from kdfast.trainer.progress import deal_steps
from kdfast.trainer.state import differences, identity
from kdfast.trainer.step import MeanOfBatches, Prepared, StepResult
from kdfast.trainer.watch import Row, Watch


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws no curves."""
    monkeypatch.setattr(loop_file, "draw_curves", lambda folder: None)


class Numbers(torch.utils.data.Dataset[int]):
    """Items that are their index."""

    def __init__(self, count: int) -> None:
        self.count, self.epoch = count, 0

    def __len__(self) -> int:
        return self.count

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> int:
        return index


class Count:
    """Counts the items that went through a feed."""

    def __init__(self) -> None:
        self.seen = 0

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]

    def merged(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        return {"seen": sum(state["seen"] for state in states)}


def numbers(
    count: int = 12, batch_size: int = 2, workers: int = 0, **options: Any
) -> tuple[Feed[Numbers], Count]:
    """A feed whose images are the indices, one pixel each."""
    counter = Count()

    def to_batch(item: Tensor, epoch: int, number: int) -> Batch:
        counter.seen += len(item)
        images = item.float().view(-1, 1, 1, 1)
        return Batch(images, None, item.tolist(), [f"{epoch}/{number}"] * len(item))

    feed = Feed(
        Numbers(count),
        EpochSampler(count, seed=1, **options),
        to_batch,
        key="batch",
        batch_size=batch_size,
        train=True,
        device=torch.device("cpu"),
        workers=workers,
        counter=counter,
    )
    return feed, counter


class Line(nn.Module):
    """One weight, the loss of which is its square distance from the mean pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor, labels: Tensor | None, epoch: int) -> dict[str, Tensor]:
        distance = (self.weight - images.mean()) ** 2
        return {"total": distance.sum(), "epoch_weight": distance.new_tensor(float(epoch))}


class Diary(Watch):
    """Writes down what it is told, and ends the training after ``last`` epochs."""

    def __init__(self, last: int = 99) -> None:
        self.last, self.lines, self.epochs = last, [], 0

    def on_start(self) -> None:
        self.lines.append("start")

    def on_step(self, step: int, result: StepResult) -> None:
        self.lines.append(f"step {step}")

    def on_epoch(self, epoch: int, step: int, lr: float) -> Row:
        self.epochs += 1
        self.lines.append(f"epoch {epoch} at {step}")
        return {"step": step, "epoch": epoch + 1, "lr": lr}

    def is_best(self) -> bool:
        self.lines.append("saved")
        return False

    def finished(self) -> bool:
        return self.epochs >= self.last

    def state_dict(self) -> dict[str, Any]:
        return {"diary": self.epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epochs = state["diary"]


def job_of(folder: Path, watch: Watch, feed: Feed[Any] | None = None, **length: Any) -> Job:
    feed = numbers()[0] if feed is None else feed
    deal_steps(feed, make_accelerator("fp32", "cpu"), accumulate=2, goes_on=folder)
    module = Line()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)

    def set_lr(step: int) -> float:
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (1 + step)
        return 0.1 / (1 + step)

    folder.mkdir(exist_ok=True)
    return Job(
        title="line",
        folder=folder,
        logs=folder / "logs",
        module=module,
        feed=feed,
        length=Length(**{"epochs": 3, "per_epoch": feed.steps, **length}),
        optimizer=optimizer,
        set_lr=set_lr,
        clip=None,
        meta={"what": "line"},
        watch=watch,
    )


def test_length() -> None:
    length = Length(epochs=3, per_epoch=3, max_steps=5)
    assert (length.per_epoch, length.total, length.stop) == (3, 9, 5)
    assert Length(epochs=1, per_epoch=4, max_steps=9).stop == 4
    with pytest.raises(ValueError, match="an epoch has 12 images, which must be at least one"):
        numbers()[0].share_out(13)


def test_order_of_events(tmp_path: Path) -> None:
    """A watch hears of steps and epochs before the checkpoint that holds them is written."""
    diary = Diary()
    loop = Loop(job_of(tmp_path, diary, epochs=2, save_every=2), make_accelerator("fp32", "cpu"))
    loop.fit()
    assert diary.lines == [
        *("start", "step 1", "step 2", "saved", "step 3", "epoch 0 at 3", "saved"),
        *("step 4", "saved", "step 5", "step 6", "epoch 1 at 6", "saved"),
    ]
    assert loop.done
    rows = read_rows(tmp_path / "logs/epochs.csv")
    assert [(row["step"], row["epoch"]) for row in rows] == [("3", "1"), ("6", "2")]
    assert float(rows[0]["lr"]) == pytest.approx(0.1 / 3)


def test_time_of_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds per step, a part of them for data; neither evaluation nor checkpoints count."""
    now = [0.0]

    class Slow(Diary):
        """Takes 100 seconds for an epoch's evaluation and for a checkpoint, 3 for a step."""

        def on_step(self, step: int, result: StepResult) -> None:
            now[0] += 3.0

        def on_epoch(self, epoch: int, step: int, lr: float) -> Row:
            now[0] += 100.0
            return super().on_epoch(epoch, step, lr)

        def is_best(self) -> bool:
            now[0] += 100.0
            return False

    feed, _ = numbers()
    to_batch = feed._to_batch

    def slow(*item: Any) -> Batch:
        now[0] += 0.5
        return to_batch(*item)

    feed._to_batch = slow
    monkeypatch.setattr(window_file.time, "monotonic", lambda: now[0])
    job = job_of(tmp_path, Slow(), feed, epochs=2, save_every=1, log_every=2)
    Loop(job, make_accelerator("fp32", "cpu")).fit()
    rows = read_rows(tmp_path / "logs/steps.csv")
    assert [row["step"] for row in rows] == ["1", "3", "5", "6"]
    for row in rows:
        # Two batches of two images in a step.
        assert (float(row["time"]), float(row["data_time"])) == (4.0, 1.0)
        assert float(row["images_per_s"]) == 1.0


def test_watch_ends_the_training(tmp_path: Path) -> None:
    accelerator = make_accelerator("fp32", "cpu")
    loop = Loop(job_of(tmp_path, Diary(last=2)), accelerator)
    loop.fit()
    assert (loop.step, loop.total, loop.done) == (6, 9, True)
    again = Loop(job_of(tmp_path, diary := Diary(last=2)), accelerator)
    again.fit(resume=True)
    assert again.step == 6 and diary.lines == ["start"], "its state says that it is over"


def test_max_steps_splits_a_training(tmp_path: Path) -> None:
    accelerator = make_accelerator("fp32", "cpu")
    whole = Loop(job_of(tmp_path / "whole", Diary()), accelerator)
    whole.fit()
    first, counter = numbers()
    part = Loop(job_of(tmp_path / "parts", Watch(), first, max_steps=4), accelerator)
    part.fit()
    assert not part.done and counter.seen == 16
    second, counter = numbers()
    rest = Loop(job_of(tmp_path / "parts", Watch(), second), accelerator)
    rest.fit(resume=True)
    assert rest.done and counter.seen == 36
    assert torch.equal(rest.job.module.weight, whole.job.module.weight)
    assert not (tmp_path / "parts/logs/epochs.csv").is_file()
    other = job_of(tmp_path / "parts", Watch(), numbers(count=16)[0])
    with pytest.raises(ConfigError, match="was made with 3 steps per epoch, got 4"):
        Loop(other, accelerator).fit(resume=True)


def prepared(module: nn.Module, accumulate: int = 1, **signals: Any) -> Prepared:
    accelerator = make_accelerator("fp32", "cpu")
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    leaves = signals.get("leaves", lambda: False)
    weights = (1 / accumulate,) * accumulate
    return Prepared("line", accelerator, module, optimizer, 4, weights, leaves)


def batches(*values: float, weight: float = 1.0) -> Iterator[Batch]:
    for i, value in enumerate(values):
        labels = torch.tensor([i])
        yield Batch(torch.full((1, 1, 1, 1), value), labels, [i], [f"item {i}"], weight)


def test_mean_of_batches() -> None:
    module = Line()
    given = batches(1.0, 2.0, 6.0, 9.0)
    result = MeanOfBatches()(prepared(module, accumulate=3), given, 5)
    assert result.losses["total"] == pytest.approx((1 + 4 + 36) / 3)
    assert result.losses["epoch_weight"] == 5 and result.outputs is None
    assert module.weight.grad == pytest.approx(-2 * (1 + 2 + 6) / 3)
    assert [batch.index for batch in result.batches] == [[0], [1], [2]]
    assert next(given).index == [3], "it takes no more than it needs"
    module.weight.grad = None
    MeanOfBatches()(prepared(module), batches(3.0, weight=0.0), 0)
    assert module.weight.grad == 0, "a batch without a readable picture trains nothing"
    stopped = prepared(module, accumulate=3, leaves=lambda: True)
    assert len(MeanOfBatches()(stopped, batches(1.0, 2.0, 6.0), 0).losses) == 2


class Drawing(nn.Module):
    """Draws from every generator, and runs out of memory with more than ``most`` images."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.drawn = most, []
        self.weight = nn.Parameter(torch.ones(1))

    def forward(
        self, images: Tensor, target: Tensor, epoch: int, teacher: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        drawn = (torch.rand(()).item(), float(np.random.rand()), random.random())
        self.drawn.append((len(images), *drawn))
        if len(images) > self.most:
            raise torch.OutOfMemoryError("simulated")
        logits = images.flatten(1) * self.weight
        return {"total": (logits - target[:, None]).square().mean()}, logits.detach()


def test_out_of_memory_restores_every_generator() -> None:
    """Not only torch's on the CPU: what the step draws must not depend on how often it fails."""
    images, target = torch.arange(4.0).view(4, 1, 1, 1), torch.tensor([3.0, 1.0, 4.0, 1.0])
    batch = Batch(images, target, [0, 1, 2, 3], ["a", "b", "c", "d"])
    results, gradients = [], []
    for most in (4, 2):
        torch.manual_seed(5), np.random.seed(5), random.seed(5)
        module, step = Drawing(most), LinkStep()
        results.append(step(prepared(module), iter([batch]), 0))
        gradients.append(module.weight.grad)
        assert step.parts == 4 // most
    assert [count for count, *_ in module.drawn] == [4, 2, 2]
    assert module.drawn[0][1:] == module.drawn[1][1:] != module.drawn[2][1:]
    torch.testing.assert_close(*gradients)
    for one, two in zip(*(result.outputs for result in results), strict=True):
        torch.testing.assert_close(one, two)
    assert set(results[1].losses) == {"total"} and results[1].outputs.loss.ndim == 0


def test_generators_of_a_gpu_come_back_after_out_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Drop path on a GPU draws there."""
    back: list[Tensor] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: torch.tensor([7]))
    monkeypatch.setattr(torch.cuda, "set_rng_state", back.append)
    images = torch.zeros(2, 1, 1, 1)
    batch = Batch(images, torch.zeros(2), [0, 1], ["a", "b"])
    LinkStep()(prepared(Drawing(1)), iter([batch]), 0)
    assert [state.tolist() for state in back] == [[7]]


def test_kept_logits_are_cut_like_the_images() -> None:
    seen: list[Any] = []

    class Taught(Drawing):
        def forward(self, images: Tensor, target: Tensor, epoch: int, teacher: Any) -> Any:
            seen.append(teacher.flatten().tolist())
            return super().forward(images, target, epoch, teacher)

    batch = Batch(torch.zeros(4, 1, 1, 1), torch.zeros(4), [0, 1, 2, 3], list("abcd"), variant=3)
    step = LinkStep(kept_logits=lambda x: torch.arange(4.0)[:, None] + x.variant)
    step(prepared(Taught(2)), iter([batch]), 0)
    assert seen == [[3, 4, 5, 6], [3, 4], [5, 6]]


def test_mixup_is_for_single_labels() -> None:
    assert mixup_of(ChainOptimConfig(), "multilabel", 3) is None
    assert mixup_of(ChainOptimConfig(cutmix=1.0), "multiclass", 3) is not None
    with pytest.raises(ValueError, match="optim.mixup: must be 0 for several labels per image"):
        mixup_of(ChainOptimConfig(mixup=0.2), "multilabel", 3)


def test_feed() -> None:
    feed, counter = numbers(count=13, batch_size=3)
    whole = [batch.index for batch in feed.batches(2)]
    assert len(whole) == feed.steps == 4 and feed.dataset.epoch == 2 and counter.seen == 12
    assert [batch.index for batch in feed.batches(2, done=3)] == whole[3:]
    assert [batch.path[0] for batch in feed.batches(2, done=3)] == ["2/3"]
    assert [len(list(feed.batches(0, limit=n))) for n in (1, 3, 4, 99)] == [1, 1, 2, 4]
    shared = numbers(count=13, batch_size=3, rank=1, world=2)[0]
    assert [len(list(shared.batches(0, limit=n))) for n in (6, 7)] == [1, 2]
    saved = feed.state_dict()
    other, counter = numbers()
    other.load_state_dict(saved)
    assert counter.seen == saved["seen"] > 0
    with pytest.raises(ValueError, match=r"batch: 2 training images on 1 process\(es\) must give"):
        numbers(count=2, batch_size=3)


def test_a_finished_loop_waits_for_no_loader_process(tmp_path: Path) -> None:
    """Two that the collector of cycles ends take ten seconds."""
    feed, _ = numbers(workers=2)
    before = set(multiprocessing.active_children())
    loop = Loop(job_of(tmp_path, Diary(), feed, max_steps=2), make_accelerator("fp32", "cpu"))
    began = time.monotonic()
    loop.fit()
    assert set(multiprocessing.active_children()) <= before
    assert time.monotonic() - began < 4
    # Another epoch has new ones, and the same order.
    assert [b.index for b in feed.batches(1)] == [b.index for b in numbers()[0].batches(1)]
    feed.close()
    assert set(multiprocessing.active_children()) <= before


def test_identity() -> None:
    tree = {"name": "a", "run": {"steps": 1, "epochs": 2}, "optim": {"lr": 0.1}}
    kept = identity(tree, ("name", "run.steps"))
    assert kept == {"run": {"epochs": 2}, "optim": {"lr": 0.1}}
    assert tree["run"] == {"steps": 1, "epochs": 2}, "the tree itself stays"
    changed = {"run": {"epochs": 3}, "optim": {"lr": 0.1, "clip": 1}}
    assert differences(kept, changed) == ["run.epochs 2, got 3", "optim.clip None, got 1"]
    with pytest.raises(KeyError):
        identity(tree, ("run.stepz",))


def test_what_an_older_version_did_not_know_was_at_its_default() -> None:
    saved = {"run": {"epochs": 2}, "old": 1}
    defaults = {"run": {"epochs": 9, "streams": 1}, "cap": {"low": 0, "high": 5}, "old": 3}
    mine = {"run": {"epochs": 2, "streams": 1}, "cap": {"low": 0, "high": 5}, "old": 1}
    assert differences(saved, mine, defaults) == []
    changed = {**mine, "run": {"epochs": 3, "streams": 4}, "cap": {"low": 0, "high": 6}}
    older = " (an older version, without this key, made it)"
    assert differences(saved, changed, defaults) == [
        "run.epochs 2, got 3",
        f"run.streams 1, got 4{older}",
        f"cap.high 5, got 6{older}",
    ]
    assert differences(saved, {**mine, "cap": None}, {**defaults, "cap": None}) == []
    assert differences({"a": None}, {"a": 1}, {"a": 1}) == ["a None, got 1"]


def test_defaults_of_configs_are_those_of_their_classes() -> None:
    assert defaults_of(DistilConfig) == plain(DistilConfig())
    found = defaults_of(Config)
    assert "name" not in found and found["run"] == plain(RunConfig())
    assert "name" not in defaults_of(ChainConfig)


def test_frozen_module_is_hidden() -> None:
    owner, teacher = nn.Linear(2, 2), nn.Dropout()
    owner.teacher = Frozen(teacher)  # type: ignore[assignment]
    owner.train()
    assert not teacher.training and list(owner.children()) == []
    inner = nn.Linear(2, 2)
    owner.other = Frozen(inner)  # type: ignore[assignment]
    assert len(list(owner.parameters())) == len(owner.state_dict()) == 2
    assert not any(p.requires_grad for p in inner.parameters())


WORKER = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_engine import Diary, Loop, job_of, make_accelerator, numbers
from kdfast.machine.signals import Interrupted

class Stops(Diary):
    def on_step(self, step, result):
        if step == 4 and accelerator.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)

accelerator = make_accelerator("fp32", "cpu")
rank, world = accelerator.process_index, accelerator.num_processes
feed, _ = numbers(count=24, rank=rank, world=world)
loop = Loop(job_of(Path(sys.argv[1]), Stops(), feed), accelerator)
try:
    loop.fit()
except Interrupted as stop:
    print(f"rank {rank} of {world} stopped by {stop.signum} after {loop.step}", flush=True)
"""


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step(tmp_path: Path) -> None:
    """The signal reaches one of them; both save the same step and leave."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launch, str(script), str(tmp_path / "run"), str(Path(__file__).parent)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        assert f"rank {rank} of 2 stopped by 15 after 4" in done.stdout
    state = load_checkpoint(tmp_path / "run/last.pt")
    assert (state["step"], state["world"], len(state["ranks"])) == (4, 2, 2)
