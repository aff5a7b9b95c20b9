# SPDX-License-Identifier: Apache-2.0
"""The distillation objective against explicit formulas in double precision."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast.configs.recovery import DistillConfig
from kdfast.models.dense_head import DenseHead
from kdfast.models.eva import EVAViT
from kdfast.pruning import prune_heads
from kdfast.recovery.objective import Distiller, alpha_at, feature_layers, paired_heads

CLASSES = 5
KEPT = [[0, 3], [1, 2], [0, 1], [2, 3]]


def tiny(**overrides: object) -> EVAViT:
    """4 x 4 tokens, windows of 3 (so with pads) in blocks 0 and 2, global blocks 1 and 3."""
    arguments: dict[str, object] = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 4,
        "num_heads": 4,
        "window_size": 3,
        "window_block_indexes": [0, 2],
        "pretrain_img_size": 32,
        "with_cp": False,
        **overrides,
    }
    model = EVAViT(**arguments)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Larger than the initial values, so that attention is not uniform.
            std = 0.3 if parameter.ndim > 1 else 0.1
            parameter.add_(torch.randn_like(parameter) * std)
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(2)
    return model


@pytest.fixture
def models() -> tuple[EVAViT, EVAViT, DenseHead]:
    """Student, teacher and head in fp64."""
    teacher = tiny().double()
    student = prune_heads(teacher, KEPT)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return student, teacher, DenseHead(32, 8, CLASSES, 8).double()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Images (2, 3, 32, 32) and labels (2, 32, 32), some of them unknown."""
    labels = torch.randint(0, CLASSES, (2, 32, 32))
    labels[0, :5] = -100
    return torch.randn(2, 3, 32, 32, dtype=torch.float64), labels


@pytest.mark.parametrize(
    ("warmup", "expected"),
    [(1, [0.8, 0.6, 0.6]), (2, [0.8, 0.8, 0.6]), (0, [0.6, 0.6, 0.6])],
)
def test_alpha(warmup: int, expected: list[float]) -> None:
    config = DistillConfig(warmup_epochs=warmup)
    assert [alpha_at(epoch, config) for epoch in range(3)] == expected


def attention_maps(model: EVAViT, qk: tuple[Tensor, Tensor], block: int) -> Iterator[Tensor]:
    """Scaled scores (B, H, n, n + pads) of every window, written out from ORION's definition."""
    q, k = qk
    size = model.blocks[block].attn.window_size or 4
    rope = model.rope((size, size), q)

    def rotate(x: Tensor, index: Tensor) -> Tensor:
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = torch.stack((-odd, even), -1).flatten(-2)
        return x * rope.cos[index] + turned * rope.sin[index]

    for top in range(0, 4, size):
        for left in range(0, 4, size):
            cells = [(y, x) for y in range(top, top + size) for x in range(left, left + size)]
            real = [(y, x) for y, x in cells if y < 4 and x < 4]
            token = torch.tensor([4 * y + x for y, x in real])
            place = torch.tensor([(y - top) * size + x - left for y, x in real])
            scores = rotate(q[:, :, token], place) @ rotate(k[:, :, token], place).transpose(2, 3)
            yield F.pad(scores * q.shape[-1] ** -0.5, (0, len(cells) - len(real)))


def attention_oracle(student: EVAViT, teacher: EVAViT, images: Tensor, t: float) -> Tensor:
    ours, theirs = student.trace(images, qk=True).qk, teacher.trace(images, qk=True).qk
    blocks = []
    for i, kept in enumerate(KEPT):
        pair, goal = ours[i], theirs[i]
        assert pair is not None and goal is not None
        goal = (goal[0][:, kept], goal[1][:, kept])
        divergences = [
            F.kl_div(
                (a / t).log_softmax(-1), (b / t).log_softmax(-1), log_target=True, reduction="none"
            )
            .sum(-1)
            .flatten()
            for a, b in zip(
                attention_maps(student, pair, i), attention_maps(teacher, goal, i), strict=True
            )
        ]
        # Every real query of every window counts once.
        per_query = torch.cat(divergences)
        assert per_query.numel() == 2 * 2 * 16
        blocks.append(per_query.mean())
    return t**2 * torch.stack(blocks).mean()


def feature_oracle(student: EVAViT, teacher: EVAViT, images: Tensor) -> Tensor:
    a, b = (m.trace(images, features=[1]).features[1] for m in (student, teacher))

    def norm(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (
            x.var(-1, correction=0, keepdim=True) + 1e-6
        ).sqrt()

    return (norm(a) - norm(b)).square().mean()


def kl_oracle(student: Tensor, teacher: Tensor, t: float) -> Tensor:
    """Mean over rows of T^2 KL(teacher || student)."""
    p = (teacher / t).softmax(-1)
    return t**2 * (p * (p.log() - (student / t).log_softmax(-1))).sum(-1).mean()


@pytest.mark.parametrize("epoch", [0, 1])
def test_total_is_the_documented_sum(
    epoch: int, models: tuple[EVAViT, EVAViT, DenseHead], batch: tuple[Tensor, Tensor]
) -> None:
    """Values and gradients of (1 - a) task + a (0.5 f + 0.3 att + 0.2 out), head included."""
    student, teacher, head = models
    images, labels = batch
    losses = Distiller(student, teacher, head, DistillConfig())(images, labels, epoch)
    losses["total"].backward()
    got = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()

    logits = head(student(images)).movedim(1, -1).flatten(0, -2)
    goal = head(teacher(images)).movedim(1, -1).flatten(0, -2).detach()
    task = F.cross_entropy(logits, labels.flatten(), ignore_index=-100)
    terms = {
        "feature": feature_oracle(student, teacher, images),
        "attention": attention_oracle(student, teacher, images, 3.0),
        "output": kl_oracle(logits, goal, 3.0),
        "task": task,
    }
    alpha = (0.8, 0.6)[epoch]
    kd = 0.5 * terms["feature"] + 0.3 * terms["attention"] + 0.2 * terms["output"]
    total = (1 - alpha) * task + alpha * kd
    total.backward()
    for name, value in {**terms, "kd": kd, "total": total}.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-9, atol=1e-12)
    assert losses["alpha"].item() == pytest.approx(alpha)
    assert all(value.grad_fn is None for name, value in losses.items() if name != "total")
    assert set(got) == {name for name, _ in student.named_parameters()}
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-7, atol=1e-10)


def test_headless_total(
    models: tuple[EVAViT, EVAViT, DenseHead], batch: tuple[Tensor, Tensor]
) -> None:
    """Without labels and head: alpha times distillation, the output term on the final map."""
    student, teacher, _ = models
    images, _ = batch
    losses = Distiller(student, teacher, None, DistillConfig())(images, None, 0)
    a, b = (m(images).movedim(1, -1).flatten(0, -2) for m in (student, teacher))
    a, b = (
        (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        for x in (a, b)
    )
    torch.testing.assert_close(losses["output"], kl_oracle(a, b, 3.0), rtol=1e-9, atol=1e-12)
    assert "task" not in losses
    torch.testing.assert_close(losses["total"], 0.8 * losses["kd"])


@pytest.mark.parametrize("kind", ["kl", "mse", "cosine"])
@pytest.mark.parametrize("labelled", [True, False], ids=["head", "headless"])
def test_equal_models_have_no_loss(labelled: bool, kind: str, batch: tuple[Tensor, Tensor]) -> None:
    # In double precision, so that zero is told from rounding.
    teacher = tiny().double()
    student = prune_heads(teacher, [[0, 1, 2, 3]] * 4)
    head = DenseHead(32, 8, CLASSES, 8).double() if labelled else None
    config = DistillConfig(attention_kind=kind)  # type: ignore[arg-type]
    losses = Distiller(student, teacher, head, config)(batch[0], None, 0)
    losses["total"].backward()
    for name in ("feature", "attention", "output", "kd", "total"):
        assert abs(losses[name].item()) < 1e-14, name
    # An unequal teacher gives gradients around 0.1.
    largest = max(p.grad.abs().max().item() for p in student.parameters() if p.grad is not None)
    assert largest < 1e-12


def test_teacher_and_head_stay_outside(
    models: tuple[EVAViT, EVAViT, DenseHead], batch: tuple[Tensor, Tensor]
) -> None:
    student, teacher, head = models
    teacher.train()
    distiller = Distiller(student, teacher, head, DistillConfig())
    assert {name.split(".")[0] for name in distiller.state_dict()} == {"student"}
    assert sum(p.numel() for p in distiller.parameters()) == sum(
        p.numel() for p in student.parameters()
    )
    assert not any(m is teacher or m is head for m in distiller.modules())
    before = {n: p.clone() for m in (teacher, head) for n, p in m.state_dict().items()}
    distiller.train()
    assert student.training and not teacher.training and not head.training
    distiller(*batch, 0)["total"].backward()
    for frozen in (teacher, head):
        assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())
        assert all(torch.equal(p, before[n]) for n, p in frozen.state_dict().items())


def test_both_see_the_same_tensor(
    models: tuple[EVAViT, EVAViT, DenseHead],
    batch: tuple[Tensor, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student, teacher, head = models
    seen: list[tuple[EVAViT, Tensor, bool]] = []
    trace = EVAViT.trace

    def spy(self: EVAViT, x: Tensor, **options: object) -> object:
        seen.append((self, x, torch.is_grad_enabled()))
        return trace(self, x, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(EVAViT, "trace", spy)
    Distiller(student, teacher, head, DistillConfig())(*batch, 0)
    assert [entry[0] for entry in seen] == [teacher, student]
    assert seen[0][1] is seen[1][1] is batch[0]
    assert [entry[2] for entry in seen] == [False, True]


def test_terms_can_be_switched_off(
    models: tuple[EVAViT, EVAViT, DenseHead], batch: tuple[Tensor, Tensor]
) -> None:
    config = replace(DistillConfig(), feature=0.0, attention=0.0, output=1.0)
    losses = Distiller(*models, config)(*batch, 1)
    assert losses["feature"].item() == losses["attention"].item() == 0
    expected = 0.4 * losses["task"] + 0.6 * losses["output"]
    torch.testing.assert_close(losses["total"].detach(), expected)


def test_feature_layers() -> None:
    model = tiny()
    assert feature_layers(model, "global") == [1]
    assert feature_layers(model, "all") == [0, 1, 2]
    assert feature_layers(model, [2, 0]) == [2, 0]
    for bad in ([3], [0, 0], [-1]):
        with pytest.raises(ValueError, match=r"must be different blocks of \[0, 3\)"):
            feature_layers(model, bad)
    with pytest.raises(ValueError, match="must leave a block before the last one"):
        feature_layers(tiny(depth=2, window_block_indexes=[0]), "global")


def test_paired_heads_of_a_pruned_teacher() -> None:
    teacher = prune_heads(tiny(), [[0, 2, 3]] * 4)
    student = prune_heads(teacher, [[0, 2]] * 4)
    assert student.heads == [[0, 3]] * 4
    assert paired_heads(student, teacher) == [[0, 2]] * 4


def test_labels_without_a_head_have_no_use(
    models: tuple[EVAViT, EVAViT, DenseHead], batch: tuple[Tensor, Tensor]
) -> None:
    student, teacher, _ = models
    distiller = Distiller(student, teacher, None, DistillConfig())
    with_labels, without = distiller(*batch, 0), distiller(batch[0], None, 0)
    assert "task" not in with_labels and torch.equal(with_labels["total"], without["total"])


def test_rejects(models: tuple[EVAViT, EVAViT, DenseHead]) -> None:
    student, teacher, head = models
    other = prune_heads(tiny().double(), [[1]] * 4)
    with pytest.raises(ValueError, match=r"must be among the teacher's, got \[1\] in block 0"):
        Distiller(other, prune_heads(teacher, [[0]] * 4), None, DistillConfig())
    with pytest.raises(ValueError, match="must have the teacher's 4 blocks, got 2"):
        Distiller(tiny(depth=2, window_block_indexes=[0]), teacher, head, DistillConfig())


def test_dense_head_shape_and_error() -> None:
    head: nn.Module = DenseHead(32, 8, CLASSES, 8)
    assert head(torch.randn(2, 32, 3, 4)).shape == (2, CLASSES, 24, 32)
    with pytest.raises(ValueError, match="patch_size must be even, got 7"):
        DenseHead(32, 8, CLASSES, 7)
