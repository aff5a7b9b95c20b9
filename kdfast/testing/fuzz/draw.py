# SPDX-License-Identifier: Apache-2.0
"""Random arguments of the ops.

B batch, H heads, N tokens, D head dim, C classes or channels.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kdfast
from kdfast import Rope, Window
from kdfast.ops.attention_distill import STATS
from kdfast.ops.attention_entropy import attention_entropy

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Call:
    """A valid call: a function of tensors and of a backend, and the tensors."""

    name: str
    function: Callable[..., Any]  # function(*inputs, backend=...)
    inputs: list[Tensor]

    def cast(self, dtype: torch.dtype) -> list[Tensor]:
        """The floating inputs in another dtype."""
        return [x.to(dtype) if x.is_floating_point() else x for x in self.inputs]


class Draw:
    """Draws calls; the same seed draws the same ones."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)
        self.torch = torch.Generator().manual_seed(self.random.getrandbits(60))
        self.dtype = self.random.choice(FLOATING)

    def maybe(self, share: float = 0.5) -> bool:
        """True with this probability."""
        return self.random.random() < share

    def size(self, most: int, least: int = 1) -> int:
        """A size, often the smallest or one beside a multiple of 16."""
        near = [x for x in (least, 15, 16, 17, 33) if least <= x <= most]
        return self.random.choice(near) if self.maybe(0.4) else self.random.randint(least, most)

    def numbers(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers with strides that an op may meet: permuted, sliced, expanded."""
        dtype = dtype or self.dtype
        style = self.random.choice(("plain", "plain", "permuted", "sliced", "offset"))
        if style == "permuted" and len(shape) > 1:
            i, j = sorted(self.random.sample(range(len(shape)), 2))
            turned = list(shape)
            turned[i], turned[j] = turned[j], turned[i]
            return self.plain(turned, dtype).transpose(i, j)
        if style == "sliced":
            step = self.random.randint(2, 3)
            return self.plain([*shape[:-1], shape[-1] * step], dtype)[..., ::step]
        if style == "offset":
            return self.plain([*shape[:-1], shape[-1] + 1], dtype)[..., 1:]
        return self.plain(shape, dtype)

    def plain(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Normal numbers, contiguous."""
        return torch.randn(shape, generator=self.torch, dtype=torch.float64).to(dtype)

    def heads(self, count: int) -> list[int] | None:
        """Some of the heads in any order, or None."""
        if count == 0 or self.maybe(0.4):
            return None
        return self.random.sample(range(count), self.random.randint(1, count))

    def rope(self, rows: int, dim: int, prefix: int = 0) -> Rope | None:
        """Tables for ``rows``, perhaps without those of the prefix."""
        if dim % 2 or self.maybe():
            return None
        left_out = prefix if self.maybe() else 0
        width = dim if self.maybe(0.7) else 2 * self.random.randint(1, dim // 2)
        angle = self.plain((rows - left_out, width), torch.float32)
        layout = self.random.choice(("interleaved", "half"))
        return Rope(angle.cos(), angle.sin(), prefix, layout)

    def window(self, heads: int, dim: int) -> tuple[Window | None, int]:
        """Windows of a grid and its number of tokens; or none, and any number."""
        if self.maybe(0.6):
            return None, self.size(70, 0)
        grid = self.size(8), self.size(8)
        pad = self.plain((heads, dim), self.dtype) if self.maybe() else None
        return Window(grid, self.size(9), pad), grid[0] * grid[1]

    def scale(self) -> float | None:
        """A factor of the scores."""
        return self.random.choice((None, None, 0.3, -0.2, 0.0))

    def call(self) -> Call:
        """A valid call of any op."""
        return self.random.choice(CALLS)(self)


def _geometry(d: Draw) -> tuple[list[int], dict[str, Any]]:
    batch, heads, dim = d.size(3, 0), d.size(4), d.size(40)
    window, tokens = d.window(heads, dim)
    prefix = d.random.randint(0, tokens) if window is None and d.maybe(0.3) else 0
    rows = tokens if window is None else window.size**2
    rope = d.rope(rows, dim, prefix)
    return [batch, heads, tokens, dim], {"window": window, "rope": rope, "scale": d.scale()}


def pruned_attention(d: Draw) -> Call:
    """A call with any geometry, or with a bias."""
    shape, options = _geometry(d)
    batch, heads, tokens, _ = shape
    inputs = [d.numbers(*shape) for _ in range(3)]
    if options["window"] is None and tokens and d.maybe(0.4):
        groups = d.random.choice([g for g in range(1, batch + 1) if batch % g == 0] or [1])
        bias = d.numbers(groups, heads, tokens, tokens)
        if d.maybe():
            bias = torch.where(d.plain(bias.shape, torch.float32) > 1, -torch.inf, bias)
        inputs.append(bias)
    kept = d.heads(heads)

    def function(
        q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, **backend: Any
    ) -> Any:
        return kdfast.pruned_attention(q, k, v, heads=kept, bias=bias, **options, **backend)

    return Call("pruned_attention", function, inputs)


def attention_distill(d: Draw) -> Call:
    """A call of any kind, with a teacher of another size and dtype."""
    shape, options = _geometry(d)
    batch, heads, tokens, dim = shape
    kept, count, wide = d.heads(heads), d.size(4), dim if d.maybe() else d.size(40)
    prefix = 0 if options["rope"] is None else options["rope"].prefix
    rows = tokens if options["window"] is None else options["window"].size ** 2
    same = wide == dim and d.maybe()
    teacher_rope = options["rope"] if same else d.rope(rows, wide, prefix)
    if teacher_rope is None and not same and options["rope"] is not None:
        options["rope"] = None
    mapped = [d.random.randrange(count) for _ in range(heads if kept is None else len(kept))]
    other = d.dtype if d.maybe(0.7) else d.random.choice(FLOATING)
    teacher = [d.numbers(batch, count, tokens, wide, dtype=other) for _ in range(2)]
    more: dict[str, Any] = {
        "kind": d.random.choice(tuple(STATS)),
        "temperature": d.random.choice((1.0, 0.5, 3.0)),
        "teacher_rope": teacher_rope,
    }

    def function(q: Tensor, k: Tensor, v: Tensor, tq: Tensor, tk: Tensor, **backend: Any) -> Any:
        both = {**options, **more, **backend}
        return kdfast.attention_distill(q, k, v, tq, tk, heads=kept, teacher_heads=mapped, **both)

    return Call("attention_distill", function, [*(d.numbers(*shape) for _ in range(3)), *teacher])


def entropy(d: Draw) -> Call:
    """A call with any geometry."""
    shape, options = _geometry(d)

    def function(q: Tensor, k: Tensor, **backend: Any) -> Any:
        return attention_entropy(q, k, **options, **backend)

    return Call("attention_entropy", function, [d.numbers(*shape) for _ in range(2)])


def _target(d: Draw, rows: Sequence[int], classes: int) -> tuple[Tensor | None, int]:
    kind = d.random.choice(("none", "hard", "hard", "soft"))
    ignored = d.random.choice((-100, -1)) if kind == "soft" or d.maybe() else 0
    if kind == "none":
        return None, ignored
    if kind == "soft":
        return d.numbers(*rows, classes).softmax(-1), ignored
    labels = torch.randint(0, classes, tuple(rows), generator=d.torch)
    return torch.where(torch.rand(labels.shape, generator=d.torch) < 0.3, ignored, labels), ignored


def _loss_options(d: Draw, ignore_index: int) -> dict[str, Any]:
    return {
        "temperature": d.random.choice((0.01, 0.5, 1.0, 4.0, 100.0)),
        "alpha": d.random.choice((0.0, 0.3, 1.0)),
        "reduction": d.random.choice(("batchmean", "mean", "sum", "none")),
        "label_smoothing": d.random.choice((0.0, 0.1, 1.0)),
        "ignore_index": ignore_index,
    }


def kd_loss(d: Draw) -> Call:
    """A call with any target, with class weights or without."""
    rows, classes = [d.size(9, 0) for _ in range(d.random.randint(0, 2))], d.size(80)
    target, ignored = _target(d, rows, classes)
    options = _loss_options(d, ignored)
    weight = [] if target is None or d.maybe(0.7) else [d.numbers(classes).abs()]

    inplace = d.dtype in (torch.float32, torch.bfloat16) and d.maybe(0.3)

    def function(s: Tensor, t: Tensor, *rest: Tensor, backend: str) -> Any:
        over = inplace and backend == "fused"
        s = s.contiguous() * 1 if over else s
        y, w = [*rest, None, None][:2]
        return kdfast.kd_loss(s, t, y, **options, class_weight=w, inplace=over, backend=backend)

    logits = [d.numbers(*rows, classes) for _ in range(2)]
    return Call("kd_loss", function, logits if target is None else [*logits, target, *weight])


def multilabel_kd_loss(d: Draw) -> Call:
    """A call with weights."""
    shape = [d.size(9, 0), d.size(40)]
    options: dict[str, Any] = {
        "temperature": d.random.choice((0.5, 1.0, 4.0)),
        "alpha": d.random.choice((0.0, 0.3, 1.0)),
        "reduction": d.random.choice(("mean", "sum", "none")),
    }

    def function(s: Tensor, t: Tensor, y: Tensor, w: Tensor, p: Tensor, **backend: Any) -> Any:
        more = {**options, **backend}
        return kdfast.multilabel_kd_loss(s, t, y, class_weight=w, pos_weight=p, **more)

    inputs = [d.numbers(*shape), d.numbers(*shape), d.numbers(*shape).sigmoid()]
    return Call(
        "multilabel_kd_loss", function, [*inputs, *(d.numbers(shape[1]).abs() for _ in "wp")]
    )


def linear_kd_loss(d: Draw) -> Call:
    """A call with a teacher's logits, in chunks."""
    rows, classes, features = [d.size(20, 0)], d.size(40), d.size(20)
    target, ignored = _target(d, rows, classes)
    options = {**_loss_options(d, ignored), "chunk": d.random.choice((None, 1, 7))}

    def function(h: Tensor, w: Tensor, t: Tensor, y: Tensor | None = None, **backend: Any) -> Any:
        return kdfast.linear_kd_loss(h, w, t, y, **options, **backend)

    inputs = [d.numbers(*rows, features), d.numbers(classes, features), d.numbers(*rows, classes)]
    return Call("linear_kd_loss", function, inputs if target is None else [*inputs, target])


def feature_loss(d: Draw) -> Call:
    """A call of any kind and normalisation."""
    shape = [d.size(9, 0) for _ in range(d.random.randint(0, 2))] + [d.size(80)]
    options: dict[str, Any] = {
        "kind": d.random.choice(("mse", "cosine", "smooth_l1")),
        "normalize": d.random.choice((None, "layer", "channel")),
    }

    def function(s: Tensor, t: Tensor, **backend: Any) -> Any:
        return kdfast.feature_loss(s, t, **options, **backend)

    return Call("feature_loss", function, [d.numbers(*shape) for _ in range(2)])


def swiglu_norm(d: Draw) -> Call:
    """A call with padding, or without."""
    width = d.size(80)
    channels = width if d.maybe() else d.random.randint(1, width)
    shape = [d.size(9, 0) for _ in range(d.random.randint(0, 2))] + [width]
    inputs = [d.numbers(*shape), d.numbers(*shape), d.numbers(channels), d.numbers(channels)]
    return Call("swiglu_norm", kdfast.swiglu_norm, inputs)


def head_gather(d: Draw) -> Call:
    """A call along any dimension."""
    count, head_dim, dim = d.size(5), d.size(9), d.random.randint(0, 2)
    shape = [d.size(6, 0) for _ in range(3)]
    shape[dim] = count * head_dim
    kept = d.heads(count) or [0]

    def function(x: Tensor, **backend: Any) -> Any:
        return kdfast.head_gather(x, kept, head_dim=head_dim, dim=dim, **backend)

    return Call("head_gather", function, [d.numbers(*shape)])


def head_gather_block(d: Draw) -> Call:
    """A call with one to three tensors."""
    count, head_dim = d.size(5), d.size(9)
    kept, inputs, dims = d.heads(count) or [0], [], []
    for _ in range(d.random.randint(1, 3)):
        dims.append(d.random.randint(0, 1))
        shape = [d.size(6), d.size(6)]
        shape[dims[-1]] = count * head_dim
        inputs.append(d.numbers(*shape))

    grad = d.maybe()  # where a gradient is wanted, every tensor has a call of its own

    def function(*x: Tensor, **backend: Any) -> Any:
        with torch.set_grad_enabled(grad):
            return tuple(kdfast.head_gather_block(x, kept, head_dim=head_dim, dims=dims, **backend))

    return Call("head_gather_block", function, inputs)


CALLS = (
    *(pruned_attention, pruned_attention, attention_distill, attention_distill, entropy),
    *(kd_loss, multilabel_kd_loss, linear_kd_loss, feature_loss, swiglu_norm),
    *(head_gather, head_gather_block),
)
