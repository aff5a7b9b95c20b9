# SPDX-License-Identifier: Apache-2.0
"""Whole models: as published (torch's SDPA), compiled, accelerated, and with half of the heads.

Latency of a forward pass and time of a training step (forward and backward, no optimizer) in fp32.
Multiply-adds of the model stand in the case, so what pruning promises is next to what it gives.
"""

import copy
from collections.abc import Callable, Mapping

import pytest
import timm
import torch
from torch import Tensor, nn

import kdfast
from bench import session
from bench.compare import Compare

Step = Callable[[], object]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = "kdfast, half of the heads"
VARIANTS = ("kdfast", HALF, "sdpa", "compile")
SMALL = session.sized({}, {"depth": 1})
MODELS = {
    "DeiT-S": ("deit_small_patch16_224", {}),
    "ViT-B": ("vit_base_patch16_224", {}),
    "DINOv2-S/14": ("vit_small_patch14_dinov2", {"img_size": 224}),
    "EVA02-S": ("eva02_small_patch14_224", {}),
    "EVA02-L": ("eva02_large_patch14_224", {}),
    "SigLIP-B": ("vit_base_patch16_siglip_224", {}),
    "Swin-T": ("swin_tiny_patch4_window7_224", {}),
}
# Beyond the quarter of an hour of `make bench`: `make bench ARGS="-m slow --benchmark-json=FILE"`.
slow = pytest.mark.slow
# Model, batch, whether torch.compile is timed too (it compiles for half a minute).
FORWARD = session.sized(
    [
        ("DeiT-S", 1, True),
        ("DeiT-S", 4, False),
        ("ViT-B", 1, False),
        ("DINOv2-S/14", 1, False),
        ("EVA02-S", 1, False),
        ("EVA02-S", 4, False),
        ("EVA02-L", 1, False),
        ("SigLIP-B", 1, False),
        ("Swin-T", 1, False),
        ("Swin-T", 4, False),
        pytest.param("Swin-T", 8, True, marks=slow),
        pytest.param("DeiT-S", 8, True, marks=slow),
        pytest.param("DINOv2-S/14", 8, False, marks=slow),
        pytest.param("EVA02-S", 8, False, marks=slow),
        pytest.param("ViT-B", 8, False, marks=slow),
        pytest.param("EVA02-L", 8, False, marks=slow),
    ],
    [("DeiT-S", 1, True), ("EVA02-S", 1, False), ("SigLIP-B", 1, False)],
)
TRAINING = session.sized(
    [("DeiT-S", 4, True), ("ViT-B", 1, False), ("EVA02-S", 4, False), ("Swin-T", 4, False)],
    [("DeiT-S", 1, False)],
)


def build(name: str) -> nn.Module:
    entry, options = MODELS[name]
    return timm.create_model(entry, num_classes=10, **options, **SMALL).to(DEVICE).eval()


def images(model: nn.Module, batch: int) -> Tensor:
    return torch.randn(batch, 3, 224, 224, device=DEVICE)


def forward(model: Callable[[Tensor], Tensor], x: Tensor) -> Step:
    def run() -> Tensor:
        with torch.no_grad():
            return model(x)

    return run


def training(model: nn.Module, x: Tensor) -> Step:
    parameters = list(model.parameters())

    def run() -> object:
        return torch.autograd.grad(model(x).square().mean(), parameters, allow_unused=True)

    return run


def variants(
    model: nn.Module, compiled: bool
) -> tuple[dict[str, Callable[..., Tensor]], dict[str, str]]:
    """Candidates, and why some are missing."""
    fused = copy.deepcopy(model)
    assert kdfast.accelerate(fused).complete
    found = {"kdfast": fused, "sdpa": model}
    if not compiled:
        return found, {"compile": "compiles for half a minute, so other cases have it"}
    return found | {"compile": session.compiled(model)}, {}


def checking(models: Mapping[str, Callable[..., Tensor]], x: Tensor) -> session.Check:
    """Of the output for one image, also where a training step is timed."""
    near = session.near(forward(models["sdpa"], x[:1])(), 1e-3)
    return lambda name, _: near(name, forward(models[name], x[:1]))


def halved(model: nn.Module) -> nn.Module:
    """Half of the heads of every block, whichever: times do not depend on the choice."""
    kept = kdfast.select_heads(kdfast.head_scores(model, "magnitude"), 0.5)
    return kdfast.prune_heads(model, kept)


def gmacs(model: nn.Module) -> list[float]:
    """Multiply-adds in 1e9 with all heads, with half of them."""
    report = kdfast.pruning_report(model, (0.5,), image_size=224)
    return [cost.flops / 2e9 for cost in (report.full, *report.pruned)]


@pytest.mark.candidates(*VARIANTS)
@pytest.mark.parametrize(("name", "batch", "compiled"), FORWARD)
def bench_forward(compare: Compare, name: str, batch: int, compiled: bool) -> None:
    model = build(name)
    x = images(model, batch)
    found, missing = variants(model, compiled)
    case, yardsticks = f"fwd {name} batch {batch}", {}
    if name == "SigLIP-B":
        missing[HALF] = "its pool, too, keeps all its heads"
    else:
        whole, half = gmacs(model)
        yardsticks[HALF] = forward(halved(model), x)
        case += f", {batch * whole:.1f} GMACs, half of the heads {batch * half:.1f}"
    calls = {n: forward(m, x) for n, m in found.items()}
    check = checking(found, x)
    compare("accelerate", case, calls, check=check, yardsticks=yardsticks, missing=missing)


@pytest.mark.candidates(*VARIANTS)
@pytest.mark.parametrize(("name", "batch", "compiled"), TRAINING)
def bench_training(compare: Compare, name: str, batch: int, compiled: bool) -> None:
    model = build(name)
    x = images(model, batch)
    found, missing = variants(model, compiled)
    compare(
        "accelerate",
        f"fwd+bwd {name} batch {batch}",
        {n: training(m, x) for n, m in found.items()},
        check=checking(found, x),
        yardsticks={HALF: training(halved(model), x)},
        missing=missing,
    )


@pytest.mark.candidates("kdfast", "sdpa")
@pytest.mark.parametrize("batch", [1, pytest.param(8, marks=slow)])
def bench_clip(compare: Compare, batch: int) -> None:
    """The vision tower of CLIP ViT-B/16 in transformers, switched by its attention interface."""
    transformers = pytest.importorskip("transformers")
    depth = session.sized(12, 1)
    config = transformers.CLIPVisionConfig(patch_size=16, num_hidden_layers=depth)
    model = transformers.CLIPVisionModel(config).to(DEVICE).eval()
    fused = transformers.CLIPVisionModel(copy.deepcopy(config)).to(DEVICE).eval()
    fused.load_state_dict(model.state_dict())
    assert kdfast.accelerate(fused).complete
    x = images(model, batch)
    towers = {
        name: lambda x, tower=tower: tower(pixel_values=x)[0]
        for name, tower in {"kdfast": fused, "sdpa": model}.items()
    }
    calls = {name: forward(tower, x) for name, tower in towers.items()}
    compare("accelerate", f"fwd CLIP ViT-B/16 batch {batch}", calls, check=checking(towers, x))
