# SPDX-License-Identifier: Apache-2.0
"""timm's registered models, made small by their own options: accelerated equals plain, and back.

The sample runs always; the sweep over all names of every family with a fused class is slow.
"""

import copy
import inspect
import re
import sys
import warnings
from typing import Any

import pytest
import timm
import torch
from timm.models.vitamin import VitCfg, VitConvCfg
from torch import Tensor, nn

import kdfast
from kdfast.nn import FusedAttention

SAMPLE = [
    "vit_tiny_patch16_224", "vit_small_patch14_dinov2", "vit_base_patch16_siglip_224",
    "vit_base_patch16_clip_224", "vit_xsmall_patch16_clip_224", "vit_small_plus_patch16_dinov3",
    "vit_dlittle_patch16_reg1_gap_256", "vit_mediumd_patch16_rope_reg1_gap_256",
    "vit_small_patch16_rope_mixed_224", "vit_pe_spatial_tiny_patch16_512",
    "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224", "beit3_base_patch16_224",
    "eva_large_patch14_196", "eva02_tiny_patch14_224", "pit_ti_distilled_224",
    "naflexvit_base_patch16_gap", "hiera_tiny_224", "mobilevit_xxs", "visformer_tiny",
    "davit_tiny", "xcit_nano_12_p16_224", "beit_base_patch16_224", "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256", "swinv2_cr_tiny_ns_224", "vit_relpos_small_patch16_224",
    "tiny_vit_5m_224", "test_coatnet",
]  # fmt: skip
# Not every attention of these can go.
PARTLY = {"hiera", "davit", "xcit", "cait", "volo", "hieradet_sam2", "twins", "nextvit"}
FAMILIES = [
    "beit", "cait", "crossvit", "csatv2", "davit", "deepseek_vit", "deit", "eva", "fastvit",
    "gcvit", "hiera", "hieradet_sam2", "maxxvit", "metaformer", "mobilevit", "naflexvit", "nest",
    "pit", "qwen3_vit", "swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr",
    "tiny_vit", "vision_transformer", "vision_transformer_hybrid", "vision_transformer_relpos",
    "visformer", "vitamin", "volo", "xcit",
]  # fmt: skip


def family(name: str) -> str:
    return timm.models.model_entrypoint(name).__module__.rpartition(".")[2]


class TooBig(Exception):
    """No option of the model makes it small; its smaller siblings are swept."""


class NoAttention(Exception):
    """The model has none; some siblings do."""


STAGES = {"depths": (1, 1, 2, 1), "embed_dim": 24, "num_heads": (1, 2, 2, 3)}
# What makes families without a ``depth`` small.
SMALL: dict[str, dict[str, Any]] = {
    "davit": {"depths": (1,) * 4, "embed_dims": (32, 64, 64, 64), "num_heads": (1, 2, 2, 2)},
    "hiera": {"stages": (1, 1, 2, 1), "embed_dim": 24, "num_heads": 1, "img_size": 128},
    "pit": {"depths": (1, 1, 1)},
    "crossvit": {"depth": [[1, 1, 0]], "embed_dim": [32, 48], "num_heads": [2, 3]},
    "swin_transformer": STAGES,
    "swin_transformer_v2": STAGES,
    "swin_transformer_v2_cr": STAGES,
    "tiny_vit": {"depths": (1, 1, 2, 1), "embed_dims": (32, 64, 64, 96), "num_heads": (1, 2, 2, 3)},
    "vitamin": {
        "depth": 2,
        "embed_dim": 48,
        "num_heads": 3,
        "embed_cfg": VitCfg(
            (16, 32, 48), (1, 1, 1), 16, VitConvCfg(norm_layer="layernorm2d"), "1d"
        ),
    },
    "gcvit": {"depths": (1, 1, 2, 1), "embed_dim": 24, "num_heads": (1, 2, 2, 3)},
    "maxxvit": {"embed_dim": (32, 32, 64, 64), "depths": (1, 1, 2, 1), "stem_width": 16},
    "metaformer": {"depths": (1,) * 4, "dims": (32, 32, 64, 64)},
    "fastvit": {"layers": (1,) * 4, "embed_dims": (32, 32, 64, 64)},
}


def options(name: str) -> list[dict[str, Any]]:
    """What to try to make a model small, the most first."""
    found = re.search(r"patch(\d+)", name)
    shallow = {"depth": 2, "img_size": 4 * int(found[1]) if found else 64}
    thin = {"embed_dim": 48, "num_heads": 3}
    small = SMALL.get(family(name), shallow | thin)
    grouped = {**shallow, "embed_dim": 64, "num_heads": 4, "num_kv_heads": 2}
    narrow = [small | {"img_size": side} for side in (64, 56)]
    narrow += [small, {"depth": 2} | thin, grouped]
    return [*narrow, shallow, {"depth": 2}, {"img_size": 64}, {}]


def image_size(model: nn.Module, kwargs: dict[str, Any]) -> int:
    if "img_size" in kwargs:
        return int(kwargs["img_size"])
    cfg = model.default_cfg
    return cfg["input_size"][-1] if cfg.get("fixed_input_size") else 64


def small(name: str) -> tuple[nn.Module, Tensor]:
    """The model in fp64, with all parameters moved off their initial values, and images."""
    for kwargs in options(name):
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = timm.create_model(name, num_classes=5, **kwargs)
                size = image_size(model, kwargs)
                if kwargs:
                    model(torch.empty(2, 3, size, size))
        except Exception:  # an option that this model does not have, or not so
            continue
        if not kdfast.accelerate(model).replaced:
            raise NoAttention(name)
        if sum(parameter.numel() for parameter in model.parameters()) < 30e6:
            break
    else:
        raise TooBig(name)
    model = timm.create_model(name, num_classes=5, **kwargs).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model, torch.randn(2, 3, size, size, dtype=torch.float64)


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(5)
    model.zero_grad()
    out = model(x)
    out = out if isinstance(out, Tensor) else torch.stack(list(out))
    (out * torch.randn(out.shape, dtype=out.dtype)).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), **grads}


def check(name: str) -> kdfast.AccelerateReport:
    torch.manual_seed(0)
    model, x = small(name)
    plain = copy.deepcopy(model)
    keys = list(model.state_dict())
    report = kdfast.accelerate(model)
    fused = sum(isinstance(module, FusedAttention) for module in model.modules())
    assert fused == len(report.replaced)
    assert report.replaced or report.left
    assert list(model.state_dict()) == keys
    for training in (True, False):
        want, got = step(plain.train(training), x), step(model.train(training), x)
        assert want.keys() == got.keys()
        for key, theirs in want.items():
            error = (got[key] - theirs).abs().max()
            # A gradient of zero, such as of a key bias, is noise of the size of its terms.
            assert error <= 1e-7 * theirs.abs().max() + 1e-9 * max(1, want["out"].abs().max()), key
    assert kdfast.restore(model) == report.count
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    return report


@pytest.mark.parametrize("name", SAMPLE)
def test_sample(name: str) -> None:
    report = check(name)
    assert report.replaced
    if family(name) in PARTLY:
        assert report.left
    else:
        assert report.complete, report


@pytest.mark.slow
@pytest.mark.parametrize("own", FAMILIES)
def test_sweep(own: str) -> None:
    names = [name for name in timm.list_models() if family(name) == own]
    assert names
    failed, swept = {}, 0
    for name in names:
        try:
            check(name)
            swept += 1
        except (TooBig, NoAttention):
            continue
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
    assert swept and not failed


def test_families_are_all_that_have_a_fused_class() -> None:
    """The classes of the table are defined in files that the sweep covers, or used by them."""
    from kdfast.nn.table import FUSED

    own = {s.split(".")[2] for s in FUSED if s.startswith("timm.models.")}
    assert own <= set(FAMILIES)
    for source in FUSED:
        if source.startswith("timm."):
            path, _, cls = source.rpartition(".")
            __import__(path)
            assert inspect.isclass(getattr(sys.modules[path], cls))
