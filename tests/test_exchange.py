# SPDX-License-Identifier: Apache-2.0
"""Gradients averaged over gloo processes during the backward, also where one runs out of memory."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kdfast.testing.ranks import in_ranks
from kdfast.trainer import exchange as exchange_file
from kdfast.trainer.exchange import Exchange
from kdfast.trainer.feed import Batch
from kdfast.trainer.step import MeanOfBatches, Prepared

CPU = torch.device("cpu")
WIDTH, IMAGES, FORWARDS = 4, 4, 3


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket for every layer of 80 bytes."""
    monkeypatch.setattr(exchange_file, "BUCKET", 80)


class Fault(torch.autograd.Function):
    """The identity, which tells when its gradient comes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, told: Any) -> Tensor:
        ctx.told = told
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.told()
        return grad, None


class Stack(nn.Module):
    """Four layers; the third backward of the last rank may fail, or a forward."""

    def __init__(self, place: str = "", piece: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.unused = nn.Parameter(torch.ones(3))
        self.place, self.piece = place, piece
        self.forwards, self.failures = 0, 0

    def _fail(self, place: str, number: int) -> None:
        if self.place == place and number == self.piece and not self.failures:
            self.failures += 1
            raise torch.OutOfMemoryError("simulated")

    def forward(self, images: Tensor, labels: Any, epoch: int) -> dict[str, Tensor]:
        number = self.forwards
        self.forwards += 1
        x = images
        for i, layer in enumerate(self.layers):
            x = Fault.apply(layer(x).tanh(), lambda i=i: self._fail(f"backward {i}", number))
        self._fail("forward", number)
        return {"total": x.square().sum(1).mean()}


def batches(world: int, rank: int) -> list[Batch]:
    every = torch.randn(world, FORWARDS, IMAGES, WIDTH, generator=torch.Generator().manual_seed(1))
    return [Batch(x, None, list(range(IMAGES)), [""] * IMAGES) for x in every[rank]]


def prepared(module: nn.Module, world: int, exchange: Exchange | None) -> Prepared:
    accelerator: Any = SimpleNamespace(
        num_processes=world, device=CPU, backward=lambda loss: loss.backward()
    )
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    weights = (1 / FORWARDS,) * FORWARDS
    together = world * FORWARDS * IMAGES
    return Prepared(
        "stack", accelerator, module, optimizer, together, weights, lambda: False, exchange
    )


def whole_gradient(world: int) -> list[Tensor]:
    """Of the mean loss of all images, in one process."""
    module = Stack()
    images = torch.cat([batch.images for rank in range(world) for batch in batches(world, rank)])
    module(images, None, 0)["total"].backward()
    return [p.grad for p in module.layers.parameters()]


class Counted:
    """Collectives that a process takes part in, by name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        for name in ("all_reduce", "broadcast"):
            monkeypatch.setattr(dist, name, self._noting(name, getattr(dist, name)))

    def _noting(self, name: str, call: Any) -> Any:
        def noted(*args: Any, **options: Any) -> Any:
            self.names.append(name)
            return call(*args, **options)

        return noted


PLACES = ["", "forward", "backward 3", "backward 1", "backward 0"]


@pytest.mark.parametrize("world", [2, 3])
def test_out_of_memory_anywhere(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever one process fails, all end with the gradient of all images, and nobody waits."""
    counted = Counted(monkeypatch)

    def attempt(place: str, piece: int, rank: int) -> None:
        module = Stack(place if rank == world - 1 else "", piece)
        exchange = Exchange(module, world, CPU)
        counted.names.clear()
        step = MeanOfBatches()
        result = step(prepared(module, world, exchange), iter(batches(world, rank)), 0)
        attempts = 2 if place else 1
        assert step.parts == attempts
        # The same in all processes: a bucket for each layer and one for what is left, and a word.
        assert counted.names == ["all_reduce"] * 6 * attempts
        for p, wanted in zip(module.layers.parameters(), whole_gradient(world), strict=True):
            torch.testing.assert_close(p.grad, wanted)
        assert module.unused.grad is None
        assert set(result.losses) == {"total"}

    def work(rank: int) -> None:
        for place in PLACES:
            for piece in range(FORWARDS):
                attempt(place, piece, rank)

    assert in_ranks(world, work) == [""] * world


def test_several_fail_at_different_places() -> None:
    def work(rank: int) -> None:
        module = Stack(["forward", "backward 2", "backward 0"][rank], [0, 2, 1][rank])
        step = MeanOfBatches()
        step(prepared(module, 3, Exchange(module, 3, CPU)), iter(batches(3, rank)), 0)
        assert step.parts == 2 and module.failures == 1
        for p, wanted in zip(module.layers.parameters(), whole_gradient(3), strict=True):
            torch.testing.assert_close(p.grad, wanted)

    assert in_ranks(3, work) == [""] * 3


def test_all_end_where_single_images_do_not_fit() -> None:
    class Never(Stack):
        def forward(self, images: Tensor, labels: Any, epoch: int) -> dict[str, Tensor]:
            raise torch.OutOfMemoryError("simulated")

    def work(rank: int) -> None:
        module = Never() if rank else Stack()
        step = MeanOfBatches()
        step(prepared(module, 2, Exchange(module, 2, CPU)), iter(batches(2, rank)), 0)

    words = "RuntimeError: stack: out of memory with single images; a smaller model"
    assert all(ending.startswith(words) for ending in in_ranks(2, work))


def test_other_errors_are_raised() -> None:
    class Wrong(Stack):
        def forward(self, images: Tensor, labels: Any, epoch: int) -> dict[str, Tensor]:
            raise RuntimeError("a bug")

    def work(rank: int) -> None:
        module = Wrong()
        step = MeanOfBatches()
        step(prepared(module, 2, Exchange(module, 2, CPU)), iter(batches(2, rank)), 0)

    assert in_ranks(2, work) == ["RuntimeError: a bug"] * 2


def test_buckets_leave_during_the_last_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)

    def work(rank: int) -> None:
        module = Stack()
        # Sent first, and full only after the backward: it would hold up all others.
        del module.unused
        exchange = Exchange(module, 2, CPU)
        step = prepared(module, 2, exchange)
        seen: list[tuple[int, int]] = []
        module._fail = lambda place, number: seen.append((number, len(counted.names)))
        counted.names.clear()
        MeanOfBatches()(step, iter(batches(2, rank)), 0)
        early = [sent for number, sent in seen if number < FORWARDS - 1]
        assert early == [0] * len(early)
        # A forward, and the layers from the last to the first: one bucket more each time.
        assert [sent for number, sent in seen if number == FORWARDS - 1] == [0, 0, 1, 2, 3]

    assert in_ranks(2, work) == [""] * 2


def test_a_parameter_that_some_ranks_reach() -> None:
    """Mean over all ranks where any has a gradient, as for a head without labels in one rank."""

    def work(rank: int) -> None:
        module = nn.ParameterDict({name: nn.Parameter(torch.ones(2)) for name in "abc"})
        exchange = Exchange(module, 3, CPU)
        for attempt in range(2):
            exchange.begin()
            with exchange.sending():
                total = module["a"].sum() * (rank + 1)
                if rank == 1:
                    total = total + module["b"].sum() * 6
                total.backward()
            assert exchange.finish(failed=False, largest=rank + attempt) == (False, 2 + attempt)
            assert module["a"].grad.tolist() == [2, 2] and module["b"].grad.tolist() == [2, 2]
            assert module["c"].grad is None

    assert in_ranks(3, work) == [""] * 3


def test_all_begin_with_the_module_of_the_first() -> None:
    """Parameters of any memory format and dtype, and buffers again in each step."""

    class Mixed(nn.Module):
        def __init__(self, rank: int) -> None:
            super().__init__()
            torch.manual_seed(rank)
            self.conv = nn.Conv2d(2, 2, 3).to(memory_format=torch.channels_last)
            self.brief = nn.Parameter(torch.randn(3).bfloat16())
            self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
            self.norm = nn.BatchNorm1d(2)
            self.register_buffer("own", torch.tensor([float(rank)]), persistent=False)

    def work(rank: int) -> None:
        module, first = Mixed(rank), Mixed(0)
        exchange = Exchange(module, 2, CPU)
        for name, value in first.state_dict().items():
            assert torch.equal(value, module.state_dict()[name]), name
        assert module.own == rank, "a buffer that is not saved is a process's own"
        module.norm.running_mean += 1 + rank
        module.norm.num_batches_tracked += 5 + rank
        exchange.share_buffers()
        assert module.norm.running_mean.tolist() == [1, 1] and module.norm.num_batches_tracked == 5
        exchange.begin()
        with exchange.sending():
            (module.conv.weight.sum() * (1 + 2 * rank) + module.brief.sum() * (2 + rank)).backward()
        exchange.finish(failed=False, largest=1)
        assert torch.equal(module.conv.weight.grad, torch.full((2, 2, 3, 3), 2.0))
        assert module.brief.grad.tolist() == [2.5] * 3
        assert module.frozen.grad is None
        exchange.close()
        module.brief.grad = None
        module.brief.sum().backward()
        assert module.brief.grad.tolist() == [1] * 3

    assert in_ranks(2, work) == [""] * 2


def test_gradients_lie_in_memory_as_their_parameters() -> None:
    """Fused optimisers go through both in the order of memory."""

    def step(layout: torch.memory_format, exchanged: bool) -> Tensor:
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 4, 2, bias=False).to(memory_format=layout)
        optimizer = torch.optim.AdamW(conv.parameters(), lr=0.1, fused=True)
        factors = torch.randn(4, 3, 2, 2)
        if exchanged:
            exchange = Exchange(conv, 2, CPU)
            exchange.begin()
            with exchange.sending():
                (conv.weight * factors).sum().backward()
            exchange.finish(failed=False, largest=1)
        else:
            (conv.weight * factors).sum().backward()
        assert conv.weight.grad.stride() == conv.weight.stride()
        optimizer.step()
        return conv.weight.detach()

    def work(rank: int) -> None:
        wanted = step(torch.contiguous_format, False)
        for layout in (torch.contiguous_format, torch.channels_last):
            torch.testing.assert_close(step(layout, True), wanted)

    assert in_ranks(2, work) == [""] * 2


def test_a_gradient_that_comes_after_it_was_sent() -> None:
    """An error: the sum would lack a part."""

    def work(rank: int) -> None:
        layer = nn.Linear(WIDTH, WIDTH)
        exchange = Exchange(layer, 2, CPU)
        exchange.begin()
        x = torch.ones(1, WIDTH, requires_grad=True)
        for _ in range(2):
            x = checkpoint(layer, x, use_reentrant=True)
        with exchange.sending():
            x.sum().backward()

    for ending in in_ranks(2, work):
        assert ending.startswith("RuntimeError: exchange: a parameter of shape (4,")


def test_buckets() -> None:
    def sizes(tensors: list[Tensor]) -> list[int]:
        return [sum(x.numel() for x in some) for some in exchange_file._buckets(tensors)]

    assert sizes([torch.ones(n) for n in (10, 10, 30, 5)]) == [20, 30, 5]
    mixed: Iterator[list[Tensor]] = exchange_file._buckets(
        [torch.ones(3), torch.ones(2).int(), torch.ones(4)]
    )
    assert [[len(x) for x in some] for some in mixed] == [[3, 4], [2]]
