# SPDX-License-Identifier: Apache-2.0
"""Every criterion against an oracle that computes it the slow way."""

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdfast.models import EVAViT
from kdfast.pruning import HeadScores, head_scores, prune_heads
from kdfast.pruning.observe import RandomProjection
from kdfast.testing import tiny_eva

HEADS, HEAD_DIM = 4, 16
tiny = partial(tiny_eva, 0.2)
METHODS = ("magnitude", "gradient", "taylor", "entropy")
NAN = torch.full((1, 3, 8, 8), math.nan)
NONE = torch.zeros(0, 3, 8, 8)


def images(batch: int = 2, height: int = 20, width: int = 28) -> Tensor:
    return torch.randn(batch, 3, height, width, dtype=torch.float64)


def mean_square(output: Tensor, batch: Any) -> Tensor:
    return output.square().mean()


def score(model: EVAViT, method: str, data: Any = None, **kwargs: Any) -> Tensor:
    return torch.stack(head_scores(model, method, data, progress=False, **kwargs).scores)


def score_any(model: EVAViT, method: str) -> Tensor:
    return score(model, method, None if method == "magnitude" else [images(1)])


def test_magnitude_is_the_norm_of_the_products() -> None:
    model = tiny()
    got = score(model, "magnitude")
    assert got.dtype == torch.float64
    for block, row in zip(model.blocks, got, strict=True):
        attn = block.attn
        for head in range(HEADS):
            rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
            wq = torch.cat((attn.q_proj.weight[rows], attn.q_bias[rows, None]), 1)
            wv = torch.cat((attn.v_proj.weight[rows], attn.v_bias[rows, None]), 1)
            write = (attn.proj.weight[:, rows] @ wv).norm()
            look = (wq.t() @ attn.k_proj.weight[rows]).norm()
            assert row[head].item() == pytest.approx((write * look).sqrt().item(), rel=1e-9)


def test_magnitude_does_not_see_scales_that_cancel() -> None:
    model = tiny()
    before = score(model, "magnitude")
    with torch.no_grad():
        attn = model.blocks[1].attn
        attn.q_proj.weight.mul_(8)
        attn.q_bias.mul_(8)
        attn.k_proj.weight.div_(8)
        attn.v_proj.weight.div_(5)
        attn.v_bias.div_(5)
        attn.proj.weight.mul_(5)
    torch.testing.assert_close(score(model, "magnitude"), before, rtol=1e-10, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_dead_head_is_last(method: str) -> None:
    """A head that writes nothing, or looks at nothing, has score 0 by every criterion."""
    model = tiny()
    rows = slice(2 * HEAD_DIM, 3 * HEAD_DIM)
    with torch.no_grad():
        model.blocks[1].attn.proj.weight[:, rows] = 0
        model.blocks[1].attn.k_proj.weight[rows] = 0
    got = score_any(model, method)
    assert got[1].argmin() == 2
    assert got[1, 2] < 1e-12
    others = torch.ones(3, HEADS, dtype=torch.bool)
    others[1, 2] = False
    assert (got[others] > 1e-4).all()


def gated(model: EVAViT, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output, and gates of value 1 on every block's, image's, token's and head's context."""
    tokens = x.shape[2] * x.shape[3] // 16
    gates, handles = [], []
    for block in model.blocks:
        gate = torch.ones(len(x), tokens, HEADS, 1, dtype=torch.float64, requires_grad=True)
        gates.append(gate)
        handles.append(
            block.attn.proj.register_forward_pre_hook(
                lambda _, args, g=gate: (args[0].unflatten(-1, (HEADS, -1)) * g).flatten(-2)
            )
        )
    output = model(x)
    for handle in handles:
        handle.remove()
    return output, gates


def test_taylor_is_the_gradient_of_gates() -> None:
    model, x = tiny().eval(), images(3)
    got = score(model, "taylor", [x], loss=mean_square)
    want = torch.zeros(3, HEADS, dtype=torch.float64)
    for image in x.split(1):
        output, gates = gated(model, image)
        grads = torch.autograd.grad(mean_square(output, None), gates)
        want += torch.stack([g.abs().mean((0, 1)).squeeze(-1) for g in grads]) / 3
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-14)
    assert (want > 0).all()


def test_taylor_predicts_what_removing_a_little_of_a_head_costs() -> None:
    model, x = tiny().eval(), images(1, 4, 4)
    got = score(model, "taylor", [x], loss=mean_square)
    step = 1e-4
    for head in range(HEADS):
        losses = []
        for change in (-step, step):
            scale = torch.ones(HEADS, 1, dtype=torch.float64)
            scale[head] += change
            handle = model.blocks[2].attn.proj.register_forward_pre_hook(
                lambda _, args, s=scale: (args[0].unflatten(-1, (HEADS, -1)) * s).flatten(-2)
            )
            losses.append(mean_square(model(x), None).item())
            handle.remove()
        slope = abs(losses[1] - losses[0]) / (2 * step)
        assert got[2, head].item() == pytest.approx(slope, rel=1e-4)


def test_gradient_is_its_norm_at_the_context() -> None:
    model, x = tiny().eval(), images(2)
    got = score(model, "gradient", [x], loss=mean_square)
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor]) -> None:
        args[0].retain_grad()
        seen.append(args[0])

    for block in model.blocks:
        block.attn.proj.register_forward_pre_hook(keep)
    for image in x.split(1):
        mean_square(model(image), None).backward()
    grads = [context.grad.view(-1, HEADS, HEAD_DIM).norm(dim=-1).mean(0) for context in seen]
    want = (torch.stack(grads[:3]) + torch.stack(grads[3:])) / 2
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("method", ["gradient", "taylor", "entropy"])
def test_batch_size_does_not_matter(method: str) -> None:
    model, x = tiny(), images(5)
    kwargs = {} if method == "entropy" else {"loss": mean_square}
    together = score(model, method, [x], **kwargs)
    apart = score(model, method, x.split([1, 3, 1]), **kwargs)
    torch.testing.assert_close(apart, together, rtol=1e-9, atol=1e-14)


def test_random_projection_measures_the_change_of_the_output() -> None:
    """Mean square over signs = squared first-order change of the output / channel rms."""
    model, x = tiny().eval(), images(1, 8, 8)
    output, gates = gated(model, x)
    rms = output.square().mean((2, 3), keepdim=True).sqrt()
    rows = [
        torch.autograd.grad(y, gates[1], retain_graph=True)[0].squeeze()
        for y in (output / rms.detach()).flatten()
    ]
    want = torch.stack(rows).square().sum(0).sqrt()
    loss = RandomProjection(seed=0)
    draws = [
        torch.autograd.grad(loss(output, None), gates[1], retain_graph=True)[0].squeeze()
        for _ in range(500)
    ]
    got = torch.stack(draws).square().mean(0).sqrt()
    torch.testing.assert_close(got, want, rtol=0.12, atol=0)


def test_random_projection_is_a_function_of_the_seed() -> None:
    model, x = tiny(), images()
    first = score(model, "taylor", [x], seed=1)
    assert torch.equal(score(model, "taylor", [x], seed=1), first)
    assert not torch.equal(score(model, "taylor", [x], seed=2), first)
    state = torch.get_rng_state()
    score(model, "taylor", [x])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", ["gradient", "taylor", "entropy"])
@pytest.mark.parametrize("fails", [False, True])
def test_model_is_left_as_it_was(method: str, fails: bool) -> None:
    model = tiny(drop_path_rate=0.5, with_cp=True).train()
    model.blocks[1].eval()
    model.blocks[0].attn.q_proj.weight.requires_grad_(False)
    model.pos_embed.grad = torch.ones_like(model.pos_embed)
    modes = [module.training for module in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]

    def data() -> Iterator[Tensor]:
        yield images()
        assert not model.training
        if fails:
            raise OSError("unreadable")

    if fails:
        with pytest.raises(OSError, match="unreadable"):
            score(model, method, data())
    else:
        score(model, method, data())
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for name, p in model.named_parameters() if name != "pos_embed")
    assert torch.equal(model.pos_embed.grad, torch.ones_like(model.pos_embed))
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", METHODS)
def test_works_without_gradients_around_and_on_pruned_models(method: str, without: Any) -> None:
    model = prune_heads(tiny(), [[1, 3], [2], [0, 1, 3]]).requires_grad_(False)
    with without():
        data = None if method == "magnitude" else [images(1)]
        got = head_scores(model, method, data, progress=False)
    assert [len(row) for row in got.scores] == [2, 1, 3]
    assert got.metadata["heads"] == [[1, 3], [2], [0, 1, 3]]


@pytest.mark.parametrize("method", ["gradient", "taylor", "entropy"])
def test_low_precision_is_close(method: str) -> None:
    model, x = tiny(), images(1)
    want = score(model, method, [x])
    with torch.autocast("cpu", torch.bfloat16):
        autocast = score(model.float(), method, [x.float()])
    for got in (autocast, score(model.bfloat16(), method, [x])):
        assert ((got - want).norm() / want.norm()).item() < 0.05


def test_kept_heads_have_the_magnitude_of_the_full_model() -> None:
    model = tiny()
    full = head_scores(model, "magnitude").scores
    part = head_scores(prune_heads(model, [[1, 3], [2], [0]]), "magnitude").scores
    for row, want in zip(part, (full[0][[1, 3]], full[1][[2]], full[2][[0]]), strict=True):
        torch.testing.assert_close(row, want, rtol=1e-12, atol=0)


def test_kinds_of_batches_and_their_count() -> None:
    model, x = tiny(), images(4)
    want = score(model, "entropy", [x])
    labels = torch.arange(4)
    for batch in ({"image": x, "label": labels, "path": ["a"] * 4}, (x, labels), [x, labels]):
        torch.testing.assert_close(score(model, "entropy", [batch]), want, rtol=0, atol=0)
    two = head_scores(model, "entropy", x.split(1), batches=2, progress=False)
    assert (two.metadata["batches"], two.metadata["images"]) == (2, 2)
    torch.testing.assert_close(torch.stack(two.scores), score(model, "entropy", [x[:2]]))


def test_loss_sees_the_batch() -> None:
    model, x = tiny(), images(2)

    def only_first(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return (output.square().mean((1, 2, 3)) * batch["weight"]).mean()

    batch = {"image": x, "weight": torch.tensor([2.0, 0.0], dtype=torch.float64)}
    got = score(model, "taylor", [batch], loss=only_first)
    want = score(model, "taylor", [x[:1]], loss=mean_square)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-14)
    name = head_scores(model, "taylor", [batch], loss=only_first, progress=False).metadata["loss"]
    assert name.endswith("only_first")


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    saved = head_scores(tiny(), "taylor", [images()], progress=False)
    saved.save(path)
    loaded = HeadScores.load(path)
    assert (loaded.method, loaded.metadata) == ("taylor", saved.metadata)
    assert loaded.metadata["images"] == 2
    for got, want in zip(loaded.scores, saved.scores, strict=True):
        assert got.dtype == torch.float64 and torch.equal(got, want)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": "else"}, "must have format 'kdfast.head_scores/1', got 'else'"),
        ({"scores": []}, "at least one block"),
        ({"scores": [[1.0], [[1.0]]]}, r"block 1 must be \(H,\)"),
        ({"scores": [[1.0, float("inf")]]}, "scores of block 0 must be finite"),
    ],
)
def test_load_rejects(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    path = tmp_path / "scores.json"
    HeadScores([torch.ones(2, dtype=torch.float64)], "given").save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=match):
        HeadScores.load(path)


def test_scores_must_be_fp64() -> None:
    with pytest.raises(TypeError, match="block 0 must be float64, got torch.float32"):
        HeadScores([torch.ones(2)], "given")


@pytest.mark.parametrize(
    ("method", "data", "kwargs", "error", "match"),
    [
        ("l2", None, {}, ValueError, "method must be one of"),
        ("magnitude", [1], {}, ValueError, "data must be None for 'magnitude'"),
        ("taylor", None, {}, ValueError, "data must be given for 'taylor'"),
        ("entropy", [], {}, ValueError, "data must give at least one batch"),
        ("taylor", [NONE], {}, ValueError, "a batch must hold at least one image"),
        ("entropy", ["x"], {}, TypeError, "a batch must be .* got str"),
        ("entropy", [{"img": 0}], {}, TypeError, r"a batch must be .* got a dict with \['img'\]"),
        ("entropy", [torch.zeros(1, 3, 9, 9)], {}, ValueError, "multiples of 4"),
        ("entropy", [0], {"loss": mean_square}, ValueError, "loss must be None for 'entropy'"),
        ("entropy", [0], {"important": "none"}, ValueError, "important must be one of"),
        ("entropy", [0], {"unit": "bits"}, ValueError, "unit must be one of"),
        ("entropy", [0], {"batches": 0}, ValueError, "batches must be at least 1, got 0"),
        ("entropy", [NAN], {}, ValueError, "in block 0 after batch 0"),
        ("taylor", [NAN], {}, ValueError, "loss must be finite, got nan"),
        ("taylor", 1, {"loss": lambda o, b: o}, TypeError, r"scalar tensor, got \(1, 64, 2, 2\)"),
        ("taylor", 1, {"loss": lambda o, b: 0.5}, TypeError, "scalar tensor, got float"),
        ("taylor", 1, {"loss": lambda o, b: o.detach().sum()}, ValueError, "got a constant"),
    ],
)
def test_rejects(
    method: str, data: Any, kwargs: dict[str, Any], error: type[Exception], match: str
) -> None:
    data = [torch.ones(1, 3, 8, 8)] if data == 1 else data
    model = tiny().float()
    with pytest.raises(error, match=match):
        head_scores(model, method, data, progress=False, **kwargs)
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_unknown_family_is_named() -> None:
    with pytest.raises(
        TypeError, match="head_scores: model must be one of EVAViT, .*, got .*Linear"
    ):
        head_scores(nn.Linear(2, 2), "magnitude")
