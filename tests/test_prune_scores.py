# SPDX-License-Identifier: Apache-2.0
"""Leave-one-out, evaluation of selections without building them, and gates of a training loop."""

from functools import partial
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import kdfast
from kdfast.models import EVAViT
from kdfast.pruning import HeadGates, evaluate_selections, head_scores, prune_heads
from kdfast.testing import tiny_eva

HEADS, HEAD_DIM = 4, 16
ALL = [0, 1, 2, 3]
tiny = partial(tiny_eva, 0.2)


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 20, 28, dtype=torch.float64)


def metric(output: Tensor, batch: Any) -> Tensor:
    return output.abs().mean()


class Counter:
    """Counts how often the blocks really run."""

    def __init__(self, model: Any) -> None:
        self.runs = [0] * len(model.blocks)
        for index, block in enumerate(model.blocks):
            block.norm1.register_forward_hook(lambda *_, i=index: self.add(i))

    def add(self, index: int) -> None:
        self.runs[index] += 1


SELECTIONS = [
    [[1, 3], [2], [0, 1, 3]],
    [ALL, [0], ALL],
    [ALL, ALL, [0, 2]],
    [[], ALL, []],
    [ALL, ALL, ALL],
]


def test_selections_are_worth_what_the_pruned_models_are() -> None:
    model, data = tiny().eval(), [images(3), images(1)]
    got = evaluate_selections(model, SELECTIONS, metric, data, progress=False)
    for value, keep in zip(got, SELECTIONS, strict=True):
        with torch.no_grad():
            pruned = prune_heads(model, keep)
            want = (3 * metric(pruned(data[0]), 0) + metric(pruned(data[1]), 0)) / 4
        assert value == pytest.approx(want.item(), rel=1e-10)
    assert len(set(got)) == 5


def test_blocks_before_the_change_are_not_run_again() -> None:
    model = tiny().eval()
    counter = Counter(model)
    evaluate_selections(model, SELECTIONS, metric, [images(1)], progress=False)
    # One whole run; then from block 0, 1, 2, 0, and nothing at all.
    assert counter.runs == [3, 4, 5]
    assert not any("forward" in vars(module) for module in model.modules())


def test_leave_one_out_is_the_drop_of_the_metric() -> None:
    model, x = tiny().eval(), images(2)
    scores = head_scores(model, "leave_one_out", [x], metric=metric, progress=False)
    with torch.no_grad():
        whole = metric(model(x), None)
        for block in range(3):
            for head in range(HEADS):
                keep = [list(ALL) for _ in range(3)]
                keep[block].remove(head)
                want = whole - metric(prune_heads(model, keep)(x), None)
                assert scores.scores[block][head].item() == pytest.approx(want.item(), abs=1e-12)
    assert scores.metadata["metric"] == "metric"
    assert min(row.min() for row in scores.scores) < 0 < max(row.max() for row in scores.scores)


def test_without_a_metric_it_is_the_relative_change_of_the_output() -> None:
    model, x = tiny().eval(), images(2)
    scores = head_scores(model, "leave_one_out", [x], progress=False)
    with torch.no_grad():
        whole, less = model(x), prune_heads(model, [ALL, ALL, [0, 1, 3]])(x)
        change = (less - whole).flatten(1).norm(dim=1) / whole.flatten(1).norm(dim=1)
    assert scores.scores[2][2].item() == pytest.approx(change.mean().item(), rel=1e-9)
    assert min(row.min() for row in scores.scores) > 0


def test_evaluation_leaves_the_model_alone_when_it_fails() -> None:
    model = tiny().train()
    calls = []

    def fails(output: Tensor, batch: Any) -> float:
        calls.append(output)
        if len(calls) == 4:
            raise OSError("no labels")
        return 0.0

    with pytest.raises(OSError, match="no labels"):
        evaluate_selections(model, SELECTIONS, fails, [images(1)], progress=False)
    assert model.training
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert "forward" not in vars(module)


@pytest.mark.parametrize(
    ("selections", "value", "error", "match"),
    [
        ([], metric, ValueError, "selections must name at least one, got none"),
        ([[[0]]], metric, ValueError, r"selections\[0\] must have one list per block \(3\), got 1"),
        ([[ALL, [4], ALL]], metric, ValueError, r"selections\[0\]\[1\] must be in \[0, 4\)"),
        (SELECTIONS, lambda o, b: o, TypeError, r"metric: must return a number, got \(1, 64, 5, 7"),
        (SELECTIONS, lambda o, b: "a", TypeError, "metric: must return a number, got str"),
        (SELECTIONS, lambda o, b: float("nan"), ValueError, "scores must be finite, got .nan"),
    ],
)
def test_evaluation_rejects(
    selections: Any, value: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        evaluate_selections(tiny(), selections, value, [images(1)], progress=False)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"method": "taylor", "metric": metric}, "metric must be None for 'taylor'"),
        ({"method": "leave_one_out", "loss": metric}, "loss must be None for 'leave_one_out'"),
    ],
)
def test_options_of_other_methods(kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        head_scores(tiny(), data=[images(1)], progress=False, **kwargs)


def gates_by_autograd(model: EVAViT, x: Tensor) -> list[Tensor]:
    """d loss / d gate with real gates, one per image, block and head."""
    gates, handles = [], []
    for block in model.blocks:
        gate = torch.ones(len(x), 1, HEADS, 1, dtype=torch.float64, requires_grad=True)
        gates.append(gate)
        handles.append(
            block.attn.proj.register_forward_pre_hook(
                lambda _, args, g=gate: (args[0].unflatten(-1, (HEADS, -1)) * g).flatten(-2)
            )
        )
    grads = torch.autograd.grad(model(x).square().mean(), gates)
    for handle in handles:
        handle.remove()
    return [grad.view(len(x), HEADS) for grad in grads]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gates_come_out_of_the_training_step(checkpointing: bool) -> None:
    model, x = tiny(with_cp=checkpointing).train(), images(3)
    want = gates_by_autograd(model, x)
    model(x).square().mean().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    counter = Counter(model)
    with HeadGates(model) as gates:
        model(x).square().mean().backward()
    assert counter.runs == [2 if checkpointing else 1] * 3
    for block, grad in enumerate(want):
        torch.testing.assert_close(gates.last[block], grad.sum(0), rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(
            gates.scores().scores[block], grad.abs().mean(0) * 3, rtol=1e-9, atol=1e-14
        )
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, plain[name]), name
    assert gates.scores().metadata["images"] == 3


def test_gates_add_up_over_steps_and_stop() -> None:
    model, x = tiny().train(), images(2)
    with HeadGates(model) as gates:
        for _ in range(2):
            model(x).square().mean().backward()
        with torch.no_grad():
            model(x)
    once = gates.scores().scores[1].clone()
    model(images(2)).sum().backward()
    assert torch.equal(gates.scores().scores[1], once)
    assert gates.scores().metadata["images"] == 4
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="scores need a backward pass, block 0 saw none"):
        HeadGates(model).scores()


def test_scores_of_all_heads_cost_one_forward_and_one_backward() -> None:
    model, x = tiny(), images(2)
    counter, backwards = Counter(model), []
    model.blocks[0].norm2.register_full_backward_hook(lambda *_: backwards.append(1))
    head_scores(model, "taylor", [x], progress=False)
    assert counter.runs == [1, 1, 1]
    assert len(backwards) == 1


def test_public_names() -> None:
    assert kdfast.evaluate_selections is evaluate_selections
    assert kdfast.HeadGates is HeadGates
    assert isinstance(kdfast.mlp_scores, type(head_scores))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("swin_tiny_patch4_window7_224",
         {"img_size": 64, "depths": (2, 1), "embed_dim": 16, "num_heads": (2, 4),
          "window_size": 4}),
        ("beit_base_patch16_224", {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2}),
        ("vit_srelpos_small_patch16_224",
         {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2}),
    ],
)  # fmt: skip
def test_entropy_counts_position_biases(name: str, arguments: dict[str, Any]) -> None:
    """Against the softmax that the model computes without fused attention."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x, rows = torch.randn(2, 3, 64, 64), []
    scores = head_scores(model, "entropy", [x], important="high", unit="nats", progress=False)

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows.append(torch.special.entr(args[0].double()).sum(-1).mean((0, 2)))

    for module in model.modules():
        if isinstance(getattr(module, "fused_attn", None), bool):
            module.fused_attn = False  # type: ignore[assignment]
            module.attn_drop.register_forward_pre_hook(keep)  # type: ignore[union-attr]
    with torch.no_grad():
        model(x)
    assert len(rows) == len(scores.scores)
    for got, want in zip(scores.scores, rows, strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=1e-4, atol=1e-6)
