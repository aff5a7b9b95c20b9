# SPDX-License-Identifier: Apache-2.0
"""Whole models: kdfast against what people would pick instead, at the same number of threads.

A forward pass in fp32 and bf16, and a training step (forward and backward, no optimizer) in fp32.
The ways of running a model are those of ``kdfast.rivals``. Multiply-adds of the model stand in the
case where half of its heads are timed too, so what pruning promises is next to what it gives.
"""

import copy
import gc
import os
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

import kdfast
from bench import session
from bench.compare import Compare
from kdfast.rivals import RIVALS, Unavailable
from kdfast.testing import DRY_RUN

Step = Callable[[], object]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PASSIVE = os.environ.get("OMP_WAIT_POLICY") == "passive"
HALF = "kdfast, half of the heads"
COMPILED = ("compile", "freezing")
FP32 = ("kdfast", HALF, "eager", *COMPILED, "onnx", "openvino")
BF16 = ("kdfast", "eager", *COMPILED, "openvino")
SMALL = session.sized({}, {"depth": 1})
CLIP = "CLIP ViT-B/16"
MODELS = {
    "DeiT-S": ("deit_small_patch16_224", {}),
    "ViT-B": ("vit_base_patch16_224", {}),
    "DINOv2-S/14": ("vit_small_patch14_dinov2", {"img_size": 224}),
    "EVA02-S": ("eva02_small_patch14_224", {}),
    "Swin-T": ("swin_tiny_patch4_window7_224", {}),
    "SigLIP-B": ("vit_base_patch16_siglip_224", {}),
}
# Beyond the quarter of an hour of `make bench`: `make bench ARGS="-m slow --benchmark-json=FILE"`.
slow = pytest.mark.slow
FORWARD = session.sized(
    [
        *[(name, 1) for name in (*MODELS, CLIP)],
        *[pytest.param(name, 8, marks=slow) for name in (*MODELS, CLIP)],
    ],
    [("DeiT-S", 1), ("EVA02-S", 1), ("SigLIP-B", 1), (CLIP, 1)],
)
FORWARD_BF16 = session.sized(
    [
        *[(name, 1) for name in ("DeiT-S", "ViT-B")],
        *[pytest.param(name, 1, marks=slow) for name in (*list(MODELS)[2:], CLIP)],
        *[pytest.param(name, 8, marks=slow) for name in (*MODELS, CLIP)],
    ],
    [],  # Triton's interpreter has no bf16
)
TRAINING = session.sized(
    [
        ("DeiT-S", 4),
        *[pytest.param(name, batch, marks=slow) for name, batch in (("ViT-B", 1), ("EVA02-S", 4))],
        pytest.param("Swin-T", 4, marks=slow),
    ],
    [("DeiT-S", 1)],
)


def build(name: str) -> nn.Module:
    """A model with random weights, on the device of the benchmarks."""
    # What was compiled for the case before is not needed any more.
    torch._dynamo.reset()
    gc.collect()
    torch.manual_seed(0)
    if name == CLIP:
        transformers = pytest.importorskip("transformers")
        depth = session.sized(12, 1)
        config = transformers.CLIPVisionConfig(patch_size=16, num_hidden_layers=depth)
        tower: nn.Module = transformers.CLIPVisionModel(config)
        return tower.to(DEVICE).eval()
    entry, options = MODELS[name]
    return timm.create_model(entry, num_classes=10, **options, **SMALL).to(DEVICE).eval()


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 224, 224, device=DEVICE)


def ready(
    names: list[str], suffix: str, model: nn.Module, x: Tensor
) -> tuple[dict[str, Step], dict[str, str]]:
    """The named rivals in a dtype on this model and batch, and why some are missing."""
    found: dict[str, Step] = {}
    missing: dict[str, str] = {}
    for name in names:
        if DRY_RUN and name in COMPILED:
            missing[name] = "nothing is compiled in a dry run"
            continue
        if RIVALS[name].runtime != "torch" and not (PASSIVE or DRY_RUN):
            # Beside threads that spin OpenVINO takes nearly twice as long as alone.
            missing[name] = "torch's threads must not spin on its cores: OMP_WAIT_POLICY=passive"
            continue
        if x.is_cuda and RIVALS[name].runtime != "torch":
            missing[name] = "is timed on CPUs only"
            continue
        try:
            call = RIVALS[name + suffix].prepare(model, x, [x]).call
        except Unavailable as error:
            missing[name] = str(error)
            continue
        found[name] = lambda call=call: call(x)  # type: ignore[misc]
    return found, missing


def halved(model: nn.Module) -> nn.Module:
    """Half of the heads of every block, whichever: times do not depend on the choice."""
    kept = kdfast.select_heads(kdfast.head_scores(model, "magnitude"), 0.5)
    return kdfast.prune_heads(model, kept)


def gmacs(model: nn.Module) -> list[float]:
    """Multiply-adds in 1e9 with all heads, with half of them."""
    report = kdfast.pruning_report(model, (0.5,), image_size=224)
    return [cost.flops / 2e9 for cost in (report.full, *report.pruned)]


@pytest.mark.candidates(*FP32)
@pytest.mark.parametrize(("name", "batch"), FORWARD)
def bench_forward(compare: Compare, name: str, batch: int) -> None:
    model, x = build(name), images(batch)
    found, missing = ready([n for n in compare.selected if n != HALF], "", model, x)
    case, yardsticks = f"fwd {name} batch {batch}", {}
    if name == "SigLIP-B":
        missing[HALF] = "its pool, too, keeps all its heads"
    elif HALF in compare.selected:
        whole, half = gmacs(model)
        case += f", {batch * whole:.1f} GMACs, half of the heads {batch * half:.1f}"
        found_half, _ = ready(["kdfast"], "", halved(model), x)
        yardsticks[HALF] = found_half["kdfast"]
    check = session.near(RIVALS["eager"].prepare(model, x, [x]).call(x), 1e-3)
    compare("accelerate", case, found, check=check, yardsticks=yardsticks, missing=missing)


@pytest.mark.candidates(*BF16)
@pytest.mark.parametrize(("name", "batch"), FORWARD_BF16)
def bench_forward_bf16(compare: Compare, name: str, batch: int) -> None:
    model, x = build(name), images(batch)
    found, missing = ready(compare.selected, "-bf16", model, x)
    check = session.near(RIVALS["eager"].prepare(model, x, [x]).call(x), 0.05)
    compare("accelerate", f"fwd {name} batch {batch}, bf16", found, check=check, missing=missing)


def training(model: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], x: Tensor) -> Step:
    """Forward and backward of a model with these parameters."""

    def run() -> object:
        return torch.autograd.grad(model(x).square().mean(), parameters, allow_unused=True)

    return run


@pytest.mark.candidates("kdfast", HALF, "eager", "compile")
@pytest.mark.parametrize(("name", "batch"), TRAINING)
def bench_training(compare: Compare, name: str, batch: int) -> None:
    model, x = build(name), images(batch)
    fused, half = copy.deepcopy(model), halved(model)
    kdfast.accelerate(fused)
    kdfast.accelerate(half)
    models = {
        "kdfast": (fused, fused),
        "eager": (model, model),
        "compile": (session.compiled(model), model),
    }
    steps = {n: training(m, list(own.parameters()), x) for n, (m, own) in models.items()}
    want = model(x[:1]).detach()

    def check(candidate: str, _: Step) -> None:
        # The forward pass: gradients have tests of their own, and compiled ones of one image would
        # be compiled for nothing.
        if candidate != "compile":
            session.near(want, 1e-3)(candidate, lambda: models[candidate][0](x[:1]))

    compare(
        "accelerate",
        f"fwd+bwd {name} batch {batch}",
        steps,
        check=check,
        yardsticks={HALF: training(half, list(half.parameters()), x)},
    )
