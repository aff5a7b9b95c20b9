# SPDX-License-Identifier: Apache-2.0
"""What a distillation compares: pairs, heads, terms and the reasons against them."""

from collections.abc import Sequence
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import kdfast
from kdfast.configs import ConfigError
from kdfast.configs.distil import DistilConfig, distil_config
from kdfast.distillation.objective import Objective, unreached
from kdfast.distillation.terms import Terms, find_terms
from kdfast.matching.capture import Capture, readers
from kdfast.matching.map_distance import turned
from kdfast.models.prepared import PreparedModel
from kdfast.nn.heads import AttentionCall

SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3}
UNEVEN = [[0, 2], [1], []]


def noisy(net: Any) -> Any:
    """Weights of which maps are not flat and no bias is zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.add_(noise * (0.2 if p.dim() > 1 else 0.05))
    return net.eval()


def vit(name: str = "vit_tiny_patch16_224", **more: Any) -> Any:
    torch.manual_seed(0)
    options = {**SIZES, "num_heads": 3, "num_classes": 5, **more}
    return noisy(timm.create_model(name, **options))


def torchvision_vit() -> Any:
    torch.manual_seed(0)
    sizes = {"num_layers": 3, "num_heads": 3, "hidden_dim": 48, "mlp_dim": 96, "num_classes": 5}
    return noisy(torchvision.models.VisionTransformer(32, 8, **sizes))  # type: ignore[arg-type]


def hugging_face(kind: str) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        **{"image_size": 32, "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 3},
        **{"num_attention_heads": 3, "intermediate_size": 96, "num_labels": 5},
    }
    if kind == "vit":
        return noisy(transformers.ViTForImageClassification(transformers.ViTConfig(**sizes)))
    if kind == "dinov3":
        return noisy(transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**sizes)))
    return noisy(transformers.Dinov2Model(transformers.Dinov2Config(**sizes)))


def models(name: str) -> Any:
    if name in ("vit", "dinov2", "dinov3"):
        return hugging_face(name)
    return torchvision_vit() if name == "torchvision" else vit(name)


# Of every library, and with rotary tables, relative positions and norms of queries.
NAMES = (
    *("vit_tiny_patch16_224", "vit_small_patch16_rope_224", "beit_base_patch16_224"),
    *("torchvision", "vit", "dinov2", "dinov3"),
)


def terms_of(student: nn.Module, teacher: nn.Module, **options: Any) -> Terms:
    pair = (PreparedModel(student), PreparedModel(teacher))
    return find_terms(*pair, distil_config(options), (32, 32))


def objective_of(student: nn.Module, teacher: nn.Module, **options: Any) -> Objective:
    config = distil_config(options)
    pair = (PreparedModel(student), PreparedModel(teacher))
    return Objective(*pair, find_terms(*pair, config, (32, 32)), config)


def probabilities(call: AttentionCall) -> Tensor:
    """(B, H, N, N), written out."""
    call = turned(call)
    scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
    scores = call.q @ call.k.transpose(-1, -2) * scale
    return (scores if call.bias is None else scores + call.bias).softmax(-1)


def divergence(student: nn.Module, teacher: nn.Module, images: Tensor, kept: Any) -> Tensor:
    """Mean over blocks of KL(teacher's map || student's map) of the kept heads, by whole maps."""
    names = [n for n, reader in readers(teacher).items() if not isinstance(reader, str)]
    mine = [n for n, reader in readers(student).items() if not isinstance(reader, str)]
    with Capture(teacher, names, [], rows={}) as theirs, torch.no_grad():
        teacher(images)
    with Capture(student, mine, [], rows={}) as own:
        student(images)
    losses = []
    for name, heads in zip(names, kept, strict=True):
        if heads:
            p = probabilities(own.call(name))
            r = probabilities(theirs.call(name))[:, heads]
            losses.append((r * (r.log() - p.log())).sum(-1).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("accelerated", [False, True])
def test_heads_meet_those_that_they_were(name: str, accelerated: bool) -> None:
    teacher = models(name)
    student = noisy(kdfast.prune_heads(teacher, UNEVEN))
    if accelerated:
        kdfast.accelerate(teacher)
        kdfast.accelerate(student)
    objective = objective_of(student, teacher)
    assert objective.terms.cut
    assert [pair.heads for pair in objective.terms.maps] == UNEVEN[:2]
    assert len(objective.terms.blocks) == 3 and not objective.terms.left_out
    images = torch.rand(2, 3, 32, 32)
    losses = objective(images, None, 0)
    prepared = objective.student.prepared(images)
    want = divergence(student, teacher, prepared, UNEVEN)
    torch.testing.assert_close(losses["attention"], want, rtol=1e-3, atol=1e-6)
    assert want > 1e-5


def test_a_pruned_teacher_and_a_student_cut_from_it() -> None:
    teacher = kdfast.prune_heads(vit(num_heads=6), [[1, 2, 5], [0, 4], [3, 5]])
    # Positions among the heads that the teacher still has: its original 2 and 5, 4, and 3.
    student = noisy(kdfast.prune_heads(teacher, [[1, 2], [1], [0]]))
    assert [reader.heads for reader in readers(student).values()] == [[2, 5], [4], [3]]  # type: ignore[union-attr]
    objective = objective_of(student, teacher)
    assert [pair.heads for pair in objective.terms.maps] == [[1, 2], [1], [0]]
    images = torch.rand(2, 3, 32, 32)
    got = objective(images, None, 0)["attention"]
    want = divergence(student, teacher, objective.student.prepared(images), [[1, 2], [1], [0]])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


def test_removed_blocks_are_compared_by_what_leaves_them() -> None:
    teacher = vit()
    student = kdfast.prune_heads(teacher, UNEVEN, mlp=[[0, 1], [2], []])
    assert kdfast.drop_blocks(student).dropped == ["blocks.2"]
    terms = terms_of(student, teacher)
    assert terms.cut and len(terms.maps) == 2
    assert [pair.student.module for pair in terms.blocks] == [f"blocks.{i}" for i in range(3)]
    losses = objective_of(student, teacher)(torch.rand(2, 3, 32, 32), None, 0)
    losses["total"].backward()
    assert student.blocks[2].bias.grad is not None


def test_a_copy_of_the_teacher_has_nothing_to_learn() -> None:
    losses = objective_of(vit(), vit())(torch.rand(2, 3, 32, 32), None, 0)
    for name in ("total", "logits", "feature", "attention"):
        assert losses[name].item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "torchvision", "vit", "dinov2"])
def test_gradients_reach_the_student_alone(name: str) -> None:
    teacher = models(name)
    student = noisy(kdfast.prune_heads(teacher, UNEVEN))
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    objective = objective_of(student, teacher)
    free = set(unreached(objective, (32, 32)))
    assert all(p.grad is None for p in student.parameters())
    objective.train()
    assert student.training and not teacher.training
    objective(torch.rand(2, 3, 32, 32), None, 0)["total"].backward()
    without = {n for n, p in student.named_parameters() if p.grad is None}
    assert without == free and len(without) < 3
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())
    assert not any(key.startswith("_teacher") for key in objective.state_dict())


def test_total_is_the_weighted_sum() -> None:
    teacher = vit()
    student = noisy(kdfast.prune_heads(teacher, UNEVEN))
    images, labels = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    weights = {"logits": 2.0, "feature": 0.3, "attention": 0.7}
    losses = objective_of(student, teacher, **weights)(images, None, 0)
    want = sum(weight * losses[name] for name, weight in weights.items())
    torch.testing.assert_close(losses["total"], want)
    objective = objective_of(student, teacher, labels=True, alpha=0.6, **weights)
    losses = objective(images, labels, 0)
    made = objective.student(images)
    torch.testing.assert_close(losses["task"], nn.functional.cross_entropy(made, labels).detach())
    want = sum(0.6 * weight * losses[name] for name, weight in weights.items())
    torch.testing.assert_close(losses["total"], want + 0.4 * losses["task"])
    losses = objective_of(student, teacher, labels=True, logits=0.0, feature=0.0, attention=0.0)(
        images, labels, 0
    )
    torch.testing.assert_close(losses["total"], 0.3 * losses["task"])


def test_embeddings_of_classes_and_of_tokens() -> None:
    teacher = vit(num_classes=0)
    student = noisy(kdfast.prune_heads(teacher, UNEVEN))
    objective = objective_of(student, teacher)
    assert "logits" not in objective.terms.weights and objective.terms.classes is None
    images = torch.rand(2, 3, 32, 32)
    made, goal = (model(images) for model in (objective.student, objective.teacher))
    want = 1 - nn.functional.cosine_similarity(made, goal).mean()
    torch.testing.assert_close(objective(images, None, 0)["embedding"], want.detach())
    tokens = hugging_face("dinov2")
    objective = objective_of(noisy(kdfast.prune_heads(tokens, UNEVEN)), tokens)
    made, goal = (m(images).last_hidden_state for m in (objective.student, objective.teacher))
    want = 1 - nn.functional.cosine_similarity(made, goal, dim=-1).mean()
    torch.testing.assert_close(objective(images, None, 0)["embedding"], want.detach())


def test_windows_meet_windows() -> None:
    sizes = {"img_size": 64, "depths": (2, 1), "embed_dim": 16, "num_heads": (2, 4)}
    torch.manual_seed(0)
    teacher = noisy(
        timm.create_model("swin_tiny_patch4_window7_224", window_size=4, num_classes=5, **sizes)
    )
    student = kdfast.prune_heads(teacher, [[0], [1], [0, 2]])
    pair = (PreparedModel(student), PreparedModel(teacher))
    terms = find_terms(*pair, DistilConfig(), (64, 64))
    assert terms.cut and [p.heads for p in terms.maps] == [[0], [1], [0, 2]]
    assert [p.student.width for p in terms.blocks] == [16, 16, 32]
    losses = Objective(*pair, terms, DistilConfig())(torch.rand(2, 3, 64, 64), None, 0)
    assert all(value.isfinite() for value in losses.values())


RELATED = {"embed_dim": 24, "num_heads": 2, "depth": 2}


def test_related_models_meet_by_groups_or_relations() -> None:
    teacher, student = vit(), vit(**RELATED)
    terms = terms_of(student, teacher)
    assert not terms.cut and terms.why_not_cut == "2 blocks and 3"
    assert [(p.student, p.teacher, p.heads) for p in terms.maps] == [
        ("blocks.0.attn", "blocks.1.attn", None),
        ("blocks.1.attn", "blocks.2.attn", None),
    ]
    assert terms.left_out == {
        "feature": "blocks.0 of the student gives 17 tokens of 24 channels, blocks.1 of the "
        "teacher 17 of 48"
    }
    assert len(terms_of(student, teacher, layers="last").maps) == 1
    objective = objective_of(student, teacher, relation_heads=4)
    losses = objective(torch.rand(2, 3, 32, 32), None, 0)
    losses["total"].backward()
    assert losses["attention"] > 0 and student.blocks[0].attn.qkv.weight.grad is not None


def test_models_of_two_libraries() -> None:
    terms = terms_of(hugging_face("vit"), vit(num_heads=6))
    assert (
        not terms.cut and terms.why_not_cut == "a ViTForImageClassification and a VisionTransformer"
    )
    assert set(terms.weights) == {"logits", "feature", "attention"}
    assert [pair.teacher.module for pair in terms.blocks] == [f"blocks.{i}" for i in range(3)]


def test_models_of_one_size_that_were_not_cut() -> None:
    assert terms_of(vit(), vit(num_heads=4)).why_not_cut == (
        "heads of blocks.0.attn are 16 and 12 channels wide"
    )
    wide = kdfast.prune_heads(vit(), [[0], [1], [2]])
    narrow = kdfast.prune_heads(vit(), [[0], [0], [2]])
    assert terms_of(narrow, wide).why_not_cut == "the teacher's blocks.1.attn has no heads [0]"
    assert terms_of(vit(embed_dim=24, num_heads=3), vit()).why_not_cut == (
        "blocks.0 is 24 and 48 channels wide"
    )


def refused(student: nn.Module, teacher: nn.Module, **options: Any) -> Sequence[str]:
    with pytest.raises(ConfigError) as error:
        terms_of(student, teacher, **options)
    return error.value.problems


def test_terms_that_were_asked_for_are_errors() -> None:
    student, teacher = vit(**RELATED), vit()
    (line,) = refused(student, teacher, feature=1.0)
    assert line.startswith("feature: cannot be formed: blocks.0 of the student gives 17 tokens")
    (line,) = refused(student, teacher, embedding=1.0)
    assert line == "embedding: cannot be formed: both models return logits"
    (line,) = refused(vit(num_classes=7), teacher, logits=1.0)
    assert line == "logits: cannot be formed: the student has 7 classes, the teacher 5 classes"
    (line,) = refused(vit(num_classes=0), teacher, labels=True)
    assert line.startswith("labels: need a student with a classifier")
    (line,) = refused(vit(), teacher, relation_heads=2)
    assert line.startswith("relation_heads: the student was cut from the teacher")
    (line,) = refused(student, teacher, relation_heads=5, attention=1.0)
    assert "relation_heads must divide the width 24 of blocks.0.attn, got 5" in line
    many = vit(img_size=32, patch_size=4)
    (line,) = refused(vit(), many, attention=0.1)
    assert "blocks.0.attn of the student attends among 17 tokens" in line


def test_classes_of_models_that_do_not_state_their_number() -> None:
    resnet = torchvision.models.resnet18(num_classes=5).eval()
    terms = terms_of(resnet, vit(), labels=True)
    assert terms.classes == 5 and "logits" in terms.weights
    resnet.fc = nn.Identity()  # type: ignore[assignment]
    assert terms_of(resnet, resnet).classes is None


def test_terms_that_nobody_asked_for_are_left_out_with_their_reason() -> None:
    assert terms_of(vit(num_classes=7), vit()).left_out == {
        "logits": "the student has 7 classes, the teacher 5 classes"
    }
    resnet = timm.create_model("resnet18", num_classes=5).eval()
    left = terms_of(vit(), resnet).left_out
    assert "resnet18 must have attention maps that can be read" in left["attention"]
    assert "feature" in left
    plain = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5))
    lines = refused(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)), plain)
    assert lines[0].startswith("models: must have something to compare, got none (")


def test_options_are_checked_together() -> None:
    with pytest.raises(ConfigError) as error:
        distil_config({"epoch": 3, "lr": -1, "layers": "some", "precision": "fp16"})
    assert error.value.problems[0] == "epoch: unknown key; did you mean epochs?"
    assert len(error.value.problems) == 3
    with pytest.raises(ConfigError, match="must not all be 0"):
        distil_config(dict.fromkeys(("logits", "embedding", "feature", "attention"), 0))


def test_kinship_is_told_by_weights_and_else_by_structure() -> None:
    teacher = vit("vit_tiny_patch16_224")
    student = kdfast.prune_heads(teacher, [[0, 2], [1], [0]][: len(teacher.blocks)])
    terms = terms_of(student, teacher)
    same, whole = terms.untouched
    assert same == whole > 4
    assert f"cut from the teacher ({same} of {whole} whole weights are still" in terms.kinship
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter))
    terms = terms_of(student, teacher)
    assert terms.cut and terms.untouched == (0, whole)
    assert "(by its structure; no weight is the teacher's any more)" in terms.kinship
    other = terms_of(vit("vit_small_patch16_rope_224"), teacher)
    assert other.untouched == (0, 0)
    assert other.kinship.startswith("the student was not cut from the teacher: ")
