# SPDX-License-Identifier: Apache-2.0
"""The CUDA implementations never wait for the device and stay on it: shown on fake CUDA tensors.

Fake tensors have no values, so reading one raises; copies between devices raise here. Launches of
Triton kernels are left out, everything around them runs, on a device that is not the current one.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdfast.ops import (
    _logit_gram,
    attention_distill,
    feature_loss,
    kd_loss,
    linear_kd_loss,
    pruned_attention,
    swiglu_norm,
)
from kdfast.ops._linear_kd import chunked
from kdfast.ops._losses import scaled_gradient
from kdfast.ops.geometry import Rope, Window

jit = pytest.importorskip("triton.runtime.jit")
common = pytest.importorskip("kdfast.kernels._common")
DEVICE = torch.device("cuda", 1)
is_tensor = torch.is_tensor
READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")


class Made(TorchDispatchMode):
    """Holds every tensor with memory of its own that is made on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[int, torch.Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if is_tensor(x)}
        results = func(*args, **(kwargs or {}))
        for x in filter(is_tensor, tree_leaves(results)):
            if x.is_cuda and x.untyped_storage()._cdata not in known:
                self.tensors.setdefault(x.untyped_storage()._cdata, x)
        return results

    def sizes(self) -> list[int]:
        """Bytes of each, the largest first."""
        return sorted((x.untyped_storage().nbytes() for x in self.tensors.values()), reverse=True)


class NoSync(TorchDispatchMode):
    """Raises for what makes the host wait for the device, or the device for the host."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_device = any(x.is_cuda for x in inputs)
        if on_device and name in READS:
            raise AssertionError(f"{name} waits for the device")
        results = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(results) if isinstance(x, torch.Tensor)]
        # A number (0-dim) on the host is an argument of the launch.
        given = {x.device.type for x in inputs if x.dim()} | {x.device.type for x in made}
        if given >= {"cuda", "cpu"}:
            raise AssertionError(f"{name} copies between host and device")
        return results


@contextmanager
def fake_device() -> Iterator[None]:
    """CUDA tensors without values; launches only look where they and their tensors are."""
    common.head_table.cache_clear()
    entered: list[torch.device] = []

    @contextmanager
    def device_of(x: torch.Tensor) -> Iterator[None]:
        entered.append(x.device)
        yield
        entered.pop()

    def launch(*args: Any, **options: Any) -> None:
        tensors = [x for x in tree_leaves((args, options)) if isinstance(x, torch.Tensor)]
        places = {x.device for x in tensors} | set(entered[-1:] or [torch.device("cuda", 0)])
        if places != {DEVICE}:
            raise AssertionError(f"a launch on {places}")

    try:
        with (
            mock.patch.object(jit.KernelInterface, "__getitem__", lambda *_: launch),
            mock.patch("torch.cuda.device_of", device_of),
            # Fake tensors are made in this thread only.
            mock.patch.object(common, "in_a_thread", lambda call, *args, **kw: call(*args, **kw)),
            mock.patch("torch.cuda.is_current_stream_capturing", lambda: False),
            FakeTensorMode(),
            torch.no_grad(),
        ):
            yield
    finally:
        common.head_table.cache_clear()


def without_sync(call: Any) -> Any:
    # As before a capture: the first call brings the indices of the heads to the device.
    call()
    with NoSync():
        return call()


def made_by(call: Any) -> list[int]:
    """Bytes of every tensor that a call makes, the largest first, results included."""
    call()
    with Made() as made:
        call()
    return made.sizes()


def cuda(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def labels(rows: int) -> torch.Tensor:
    return torch.zeros(rows, device=DEVICE, dtype=torch.int64)


@pytest.mark.parametrize("geometry", ["plain", "rope", "windows"])
def test_pruned_attention(geometry: str) -> None:
    with fake_device():
        tokens = 12 if geometry == "windows" else 37
        q, k, v = cuda(2, tokens, 3, 4, 32).permute(2, 0, 3, 1, 4).unbind()
        turn = cuda(4 if geometry == "windows" else tokens - 1, 32, dtype=torch.float32)
        rope = {"plain": None, "rope": Rope(turn, turn, 1), "windows": Rope(turn, turn)}[geometry]
        window = Window((3, 4), 2, cuda(4, 32)) if geometry == "windows" else None
        args = ([2, 0], *pruned_attention.geometry_args(rope, window, 0.5))
        out, lse = without_sync(lambda: pruned_attention._cuda(q, k, v, *args, None))
        assert isinstance(out, FakeTensor) and out.is_cuda
        without_sync(lambda: pruned_attention._cuda_bwd(out, q, k, v, out, lse, *args, None, False))
        without_sync(
            lambda: pruned_attention.pruned_attention(
                q, k, v, heads=[2, 0], rope=rope, window=window, backend="fused"
            )
        )


def test_bias() -> None:
    with fake_device():
        q, k, v = cuda(4, 37, 3, 4, 32).permute(2, 0, 3, 1, 4).unbind()
        args = (
            *pruned_attention.geometry_args(None, None, 0.5),
            cuda(2, 1, 37, 37).expand(2, 4, 37, 37),
        )
        out, lse = without_sync(lambda: pruned_attention._cuda(q, k, v, [2, 0], *args))
        grads = without_sync(
            lambda: pruned_attention._cuda_bwd(out, q, k, v, out, lse, [2, 0], *args, True)
        )
        assert grads[4].shape == (2, 4, 37, 37)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", attention_distill.STATS)
def test_attention_distill(kind: str, temperature: float) -> None:
    with fake_device():
        q, k, v = cuda(2, 37, 3, 4, 32).permute(2, 0, 3, 1, 4).unbind()
        turn = cuda(37, 32, dtype=torch.float32)
        side = pruned_attention.geometry_args(Rope(turn, turn), None, 0.5)
        args = (q, k, v, q, k, [2, 0], [1, 3], *side, *side[:5], temperature, kind)
        out, loss, stats = without_sync(lambda: attention_distill._cuda(*args))
        without_sync(lambda: attention_distill._cuda_bwd(out, loss, out, stats, *args))


@pytest.mark.parametrize("windows", [False, True])
def test_logit_mse_by_gram_matrices(windows: bool) -> None:
    with fake_device():
        tokens, rows = 20 * 15, 17**2 if windows else 20 * 15
        q, k, v = cuda(2, tokens, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind()
        turn = cuda(rows, 8, dtype=torch.float32)
        window = Window((20, 15), 17, cuda(4, 8)) if windows else None
        assert _logit_gram.pays(tokens, 8, 8, window)
        _, loss = without_sync(
            lambda: attention_distill.attention_distill(
                *(q, k, v, q, k),
                heads=[2, 0],
                teacher_heads=[3, 3],
                kind="logit_mse",
                rope=Rope(turn, turn),
                window=window,
            )
        )
        pairs = [x[:, :2].contiguous() for x in (q, k, q, k)]
        args: Any = (*pairs, 0.5, 0.7, *(([20, 15], 17) if windows else (None, 0)))
        loss, factors = without_sync(lambda: _logit_gram._forward(*args))
        without_sync(lambda: _logit_gram._backward(loss, factors, *args))


TARGETS = ("none", "hard", "soft")


def make_target(kind: str) -> torch.Tensor | None:
    return {"none": None, "hard": labels(9), "soft": cuda(9, 40, dtype=torch.float32)}[kind]


@pytest.mark.parametrize("reduction", kd_loss.REDUCTIONS)
@pytest.mark.parametrize("target", TARGETS)
def test_kd_loss(target: str, reduction: str) -> None:
    with fake_device():
        s, goal = cuda(9, 40), make_target(target)
        options = (4.0, 0.7, reduction, 0.1, -100)
        grad = without_sync(lambda: kd_loss._cuda(s, s, goal, *options, True))[3]
        without_sync(lambda: kd_loss._cuda_inplace(s, s.clone(), goal, *options))
        upstream = cuda(9, 1) if reduction == "none" else cuda(1).squeeze()
        without_sync(lambda: scaled_gradient("kd_loss", grad, upstream, s.dtype))
        without_sync(lambda: kd_loss.kd_loss(s, s, goal, reduction=reduction, backend="fused"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("reduction", kd_loss.REDUCTIONS)
@pytest.mark.parametrize("target", TARGETS)
def test_linear_kd_loss(target: str, reduction: str, dtype: torch.dtype) -> None:
    with fake_device():
        hidden, weight, bias = cuda(9, 8, dtype=dtype), cuda(40, 8, dtype=dtype), None
        teacher, goal = cuda(9, 40, dtype=dtype), make_target(target)
        row = cuda(9, dtype=torch.float32) if reduction == "none" else None
        args = (hidden, weight, bias, teacher, None, None, None, goal, row)
        options = (4.0, 0.7, reduction, 0.1, -100, 4, [True, True, False])
        results = without_sync(lambda: chunked(*args, *options))
        assert results[0].is_cuda and results[4].shape == weight.shape
        without_sync(
            lambda: linear_kd_loss.linear_kd_loss(hidden, weight, teacher, goal, backend="fused")
        )


@pytest.mark.parametrize("normalize", ["none", "layer", "channel"])
@pytest.mark.parametrize("kind", ["mse", "cosine", "smooth_l1"])
def test_feature_loss(kind: str, normalize: str) -> None:
    with fake_device():
        x = cuda(9, 40)
        without_sync(lambda: feature_loss._cuda(x, x, kind, normalize, True))


def test_swiglu_norm() -> None:
    with fake_device():
        gate, value = cuda(5, 2, 48).unbind(1)
        weight = cuda(40)
        out, *moments = without_sync(
            lambda: swiglu_norm._cuda(gate, value, weight, weight, 1e-6),
        )
        without_sync(lambda: swiglu_norm._cuda_bwd(out, gate, value, weight, *moments))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense waits"),
        (lambda x: x.nonzero(), "nonzero waits"),
        (lambda x: bool((x > 0).any()), "waits"),
        (lambda x: x.cpu(), "copies between"),
        (lambda x: torch.ones(3).to(x.device), "copies between"),
        (lambda x: x[torch.tensor([0, 2])], "copies between"),
    ],
)
def test_a_sync_is_seen(call: Any, match: str) -> None:
    with fake_device(), NoSync():
        x = cuda(4, 4)
        with pytest.raises(AssertionError, match=match):
            call(x)


def test_a_launch_elsewhere_is_seen() -> None:
    with fake_device():
        x = cuda(9, 40)
        launch = common.total_kernel[(1,)]
        with torch.cuda.device_of(x):
            launch(x, 3, option=x)
            with pytest.raises(AssertionError, match="a launch on"):
                launch(x, x.to("cuda:0"))
        with pytest.raises(AssertionError, match="a launch on"):
            launch(x)


@pytest.mark.parametrize("turned", [False, True])
def test_attention_makes_its_results_and_turned_copies(turned: bool) -> None:
    """Nothing for the gathered heads and the packed projection, and nothing N x N."""
    with fake_device():
        q, k, v = cuda(2, 37, 3, 4, 32).permute(2, 0, 3, 1, 4).unbind()
        table = cuda(37, 32, dtype=torch.float32)
        rope = Rope(table, table) if turned else None
        args = ([2, 0], *pruned_attention.geometry_args(rope, None, 0.5))
        kept, whole, row = 2 * 2 * 37 * 32 * 2, 2 * 37 * 4 * 32 * 2, 2 * 2 * 37 * 4
        out, lse = pruned_attention._cuda(q, k, v, *args, None)
        # out, the rotated keys; lse.
        made = made_by(lambda: pruned_attention._cuda(q, k, v, *args, None))
        assert made == [kept] * (1 + turned) + [row]
        # dq, dk and dv of all heads; rotated keys and queries; delta; no parts of a pad value.
        made = made_by(
            lambda: pruned_attention._cuda_bwd(out, q, k, v, out, lse, *args, None, False)
        )
        assert [size for size in made if size] == [whole] * 3 + [kept] * (2 * turned) + [row]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", attention_distill.STATS)
def test_distances_make_no_map(kind: str, temperature: float) -> None:
    def sizes(tokens: int) -> tuple[list[int], list[int]]:
        q, k, v = cuda(1, tokens, 3, 4, 32).permute(2, 0, 3, 1, 4).unbind()
        side = pruned_attention.geometry_args(None, None, 0.5)
        args = (q, k, v, q, k, [2, 0], [1, 3], *side, *side[:5], temperature, kind)
        out, loss, stats = attention_distill._cuda(*args)
        return (
            made_by(lambda: attention_distill._cuda(*args)),
            made_by(lambda: attention_distill._cuda_bwd(out, loss, out, stats, *args)),
        )

    with fake_device():
        for few, many in zip(sizes(500), sizes(1000), strict=True):
            assert sum(many) <= 2 * sum(few)
            # dq, dk and dv of all heads at most, where a map of two heads has 8 MB.
            assert sum(many) < 3 * 1000 * 4 * 32 * 2 + 20000


def test_long_rows_of_logit_mse_make_no_map() -> None:
    with fake_device():
        q, k, v = cuda(1, 1024, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind()
        call = attention_distill.attention_distill
        sizes = made_by(
            lambda: call(q, k, v, q, k, heads=[2, 0], teacher_heads=[1, 1], kind="logit_mse")
        )
        assert sizes[0] < 1024**2 // 4


@pytest.mark.parametrize("inplace", [False, True])
def test_kd_loss_makes_one_gradient_or_none(inplace: bool) -> None:
    with fake_device():
        s, t, goal = cuda(9, 4000), cuda(9, 4000), labels(9)
        options = (4.0, 0.7, "batchmean", 0.1, -100)
        sizes = made_by(
            lambda: (
                kd_loss._cuda_inplace(s, t, goal, *options)
                if inplace
                else kd_loss._cuda(s, t, goal, *options, True)
            )
        )
        assert sum(sizes) - (0 if inplace else s.nbytes) < 200


@pytest.mark.parametrize("reduction", kd_loss.REDUCTIONS)
def test_linear_kd_loss_makes_the_logits_of_a_chunk(reduction: str) -> None:
    with fake_device():
        hidden, weight = cuda(64, 8), cuda(4000, 8)
        given = (hidden, weight, None, None, hidden, weight, None, labels(64), None)
        options = (4.0, 0.7, reduction, 0.1, -100, 4, [True, True, False])
        sizes = made_by(lambda: chunked(*given, *options))
        # Logits of both sides for 4 rows, and d weight in fp32.
        assert sizes[0] == 4000 * 8 * 4 and sizes.count(4 * 4000 * 2) >= 2
        assert 64 * 4000 * 2 not in sizes and sizes[1] <= 4000 * 8 * 2


def test_heads_come_to_the_device_before_a_graph_owns_its_memory() -> None:
    with fake_device():
        q, k, v = cuda(1, 37, 3, 4, 32).permute(2, 0, 3, 1, 4).unbind()
        side = pruned_attention.geometry_args(None, None, 0.5)
        brought: list[Any] = []

        def other(call: Any, heads: tuple[int, ...], **options: Any) -> torch.Tensor:
            brought.append((heads, options["device"]))
            table: torch.Tensor = call(heads, **options)
            return table

        with mock.patch.object(common, "in_a_thread", other):
            for _ in range(2):
                pruned_attention._cuda(q, k, v, None, *side, None)
                args = (q, k, v, q, k, [2, 0], [1, 3], *side, *side[:5], 1.0, "kl")
                attention_distill._cuda(*args)
        assert brought == [(heads, DEVICE) for heads in ((0, 1, 2, 3), (2, 0), (1, 3))]
        with mock.patch("torch.cuda.is_current_stream_capturing", lambda: True):
            pruned_attention._cuda(q, k, v, [2, 0], *side, None)
            with pytest.raises(RuntimeError, match=r"heads \[3\] are new on cuda:1"):
                pruned_attention._cuda(q, k, v, [3], *side, None)


def test_a_thread_of_its_own() -> None:
    threads = []
    common.in_a_thread(lambda x: threads.append((x, threading.get_ident())), 3)
    assert threads[0][0] == 3 and threads[0][1] != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        common.in_a_thread(lambda: 1 // 0)
