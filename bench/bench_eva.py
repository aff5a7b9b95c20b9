# SPDX-License-Identifier: Apache-2.0
"""ORION's EVA-ViT at 640 x 640: the student's forward and a distillation step with attention KL.

Three blocks (window, window, global: an eighth of the 24), one image. "eager" is bench.orion_eager,
what public ORION code computes: padded windows, rotation by tensor ops, maps in memory. The student
has 8 of the 16 heads.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import session
from bench.compare import Compare
from bench.orion_eager import forward as eager_forward
from kdfast.models import AttentionTarget, EVAViT, eva_vit_l_orion
from kdfast.testing import DRY_RUN

DEPTH, KEPT = 3, list(range(0, 16, 2))
DTYPES = [torch.float32, torch.bfloat16]
pytestmark = pytest.mark.skipif(DRY_RUN, reason="a model takes minutes in Triton's interpreter")


def models(device: torch.device, dtype: torch.dtype) -> tuple[EVAViT, EVAViT, Tensor]:
    """Teacher, student with half of the heads, and an image."""
    plain = {"depth": DEPTH, "drop_path_rate": 0.0, "with_cp": False}
    teacher = eva_vit_l_orion(**plain).to(device, dtype).eval().requires_grad_(False)
    student = eva_vit_l_orion(**plain, heads=KEPT).to(device, dtype)
    return teacher, student, torch.randn(1, 3, 640, 640).to(device, dtype)


@pytest.mark.candidates("kdfast", "kdfast, 16 heads", "eager")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def bench_forward(compare: Compare, dtype: torch.dtype) -> None:
    teacher, student, image = models(compare.device, dtype)
    with torch.no_grad():
        for model in (teacher, student):
            want, got = eager_forward(model, image)[0], model(image)
            error = (got.double() - want.double()).norm() / want.double().norm()
            assert error < (3e-2 if dtype == torch.bfloat16 else 1e-4), f"{error:.2e}"

    calls = {
        "kdfast": session.inference(lambda: student(image)),
        "eager": session.inference(lambda: eager_forward(teacher, image)),
    }
    case = f"fwd 3 of 24 blocks, 8 heads, eager: 16 {dtype}"
    yardsticks = {"kdfast, 16 heads": session.inference(lambda: teacher(image))}
    compare("EVA-ViT-L", case, calls, yardsticks=yardsticks)


@pytest.mark.candidates("kdfast", "eager")
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)  # a round in fp32 takes ten seconds
def bench_distillation(compare: Compare, dtype: torch.dtype) -> None:
    """Teacher forward, student forward and backward: MSE of the output, KL of every block's maps.

    The KL of kdfast leaves the padded queries out, which ORION crops; eager compares them too.
    """
    teacher, student, image = models(compare.device, dtype)
    parameters = list(student.parameters())

    def fused() -> object:
        with torch.no_grad():
            goal = teacher.trace(image, qk=True)
        target = AttentionTarget(goal.qk, [KEPT] * DEPTH)
        trace = student.trace(image, target=target)
        loss = F.mse_loss(trace.output, goal.output) + sum(trace.attention_losses.values())
        return torch.autograd.grad(loss, parameters)

    def eager() -> object:
        with torch.no_grad():
            goal, goal_maps = eager_forward(teacher, image)
        out, maps = eager_forward(student, image)
        loss = F.mse_loss(out, goal)
        for log_map, other in zip(maps, goal_maps, strict=True):
            other = other[:, KEPT]
            kl = F.kl_div(log_map.float(), other.float(), log_target=True, reduction="none")
            loss = loss + kl.sum(-1).mean()
        return torch.autograd.grad(loss, parameters)

    case = f"distillation step, 3 of 24 blocks {dtype}"
    calls = {"kdfast": fused, "eager": eager}
    compare("EVA-ViT-L", case, calls, memory=True)
