# SPDX-License-Identifier: Apache-2.0
"""Attention entropy against whole maps in which the pads are tokens like any other."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.models import EVAViT
from kdfast.ops.geometry import Rope, Window
from kdfast.pruning import entropy, head_scores
from kdfast.pruning.entropy import attention_entropy

HEADS, HEAD_DIM = 4, 16


def tiny(**overrides: Any) -> EVAViT:
    """Window, window, global, all in fp64, nothing zero."""
    config: dict[str, Any] = {
        "img_size": 20,
        "patch_size": 4,
        "embed_dim": HEADS * HEAD_DIM,
        "depth": 3,
        "num_heads": HEADS,
        "mlp_ratio": 2.0,
        "window_size": 3,
        "window_block_indexes": (0, 1),
        "pretrain_img_size": 12,
    }
    torch.manual_seed(1)
    model = EVAViT(**{**config, **overrides}).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def score(model: EVAViT, x: Tensor, **kwargs: Any) -> Tensor:
    return torch.stack(head_scores(model, "entropy", [x], progress=False, **kwargs).scores)


def windows(x: Tensor, grid: tuple[int, int], size: int) -> tuple[Tensor, Tensor]:
    """(B, H, N, D) as padded windows (B, H, W, size^2, D), and which of them are real tokens."""
    h, w = grid
    pad = (0, 0, 0, -w % size, 0, -h % size)
    real = F.pad(torch.ones(1, 1, h, w, 1), pad)

    def split(t: Tensor) -> Tensor:
        b, c, rows, cols, d = t.shape
        t = t.view(b, c, rows // size, size, cols // size, size, d)
        return t.transpose(3, 4).reshape(b, c, -1, size * size, d)

    return split(F.pad(x.unflatten(2, grid), pad)), split(real)[0, 0, ..., 0].bool()


def turned(x: Tensor, rope: Rope) -> Tensor:
    pair = x.unflatten(-1, (-1, 2))
    turn = torch.complex(rope.cos[:, ::2], rope.sin[:, ::2])
    return torch.view_as_real(torch.view_as_complex(pair.contiguous()) * turn).flatten(-2)


def explicit_entropy(q: Tensor, k: Tensor, grid: Any, rope: Rope, size: int) -> Tensor:
    """Mean entropy (H,) from whole maps in which the pads are tokens like any other."""
    real = torch.ones(1, q.shape[2], dtype=torch.bool)
    q, k = q[:, :, None], k[:, :, None]
    if size:
        (q, real), (k, _) = (windows(x[:, :, 0], grid, size) for x in (q, k))
    p = (turned(q, rope) @ turned(k, rope).transpose(-1, -2) / math.sqrt(HEAD_DIM)).softmax(-1)
    rows = -(p * p.log()).sum(-1)
    return rows[:, :, real].mean((0, 2))


@pytest.mark.parametrize("tile", [1, 1 << 22])
@pytest.mark.parametrize("grid", [(5, 7), (3, 3), (6, 4)])
def test_entropy_of_explicit_maps(
    grid: tuple[int, int], tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entropy, "TILE", tile)
    model, x = tiny().eval(), torch.randn(2, 3, 4 * grid[0], 4 * grid[1]).double()
    trace = model.trace(x, qk=True)
    rows = []
    for block, (q, k) in zip(model.blocks, trace.qk, strict=True):
        size = block.attn.window_size
        shape = (size, size) if size else grid
        rows.append(explicit_entropy(q, k, grid, model.rope(shape, q), size))
    want = torch.stack(rows).detach()
    got = score(model, x, important="high", unit="nats")
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    limit = torch.tensor([9, 9, grid[0] * grid[1]], dtype=torch.float64).log()[:, None]
    for important, unit, value in (
        ("low", "nats", limit - want),
        ("high", "share", want / limit),
        ("low", "share", 1 - want / limit),
    ):
        got = score(model, x, important=important, unit=unit)
        torch.testing.assert_close(got, value, rtol=1e-9, atol=1e-12)


def test_entropy_literals() -> None:
    # Equal keys: log 3. One key far ahead: 0. Two equal ones far ahead: log 2.
    k = torch.tensor([[9.0, 0, 0, 0], [9, 0, 0, 0], [-9, 0, 0, 0]])[None, None]
    q = torch.tensor([[0.0, 0, 0, 0], [-99, 0, 0, 0], [99, 0, 0, 0]])[None, None]
    rows, limit = attention_entropy(q, k)
    assert rows[0, 0].tolist() == pytest.approx([math.log(3), 0, math.log(2)], abs=1e-5)
    assert limit.tolist() == pytest.approx([math.log(3)] * 3)


def test_entropy_of_huge_logits_and_pads() -> None:
    # One real token in a window of four. Its logit drowns in the pads, or they in it.
    window = Window((1, 1), 2, torch.zeros(1, 4))
    x = torch.tensor([900.0, 0, 0, 0])[None, None, None]
    for key, want in ((-x, math.log(3)), (x, 0)):
        assert attention_entropy(x, key, window=window)[0].item() == pytest.approx(want, abs=1e-6)


def test_entropy_counts_pads_only_where_they_are_keys() -> None:
    # A 3 x 3 grid in windows of 2: 4, 2, 2 and 1 real tokens; zero scores, so all keys weigh alike.
    zero = torch.zeros(1, 1, 9, 4)
    for pad, keys in ((torch.zeros(1, 4), (4, 4, 4, 4)), (None, (4, 2, 2, 1))):
        rows, limit = attention_entropy(zero, zero, window=Window((3, 3), 2, pad))
        for token, count in zip((0, 2, 6, 8), keys, strict=True):
            assert rows[0, 0, token].item() == pytest.approx(math.log(count), abs=1e-6)
            assert limit[token].item() == pytest.approx(math.log(count), abs=1e-6)


def test_entropy_of_one_key_is_no_nan() -> None:
    model = tiny(window_block_indexes=())
    for important in ("low", "high"):
        got = score(model, torch.randn(1, 3, 4, 4), important=important)
        assert torch.equal(got, torch.zeros(3, HEADS, dtype=torch.float64))
