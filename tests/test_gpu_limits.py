# SPDX-License-Identifier: Apache-2.0
"""What needs a large CUDA device: offsets beyond 32 bits, and memory that grows with N alone.

`python -m bench.gpu` runs it beside tests/test_gpu.py.
"""

import pytest
import torch
from torch import Tensor

import kdfast
from kdfast.ops._library import fused_devices, not_compiled
from kdfast.testing import DRY_RUN

pytestmark = pytest.mark.skipif(
    DRY_RUN or not torch.cuda.is_available(), reason="no CUDA device, or a dry run"
)
DEVICE = torch.device("cuda")
BEYOND = (1 << 31) + (1 << 20)  # elements: the last ones are out of the reach of 32 bits


def need_memory(nbytes: int) -> None:
    free = torch.cuda.mem_get_info()[0]
    if free < nbytes:
        pytest.skip(f"needs {nbytes >> 30} GiB of device memory, {free >> 30} GiB are free")


def test_attention_beyond_32_bits() -> None:
    need_memory(30 << 30)
    batch = BEYOND // (16 * 257 * 64) + 1
    x = torch.randn(batch, 257, 16, 64, dtype=torch.bfloat16, device=DEVICE).transpose(1, 2)
    args = (None, None, None, 0, True, 0.125, None, 0, None, None)
    out, lse = torch.ops.kdfast.pruned_attention(x, x, x, *args, 0)
    grads = torch.ops.kdfast.pruned_attention_bwd(out, x, x, x, out, lse, *args, False, 0)
    last = x[-1:]
    want, small = torch.ops.kdfast.pruned_attention(last, last, last, *args, 0)
    assert torch.equal(out[-1:], want)
    bwd = torch.ops.kdfast.pruned_attention_bwd
    again = bwd(want, last, last, last, want, small, *args, False, 0)
    for a, b in zip(grads[:3], again[:3], strict=True):
        assert torch.equal(a[-1:], b)


@pytest.mark.parametrize("op", ["kd_loss", "feature_loss"])
def test_losses_beyond_32_bits(op: str) -> None:
    need_memory(20 << 30)
    wide = 4096
    s, t = (
        torch.randn(BEYOND // wide, wide, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)
    )

    def gradient(s: Tensor, t: Tensor) -> Tensor:
        if op == "kd_loss":
            options = (None, 4.0, 1.0, "batchmean", 0.0, -100, True)
            return torch.ops.kdfast.kd_loss(s, t, *options)[3] * s.shape[0]
        return torch.ops.kdfast.feature_loss(s, t, "mse", "none", True)[1] * s.shape[0]

    got = gradient(s, t)[-3:].clone()
    torch.testing.assert_close(got, gradient(s[-3:], t[-3:]), rtol=2e-2, atol=1e-6)


def test_gather_beyond_32_bits() -> None:
    reason = not_compiled("head_gather", DEVICE, fused_devices("head_gather"))
    if reason is not None:
        pytest.skip(reason)
    need_memory(12 << 30)
    x = torch.randint(0, 99, (BEYOND // 1024, 1024), dtype=torch.int8, device=DEVICE)
    got = kdfast.head_gather(x, [15, 1], head_dim=64, dim=1, backend="fused")
    assert torch.equal(got[-5:], x[-5:].unflatten(1, (16, 64))[:, [15, 1]].flatten(1))


def test_memory_is_linear_in_tokens() -> None:
    heads, tokens = 4, 8192
    x = torch.randn(1, tokens, 3, heads, 64, dtype=torch.bfloat16, device=DEVICE)
    x.requires_grad_()
    one_map = heads * tokens**2 * 2

    def step() -> None:
        q, k, v = (y.transpose(1, 2) for y in x.unbind(2))
        out, loss = kdfast.attention_distill(
            *(q, k, v, q.detach(), k.detach()), heads=[3], teacher_heads=[0], backend="fused"
        )
        torch.autograd.grad(out.sum() + loss, x)

    step()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    assert torch.cuda.max_memory_allocated() - before < one_map / 4
