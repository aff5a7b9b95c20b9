# SPDX-License-Identifier: Apache-2.0
"""What is no tensor is refused by every op, by name, before anything is asked of it."""

import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import kdfast
from kdfast import Rope, Window
from kdfast.ops.attention_entropy import attention_entropy

QKV = {name: torch.randn(1, 2, 6, 4) for name in ("q", "k", "v")}
ROWS = torch.randn(3, 4)
TEACHER = {"teacher_hidden": ROWS, "teacher_weight": ROWS, "teacher_bias": torch.randn(3)}
LINEAR = {"hidden": ROWS, "weight": torch.randn(3, 4), "bias": torch.randn(3)}
# Calls that work; of an op whose arguments exclude each other there are two.
CALLS: list[tuple[str, Callable[..., Any], dict[str, Any]]] = [
    ("pruned_attention", kdfast.pruned_attention, {**QKV, "bias": torch.randn(2, 6, 6)}),
    (
        "attention_distill",
        kdfast.attention_distill,
        {**QKV, "teacher_q": QKV["q"], "teacher_k": QKV["k"]},
    ),
    ("attention_entropy", attention_entropy, {name: QKV[name] for name in ("q", "k")}),
    (
        "scaled_dot_product_attention",
        kdfast.scaled_dot_product_attention,
        {
            **dict(zip(("query", "key", "value"), QKV.values(), strict=True)),
            "attn_mask": torch.zeros(6, 6),
        },
    ),
    (
        "kd_loss",
        kdfast.kd_loss,
        {
            **{"student_logits": ROWS, "teacher_logits": ROWS, "target": torch.arange(3)},
            "class_weight": ROWS[0],
        },
    ),
    (
        "multilabel_kd_loss",
        kdfast.multilabel_kd_loss,
        {
            **{"student_logits": ROWS, "teacher_logits": ROWS, "target": ROWS.sigmoid()},
            **{"class_weight": ROWS[0], "pos_weight": ROWS[0]},
        },
    ),
    (
        "linear_kd_loss",
        kdfast.linear_kd_loss,
        {**LINEAR, "teacher_logits": torch.randn(3, 3), "target": torch.arange(3)},
    ),
    ("linear_kd_loss", kdfast.linear_kd_loss, {**LINEAR, **TEACHER}),
    ("linear", kdfast.linear, {"x": ROWS, "weight": ROWS, "bias": ROWS[:, 0]}),
    ("feature_loss", kdfast.feature_loss, {"student": ROWS, "teacher": ROWS}),
    (
        "swiglu_norm",
        kdfast.swiglu_norm,
        {"gate": ROWS, "value": ROWS, "weight": ROWS[0], "bias": ROWS[0]},
    ),
    ("head_gather", partial(kdfast.head_gather, heads=[1], head_dim=2, dim=1), {"x": ROWS}),
]
CASES = [(op, call, good, name) for op, call, good in CALLS for name in good]


@pytest.mark.parametrize(("op", "call", "good", "name"), CASES)
def test_refused(op: str, call: Callable[..., Any], good: dict[str, Any], name: str) -> None:
    call(**good)
    wrong = [good[name].numpy(), good[name].tolist(), None]
    if inspect.signature(call).parameters[name].default is None:
        del wrong[-1]
    for value in wrong:
        message = f"{op}: {name} must be a tensor, got {type(value).__name__}"
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            call(**{**good, name: value})
    # Autocast, which looks at dtypes and devices first, is no way around.
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match="a tensor"):
        call(**{**good, name: wrong[0]})


def test_every_op_and_argument_is_tried() -> None:
    tried: dict[str, set[str]] = {"head_gather_block": set()}
    for op, _, good in CALLS:
        tried.setdefault(op, set()).update(good)
    public = {name: getattr(kdfast, name) for name in kdfast.__all__} | {
        "attention_entropy": attention_entropy
    }
    ops = {name: x for name, x in public.items() if inspect.isfunction(x)}
    ops = {name: op for name, op in ops.items() if op.__module__.startswith("kdfast.ops.")}
    assert set(ops) == set(tried), "each op needs a row in CALLS"
    for name, op in ops.items():
        hints = inspect.signature(op).parameters.values()
        tensors = (torch.Tensor, torch.Tensor | None)
        assert {x.name for x in hints if x.annotation in tensors} == tried[name]


def test_tensors_of_a_block() -> None:
    for value in (ROWS.numpy(), None):
        with pytest.raises(TypeError, match="head_gather_block: each of tensors must be a tensor"):
            kdfast.head_gather_block([ROWS, value], [1], head_dim=2, dims=[1, 1])


@pytest.mark.parametrize("op", ["pruned_attention", "attention_distill", "attention_entropy"])
def test_tables(op: str) -> None:
    call, good = next((call, good) for name, call, good in CALLS if name == op)
    good = {name: x for name, x in good.items() if name != "bias"}
    table = torch.ones(6, 4)
    for name, tables in (("cos", (table.numpy(), table)), ("sin", (table, table.numpy()))):
        with pytest.raises(TypeError, match=f"{op}: rope.{name} must be a tensor, got ndarray"):
            call(**good, rope=Rope(*tables))
    pad: Any = [[0.0] * 4] * 2
    with pytest.raises(TypeError, match=f"{op}: window.pad_value must be a tensor, got list"):
        call(**good, window=Window((2, 3), 2, pad))
