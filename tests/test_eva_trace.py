# SPDX-License-Identifier: Apache-2.0
"""EVAViT in training: traces, attention losses, checkpointing, dtypes, torch.compile."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.models import AttentionTarget, EVAViT, eva_layers
from kdfast.models import eva as eva_module
from kdfast.models.axial_rope import AxialRope
from kdfast.models.eva_layers import Attention, Block
from kdfast.testing import gradients, relative, small_eva


def test_frozen_model_never_trains() -> None:
    model = small_eva(frozen=True, drop_path_rate=0.9, with_cp=True)
    assert not any(p.requires_grad for p in model.parameters())
    model.train()
    assert not any(m.training for m in model.modules())
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():  # both in inference
        assert torch.equal(model(x), small_eva().eval()(x))


def test_drop_path_is_per_image_and_scaled() -> None:
    block = Block(Attention(48, [0, 1, 2], 16, True, 0), 48, 128, 0.75).train()
    torch.nn.init.zeros_(block.mlp.w3.weight)
    torch.nn.init.zeros_(block.mlp.w3.bias)
    x = torch.randn(64, 6, 48)
    rope = AxialRope(16, 16, True)((2, 3), x)
    out, *rest = block(x, (2, 3), rope)
    assert rest == [None, None, None]
    step = out - x
    whole = block.attn(block.norm1(x), (2, 3), rope)[0]
    dropped = step.flatten(1).abs().amax(1) < 1e-6
    assert 30 < dropped.sum() < 62
    torch.testing.assert_close(step[~dropped], 4 * whole[~dropped], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(block.eval()(x, (2, 3), rope)[0], x + whole)


def test_trace_equals_forward_and_keeps_only_what_was_asked() -> None:
    model = small_eva(heads=[[0, 2], [1], [0, 1, 2]])
    x = torch.randn(2, 3, 80, 112)
    streams = []
    for block in model.blocks:
        block.register_forward_hook(lambda _m, _a, out: streams.append(out[0]))
    plain = model.trace(x)
    assert torch.equal(plain.output, model(x))
    assert (plain.features, plain.qk, plain.attention_losses) == ({}, [None] * 3, {})
    full = model.trace(x, features={0, 2}, qk=True)
    assert torch.equal(full.output, plain.output)
    assert list(full.features) == [0, 2]
    for i, feature in full.features.items():
        assert torch.equal(feature, streams[i])
        assert feature.shape == (2, 35, 48)
    assert torch.equal(full.features[2].view(2, 5, 7, 48).permute(0, 3, 1, 2), full.output)
    block = model.blocks[1]
    tokens = block.norm1(streams[0])
    pair = full.qk[1]
    assert pair is not None
    q = F.linear(tokens, block.attn.q_proj.weight, block.attn.q_bias)
    torch.testing.assert_close(pair[0], q[:, None])
    torch.testing.assert_close(pair[1], F.linear(tokens, block.attn.k_proj.weight)[:, None])
    assert [p[0].shape[1] for p in full.qk if p] == [2, 1, 3]


KEEP = [[0, 2], [1], [1, 2]]


def pair_of_models(**overrides: Any) -> tuple[EVAViT, EVAViT]:
    """A teacher and the student that holds some of its heads."""
    teacher, student = small_eva().eval(), small_eva(heads=KEEP, **overrides)
    state = teacher.state_dict()
    for i, heads in enumerate(KEEP):
        rows = torch.cat([torch.arange(16 * h, 16 * h + 16) for h in heads])
        for name in ("q_proj.weight", "k_proj.weight", "v_proj.weight", "q_bias", "v_bias"):
            state[f"blocks.{i}.attn.{name}"] = state[f"blocks.{i}.attn.{name}"][rows]
        state[f"blocks.{i}.attn.proj.weight"] = state[f"blocks.{i}.attn.proj.weight"][:, rows]
    student.load_state_dict(state)
    return teacher, student


def test_attention_losses_vanish_on_equal_attention_only() -> None:
    teacher, student = pair_of_models()
    x = torch.randn(2, 3, 80, 112)
    with torch.no_grad():
        qk = teacher.trace(x, qk=True).qk
    # The first block sees the same input in both models: its kept heads attend equally.
    first = AttentionTarget([qk[0], None, None], KEEP)
    got = student.trace(x, target=first)
    assert list(got.attention_losses) == [0]
    assert got.attention_losses[0].item() == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(got.output, student(x))
    wrong = AttentionTarget([qk[0], None, None], [[1, 2], [], []])
    assert student.trace(x, target=wrong).attention_losses[0].item() > 1e-4
    every = student.trace(x, target=AttentionTarget(qk, KEEP, kind="mse"))
    assert list(every.attention_losses) == [0, 1, 2]
    every.attention_losses[2].backward()
    assert student.blocks[2].attn.k_proj.weight.grad.abs().max() > 0
    assert teacher.blocks[2].attn.k_proj.weight.grad is None


def test_temperature_and_kind_reach_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, *teacher: Tensor, **options: Any) -> Any:
        seen.append(options)
        return v, v.sum()

    monkeypatch.setattr(eva_layers, "attention_distill", spy)
    teacher, student = pair_of_models()
    x = torch.randn(1, 3, 80, 80)
    qk = teacher.trace(x, qk=True).qk
    student.trace(x, target=AttentionTarget(qk, KEEP, kind="jsd", temperature=3.0))
    assert [(o["kind"], o["temperature"], o["teacher_heads"]) for o in seen] == [
        ("jsd", 3.0, heads) for heads in KEEP
    ]
    assert [o["window"] is None for o in seen] == [False, False, True]


def distilled(model: EVAViT, x: Tensor, target: AttentionTarget) -> tuple[Tensor, Any]:
    torch.manual_seed(7)
    run = model.trace(x, features=[1], target=target)
    loss = run.output.square().mean() + run.features[1].square().mean()
    loss = loss + sum(run.attention_losses.values())
    return loss, gradients(model, loss)


def test_checkpointing_changes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = pair_of_models(with_cp=True, drop_path_rate=0.5)
    student.train()
    x = torch.randn(4, 3, 80, 80)
    with torch.no_grad():
        target = AttentionTarget(teacher.trace(x, qk=True).qk, KEEP, temperature=2.0)
    calls: list[dict[str, Any]] = []
    checkpoint = eva_module.checkpoint

    def spy(*args: Any, **options: Any) -> Any:
        calls.append(options)
        return checkpoint(*args, **options)

    monkeypatch.setattr(eva_module, "checkpoint", spy)
    got_loss, got = distilled(student, x, target)
    assert calls == [{"use_reentrant": False}] * 3
    student.with_cp = False
    want_loss, want = distilled(student, x, target)
    assert torch.equal(got_loss, want_loss)
    for name in want:
        assert torch.equal(got[name], want[name]), name
    student.with_cp = True
    student.eval()(x)
    with torch.no_grad():
        student.train()(x)
    assert len(calls) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype: torch.dtype) -> None:
    model = small_eva().eval()
    x = torch.randn(2, 3, 80, 112)
    want = model(x)
    got = copy.deepcopy(model).to(dtype)(x)
    assert got.dtype == dtype
    assert relative(got.float(), want) < 0.03


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    teacher, student = pair_of_models()
    x = torch.randn(2, 3, 80, 112)
    want = student.trace(x, target=AttentionTarget(teacher.trace(x, qk=True).qk, KEEP))
    with torch.autocast("cpu", dtype):
        qk = teacher.trace(x, qk=True).qk
        got = student.trace(x, target=AttentionTarget(qk, KEEP))
    assert got.output.dtype == dtype
    assert relative(got.output.float(), want.output) < 0.03
    (got.output.float().sum() + sum(got.attention_losses.values())).backward()
    grad = student.blocks[0].attn.v_bias.grad
    assert grad.dtype == torch.float32 and grad.isfinite().all()


def test_linear_layers_of_another_dtype_than_their_biases() -> None:
    model = small_eva().eval()
    attn = copy.deepcopy(model.blocks[0].attn)
    for module in attn.children():
        module.to(torch.bfloat16)
    x = torch.randn(1, 35, 48)
    rope = AxialRope(16, 16, True)((4, 4), x)
    got = attn(x.bfloat16(), (5, 7), rope)[0]
    assert relative(got.float(), model.blocks[0].attn(x, (5, 7), rope)[0]) < 0.02


def test_rope_tables_follow_the_model_and_stay_out_of_its_state() -> None:
    model = small_eva().eval()
    x = torch.randn(1, 3, 96, 96)
    with torch.inference_mode():
        model(x)
        model(torch.randn(1, 3, 80, 80))
    assert len(model.rope._tables) == 3
    assert not any(table.is_inference() for table in model.rope._tables.values())
    model(torch.randn(1, 3, 80, 80)).sum().backward()
    model.double()
    assert {key[3] for key in model.rope._tables} == {torch.float64}
    precise = model(x.double())
    assert relative(model.float()(x).double(), precise) < 1e-5
    assert {key[2].type for key in model.to("meta").rope._tables} == {"meta"}
    assert not any("rope" in key for key in model.state_dict())


def test_rope_tables_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_eva().eval()
    x = torch.randn(1, 3, 80, 80)
    want = model(x)
    monkeypatch.setattr(AxialRope, "tables", None)
    assert torch.equal(model(x), want)


COMPILED = {"backend": "aot_eager", "fullgraph": True}


def test_compile_training_step_with_checkpoints() -> None:
    torch._dynamo.reset()
    model = small_eva(depth=2, window_block_indexes=(0,), with_cp=True).train()
    x = torch.randn(2, 3, 48, 64)
    got_out, want_out = torch.compile(model, **COMPILED)(x), model(x)
    torch.testing.assert_close(got_out, want_out)
    got, want = (gradients(model, out.square().sum()) for out in (got_out, want_out))
    for name in want:
        assert relative(got[name], want[name]) < 1e-5, name


def test_compile_reads_tables_and_takes_other_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    model = small_eva(depth=2, window_block_indexes=(0,), img_size=64).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        x = torch.randn(1, 3, 64, 64)
        with monkeypatch.context() as patch:
            patch.setattr(AxialRope, "tables", None)
            torch.testing.assert_close(compiled(x), model(x))
        other = torch.randn(1, 3, 48, 64)
        torch.testing.assert_close(compiled(other), model(other))


def test_compile_distillation_step() -> None:
    torch._dynamo.reset()
    teacher, student = pair_of_models(with_cp=True)
    x = torch.randn(1, 3, 48, 64)

    def step(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            qk = teacher.trace(x, qk=True).qk
        run = student.trace(x, features=[1], target=AttentionTarget([None, *qk[1:]], KEEP))
        return run.output, run.features[1], sum(run.attention_losses.values())

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), step(x))
