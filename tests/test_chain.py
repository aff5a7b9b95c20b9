# SPDX-License-Identifier: Apache-2.0
"""Parts of the chain against literals and independent oracles."""

import argparse
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from sklearn import metrics as sk
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import Tensor

from kdfast.chain.compare import compare, gain
from kdfast.chain.links import Link, LinkModel, build_link, facts, links_of, load_teacher
from kdfast.chain.metrics import Meter
from kdfast.chain.objective import Objective, distill_loss, scheduled_alpha, task_loss
from kdfast.configs import ConfigError, load
from kdfast.configs.chain import ChainConfig, ChainDistillConfig, roles
from kdfast.configs.load import save
from kdfast.machine.memory import is_out_of_memory, peak_mib, reset_peak
from kdfast.matching.capture import Capture, attention_layers
from kdfast.matching.layers import paired_layers
from kdfast.matching.map_distance import head_groups, relation_heads
from kdfast.sources import load_model
from kdfast.trainer.class_feed import class_feed, even_part
from kdfast.trainer.commits import save_checkpoint
from kdfast.trainer.feed import Feed

VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


def link(**changes: Any) -> Link:
    base = Link(0, "teacher", "vit_tiny_patch16_224", VIT, "scratch", 1, False)
    return replace(base, **changes)


def problems(source: str, *changes: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(source, changes)
    return caught.value.problems


def chain(*changes: str) -> ChainConfig:
    config = load("vit_chain_digits", changes)
    assert isinstance(config, ChainConfig)
    return config


def test_defaults_of_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/cifar10").mkdir(parents=True)
    config = load("vit_chain")
    assert isinstance(config, ChainConfig)
    assert config.chain == tuple(f"vit_{x}_patch16_224" for x in ("base", "small", "tiny"))
    assert config.batch == (8, 16, 32) and config.epochs == 100 and config.seeds == (42,)
    assert (config.optim.lr, config.optim.weight_decay) == (3e-4, 0.05)
    assert (config.distill.temperature, config.distill.alpha) == (4.0, 0.7)
    assert config.data.workers == 2 and config.data.size == 224 and config.note == ""
    cnn = load("cnn_chain")
    assert isinstance(cnn, ChainConfig)
    assert cnn.chain == ("resnet50", "resnet34", "resnet18")


def test_embedded_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load("vit_chain")
    assert isinstance(config, ChainConfig)
    assert config.name == "vit_chain_digits" and config.data.kind == "digits" and config.twin
    assert "no data/cifar10, so this is vit_chain_digits" in config.note
    # Whoever names data gets no stand-in.
    named = load("vit_chain", ["data.root=elsewhere"])
    assert named.name == "vit_chain"


def test_roles_and_links() -> None:
    assert roles(1) == ["teacher"]
    assert roles(2) == ["teacher", "student"]
    assert roles(3) == ["teacher", "assistant", "student"]
    assert roles(4) == ["teacher", "assistant1", "assistant2", "student"]
    links = links_of(chain("init=[pretrained, scratch, scratch]", "epochs=[3, 2, 2]"))
    assert [x.folder for x in links] == ["imagenet_pretrained", "from_scratch", "from_scratch"]
    assert [(x.epochs, x.distilled) for x in links] == [(3, False), (2, True), (2, True)]


def test_one_value_for_all_links(tmp_path: Path) -> None:
    one = chain("model_args={depth: 2}", "batch=8")
    assert [link.args for link in links_of(one)] == [{"depth": 2}] * 3
    save(one, tmp_path / "config.yaml")
    assert load(str(tmp_path / "config.yaml")) == one
    (tmp_path / "mine.yaml").write_text(
        "name: vit_chain_digits\nmodel_args: {depth: 2}\nbatch: 8\n"
    )
    mine = load(str(tmp_path / "mine.yaml"))
    assert isinstance(mine, ChainConfig) and links_of(mine) == links_of(one)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (["stage=pupil"], "stage: must be one of all, teacher, assistant, student, got 'pupil'"),
        (["epochs=[3, 3]"], "epochs: must have one entry, or one for each of the 3 links, got 2"),
        (["init=nowhere.pt"], "init: must be scratch or pretrained, or a file, got 'nowhere.pt'"),
        (["cache=true", "optim.mixup=0.2"], "cache: needs images that come again"),
        (["cache=true", "distill.attention=1"], "cache: holds the teacher's logits only"),
        (["optim.mixup=0.2", "batch=7"], "batch: must be even"),
        (["seeds=[1, 1]"], "seeds: must be different numbers"),
        (["model_args=[3]"], "model_args: must be keys and values such as {depth: 6}"),
        (["precision=fp16", "device=cpu"], "precision: fp16 needs a GPU"),
        (["optim.momentumm=1"], "optim.momentumm: unknown key; did you mean optim.momentum?"),
    ],
)
def test_rejects(changes: list[str], text: str) -> None:
    assert any(text in line for line in problems("vit_chain_digits", *changes))


def test_alpha_schedules() -> None:
    def values(schedule: Any, epochs: int) -> list[float]:
        config = ChainDistillConfig(alpha=0.9, alpha_end=0.5, schedule=schedule)
        return [scheduled_alpha(epoch, epochs, config) for epoch in range(epochs)]

    assert values("constant", 3) == [0.9, 0.9, 0.9]
    assert values("linear", 5) == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5])
    assert values("cosine", 3) == pytest.approx([0.9, 0.7, 0.5])
    assert values("cosine", 5)[1] == pytest.approx(0.5 + 0.2 * (1 + math.cos(math.pi / 4)))
    assert values("linear", 1) == [0.9]  # no division by zero


def test_distill_loss_of_classes() -> None:
    s, t, y = torch.randn(6, 5), torch.randn(6, 5), torch.randint(0, 5, (6,))
    loss, kd, ce = distill_loss(s, t, y, "multiclass", ChainDistillConfig(), 0.7)
    want = 16 * F.kl_div((s / 4).log_softmax(1), (t / 4).softmax(1), reduction="batchmean")
    torch.testing.assert_close(kd, want)
    torch.testing.assert_close(ce, F.cross_entropy(s, y))
    torch.testing.assert_close(loss, 0.7 * kd + 0.3 * ce)


def test_distill_loss_of_several_labels() -> None:
    s, t = torch.randn(6, 3).double(), torch.randn(6, 3).double()
    y = (torch.rand(6, 3) > 0.5).double()
    config = ChainDistillConfig(temperature=2.0)
    loss, kd, bce = distill_loss(s, t, y, "multilabel", config, 0.4)
    p, q = torch.sigmoid(t / 2), torch.sigmoid(s / 2)
    want = 4 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    torch.testing.assert_close(kd, want)
    torch.testing.assert_close(bce, F.binary_cross_entropy_with_logits(s, y))
    torch.testing.assert_close(loss, 0.4 * want + 0.6 * bce)
    torch.testing.assert_close(task_loss(s, y, "multilabel").double(), bce, rtol=1e-5, atol=1e-6)


def test_maps() -> None:
    assert head_groups(3, 6) == [0, 2, 4]
    assert head_groups(4, 4) == [0, 1, 2, 3]
    assert head_groups(4, 6) == [0, 1, 3, 4]
    assert paired_layers(3, 6, "all") == [(0, 1), (1, 3), (2, 5)]
    assert paired_layers(4, 6, "all") == [(0, 1), (1, 2), (2, 4), (3, 5)]
    assert paired_layers(3, 6, "last") == [(2, 5)]
    x = torch.arange(2 * 3 * 5 * 4.0).view(2, 3, 5, 4)
    y = relation_heads(x, 2, "student")
    assert y.shape == (2, 2, 5, 6)
    together = x.transpose(1, 2).reshape(2, 5, 12)
    assert torch.equal(y[:, 1], together[..., 6:])
    with pytest.raises(ValueError, match="must divide the width 12 of student, got 5"):
        relation_heads(x, 5, "student")


def models(student: dict[str, Any], teacher: dict[str, Any]) -> tuple[LinkModel, LinkModel]:
    a = build_link(link(args={**VIT, **student}), 4)
    b = build_link(link(args={**VIT, **teacher}), 4)
    return a, b.requires_grad_(False).eval()


def attention_maps(model: LinkModel, images: Tensor, layer: int, heads: int) -> Tensor:
    """Log of softmax(q k^T / sqrt(d)) of all heads together, split anew into ``heads``."""
    net: Any = model.net
    x = net.patch_embed((images - model.mean) / model.std)
    x = torch.cat([net.cls_token.expand(len(x), -1, -1), x], 1) + net.pos_embed
    for block in net.blocks[:layer]:
        x = block(x)
    block = net.blocks[layer]
    q, k, _ = block.attn.qkv(block.norm1(x)).chunk(3, -1)
    q, k = (z.unflatten(2, (heads, -1)).transpose(1, 2) for z in (q, k))
    return (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).log_softmax(-1)


@pytest.mark.parametrize("how", ["groups", "relation"])
def test_attention_term(how: Any) -> None:
    """Two heads of 12 against four of 6, and a teacher of twice the depth."""
    student, teacher = models({}, {"num_heads": 4, "depth": 4})
    config = ChainDistillConfig(
        alpha=0.5, attention=2.0, attention_map=how, relation_heads=3, layers="all"
    )
    objective = Objective(student, teacher, "multiclass", config, epochs=1, distilled=True)
    images, target = torch.rand(3, 3, 16, 16), torch.tensor([0, 1, 2])
    losses, _ = objective(images, target, 0)
    expected = []
    for mine, theirs in ((0, 1), (1, 3)):
        count = (2, 4) if how == "groups" else (3, 3)
        p = attention_maps(student, images, mine, count[0])
        r = attention_maps(teacher, images, theirs, count[1])
        r = r[:, [0, 2]] if how == "groups" else r
        expected.append((r.exp() * (r - p)).sum(-1).mean())
    torch.testing.assert_close(losses["attention"], sum(expected) / 2, rtol=1e-4, atol=1e-6)
    total = 0.5 * losses["kd"] + 0.5 * losses["task"] + 2 * losses["attention"]
    torch.testing.assert_close(losses["total"].detach(), total)
    losses["total"].backward()
    gradients = student.net.blocks[0].attn.qkv.weight.grad  # type: ignore[union-attr,index]
    assert gradients is not None and gradients.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())


def test_feature_term_projects_and_checkpoints() -> None:
    student, teacher = models({}, {"embed_dim": 48})
    config = ChainDistillConfig(feature=1.0, feature_normalize=None)
    objective = Objective(student, teacher, "multiclass", config, epochs=1, distilled=True)
    assert [(p.in_features, p.out_features) for p in objective.projections] == [(24, 48)] * 2  # type: ignore[union-attr]
    images, target = torch.rand(3, 3, 16, 16), torch.tensor([0, 1, 2])
    losses, _ = objective(images, target, 0)
    names = ["blocks.0", "blocks.1"]
    with Capture(student.net, [], names) as mine, Capture(teacher.net, [], names) as theirs:
        student(images), teacher(images)
    expected = [
        F.mse_loss(project(mine.features[name]), theirs.features[name])
        for project, name in zip(objective.projections, names, strict=True)
    ]
    torch.testing.assert_close(losses["feature"], torch.stack(expected).mean().detach())
    losses["total"].backward()
    plain_grad = student.net.blocks[0].mlp.fc1.weight.grad.clone()  # type: ignore[union-attr,index]
    student.zero_grad()
    student.net.set_grad_checkpointing(True)  # type: ignore[operator]
    objective(images, target, 0)[0]["total"].backward()
    again = student.net.blocks[0].mlp.fc1.weight.grad  # type: ignore[union-attr,index]
    assert torch.equal(plain_grad, again)


def test_terms_that_do_not_fit() -> None:
    net = timm.create_model("resnet18", channels=(8, 8, 8, 8), num_classes=4)
    with pytest.raises(ValueError, match="maps can be read, it has no attention"):
        attention_layers(net, "resnet18")
    cnn = LinkModel(net)
    student, _ = models({}, {})
    config = ChainDistillConfig(feature=1.0)
    with pytest.raises(ValueError, match=r"blocks.0 of vit_tiny_.* must have as many positions"):
        Objective(student, cnn.eval(), "multiclass", config, epochs=1, distilled=True)


def test_own_normalisation_and_size() -> None:
    """Models with other statistics and sizes see the same pictures, each as it was made for."""
    vit = LinkModel(timm.create_model("vit_tiny_patch16_224", **VIT, num_classes=4))
    cnn = LinkModel(timm.create_model("resnet18", num_classes=4))
    assert vit.mean.flatten().tolist() == [0.5, 0.5, 0.5] and vit.size == (16, 16)
    assert cnn.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert cnn.std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])
    assert cnn.size is None
    vit.eval()
    images = torch.rand(2, 3, 32, 32)
    small = F.interpolate(images, (16, 16), mode="bilinear", antialias=True)
    assert torch.equal(vit(images), vit.net((small - 0.5) / 0.5))
    assert set(vit.state_dict()) == {f"net.{name}" for name in vit.net.state_dict()}


@pytest.fixture
def data() -> Any:
    return SimpleNamespace(
        name="digits", task="multiclass", class_names=list("abcd"), facts={"content": "x1"}
    )


def test_teacher_checkpoint_is_verified(tmp_path: Path, data: Any) -> None:
    model = build_link(link(), 4)
    module = {f"student.{k}": v for k, v in model.state_dict().items()}
    path = save_checkpoint(tmp_path, {"meta": facts(link(), data), "module": module})
    loaded = load_teacher(path, link(init="pretrained"), data)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(loaded(images), model.eval()(images))
    with pytest.raises(ConfigError, match="must have model 'resnet18', got 'vit_tiny_patch16_224'"):
        load_teacher(path, link(model="resnet18"), data)
    with pytest.raises(ConfigError, match=r"must have args .*'depth': 9"):
        load_teacher(path, link(args={**VIT, "depth": 9}), data)
    data.class_names = list("abce")
    with pytest.raises(ConfigError, match="must have classes"):
        load_teacher(path, link(), data)
    data.class_names, data.facts = list("abcd"), {"content": "x2"}
    with pytest.raises(ConfigError, match="was trained on other images of digits"):
        load_teacher(path, link(), data)
    with pytest.raises(ConfigError, match=r"train it first: stage=teacher"):
        load_teacher(tmp_path / "best.pt", link(), data)
    # Averaged weights go before the others.
    ema = {k: v + 1 for k, v in model.state_dict().items()}
    data.facts = {"content": "x1"}
    path = save_checkpoint(tmp_path, {"meta": facts(link(), data), "module": module, "ema": ema})
    first = next(iter(load_teacher(path, link(), data).parameters()))
    assert torch.equal(first, next(iter(model.parameters())) + 1)


def test_local_checkpoint_as_start(tmp_path: Path) -> None:
    source = timm.create_model("vit_tiny_patch16_224", **VIT, num_classes=7)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    model = build_link(link(init=str(tmp_path / "w.pth")), 4)
    own = model.net.state_dict()
    assert torch.equal(own["blocks.1.mlp.fc1.weight"], source.blocks[1].mlp.fc1.weight)
    assert own["head.weight"].shape == (4, 24)
    with pytest.raises(ConfigError, match="does not fit vit_tiny_patch16_224"):
        build_link(link(args={**VIT, "depth": 1}, init=str(tmp_path / "w.pth")), 4)
    (tmp_path / "bad.pth").write_bytes(b"no")
    with pytest.raises(ConfigError, match="is no checkpoint"):
        build_link(link(init=str(tmp_path / "bad.pth")), 4)


@pytest.mark.parametrize("ema", [False, True])
def test_checkpoints_of_timms_trainer_as_start(tmp_path: Path, ema: bool) -> None:
    """They hold an argparse.Namespace, and perhaps averaged weights, which go first."""
    net = timm.create_model("vit_tiny_patch16_224", **VIT, num_classes=4)
    averaged = ModelEmaV3(net) if ema else None
    if averaged is not None:
        averaged.module.cls_token.data.add_(1)
    saver = CheckpointSaver(
        net,
        torch.optim.SGD(net.parameters(), lr=0.1),
        args=argparse.Namespace(model="vit_tiny_patch16_224", lr=0.1),
        model_ema=averaged,
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    saver.save_checkpoint(0, metric=0.5)
    path = str(tmp_path / "last.pth.tar")
    want = net.cls_token + (1 if ema else 0)
    assert torch.equal(build_link(link(init=path), 4).net.cls_token, want)  # type: ignore[arg-type]
    if not ema:
        whole = timm.create_model("vit_tiny_patch16_224", num_classes=4)
        torch.save(
            {"model": {f"_orig_mod.module.{k}": v for k, v in whole.state_dict().items()},
             "args": argparse.Namespace()},
            tmp_path / "deit.pth",
        )  # fmt: skip
        loaded: Any = load_model("vit_tiny_patch16_224", str(tmp_path / "deit.pth"))
        assert torch.equal(loaded.cls_token, whole.cls_token)


def test_metrics_against_sklearn() -> None:
    """Class 3 neither occurs nor is predicted, class 4 occurs only: both count."""
    logits = torch.randn(60, 6)
    logits[:, 3] = -9
    target = torch.randint(0, 3, (60,))
    target[:5] = 4
    meter = Meter("multiclass", 6, scores=True)
    for part in range(0, 60, 25):
        piece = slice(part, part + 25)
        meter.add(logits[piece], target[piece], F.cross_entropy(logits[piece], target[piece]))
    values = meter.compute()
    pred, true = logits.argmax(1).numpy(), target.numpy()
    options: dict[str, Any] = {"labels": range(6), "zero_division": 0}
    for average, prefix in (("macro", ""), ("weighted", "weighted_")):
        expected = sk.precision_recall_fscore_support(true, pred, average=average, **options)
        for name, value in zip(("precision", "recall", "f1_score"), expected, strict=False):
            assert values[prefix + name] == pytest.approx(100 * value, rel=1e-5)
    assert values["accuracy"] == pytest.approx(100 * (pred == true).mean())
    top = np.argsort(-logits.numpy(), 1)[:, :5]
    assert values["top5_accuracy"] == pytest.approx(100 * (top == true[:, None]).any(1).mean())
    assert values["loss"] == pytest.approx(float(F.cross_entropy(logits, target)), rel=1e-6)
    shares = logits.softmax(1).numpy()
    areas = [sk.roc_auc_score(true == c, shares[:, c]) for c in (0, 1, 2, 4)]
    assert values["auc"] == pytest.approx(100 * np.mean(areas), rel=1e-5)
    seen = meter.gathered()
    counts = meter.confusion(seen["pred"], seen["target"]).numpy()
    assert (counts == sk.confusion_matrix(true, pred, labels=range(6))).all()


def test_metrics_of_several_labels() -> None:
    logits = torch.randn(40, 3)
    target = (torch.rand(40, 3) > 0.6).float()
    meter = Meter("multilabel", 3, scores=True)
    meter.add(logits, target, torch.tensor(0.5))
    values = meter.compute()
    pred, true = (logits > 0).numpy(), target.bool().numpy()
    assert values["accuracy"] == pytest.approx(100 * (pred == true).mean())
    expected = sk.precision_recall_fscore_support(true, pred, average="macro", zero_division=0)
    for name, value in zip(("precision", "recall", "f1_score"), expected, strict=False):
        assert values[name] == pytest.approx(100 * value, rel=1e-5)
    assert values["auc"] == pytest.approx(100 * sk.roc_auc_score(true, logits.numpy()), rel=1e-5)
    assert math.isnan(values["top5_accuracy"])


def test_meter_state() -> None:
    one, two = (Meter("multiclass", 6, scores=False) for _ in range(2))
    batches = [(torch.randn(8, 6), torch.randint(0, 6, (8,)), torch.rand(())) for _ in range(4)]
    for batch in batches[:2]:
        one.add(*batch)
    two.load_state_dict(one.state_dict(), torch.device("cpu"))
    for meter in (one, two):
        for batch in batches[2:]:
            meter.add(*batch)
    first, second = one.compute(), two.compute()
    assert {k: v for k, v in first.items() if v == v} == {k: v for k, v in second.items() if v == v}


def test_even_part() -> None:
    targets = torch.tensor([0] * 50 + [1] * 30 + [2] * 4)
    chosen = even_part(targets, 15, seed=1)
    assert chosen is not None and len(set(chosen)) == 15
    assert torch.bincount(targets[chosen]).tolist() in ([6, 5, 4], [5, 6, 4])
    assert even_part(targets, 84, seed=1) is None and even_part(targets, None, seed=1) is None
    assert chosen == even_part(targets, 15, seed=1) != even_part(targets, 15, seed=2)


class Numbers(torch.utils.data.Dataset[Any]):
    """Items whose picture is their index."""

    def __init__(self, count: int) -> None:
        self.count, self.epoch = count, 0

    def __len__(self) -> int:
        return self.count

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, i: int) -> dict[str, Any]:
        image = torch.full((3, 2, 2), float(i))
        return {
            "image": image,
            "target": torch.tensor(i % 3),
            "index": i,
            "variant": self.epoch % 2,
        }


def test_feed_resumes_and_shares() -> None:
    def feed(**options: Any) -> Feed[Any]:
        dataset: Any = Numbers(20)
        return class_feed(dataset, batch_size=3, device=torch.device("cpu"), seed=4, **options)

    whole = [batch.index for batch in feed().batches(1)]
    assert len(whole) == feed().steps == 6 and len({i for b in whole for i in b}) == 18
    assert [batch.index for batch in feed().batches(1, done=4)] == whole[4:]
    assert [batch.index for batch in feed().batches(2)] != whole
    assert next(feed().batches(3)).variant == 1
    some = {i for batch in feed(chosen=[2, 4, 6, 8, 10, 12]).batches(0) for i in batch.index}
    assert some == {2, 4, 6, 8, 10, 12}
    ranks = [{i for b in feed(rank=rank, world=2).batches(1) for i in b.index} for rank in range(2)]
    assert not ranks[0] & ranks[1]
    every = [i for batch in feed(train=False).batches(0) for i in batch.index]
    assert every == list(range(20))
    with pytest.raises(ValueError, match="must give at least one batch, got batches of 3"):
        feed(chosen=[1, 2])


def test_compare_and_gain() -> None:
    def result(role: str, seed: int, accuracy: float) -> dict[str, Any]:
        names = ("test_f1_score", "test_auc", "val_accuracy", "seconds", "peak_mib")
        rest = dict.fromkeys(names, 1.0)
        return {
            **{"role": role, "model": "m", "params": 5, "seed": seed},
            **{"test_accuracy": accuracy, **rest},
        }

    scores = {"student": (52.0, 54.0, 53.0), "student_ce": (50.0, 50.5, 51.0)}
    results = [result(r, s, x) for r, values in scores.items() for s, x in enumerate(values)]
    rows = compare(results)
    assert [row["mean"]["test_accuracy"] for row in rows] == [53.0, 50.5]
    assert [row["spread"]["test_accuracy"] for row in rows] == [1.0, 0.5]
    assert gain(rows) == {"margin": 2.5, "spread": 1.0, "beats": True}
    assert gain(compare(results[:3])) is None


def test_memory() -> None:
    device = torch.device("cpu")
    reset_peak(device)
    before = peak_mib(device)["host"]
    block = torch.ones(64 * 2**20 // 4)
    del block
    grown = peak_mib(device)["host"] - before
    assert 40 < grown < 200, "the peak must show memory that is free again"
    reset_peak(device)
    assert peak_mib(device)["host"] < before + 40
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: tried"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
