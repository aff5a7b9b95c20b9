# SPDX-License-Identifier: Apache-2.0
"""A packed weight is never stale, saved or kept in training, and is freed with its module."""

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdfast
from kdfast.ops import _packed
from kdfast.testing import small_eva

C, P, ROWS = 192, 144, 50  # above LEAST_WORK, and no multiples of each other


pytestmark = pytest.mark.usefixtures("always_packed")


def layer(**options: Any) -> nn.Module:
    """A holder of one fused linear layer in evaluation."""
    model = nn.Sequential(nn.Linear(C, P, **options)).eval()
    assert len(kdfast.accelerate(model).layers) == 1
    return model


def is_packed(module: nn.Module) -> bool:
    return module in _packed._packs


def check(model: Any, dtype: torch.dtype = torch.float32, packed: bool = True) -> None:
    """A call in inference gives what the tensors as they are now say."""
    x = torch.randn(ROWS, C).to(dtype)
    with torch.no_grad():
        got, want = model(x), F.linear(x, model[0].weight, model[0].bias)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    assert is_packed(model[0]) == packed


def optimizer_step(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(torch.randn(ROWS, C)).square().sum().backward()
    optimizer.step()


def load(assign: bool) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
        model.load_state_dict(state, assign=assign)

    return change


@torch.no_grad()
def in_place(model: Any) -> None:
    model[0].weight[3, 4] += 5.0  # one element of all: the version counter sees it


@torch.no_grad()
def bias_in_place(model: Any) -> None:
    model[0].bias[3] += 5.0


def by_data(model: Any) -> None:
    model[0].weight.data.mul_(1.5)


def rows_by_data(model: Any) -> None:
    model[0].weight.data[: P // 12].zero_()


def columns_by_data(model: Any) -> None:
    model[0].weight.data[:, : C // 12].zero_()


def data_assigned(model: Any) -> None:
    model[0].weight.data = torch.randn(P, C)


def by_numpy(model: Any) -> None:
    array = model[0].weight.detach().numpy()
    array *= 2


def replaced(model: Any) -> None:
    model[0].weight = nn.Parameter(torch.randn(P, C))
    model[0].bias = None


def cast_and_back(model: Any) -> None:
    model.to(torch.bfloat16).to(torch.float32)


def other_shape(model: Any) -> None:
    model[0].weight = nn.Parameter(torch.randn(P // 2, C))
    model[0].bias = nn.Parameter(torch.randn(P // 2))


def strided(model: Any) -> None:
    model[0].weight = nn.Parameter(torch.randn(C, P).t())


def transposed_by_data(model: Any) -> None:
    weight = model[0].weight
    now = weight.data  # what comes in its place has the same memory and shape
    weight.data = now.view(C, P).t() if weight.is_contiguous() else now.t().view(P, C)


def swapped(model: Any) -> None:
    # What torch.__future__.set_swap_module_params_on_conversion does; weak references forbid it.
    torch.utils.swap_tensors(model[0].weight, nn.Parameter(torch.randn(P, C)))


def averaged(model: Any) -> None:
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    other = layer()
    average.update_parameters(other)
    average.update_parameters(other)
    check(average.module)
    model.load_state_dict(average.module.state_dict())


CHANGES: list[Callable[[Any], None]] = [
    optimizer_step, load(False), load(True), in_place, bias_in_place, by_data, rows_by_data,
    columns_by_data, data_assigned, by_numpy, replaced, cast_and_back, other_shape, strided,
    averaged, transposed_by_data, swapped,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_never_stale(change: Callable[[Any], None]) -> None:
    model = layer()
    check(model)
    for _ in range(2):
        change(model)
        check(model)


def test_unchanged_weights_are_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    real = _packed.Product
    monkeypatch.setattr(_packed, "Product", lambda *args: made.append(args) or real(*args))
    model = layer()
    for _ in range(3):
        check(model)
    assert len(made) == 1


def test_several_row_counts_and_shapes_in_turn() -> None:
    model: Any = layer()
    for shape in [(ROWS, C), (1000, C), (2, 40, C), (41, C), (3, 5, 7, C), (ROWS, C)]:
        x = torch.randn(shape)
        with torch.no_grad():
            want = F.linear(x, model[0].weight, model[0].bias)
            torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
    wide = nn.Sequential(nn.Linear(1024, 1030)).eval()
    kdfast.accelerate(wide)
    x = torch.randn(1024)
    with torch.no_grad():
        want = F.linear(x, wide[0].weight, wide[0].bias)
        torch.testing.assert_close(wide(x), want, rtol=1e-4, atol=1e-4)
    assert is_packed(wide[0])


@pytest.mark.parametrize(
    "view",
    [
        lambda: torch.randn(C, ROWS).t(),
        lambda: torch.randn(ROWS, 2 * C)[:, ::2],
        lambda: torch.randn(1, C).expand(ROWS, C),
        lambda: torch.randn(4, ROWS, C)[:, 1:],
        lambda: torch.randn(ROWS, 4, C).transpose(0, 1),
        lambda: torch.randn(ROWS * C + 1)[1:].view(ROWS, C),
    ],
)
def test_strided_inputs(view: Callable[[], Tensor]) -> None:
    model: Any = layer()
    x = view()
    with torch.no_grad():
        want = F.linear(x, model[0].weight, model[0].bias)
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
    assert is_packed(model[0])


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_go_their_own_way(how: Callable[[Any], Any]) -> None:
    model = layer()
    check(model)
    twin = how(model)
    assert not is_packed(twin[0])
    check(twin)
    for one in (model, twin):
        in_place(one)
        check(one)
        check(twin if one is model else model)


def test_tied_weights() -> None:
    model: Any = nn.Sequential(nn.Linear(C, C), nn.Linear(C, C, bias=False)).eval()
    model[1].weight = model[0].weight
    kdfast.accelerate(model)
    assert model[1].weight is model[0].weight
    for _ in range(2):
        x = torch.randn(ROWS, C)
        with torch.no_grad():
            want = F.linear(F.linear(x, model[0].weight, model[0].bias), model[0].weight)
            torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
            model[0].weight[0, 0] += 3
    assert is_packed(model[0]) and is_packed(model[1])


def test_not_in_the_state_dict_and_freed_with_the_module() -> None:
    model = layer()
    check(model)
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
    product = weakref.ref(_packed._packs[model[0]].products[0])  # type: ignore[index]
    del model
    gc.collect()
    assert product() is None


def test_freed_in_training() -> None:
    model = layer()
    check(model)
    model.train()
    with torch.no_grad():
        model(torch.randn(ROWS, C))
    assert not is_packed(model[0])  # type: ignore[index]
    model.eval()
    check(model)
    model(torch.randn(ROWS, C)).sum().backward()  # evaluation with gradients trains, too
    assert not is_packed(model[0])  # type: ignore[index]
    check(model)
    optimizer_step(model.train())
    check(model.eval())
    kdfast.restore(model)
    assert not is_packed(model[0])  # type: ignore[index]


@pytest.mark.parametrize("kind", ["vit", "eva"])
def test_blocks_free_theirs_in_training(kind: str) -> None:
    if kind == "vit":
        model: Any = tiny_vit()
        x = torch.randn(2, 3, 64, 64)
    else:
        model = small_eva(embed_dim=96, num_heads=3)
        x = torch.randn(1, 3, 96, 96)
    before = len(_packed._packs)
    with torch.no_grad():
        model.eval()(x)
        assert len(_packed._packs) > before
        model.train()(x)
    gc.collect()
    assert not any(module in _packed._packs for module in model.modules())


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_gradients_in_evaluation(trained: str) -> None:
    model: Any = layer().requires_grad_(False)
    check(model)
    getattr(model[0], trained).requires_grad_(True)
    model(torch.randn(ROWS, C)).sum().backward()
    assert getattr(model[0], trained).grad is not None
    x = torch.randn(ROWS, C, requires_grad=True)
    model.requires_grad_(False)(x).sum().backward()
    torch.testing.assert_close(x.grad, model[0].weight.sum(0).expand(ROWS, C))


def test_a_frozen_layer_is_packed_with_gradients_on() -> None:
    model: Any = layer().requires_grad_(False)
    model(torch.randn(ROWS, C))
    assert is_packed(model[0])


def test_inference_mode() -> None:
    model = layer()
    with torch.inference_mode():
        check(model)
        x = torch.randn(ROWS, C)
        made_inside = nn.Sequential(nn.Linear(C, P)).eval()
        kdfast.accelerate(made_inside)
        check(made_inside, packed=False)  # such tensors have no version to watch
    check(model)
    with torch.no_grad():
        model(x)
    in_place(model)
    with torch.inference_mode():
        check(model)


def test_functional_call() -> None:
    model: Any = layer()
    check(model)
    x = torch.randn(ROWS, C)
    for _ in range(2):
        state = {"0.weight": torch.randn(P, C), "0.bias": torch.randn(P)}
        with torch.no_grad():
            got = torch.func.functional_call(model, state, (x,))
            torch.testing.assert_close(got, F.linear(x, *state.values()), rtol=1e-4, atol=1e-4)
        check(model)
    stacked = torch.randn(3, P, C)

    def call(weight: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(model, {"0.weight": weight}, (x,))
        return out

    with torch.no_grad():
        got = torch.vmap(call)(stacked)
        want = x @ stacked.mT + model[0].bias
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_weights_given_one_after_the_other_at_one_address() -> None:
    """Each lives where the one before lived, with its version, and differs in one element."""
    model: Any = layer()
    x, weight = torch.randn(ROWS, C), torch.randn(P, C)
    places = set()
    for row in range(20):
        changed = weight.clone()
        changed[row, 1] = 100.0
        places.add(changed.data_ptr())
        with torch.no_grad():
            got = torch.func.functional_call(model, {"0.weight": changed}, (x,))
            torch.testing.assert_close(
                got, F.linear(x, changed, model[0].bias), rtol=1e-4, atol=1e-3
            )
    assert len(places) < 20


def test_strange_weights_are_torchs_own() -> None:
    model: Any = layer()
    check(model)
    model[0].weight = nn.Parameter(torch.randn(P, 2 * C)[:, :C])  # not dense
    check(model)
    model[0].weight = nn.Parameter(torch.randn(P, 1).expand(P, C))
    check(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), torch.no_grad():
        model(torch.randn(ROWS, C + 1))
    with pytest.raises(RuntimeError, match="dtype"), torch.no_grad():
        model(torch.randn(ROWS, C, dtype=torch.float64))
    model.to("meta")
    with torch.no_grad():
        assert model(torch.randn(ROWS, C, device="meta")).shape == (ROWS, P)
        with pytest.raises(RuntimeError, match="meta"):
            model(torch.randn(ROWS, C))


def test_autocast_packs_in_its_dtype() -> None:
    model: Any = layer()
    x = torch.randn(ROWS, C)
    for given in (x, x.bfloat16()):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            got, want = model(given), F.linear(given, model[0].weight, model[0].bias)
        assert got.dtype == torch.bfloat16 and is_packed(model[0])
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    # Outside of autocast torch refuses to mix dtypes, whatever is still packed.
    with torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
        model(x.bfloat16())
    check(model)
    check(model.to(torch.bfloat16), torch.bfloat16)


@pytest.mark.usefixtures("precision")
def test_torchs_settings_keep_their_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = layer()
    check(model)
    calls: list[Any] = []
    real = _packed.Product.__call__
    monkeypatch.setattr(
        _packed.Product, "__call__", lambda *args: calls.append(args) or real(*args)
    )
    with torch.backends.mkldnn.flags(enabled=False), torch.no_grad():
        model(torch.randn(ROWS, C))
    assert not calls
    torch.set_float32_matmul_precision("medium")
    with torch.no_grad():
        model(torch.randn(ROWS, C))
    assert not calls
    torch.set_float32_matmul_precision("highest")
    check(model)
    assert len(calls) == 1


def test_layers_can_be_traced_by_fx() -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, C, 16, 16), nn.Flatten(2), nn.Linear(16, 8)).eval()
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        want = model(x)
        assert len(kdfast.accelerate(model).layers) == 2
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
        traced = torch.fx.symbolic_trace(model)
        torch.testing.assert_close(traced(x), want, rtol=1e-4, atol=1e-4)


def test_threads() -> None:
    model: Any = layer()
    x = torch.randn(ROWS, C)
    want = F.linear(x, model[0].weight, model[0].bias).detach()
    wrong: list[Tensor] = []

    def work() -> None:
        for _ in range(20):
            with torch.no_grad():
                got = model(x)
            if not torch.allclose(got, want, rtol=1e-4, atol=1e-4):
                wrong.append(got)
            _packed.forget(model[0])

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def tiny_vit() -> nn.Module:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=96, depth=2, num_heads=6,
        num_classes=5,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    assert kdfast.accelerate(model).complete
    out: nn.Module = model.eval()
    return out


def test_removed_heads() -> None:
    model: Any = tiny_vit()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        model(x)
    for kept in ([0, 2, 5], [2], []):
        model.blocks[0].attn.keep_heads(kept)
        plain = copy.deepcopy(model)
        with torch.no_grad():
            got = model(x)
        plain_out = plain.requires_grad_(True)(x)  # with gradients nothing is packed
        torch.testing.assert_close(got, plain_out.detach(), rtol=1e-4, atol=1e-4)


@pytest.fixture
def one_process(tmp_path: Any) -> Iterator[None]:
    if not torch.distributed.is_available():
        pytest.skip("torch.distributed is not built")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_ddp() -> None:
    model: Any = layer()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.1)
    for _ in range(2):
        check(model.eval())
        wrapped.train()
        optimizer.zero_grad()
        wrapped(torch.randn(ROWS, C)).square().sum().backward()
        optimizer.step()
    check(model.eval())


def test_layers_without_units_are_left_to_torch() -> None:
    """oneDNN has no layout for a matrix without rows or columns."""
    model = small_eva(heads=[[0, 1]] * 3, mlp_hidden=[0, 128, 0]).eval()
    image = torch.randn(1, 3, 64, 64)
    want = model(image).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(image), want, rtol=1e-4, atol=1e-4)
