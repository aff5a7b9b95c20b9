# SPDX-License-Identifier: Apache-2.0
"""What torch's FlopCounterMode counts of the ops, and the planner of a whole training step."""

from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from kdfast import Window, attention_distill, linear_kd_loss, pruned_attention
from kdfast.memory import plan_step
from kdfast.memory.measure import checkpointed, supervised

B, H, N, D = 2, 4, 24, 16
ONE = 2 * B * N * N * D  # a product of queries and keys of one head


def counted(call: Callable[[], torch.Tensor]) -> tuple[int, int]:
    """Operations of the forward and of the backward."""
    with FlopCounterMode(display=False) as forward:
        out = call()
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def heads(count: int, dim: int = D) -> list[torch.Tensor]:
    return [torch.randn(B, count, N, dim, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_attention(backend: str) -> None:
    if backend == "fused":
        pytest.importorskip("kdfast._C")
    backward = {"fused": 5, "reference": 4}[backend]  # the fused one computes the scores again
    q, k, v = heads(H)
    got = counted(lambda: pruned_attention(q, k, v, backend=backend))
    assert got == (2 * H * ONE, backward * H * ONE)


def test_attention_of_kept_heads_in_windows() -> None:
    pytest.importorskip("kdfast._C")
    q, k, v = heads(H)
    window = Window((4, 6), 4)  # two windows: 4 x 4 and 4 x 2
    forward, backward = counted(lambda: pruned_attention(q, k, v, heads=[0, 2], window=window))
    pairs = 16**2 + 8**2
    assert forward == 2 * 2 * (2 * B * pairs * D) and backward == forward // 2 * 5


@pytest.mark.parametrize("kind", ["kl", "logit_mse"])
def test_attention_distill(kind: str) -> None:
    pytest.importorskip("kdfast._C")
    q, k, v = heads(2)
    teacher_q, teacher_k, _ = (x.detach() for x in heads(H, 2 * D))

    def call() -> torch.Tensor:
        out, loss = attention_distill(
            q, k, v, teacher_q, teacher_k, teacher_heads=[1, 3], kind=kind
        )
        return out.sum() + loss

    # Queries and keys of the teacher are twice as wide.
    assert counted(call) == (2 * (2 + 2) * ONE, 2 * (5 + 2) * ONE)


def test_logit_mse_by_gram_matrices() -> None:
    pytest.importorskip("kdfast._C")
    tokens, dim = 200, 8
    q, k, v = (torch.randn(1, 2, tokens, dim, requires_grad=True) for _ in range(3))
    other = [torch.randn(1, 2, tokens, dim) for _ in range(2)]
    with FlopCounterMode(display=False) as counter:
        sum(attention_distill(q, k, v, *other, kind="logit_mse"), q.new_zeros(())).sum().backward()
    own = counter.get_flop_counts()["Global"]
    rows = 2 * tokens
    assert own[torch.ops.kdfast.attention_logit_mse] == 12 * rows * dim**2
    assert own[torch.ops.kdfast.attention_logit_mse_bwd] == 8 * rows * dim**2


def test_linear_kd_loss() -> None:
    pytest.importorskip("kdfast._C")
    hidden = torch.randn(30, 8, requires_grad=True)
    weight = torch.randn(11, 8, requires_grad=True)
    logits, target = torch.randn(30, 11), torch.randint(11, (30,))
    forward, backward = counted(lambda: linear_kd_loss(hidden, weight, logits, target)[0])
    assert (forward, backward) == (3 * 2 * 30 * 11 * 8, 0)  # gradients come with the loss
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        linear_kd_loss(hidden, weight, logits, target)
    assert counter.get_total_flops() == 2 * 30 * 11 * 8


@pytest.mark.parametrize("recompute", [False, True])
def test_plan(recompute: bool) -> None:
    def vit() -> torch.nn.Module:
        return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=10)

    def count(training: bool) -> int:
        model = vit()
        for block in model.blocks:
            block.attn.fused_attn = False
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
            loss = F.cross_entropy(model(torch.randn(4, 3, 64, 64)), torch.zeros(4).long())
            if training:
                loss.backward()
        return counter.get_total_flops()

    def build() -> object:
        return supervised(checkpointed(vit(), recompute), vit())

    plan = plan_step(build, 4, image_size=64, checkpointing=recompute)
    # The student forward and backward, the teacher forward, and the scores again.
    scores = 2 * 2 * 4 * 3 * 17**2 * 64
    want = count(True) + count(False) + scores
    if recompute:  # the blocks again, but for the last product of each, which nobody needs
        want += count(False) - 2 * 4 * (16 * 192 * 768 + 192 * 10) - 2 * (2 * 4 * 17 * 768 * 192)
    assert plan.flops == want
