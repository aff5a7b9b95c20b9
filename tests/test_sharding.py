# SPDX-License-Identifier: Apache-2.0
"""Sharded models: the steps of two processes against those of one, and what is refused."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch import Tensor, nn

import kdfast
from kdfast.chain.links import LinkModel
from kdfast.chain.objective import Objective
from kdfast.chain.planning import check_links
from kdfast.configs import ConfigError, load
from kdfast.configs.chain import ChainDistillConfig
from kdfast.configs.distil import distil_config
from kdfast.configs.recovery import DistillConfig
from kdfast.data.shares import Shares
from kdfast.distillation.objective import Objective as DistilObjective
from kdfast.distillation.terms import find_terms
from kdfast.models.prepared import PreparedModel
from kdfast.recovery.objective import Distiller
from kdfast.testing.compare import assert_no_worse
from kdfast.testing.models import small_eva
from kdfast.testing.ranks import in_ranks, started
from kdfast.train import main
from kdfast.trainer.gathered import (
    is_sharded,
    load_module_state,
    load_optimizer_state,
    module_state,
    optimizer_state,
)
from kdfast.trainer.processes import make_accelerator
from kdfast.trainer.sharding import (
    gathered,
    prepare,
    shard,
    units_of,
    whole,
    whole_tensor,
)
from kdfast.trainer.step import Inputs, Piecewise, Prepared

BATCH, STEPS = 4, 3


class Made(NamedTuple):
    """What a case trains."""

    module: nn.Module
    student: nn.Module
    teacher: nn.Module
    read: list[nn.Module]
    images: tuple[int, ...]


def vit(**changes: Any) -> nn.Module:
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    return timm.create_model("vit_tiny_patch16_224", **{**options, "num_classes": 5, **changes})


def chain(dtype: torch.dtype) -> Made:
    """Attention maps and features of models of different widths, and recomputed blocks."""
    return _chain(vit(depth=3, embed_dim=64, num_heads=4), vit(), dtype, recompute=True)


def late(dtype: torch.dtype) -> Made:
    """An attention with projections of its own, which are read again after the forward."""
    from torchvision.models import VisionTransformer

    def model() -> nn.Module:
        sizes = {"num_layers": 2, "num_heads": 3, "hidden_dim": 48, "mlp_dim": 96}
        return VisionTransformer(image_size=32, patch_size=8, num_classes=5, **sizes)

    made = _chain(model(), model(), dtype, feature=0.0)
    assert len(made.read) == 2
    return made


def _chain(
    teacher: nn.Module,
    student: nn.Module,
    dtype: torch.dtype,
    *,
    recompute: bool = False,
    **more: Any,
) -> Made:
    for net in (teacher, student):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        kdfast.accelerate(net)
    if recompute:
        student.set_grad_checkpointing(True)
    config = ChainDistillConfig(**{"attention": 1.0, "feature": 1.0, **more})
    models = [LinkModel(net).to(dtype) for net in (student, teacher)]
    module = Objective(*models, "multiclass", config, epochs=1, distilled=True, size=(32, 32)).to(
        dtype
    )
    return Made(module, *models, module.read_late(), (3, 32, 32))


def recovery(dtype: torch.dtype) -> Made:
    """Attention losses inside of the attention op, and recomputed blocks."""
    teacher = small_eva().to(dtype)
    student = kdfast.prune_heads(teacher, [[0, 2], [1, 2], [0]])
    student.with_cp = True
    config = DistillConfig(feature_layers="all", attention=1.0)
    module = Distiller(student.requires_grad_(True), teacher, None, config)
    return Made(module, student, teacher, [], (3, 96, 96))


def distillation(dtype: torch.dtype) -> Made:
    """A student that was cut from its teacher."""
    net = vit(num_heads=4, embed_dim=64)
    models = [PreparedModel(kdfast.prune_heads(net, [[0, 1], [2]])), PreparedModel(net)]
    config = distil_config({"attention": 1.0, "feature": 1.0})
    terms = find_terms(*models, config, (32, 32))
    module = DistilObjective(*models, terms, config).to(dtype)
    models[1].to(dtype)
    return Made(module, *models, module.read_late(), (3, 32, 32))


CASES: dict[str, Callable[[torch.dtype], Made]] = {
    f.__name__: f for f in (chain, late, recovery, distillation)
}


class Steps:
    """Training steps of a case, of all images or of this process's share of them."""

    def __init__(self, case: str, precision: str, sharded: bool = False) -> None:
        exact = precision == "fp64"
        # The processes stay joined; the precision is another one.
        AcceleratorState._reset_state()
        self.dtype = torch.float64 if exact else torch.float32
        self.accelerator = make_accelerator("fp32" if exact else precision, "cpu")
        torch.manual_seed(3)
        self.made = CASES[case](self.dtype)
        self.made.module.train()
        if sharded:
            models = [self.made.student, self.made.teacher]
            shard(self.made.module, models, self.accelerator, read=self.made.read)
        self.trained = [p for p in self.made.module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(self.trained, lr=1e-2, eps=1e-3, fused=True)
        self.module, self.optimizer = prepare(self.accelerator, self.made.module, optimizer)
        self.seen: dict[str, list[Tensor]] = {"loss": [], "norm": []}

    def take(self, count: int) -> "Steps":
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        for _ in range(count):
            generator = torch.Generator().manual_seed(len(self.seen["loss"]))
            images = torch.rand(BATCH, *self.made.images, generator=generator, dtype=self.dtype)
            labels = torch.arange(BATCH) % 5
            out = self.module(images[rank::world], labels[rank::world], 0)
            loss = (out[0] if isinstance(out, tuple) else out)["total"]
            self.accelerator.backward(loss)
            norm = whole_tensor(self.accelerator.clip_grad_norm_(self.trained, 0.3))
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.seen["loss"].append(self.accelerator.reduce(loss.detach(), "mean"))
            self.seen["norm"].append(norm)
        return self

    def result(self) -> dict[str, Any]:
        seen = {name: torch.stack(values).double() for name, values in self.seen.items()}
        state = {"module": module_state(self.made.module)}
        return {**seen, **state, "optimizer": optimizer_state(self.optimizer)}

    def resume(self, state: dict[str, Any]) -> "Steps":
        load_module_state(self.made.module, state["module"])
        load_optimizer_state(self.optimizer, state["optimizer"])
        self.seen = {name: list(state[name]) for name in ("loss", "norm")}
        return self


def evaluated(steps: Steps) -> Tensor:
    """A forward by the first process alone, of the gathered model."""
    images = torch.full((1, *steps.made.images), 0.5)
    found = torch.zeros(1)
    with gathered(steps.made.student.eval()), torch.no_grad():
        if steps.accelerator.is_main_process:
            found = steps.made.student(images)
    return found


def work(where: str) -> None:
    """What each of two processes does; the first one writes the results."""
    torch.set_num_threads(1)
    folder = Path(where)
    for case in CASES:
        for precision in ("fp32", "bf16"):
            steps = Steps(case, precision, sharded=True)
            assert is_sharded(steps.made.module)
            held = sum(p.to_local().numel() for p in steps.trained)
            total = sum(p.numel() for p in steps.trained)
            results = {"part": held / total, **steps.take(STEPS).result()}
            state = [v for s in steps.optimizer.state.values() for v in s.values() if v.dim()]
            results["state"] = sum(x.to_local().numel() for x in state) / total
            results["output"] = evaluated(steps)
            results["after"] = steps.take(1).result()["module"]
            plain = whole(steps.made.student)
            assert not is_sharded(plain)
            results["whole"] = plain.state_dict()
            if steps.accelerator.is_main_process:
                torch.save(results, folder / f"{case}-{precision}.pt")
    again = Steps("chain", "fp32", sharded=True)
    again.resume(torch.load(folder / "one.pt")).take(1)
    results = again.result()
    if again.accelerator.is_main_process:
        torch.save(results, folder / "resumed.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote."""
    folder = tmp_path_factory.mktemp("sharded")
    torch.save(Steps("chain", "fp32").take(STEPS).result(), folder / "one.pt")
    started("tests.test_sharding", "work", str(folder))
    return folder


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", list(CASES))
def test_steps_are_those_of_one_process(case: str, precision: str, folder: Path) -> None:
    got = torch.load(folder / f"{case}-{precision}.pt")
    exact = Steps(case, "fp64").take(STEPS).result()
    plain = Steps(case, precision).take(STEPS)
    eager = plain.result()
    eps = torch.finfo(torch.float32 if precision == "fp32" else torch.bfloat16).eps
    for name in ("loss", "norm"):
        torch.testing.assert_close(got[name], eager[name], rtol=8 * eps, atol=0)
    for name, value in got["module"].items():
        want = [x["module"][name] for x in (exact, eager)]
        assert_no_worse(name, value, *want, eps=eps)
    # Of every parameter a half; the model's smallest ones lie in one process.
    assert 0.4 < got["part"] < 0.6 and 0.8 < got["state"] < 1.2
    torch.testing.assert_close(got["output"], evaluated(plain), rtol=1e-2, atol=1e-2)
    student = {f"student.{name}": value for name, value in got["whole"].items()}
    assert all(
        torch.equal(value, student[name]) for name, value in got["after"].items() if name in student
    )


def test_a_plain_checkpoint_goes_on_in_shards(folder: Path) -> None:
    got = torch.load(folder / "resumed.pt")
    want = Steps("chain", "fp32").take(STEPS + 1).result()
    torch.testing.assert_close(got["loss"], want["loss"])
    torch.testing.assert_close(got["module"], want["module"], rtol=1e-4, atol=1e-5)
    assert got["optimizer"]["param_groups"] == want["optimizer"]["param_groups"]
    for mine, other in zip(
        got["optimizer"]["state"].values(), want["optimizer"]["state"].values(), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-6)


def test_what_is_not_sharded_stays_as_it_is() -> None:
    model = vit()
    assert whole(model) is model and not is_sharded(model)
    with gathered(model, None):
        assert whole_tensor(model.norm.weight) is model.norm.weight


def test_pieces_of_uneven_shares() -> None:
    """Shards are gathered as often in every process, where a run in pieces goes on in shards."""

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = vit(depth=1)
            self.rows: list[int] = []

        def forward(
            self, images: Tensor, labels: None, epoch: int
        ) -> tuple[dict[str, Tensor], Tensor]:
            self.rows.append(len(images))
            logits = self.net(images)
            return {"total": logits.square().mean()}, logits

    def attempt(images: Tensor, rank: int, parts: int, weight: float) -> list[int]:
        module = Mean()
        accelerator: Any = SimpleNamespace(
            num_processes=2,
            device=torch.device("cpu"),
            backward=lambda loss: loss.backward(),
            no_sync=lambda module: nullcontext(),
        )
        shard(module, [module.net], accelerator)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
        weights = Shares(9, 9, 2).weights(rank)
        prepared = Prepared("mean", accelerator, module, optimizer, 9, weights, lambda: False)
        step = Piecewise()
        step.parts = parts
        inputs = [Inputs(images, None, weight=weight)]
        losses, outputs = step.gradient(prepared, inputs, 0)
        assert sum(map(len, outputs)) == len(images)
        alone = Mean()
        whole = weight * alone(images, None, 0)[0]["total"] * weights[0]
        whole.backward()
        torch.testing.assert_close(losses["total"] * weight, whole.detach())
        for mine, one in zip(module.parameters(), alone.parameters(), strict=True):
            wanted = one.grad.clone()
            dist.all_reduce(wanted)
            got = torch.zeros_like(wanted) if mine.grad is None else whole_tensor(mine.grad)
            torch.testing.assert_close(got, wanted / 2, rtol=1e-4, atol=1e-6)
        return module.rows

    def work(rank: int) -> None:
        images = torch.rand(9, 3, 32, 32, generator=torch.Generator().manual_seed(1))[rank::2]
        assert attempt(images, rank, 4, 1.0) == [[2, 2, 1, 1], [1, 1, 1, 1]][rank]
        assert attempt(images, rank, 8, 1.0) == [1] * 5
        # One process could read none of its pictures.
        few = images if rank == 0 else torch.zeros(1, 3, 32, 32)
        assert len(attempt(few, rank, 2, 1.0 - rank)) == 2

    assert in_ranks(2, work, seconds=60.0) == [""] * 2


def test_rejects_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    accelerator = make_accelerator("fp32", "cpu")
    with pytest.raises(ConfigError, match="shard: fsdp divides models .* got one process"):
        shard(vit(), [], accelerator)
    assert main(["--config", "smoke", "--set", "run.shard=fsdp", "--set", "run.device=cpu"]) == 2
    assert "shard: fsdp divides models among several processes" in capsys.readouterr().err


def test_rejects_models_without_known_blocks() -> None:
    with pytest.raises(ConfigError, match="shard: fsdp must know the blocks .*ByobNet"):
        units_of(timm.create_model("test_byobnet"))
    config = load("cnn_chain_digits", ["shard=fsdp", "device=cpu"])
    with pytest.raises(ConfigError, match="shard: fsdp must know the blocks"):
        check_links(config, 10)


def test_rejects_the_flag_of_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="set it to fsdp instead of `accelerate launch --use_fsd"):
        make_accelerator("fp32", "cpu")


@pytest.mark.parametrize(
    ("config", "words", "match"),
    [
        ("smoke", ["run.shard=ddp"], "run.shard: must be one of none, fsdp, got 'ddp'"),
        ("smoke", ["run.shard=fsdp", "run.precision=fp16"], "run.shard: fsdp has no loss scaling"),
        ("vit_chain_digits", ["shard=fsdp", "precision=fp16"], "shard: fsdp has no loss scaling"),
        ("vit_chain_digits", ["shard=fsdp", "optim.ema=0.9"], "averaged weights cannot be sharded"),
    ],
)
def test_rejects_configs(config: str, words: list[str], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        load(config, words)


def test_rejects_options_of_distil() -> None:
    with pytest.raises(ConfigError, match="shard: fsdp has no loss scaling"):
        distil_config({"shard": "fsdp", "precision": "fp16"})
