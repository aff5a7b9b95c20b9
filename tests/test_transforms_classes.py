# SPDX-License-Identifier: Apache-2.0
"""Every class that accelerate replaces under transforms and tracers, against its original."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import kdfast
from tests.test_accelerate_classes import CASES, build
from tests.test_accelerate_models import hugging_face

Arguments = tuple[Tensor, ...]
Results = list[Tensor | None]


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach() for name, x in module.named_parameters()}


def call(module: nn.Module, given: dict[str, Tensor], *args: Tensor) -> Tensor:
    out: Tensor = functional_call(module, given, args)
    return out


def gradient(module: nn.Module, args: Arguments) -> Results:
    found = grad(lambda given: call(module, given, *args).sin().sum())(parameters(module))
    return list(found.values())


def per_sample(module: nn.Module, args: Arguments) -> Results:
    x, *rest = args

    def loss(given: dict[str, Tensor], x: Tensor) -> Tensor:
        return call(module, given, x, *rest).sin().sum()

    found = vmap(grad(loss), (None, 0))(parameters(module), torch.stack((x, x.cos())))
    return list(found.values())


def ensemble(module: nn.Module, args: Arguments) -> Results:
    stacked = {name: torch.stack((x, 1.1 * x)) for name, x in parameters(module).items()}
    return [vmap(lambda given: call(module, given, *args))(stacked)]


def forward_mode(module: nn.Module, args: Arguments) -> Results:
    given, (x, *rest) = parameters(module), args
    directions = {name: y.cos() for name, y in given.items()}, x.cos()
    return list(jvp(lambda g, x: call(module, g, x, *rest), (given, x), directions))


def twice(module: nn.Module, args: Arguments) -> Results:
    x = args[0].clone().requires_grad_()
    leaves = [x, *module.parameters()]
    out = module(x, *args[1:]).sin().sum()
    first = torch.autograd.grad(out, leaves, create_graph=True, allow_unused=True)
    total = sum(g.sin().sum() for g in first if g is not None)
    return list(torch.autograd.grad(total, leaves, allow_unused=True))


def checkpointed(module: nn.Module, args: Arguments) -> Results:
    found: Results = []
    for reentrant in (True, False):
        x = args[0].clone().requires_grad_()
        checkpoint(module, x, *args[1:], use_reentrant=reentrant).sin().sum().backward()
        found.append(x.grad)
        module.zero_grad()
    return found


def traced(module: nn.Module, args: Arguments) -> Results:
    with torch.no_grad():
        graph = torch.jit.trace(module, args, check_trace=False)
        assert not any(f"{space}::" in str(graph.inlined_graph) for space in ("kdfast", "mkldnn"))
        return [graph(args[0].sin(), *args[1:])]


class Named(Tensor):
    """A subclass that does nothing."""


def subclassed(module: nn.Module, args: Arguments) -> Results:
    out = module(args[0].as_subclass(Named), *args[1:])
    assert type(out) is Named
    return [out.as_subclass(Tensor)]


def untransformed(module: nn.Module, args: Arguments) -> Results:
    return [module(args[0].sin(), *args[1:])]


# What is done to the stand-in, and what to the original, if that is something else.
TRANSFORMS: dict[str, tuple[Callable[[nn.Module, Arguments], Results], ...]] = {
    "grad": (gradient,),
    "per-sample gradients": (per_sample,),
    "vmap of parameters": (ensemble,),
    "jvp": (forward_mode,),
    "double backward": (twice,),
    "checkpoint": (checkpointed,),
    "trace": (traced, untransformed),
    "subclass": (subclassed, lambda module, args: [module(*args)]),
}


def both(case: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, Arguments]:
    """The original, its stand-in, and inputs."""
    holder, inputs = build(case)
    # timm's keeps a bias between calls in evaluation, also one of other parameters.
    holder.to(dtype).train(case == "TinyViT")
    original = copy.deepcopy(holder)[0]
    assert kdfast.accelerate(holder).complete
    return original, holder[0], tuple(x.to(dtype) for x in inputs)


def compare(transform: str, original: nn.Module, ours: nn.Module, args: Arguments) -> None:
    apply, *other = TRANSFORMS[transform]
    with sdpa_kernel(SDPBackend.MATH):  # the only one of torch that has all derivatives
        want = (*other, apply)[0](original, args)
    for got, wanted in zip(apply(ours, args), want, strict=True):
        # A parameter without any effect may have zeros or nothing.
        if wanted is None or got is None:
            assert not any(x.any() for x in (got, wanted) if x is not None)
            continue
        # The length of a padded token is 0 and has no second derivative, in torchvision as here.
        size = wanted.detach().nan_to_num().abs()
        atol = 1e-7 * (1 + float(size.max() if size.numel() else 0))
        torch.testing.assert_close(got, wanted, rtol=0, atol=atol, equal_nan=True)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("case", CASES)
def test_classes(case: str, transform: str) -> None:
    compare(transform, *both(case, torch.float64))


@pytest.mark.parametrize("case", CASES)
def test_meta(case: str) -> None:
    _, ours, args = both(case, torch.float32)
    want = ours(*args).shape
    assert copy.deepcopy(ours).to("meta")(*(x.to("meta") for x in args)).shape == want


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "name", ["ViT", "Dinov2", "CLIPVision", "SiglipVision", "Beit", "DINOv3ViT"]
)
@pytest.mark.parametrize("transform", ["per-sample gradients", "jvp", "double backward", "trace"])
def test_hugging_face(name: str, transform: str) -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, given = hugging_face(name)
            self.shape = given["pixel_values"].shape

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(pixel_values=x)[0]
            return out

    original: Any = First().double().eval()
    ours = copy.deepcopy(original)
    assert kdfast.accelerate(ours).replaced
    compare(transform, original, ours, (torch.randn(original.shape, dtype=torch.float64),))


# Its inputs are of one batch, which a graph cannot know; the exporter has no rms_norm.
OWN_BATCH = ("rope per image", "rope per head and image", "GC ViT, queries of the image")
UNKNOWN_TO_CLASSIC = ("rms q/k norm", "differential", "differential, two scalars")
FEW = ("everything", "eva02", "Swin, shifted", "Swin v2", "BEiT, both biases", "TinyViT", "MaxViT")


def agrees(path: Path, module: nn.Module, args: Arguments) -> None:
    """A file gives what the module does, for this batch and for one of twice its size."""
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for x in (args[0], torch.cat((args[0], args[0].sin()))):
        given = (x, *args[1:])
        feed = {i.name: t.numpy() for i, t in zip(session.get_inputs(), given, strict=True)}
        (got,) = session.run(None, feed)
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(got), module(*given), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[] if case in FEW else pytest.mark.slow)
        for case in CASES
        if case not in OWN_BATCH + UNKNOWN_TO_CLASSIC
    ],
)
def test_classic_onnx(case: str, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    _, ours, args = both(case, torch.float32)
    path, names = tmp_path / "model.onnx", [f"x{i}" for i in range(len(args))]
    torch.onnx.export(
        *(ours.eval(), args, path), dynamo=False, opset_version=17, input_names=names,
        dynamic_axes={"x0": {0: "batch"}},
    )  # fmt: skip
    agrees(path, ours, args)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [case for case in CASES if case not in OWN_BATCH])
def test_export_with_an_open_batch(case: str) -> None:
    _, ours, args = both(case, torch.float32)
    shapes = ({0: torch.export.Dim.DYNAMIC}, *[None] * (len(args) - 1))
    program = torch.export.export(ours.eval(), args, dynamic_shapes=shapes)
    assert "kdfast" not in str(program.graph)
    for x in (args[0], torch.cat((args[0], args[0].sin()))):
        torch.testing.assert_close(
            program.module()(x, *args[1:]), ours(x, *args[1:]), rtol=1e-4, atol=1e-5
        )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if c == FEW[2] else pytest.mark.slow) for c in FEW]
)
def test_onnx_with_an_open_batch(case: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    _, ours, args = both(case, torch.float32)
    shapes = ({0: torch.export.Dim.DYNAMIC}, *[None] * (len(args) - 1))
    path = tmp_path / "model.onnx"
    torch.onnx.export(ours.eval(), args, path, dynamo=True, verbose=False, dynamic_shapes=shapes)
    agrees(path, ours, args)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["accelerated", pytest.param("pruned", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", pytest.param("beit3_base_patch16_224",
                                                          marks=pytest.mark.slow)]
)  # fmt: skip
def test_onnx_of_models(name: str, how: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    sizes: dict[str, Any] = {"img_size": 56, "num_classes": 3, "num_heads": (2, 4)}
    if name.startswith("swin"):
        sizes |= {"embed_dim": 32, "depths": (2, 1)}
    else:
        sizes |= {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8}
    model = timm.create_model(name, **sizes).eval()
    if how == "pruned":
        scores = kdfast.head_scores(model, "magnitude")
        model = kdfast.prune_heads(model, kdfast.select_heads(scores, 0.5)).eval()
    kdfast.accelerate(model)
    path, x = tmp_path / "model.onnx", torch.randn(2, 3, 56, 56)
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False, dynamic_shapes=shapes)
    agrees(path, model, (x,))


def test_tiny_vit_after_a_forward_pass_with_gradients() -> None:
    """timm keeps a position bias in evaluation, with its graph, which nothing can copy."""
    sizes = {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 16), "num_heads": (1, 2, 2, 2)}
    model = timm.create_model("tiny_vit_5m_224", num_classes=3, **sizes).eval()
    x = torch.randn(1, 3, 64, 64)
    want = model(x)
    scores = kdfast.head_scores(model, "magnitude")
    pruned = kdfast.prune_heads(model, kdfast.select_heads(scores, 0.5)).eval()
    pruned(x)
    copy.deepcopy(pruned)
    kdfast.accelerate(model)
    model(x)
    torch.testing.assert_close(copy.deepcopy(model)(x), want, rtol=1e-4, atol=1e-5)
