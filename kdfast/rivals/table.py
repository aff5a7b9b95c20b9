# SPDX-License-Identifier: Apache-2.0
"""All ways of running a model, by name."""

from kdfast.rivals.compiled import Compiled, Frozen
from kdfast.rivals.eager import Eager
from kdfast.rivals.fused import Fused
from kdfast.rivals.onnx_runtime import OnnxRuntime, OnnxRuntimeDynamic, OnnxRuntimeInt8
from kdfast.rivals.open_vino import OPENVINO, OpenVino, OpenVinoInt8
from kdfast.rivals.rival import Rival

_BF16 = "model.to(torch.bfloat16)"
_ALL: tuple[Rival, ...] = (
    Eager("eager", "fp32", "PyTorch as it is, with its own attention"),
    Eager("eager-bf16", "bf16", f"the same after {_BF16}"),
    Compiled("compile", "fp32", "torch.compile(model, dynamic=False)"),
    Compiled("compile-bf16", "bf16", f"the same after {_BF16}"),
    Frozen("freezing", "fp32", "torch.compile with inductor's freezing"),
    Frozen("freezing-bf16", "bf16", f"the same after {_BF16}"),
    OnnxRuntime(),
    OnnxRuntimeInt8(),
    OnnxRuntimeDynamic(),
    OPENVINO,
    OpenVino("openvino-bf16", "bf16", "bf16", "the same with INFERENCE_PRECISION_HINT=bf16"),
    OpenVinoInt8("openvino-int8", "int8", "", "OpenVINO, nncf.quantize on the pictures"),
    Fused("kdfast", "fp32", "kdfast.accelerate"),
    Fused("kdfast-bf16", "bf16", f"the same after {_BF16}"),
)
RIVALS = {rival.name: rival for rival in _ALL}
