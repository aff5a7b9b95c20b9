# SPDX-License-Identifier: Apache-2.0
"""The last step of a mean: one program that adds up what the others left, in one order."""

import triton
import triton.language as tl

# Values that the program adds at a time.
SUM_BLOCK = 4096


@triton.jit
def total_kernel(part_ptr, loss_ptr, parts, divisor, BLOCK: tl.constexpr):
    """The sum of the parts over ``divisor``, in fp64 and in one order."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, parts, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(part_ptr + i, mask=i < parts, other=0.0).to(tl.float64)
    tl.store(loss_ptr, (tl.sum(total, 0) / divisor).to(tl.float32))
