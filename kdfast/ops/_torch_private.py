# SPDX-License-Identifier: Apache-2.0
"""What kdfast uses of torch that torch does not promise to keep, and what it counts on.

No other file uses a private name of torch, and tests/test_torch_private.py tries each of these, so
a release that changes one says so in one place. See docs/use/compatibility.md for those that were
tested. The dictionaries of ``nn.Module`` (``_parameters``, ``_modules``, hooks) are not counted:
code that changes modules has no others.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook as any_global_hook
from torch.overrides import _get_current_function_mode as current_function_mode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = [
    "AFTER_AUTOGRAD",
    "FLASH_ATTENTION",
    "BelowAutograd",
    "FakeTensor",
    "FakeTensorMode",
    "FunctionalTensor",
    "TorchDispatchMode",
    "any_global_hook",
    "any_requires_grad",
    "current_function_mode",
    "dispatch_modes",
    "exporting",
    "forward_level",
    "functorch_active",
    "graph_is_kept",
    "has_kernel",
    "inductor_config",
    "is_batched",
    "is_compiled",
    "is_legacy_batched",
    "is_wrapped",
    "linear_pointwise",
    "multiplies_bf16",
    "multiplies_fp16",
    "reorder_linear_weight",
    "schema_arguments",
    "storage_key",
    "tracing_state",
    "tree_leaves",
    "version",
]

# Of the dispatcher: whether an op has a kernel for a key, whether one of an op's arguments requires
# a gradient, the context that leaves autograd's kernels out, and the keys that come after them.
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
any_requires_grad = torch._C._any_requires_grad
BelowAutograd = torch._C._AutoDispatchBelowAutograd
AFTER_AUTOGRAD = torch._C._after_autograd_keyset
# How many TorchDispatchModes are on.
dispatch_modes = torch._C._len_torch_dispatch_stack
# In a backward pass: whether its graph stays for another one.
graph_is_kept = torch._C._autograd._get_current_graph_task_keep_graph
# torch.func: whether a transform is on, and what it gave a tensor. The legacy vmap is that of
# ``torch.autograd.grad(is_grads_batched=True)``.
functorch_active = torch._C._are_functorch_transforms_active
is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
is_batched = torch._C._functorch.is_batchedtensor
is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor
# None unless ``torch.jit.trace`` records.
tracing_state = torch._C._get_tracing_state
# oneDNN, by the operators that inductor calls; None in a torch without it. A linear layer with what
# follows it, a weight in oneDNN's own layout, and whether a dtype is multiplied at full speed.
linear_pointwise: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
reorder_linear_weight: Any = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
multiplies_bf16: Any = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
multiplies_fp16: Any = getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", None)
# By the operator of attention on a CPU, forward and backward: that of GPUs, which takes the same
# arguments.
FLASH_ATTENTION: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        torch.ops.aten._scaled_dot_product_flash_attention
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        torch.ops.aten._scaled_dot_product_flash_attention_backward
    ),
}


def forward_level() -> int:
    """The nesting of forward-mode derivatives; -1 outside of them."""
    return forward_ad._current_level


def exporting() -> bool:
    """Whether ``torch.export`` records; ``torch.compiler.is_exporting`` says so of every
    ``torch.compile`` before torch 2.12."""
    flag: bool = torch.compiler._is_exporting_flag
    return flag


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called."""
    return module.__dict__.get("_compiled_call_impl") is not None


def schema_arguments(op: Any) -> Sequence[Any]:
    """The arguments in the schema of an overload of an operator, in order."""
    arguments: Sequence[Any] = op._schema.arguments
    return arguments


def storage_key(x: Tensor) -> int:
    """The same for two tensors just where they share their memory, also if that is empty."""
    key: int = x.untyped_storage()._cdata
    return key


def version(x: Tensor) -> int:
    """Grows with every write to x that autograd can see; 0 for what inference mode made."""
    return 0 if x.is_inference() else x._version


def inductor_config() -> Any:
    """The settings of torch.compile's own backend; imports the whole compiler."""
    import torch._inductor.config as config

    return config
