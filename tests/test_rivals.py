# SPDX-License-Identifier: Apache-2.0
"""Every way of running a model gives the model's answers, and says so where it cannot run."""

import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import Tensor, nn

from kdfast.nn.attention import FusedAttention
from kdfast.pruning import prune_heads
from kdfast.rivals import RIVALS, Loaded, Rival, Unavailable
from kdfast.rivals.plain import Plain, without_kdfast
from kdfast.rivals.rival import file_bytes, main_tensor, told, weight_bytes
from kdfast.testing import small_eva

# Largest relative error of the output, by dtype; int8 is calibrated on four pictures of noise.
NEAR = {"fp32": 1e-4, "bf16": 0.05, "int8": 0.5}
FAST = [name for name in RIVALS if not name.startswith(("compile", "freezing"))]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", depth=2, num_classes=7, img_size=32, embed_dim=48, num_heads=3
    ).eval()


@pytest.fixture(scope="module")
def pictures() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, 3, 32, 32) for _ in range(4)]


def prepared(name: str, model: nn.Module, pictures: list[Tensor]) -> Tensor:
    rival = RIVALS[name]
    for module in rival.modules:
        pytest.importorskip(module)
    found = rival.prepare(model, pictures[0], pictures)
    assert found.nbytes > 10_000
    return found.call(pictures[0])


def near(got: Tensor, want: Tensor, dtype: str) -> None:
    assert got.dtype == torch.float32 and got.shape == want.shape
    assert (got - want).norm() <= NEAR[dtype] * want.norm()


@pytest.mark.parametrize("name", FAST)
def test_answers_are_those_of_the_model(
    name: str, model: nn.Module, pictures: list[Tensor]
) -> None:
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        want = model(pictures[0])
    near(prepared(name, model, pictures), want, RIVALS[name].dtype)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) and value.dtype == torch.float32
    assert not any(isinstance(m, FusedAttention) for m in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RIVALS if name not in FAST])
def test_compiled_answers_are_those_of_the_model(
    name: str, model: nn.Module, pictures: list[Tensor]
) -> None:
    with torch.no_grad():
        want = model(pictures[0])
    near(prepared(name, model, pictures), want, RIVALS[name].dtype)
    assert torch._inductor.config.freezing is False


@pytest.mark.parametrize("name", ["eager", "onnx", "openvino", "kdfast"])
def test_pruned_models(name: str, model: nn.Module, pictures: list[Tensor]) -> None:
    pruned = prune_heads(model, [[0, 2], [1]]).eval()
    with torch.no_grad():
        want = pruned(pictures[0])
    near(prepared(name, pruned, pictures), want, "fp32")


def test_rivals_get_no_kernel_of_kdfast(
    model: nn.Module, pictures: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned = prune_heads(model, [[0, 2], [1]]).eval()
    with torch.no_grad():
        want = pruned(pictures[0])

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("kdfast's attention was called")

    monkeypatch.setattr("kdfast.ops.sdpa.pruned_attention", fail)
    with pytest.raises(AssertionError, match="was called"):
        pruned(pictures[0])
    near(RIVALS["eager"].prepare(pruned, pictures[0], pictures).call(pictures[0]), want, "fp32")
    assert all(m.backend is None for m in pruned.modules() if isinstance(m, FusedAttention))


def test_eva_runs_as_its_exported_graph() -> None:
    eva = small_eva().eval()
    x = torch.randn(1, 3, 96, 96)
    graph = without_kdfast(eva, x)
    assert not isinstance(graph, Plain)
    assert not any("kdfast" in str(node.target) for node in graph.graph.nodes)
    with torch.no_grad():
        torch.testing.assert_close(graph(x), main_tensor(eva(x)), rtol=1e-4, atol=1e-5)


def test_missing_libraries_are_named(
    model: nn.Module, pictures: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RIVALS["openvino"], "modules", ("no_such_library",))
    with pytest.raises(Unavailable, match=r"not installed: no_such_library \(pip install 'kdfast"):
        RIVALS["openvino"].prepare(model, pictures[0], pictures)


def test_another_precision_than_asked_is_no_row(
    model: nn.Module, pictures: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr(RIVALS["openvino-bf16"], "config", lambda: {})
    monkeypatch.setattr(RIVALS["openvino-bf16"], "precision", "f16")
    with pytest.raises(Unavailable, match=r"asked for f16, but OpenVINO runs (f32|bf16) here"):
        RIVALS["openvino-bf16"].prepare(model, pictures[0], pictures)


def test_a_failed_export_is_its_first_line(pictures: list[Tensor]) -> None:
    pytest.importorskip("openvino")

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight if x.sum() > 0 else x

    with pytest.raises(Unavailable, match=r"^openvino.convert_model failed: \w+: .+$") as caught:
        RIVALS["openvino"].prepare(Branches(), pictures[0], pictures)
    assert "\n" not in str(caught.value)


def test_told_keeps_reasons_and_gives_the_kind_where_there_is_no_text() -> None:
    with pytest.raises(Unavailable, match="^step failed: KeyError: no message$"), told("step"):
        raise KeyError
    with pytest.raises(Unavailable, match="^mine$"), told("step"):
        raise Unavailable("mine")


def test_sizes(model: nn.Module, tmp_path: Path) -> None:
    tied = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
    assert weight_bytes(tied) == 128
    tied[1].weight = tied[0].weight
    assert weight_bytes(tied) == 64
    for name, count in (("a.xml", 3), ("a.bin", 4), ("a-int8.xml", 5)):
        (tmp_path / name).write_bytes(b"x" * count)
    assert file_bytes(tmp_path, "a") == 7
    assert RIVALS["eager-bf16"].nbytes(model, tmp_path) * 2 == weight_bytes(model)


def test_the_tensor_of_an_output() -> None:
    x, y = torch.zeros(1), torch.ones(1)
    assert main_tensor(x) is x and main_tensor((x, y)) is x
    assert main_tensor(SimpleNamespace(logits=y, last_hidden_state=x)) is y
    assert main_tensor(SimpleNamespace(pooler_output=None, last_hidden_state=x)) is x
    with pytest.raises(TypeError, match="must hold a tensor, got dict"):
        main_tensor({})


def test_threads_are_those_of_torch(
    model: nn.Module, pictures: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    openvino = pytest.importorskip("openvino")
    seen = []
    original = openvino.Core

    class Core:
        def compile_model(self, path: Path, device: str, config: dict[str, object]) -> object:
            seen.append(config["INFERENCE_NUM_THREADS"])
            return original().compile_model(path, device, config)

    monkeypatch.setattr(sys.modules["openvino"], "Core", Core)
    prepared("openvino", model, pictures)
    assert seen == [torch.get_num_threads()]


def test_every_rival_says_what_it_is() -> None:
    for name, rival in RIVALS.items():
        assert isinstance(rival, Rival) and rival.name == name and rival.about
        assert rival.dtype in NEAR and name.endswith("bf16") == (rival.dtype == "bf16")
    assert Loaded(torch.clone).note == ""
