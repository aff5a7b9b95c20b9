# SPDX-License-Identifier: Apache-2.0
"""Seeds, one thread, NaN-filled torch.empty, and the folder of shared data."""

import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from torch import nn

if not torch.cuda.is_available():
    # Triton decides when it is imported, which several packages do: before any of them.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import kdfast
from kdfast.nn import block as block_module
from kdfast.ops import _matmul, _packed
from kdfast.ops._library import EXTENSION
from kdfast.ops._matmul import Choice

# Autograd counts devices at the first backward of a process. Under FakeTensorMode it finds some
# that are not there, starts threads for them, and refuses to run in forked processes from then on.
torch.ones(1, requires_grad=True).sum().backward()

ROOT = Path(__file__).resolve().parents[1]
# Behind what is installed: tests of bench/ import it.
sys.path.append(str(ROOT))
SHARED = Path(os.environ.get("KDFAST_SHARED", ROOT.parent / "shared"))


@pytest.fixture
def picture_folder(tmp_path: Path) -> Path:
    """Five pictures of noise, of different sizes, in a folder of a folder."""
    folder = tmp_path / "pictures" / "cats"
    folder.mkdir(parents=True)
    for index in range(5):
        pixels = numpy.random.default_rng(index).integers(0, 255, (40, 50 + index, 3))
        Image.fromarray(pixels.astype(numpy.uint8)).save(folder / f"{index}.png")
    return folder.parent


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cache of trained teachers, shared by the tests of a file."""
    return tmp_path_factory.mktemp("teachers")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs time models once instead of for half a second each, and draw no curves."""
    for report in ("kdfast.recovery.report", "kdfast.distillation.report"):
        monkeypatch.setattr(
            f"{report}.interleave", lambda calls, **_: {name: [(1e-3, True)] for name in calls}
        )
    monkeypatch.setattr("kdfast.trainer.loop.draw_curves", lambda folder: None)


@pytest.fixture(autouse=True)
def _isolate() -> Iterator[None]:
    """Same seed and one thread for every test; uninitialised memory shows up as NaN."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings():
        # A missing kernel is a property of the install; a fallback of an existing one is a bug.
        warnings.simplefilter("error", kdfast.FallbackWarning)
        warnings.simplefilter("ignore", kdfast.NotCompiledWarning)
        yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture
def compiled() -> None:
    """Skips where kdfast._C is not built; with KDFAST_REQUIRE=cpu that is a failure."""
    if EXTENSION is None:
        if "cpu" in os.environ.get("KDFAST_REQUIRE", "").split(","):
            pytest.fail("KDFAST_REQUIRE=cpu, but kdfast._C is not built")
        pytest.skip("kdfast._C is not built")


@pytest.fixture
def always_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of fp32 and bf16 are packed on any machine with oneDNN."""
    if not _matmul._available():
        pytest.skip("this torch has no oneDNN")
    if _matmul.SETTING == "torch":
        pytest.skip("KDFAST_LINEAR=torch")
    always = Choice(True, True, True, True, True, "as the test wants it")
    monkeypatch.setattr(_matmul, "CHOICES", dict.fromkeys((torch.float32, torch.bfloat16), always))


@pytest.fixture(params=EXTENSION.testable_isas() if EXTENSION else ["generic"])
def isa(request: pytest.FixtureRequest, compiled: None) -> Iterator[str]:
    """Runs the test with every instruction set that this CPU has or can emulate."""
    before = EXTENSION.cpu_isa()
    EXTENSION.set_cpu_isa(request.param)
    assert EXTENSION.cpu_isa() == request.param
    yield request.param
    EXTENSION.set_cpu_isa(before)


@pytest.fixture
def precision(compiled: None) -> Iterator[None]:
    """Puts back torch's precision of fp32 products and the instruction set after the test."""
    isa = EXTENSION.cpu_isa()
    holders = [torch.backends, torch.backends.mkldnn.matmul, torch.backends.cuda.matmul]
    before = [x.fp32_precision for x in holders]
    yield
    torch.set_float32_matmul_precision("highest")
    for x, value in zip(holders, before, strict=True):
        x.fp32_precision = value
    EXTENSION.set_cpu_isa(isa)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[type[nn.Module]]:
    """Blocks and MLPs may be packed on any machine with oneDNN; the classes of those that were."""
    if not _matmul._available() or _matmul.SETTING == "torch":
        pytest.skip("blocks are not fused here")
    always = Choice(True, True, True, True, True, "as the test wants it")
    monkeypatch.setattr(_matmul, "CHOICES", dict.fromkeys((torch.float32, torch.bfloat16), always))
    seen: list[type[nn.Module]] = []
    real = _packed.packed

    def packed(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        products = real(module, *args, **kwargs)
        if products is not None:
            seen.append(type(module))
        return products

    monkeypatch.setattr(block_module, "packed", packed)
    return seen


@pytest.fixture
def shared() -> Path:
    """The folder with real images and golden tensors, which is not part of the repository."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"no shared data folder at {folder} (set KDFAST_SHARED)")
    return folder
