# SPDX-License-Identifier: Apache-2.0
"""Pruned models leave Python without kdfast: torch.export, ONNX, torch.compile."""

import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import timm
import torch
from torch import Tensor, nn

from kdfast.models import EVAViT
from kdfast.pruning import prune_heads

NAMES = ("vit_tiny_patch16_224", "eva02_tiny_patch14_224", "beit3_base_patch16_224")


def pruned(name: str) -> tuple[nn.Module, Tensor]:
    """With 2, 0 and 3 heads in its blocks, and narrow MLPs."""
    torch.manual_seed(0)
    arguments = {"depth": 3, "num_classes": 5, "embed_dim": 48, "num_heads": 3, "img_size": 32}
    model = timm.create_model(name, patch_size=16, **arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    width = model.blocks[0].mlp.fc2.in_features
    units = [list(range(width // 2)), list(range(0, width, 3)), list(range(width))]
    return prune_heads(model, [[0, 2], [], [0, 1, 2]], mlp=units).eval(), torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize("name", NAMES)
def test_export_has_only_ops_of_torch(name: str) -> None:
    model, x = pruned(name)
    program = torch.export.export(model, (x,))
    ops = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert ops and not any("kdfast" in str(op) for op in ops)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x))


def test_export_of_eva() -> None:
    sizes = {"img_size": 40, "embed_dim": 48, "depth": 3, "num_heads": 3, "patch_size": 8}
    model = EVAViT(**sizes, window_size=2, window_block_indexes=(0, 1), pretrain_img_size=40)
    model = prune_heads(model.eval(), [[0, 2], [], [1]])
    x = torch.randn(1, 3, 40, 40)
    program = torch.export.export(model, (x,))
    assert not any("kdfast" in str(node.target) for node in program.graph.nodes)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


def test_exported_program_runs_without_kdfast(tmp_path: Path) -> None:
    model, x = pruned(NAMES[1])
    program = torch.export.export(model, (x,))
    torch.export.save(program, tmp_path / "model.pt2")
    torch.save({"x": x, "y": model(x).detach()}, tmp_path / "pair.pt")
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "pair = torch.load(sys.argv[1] + '/pair.pt')\n"
        "out = torch.export.load(sys.argv[1] + '/model.pt2').module()(pair['x'])\n"
        "torch.testing.assert_close(out, pair['y'])\n"
        "assert not any(m.startswith(('kdfast', 'timm')) for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


@pytest.mark.parametrize("name", NAMES[:2])
def test_onnx_equals_torch(name: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = pruned(name)
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        numpy.testing.assert_allclose(got, model(x).numpy(), rtol=1e-4, atol=1e-5)


def test_compiles_as_one_graph() -> None:
    model, x = pruned(NAMES[0])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(x).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_compiles_with_inductor() -> None:
    model, x = pruned(NAMES[1])
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
