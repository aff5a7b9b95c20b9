# SPDX-License-Identifier: Apache-2.0
"""Triton kernels on the CPU, in Triton's interpreter."""

import functools
import importlib
import os
import sys
from types import ModuleType
from typing import Any
from unittest import SkipTest

import torch

from kdfast.ops import TRITON_OPS

# With this set, checks that are written for a GPU run small on the CPU, in Triton's interpreter.
DRY_RUN = os.environ.get("KDFAST_DRY_RUN", "0") == "1"


def interpreted_kernels(op: str) -> ModuleType:
    """``kdfast.kernels.<op>`` in Triton's interpreter, which runs it on CPU tensors.

    Triton decides when a function is decorated, so this must be the first import of triton in the
    process: call it where a test file is imported. It sets TRITON_INTERPRET for the rest of the
    process; code that compiles kernels needs a process of its own without it.

    Raises:
        SkipTest: triton is not installed, or was imported without the interpreter before.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        kernels = importlib.import_module(f"kdfast.kernels.{op}")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise SkipTest("triton is not installed") from error
    language = sys.modules["triton.language"]
    if type(language.max).__name__ != "InterpretedFunction":
        raise SkipTest("triton was imported before, without its interpreter")
    _count_by_arguments()
    return kernels


@functools.cache
def _count_by_arguments() -> None:
    """Lets arguments bound loops, with any numpy.

    The interpreter holds an argument as an array of one element. That of Triton 3.6 gives such an
    array to ``int``, which numpy refuses from 2.4 on.
    """
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    patch = interpreter._patch_lang_tensor

    def patch_and_count(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_count


def launch_on_cpu() -> torch.library.Library:
    """From now on ``backend="fused"`` on CPU tensors means the Triton kernels, interpreted.

    Returns:
        What holds the registration: keep it for as long as that shall last.

    Raises:
        SkipTest: As ``interpreted_kernels``.
    """
    library = torch.library.Library("kdfast", "IMPL")
    for name in TRITON_OPS:
        interpreted_kernels(name)
        op: Any = importlib.import_module(f"kdfast.ops.{name}")
        library.impl(name, op._cuda, "CPU")
        if hasattr(op, "_cuda_bwd"):
            library.impl(f"{name}_bwd", op._cuda_bwd, "CPU")
        if hasattr(op, "_cuda_inplace"):
            library.impl(f"{name}_", op._cuda_inplace, "CPU")
            op.INPLACE_ON = op.INPLACE_ON | {"cpu"}
        op.FUSED_ON = op.FUSED_ON | {"cpu"}
    return library
