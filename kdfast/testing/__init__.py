# SPDX-License-Identifier: Apache-2.0
"""What tests/ and bench/ share: shapes, inputs, the tolerance rule, interpreted kernels."""

from kdfast.testing.cases import SHAPES, AttentionCase, rotary
from kdfast.testing.compare import assert_no_worse, assert_right, gradients, relative, run
from kdfast.testing.interpreter import DRY_RUN, interpreted_kernels, launch_on_cpu
from kdfast.testing.models import small_eva, tiny_eva
from kdfast.testing.products import Bf16Products

__all__ = [
    "DRY_RUN",
    "SHAPES",
    "AttentionCase",
    "Bf16Products",
    "assert_no_worse",
    "assert_right",
    "gradients",
    "interpreted_kernels",
    "launch_on_cpu",
    "relative",
    "rotary",
    "run",
    "small_eva",
    "tiny_eva",
]
