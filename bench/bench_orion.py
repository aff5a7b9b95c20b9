# SPDX-License-Identifier: Apache-2.0
"""ORION at 640 x 640: the backbone's forward, a frame through the heads, a distillation step.

"eager" is bench.orion_eager, what public ORION code computes: padded windows, rotation by tensor
ops, maps in memory; "SDPA" the same with torch's attention. The student has 8 of the 16 heads. The
whole models take minutes and are slow tests; three blocks (window, window, global) are an eighth.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import session
from bench.compare import Compare
from bench.orion_eager import attention_kl, eager_heads, traced
from bench.orion_eager import forward as eager_forward
from kdfast.configs.recovery import DistillConfig
from kdfast.models import EVAViT, eva_vit_l_orion
from kdfast.models.orion import Batch, OrionHeads, task_loss
from kdfast.ops.feature_loss import feature_loss
from kdfast.ops.kd_loss import kd_loss
from kdfast.recovery.objective import feature_layers, paired_heads
from kdfast.recovery.orion.feed import Streams
from kdfast.recovery.orion.objective import TaskDistiller
from kdfast.testing import DRY_RUN
from kdfast.testing import orion as drive

KEPT = list(range(0, 16, 2))
UNITS = 1365  # half of an MLP's hidden ones
DTYPES = [torch.float32, torch.bfloat16]
DEPTHS = [3, pytest.param(24, marks=pytest.mark.slow)]
CONFIG = DistillConfig()
pytestmark = pytest.mark.skipif(DRY_RUN, reason="a model takes minutes in Triton's interpreter")


def models(
    device: torch.device, dtype: torch.dtype, depth: int, mlp: int | None = None
) -> tuple[EVAViT, EVAViT, Tensor]:
    """Teacher, student with half of the heads (and ``mlp`` hidden units), and an image."""
    torch.manual_seed(0)
    plain = {"depth": depth, "drop_path_rate": 0.0, "with_cp": False}
    units = {} if mlp is None else {"mlp_hidden": mlp}
    teacher = eva_vit_l_orion(**plain).to(device, dtype).eval().requires_grad_(False)
    student = eva_vit_l_orion(**plain, heads=KEPT, **units).to(device, dtype)
    return teacher, student, torch.randn(1, 3, 640, 640).to(device, dtype)


def case(text: str, depth: int, dtype: torch.dtype) -> str:
    return f"{text}, {depth} of 24 blocks {dtype}"


@pytest.mark.candidates(
    "kdfast", "eager", "SDPA", "kdfast, 16 heads", "kdfast, half of units too", "eager, 16 heads"
)
@pytest.mark.benchmark(min_rounds=3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("depth", DEPTHS)
def bench_forward(compare: Compare, dtype: torch.dtype, depth: int) -> None:
    """The student, and for comparison the teacher: what the student takes the place of."""
    teacher, student, image = models(compare.device, dtype, depth)
    narrow = models(compare.device, dtype, depth, UNITS)[1]

    def eager(model: EVAViT, sdpa: bool = False) -> Callable[[], Tensor]:
        return session.inference(lambda: eager_forward(model, image, sdpa))

    calls = {
        "kdfast": session.inference(lambda: student(image)),
        "eager": eager(student),
        "SDPA": eager(student, sdpa=True),
    }
    yardsticks = {
        "kdfast, 16 heads": session.inference(lambda: teacher(image)),
        "kdfast, half of units too": session.inference(lambda: narrow(image)),
        "eager, 16 heads": eager(teacher),
    }
    check = session.near(calls["eager"](), 3e-2 if dtype == torch.bfloat16 else 1e-4)
    name = case("fwd, 8 heads", depth, dtype)
    compare("EVA-ViT-L", name, calls, check=check, yardsticks=yardsticks, memory=depth == 24)


@pytest.mark.slow
@pytest.mark.candidates("kdfast", "eager", "SDPA")
@pytest.mark.benchmark(min_rounds=3)
def bench_detection_frame(compare: Compare) -> None:
    """One frame of six cameras through both heads, with the memory of the frame before; fp32."""
    first, second = ring(compare.device, 0), ring(compare.device, 1)
    heads = seeded_heads().to(compare.device)
    features = torch.randn(6, 1024, 40, 40, device=compare.device)
    with torch.no_grad():
        memory = heads(features, first.frame)[1]

    def frame(module: OrionHeads) -> Callable[[], Sequence[Tensor]]:
        def run() -> Sequence[Tensor]:
            found = module(features, second.frame, memory)[0]
            return found.detection.found.codes, found.map.points, found.vlm_tokens

        return session.inference(run)

    calls = {
        "kdfast": frame(heads),
        "eager": frame(eager_heads(heads)),
        "SDPA": frame(eager_heads(heads, sdpa=True)),
    }
    check = session.near(calls["eager"](), 1e-3)
    compare("ORION's heads", "a frame of six cameras", calls, check=check, memory=True)


@pytest.mark.candidates("kdfast", "eager", "SDPA, no attention term")
@pytest.mark.benchmark(min_rounds=3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("depth", DEPTHS)
def bench_distillation(compare: Compare, dtype: torch.dtype, depth: int) -> None:
    """Teacher, student, all terms and the heads' task loss on one camera, forward and backward.

    SDPA has no maps, so it leaves the largest term out.
    """
    teacher, student, image = models(compare.device, dtype, depth)
    heads = seeded_heads().to(compare.device)
    batch = one_camera(ring(compare.device, 0))
    leaves = list(student.parameters())
    config = CONFIG if depth == 24 else replace(CONFIG, feature_layers="all")
    distiller = TaskDistiller(student, teacher, heads, config, Streams(compare.device))

    def fused() -> Any:
        distiller.streams = Streams(compare.device)
        return distiller(image, batch, 1)["total"]

    eager = EagerStep(student, teacher, heads, config)
    losses: dict[str, Callable[[], Any]] = {
        "kdfast": fused,
        "eager": lambda: eager(image, batch),
    }
    calls = {name: session.gradients(loss, leaves) for name, loss in losses.items()}
    check = session.near([losses["eager"]()], 3e-2 if dtype == torch.bfloat16 else 1e-3)

    def same_loss(name: str, _: object) -> None:
        check(name, lambda: [losses[name]()])

    other = EagerStep(student, teacher, heads, replace(config, attention=0.0), sdpa=True)
    less = session.gradients(lambda: other(image, batch), leaves)
    compare(
        "EVA-ViT-L",
        case("distillation step, 8 heads", depth, dtype),
        calls,
        check=same_loss,
        yardsticks={"SDPA, no attention term": less},
        memory=True,
    )


class EagerStep:
    """The loss of TaskDistiller by tensor ops."""

    def __init__(
        self,
        student: EVAViT,
        teacher: EVAViT,
        heads: OrionHeads,
        config: DistillConfig,
        sdpa: bool = False,
    ) -> None:
        self.student, self.teacher, self.config, self.sdpa = student, teacher, config, sdpa
        self.heads = eager_heads(heads, sdpa)
        self.layers = feature_layers(teacher, config.feature_layers)
        self.pairs = paired_heads(student, teacher)

    def __call__(self, image: Tensor, batch: Batch) -> Tensor:
        config, alpha = self.config, self.config.alpha
        with torch.no_grad():
            goal, goals, maps = traced(self.teacher, image, self.sdpa)
        out, streams, mine = traced(self.student, image, self.sdpa)
        features = [
            feature_loss(
                streams[i],
                goals[i],
                kind=config.feature_kind,
                normalize=config.feature_normalize,
                backend="reference",
            )
            for i in self.layers
        ]
        kd = config.feature * torch.stack(features).mean()
        if config.attention:
            grid = (out.shape[2], out.shape[3])
            term = attention_kl(mine, maps, self.pairs, self.student, grid, config.temperature)
            kd = kd + config.attention * term
        rows = [x.movedim(1, -1).flatten(0, -2) for x in (out, goal)]
        rows = [torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6) for x in rows]
        output = kd_loss(
            *rows, None, temperature=config.temperature, alpha=1.0, backend="reference"
        )[0]
        task = task_loss(self.heads, out, batch).total
        return (1 - alpha) * task + alpha * (kd + config.output * output)


def seeded_heads() -> OrionHeads:
    """Both heads in full size."""
    torch.manual_seed(1)
    return OrionHeads().requires_grad_(False).eval()


def ring(device: torch.device, step: int) -> Batch:
    """A frame of one car with six cameras: three directions, each twice."""
    made = drive.batch(step, streams=1)
    cameras = torch.cat((made.frame.lidar2img, made.frame.lidar2img), 1)
    return replace(made, frame=replace(made.frame, lidar2img=cameras)).to(device)


def one_camera(batch: Batch) -> Batch:
    """The same with the first camera alone."""
    return replace(batch, frame=replace(batch.frame, lidar2img=batch.frame.lidar2img[:, :1]))
