# SPDX-License-Identifier: Apache-2.0
"""``python -m kdfast.testing.smoke``: whether an installed kdfast does its work, in a minute.

For a wheel in an environment of its own: the compiled kernels against the references, typed
errors, ``accelerate``, pruning, saving, and a run of the trainer. Needs the extra ``train``.
"""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

import kdfast
from kdfast.ops._library import CPU_ISA, EXTENSION
from kdfast.train import main as train

COMPILERS = ("c++", "g++", "gcc", "cc", "clang", "clang++")


def close(got: Tensor, want: Tensor) -> None:
    """Raises AssertionError unless two results of fp32 agree."""
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def small_vit() -> torch.nn.Module:
    """A ViT of two blocks with six heads each, with weights that do not fade what comes in."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embed_dim": 96, "depth": 2, "num_heads": 6}
    model: torch.nn.Module = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, num_classes=10, **sizes
    ).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    return model


def ops() -> None:
    """Values and gradients of two ops, and the types of the errors that compiled code raises."""
    for op in (attention, losses):
        results = []
        for backend in ("fused", "reference"):
            torch.manual_seed(1)
            inputs = [torch.randn(2, 3, 17, 16, requires_grad=True) for _ in range(5)]
            value = op(inputs, backend)
            results.append([value, *torch.autograd.grad(value, inputs, allow_unused=True)])
        for got, want in zip(*results, strict=True):
            if want is not None:
                close(got, want)
    x = torch.randn(1, 2, 4, 8)
    raw = torch.ops.kdfast.head_gather
    for error, call in (
        (ValueError, lambda: raw(x, [2], 1, 1)),
        (IndexError, lambda: raw_kd(torch.tensor([9, 0]))),
        (TypeError, lambda: torch.ops.kdfast.feature_loss(x.int(), x.int(), "mse", "none", True)),
    ):
        raises(error, call)


def raw_kd(labels: Tensor) -> None:
    x = torch.randn(2, 5)
    torch.ops.kdfast.kd_loss(x, x, labels, 1.0, 0.5, "batchmean", 0.0, -100, False)


def raises(error: type[Exception], call: Callable[[], object]) -> None:
    """Raises AssertionError unless the call raises exactly this type."""
    try:
        call()
    except Exception as found:
        if type(found) is error:
            return
        raise AssertionError(f"must raise {error.__name__}, got {found!r}") from found
    raise AssertionError(f"must raise {error.__name__}, raised nothing")


def attention(x: list[Tensor], backend: str) -> Tensor:
    out, loss = kdfast.attention_distill(*x, heads=[2, 0], teacher_heads=[0, 1], backend=backend)
    return out.sin().sum() + loss


def losses(x: list[Tensor], backend: str) -> Tensor:
    loss = kdfast.kd_loss(x[0], x[1], backend=backend)
    kd = loss[0] if isinstance(loss, tuple) else loss
    return kd + kdfast.feature_loss(x[2], x[3], normalize="layer", backend=backend)


def models() -> None:
    """A timm model accelerated, pruned, saved and loaded."""
    picture = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        model = small_vit()
        want = model(picture)
        print(kdfast.accelerate(model))
        close(model(picture), want)
        small = kdfast.prune_heads(
            small_vit(), kdfast.select_heads(kdfast.head_scores(small_vit(), "magnitude"), keep=0.5)
        )
        with tempfile.TemporaryDirectory() as folder:
            kdfast.save_pretrained(small, folder)
            close(kdfast.load_pretrained(folder)(picture), small(picture))


def training() -> None:
    """The trainer's run of seconds, from a teacher that it trains to the student's file."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        words = [f"output={output}", f"teacher.cache={Path(folder) / 'teachers'}"]
        code = train(["--config", "smoke", *(x for word in words for x in ("--set", word))])
        assert code == 0, f"the trainer must return 0, got {code}"
        assert (output / "student.safetensors").is_file(), "the trainer wrote no student"


def main() -> int:
    """Runs all parts; an error of one ends it with its traceback."""
    assert EXTENSION is not None, "kdfast._C is not installed: this is a pure-Python install"
    found = [name for name in COMPILERS if shutil.which(name)]
    print(f"kdfast {kdfast.__version__} of {os.path.dirname(kdfast.__file__)}")
    print(f"{CPU_ISA}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    print(f"built with {EXTENSION.build_info()}; compilers here: {', '.join(found) or 'none'}")
    for part in (ops, models, training):
        started = time.perf_counter()
        part()
        print(f"smoke: {part.__name__} passed in {time.perf_counter() - started:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
