# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime: fp32, and int8 by its own quantiser."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.rivals.plain import without_kdfast
from kdfast.rivals.rival import Loaded, Rival, file_bytes, quiet, told

# Quantising every op, the default, costs a ViT's output ten times the error and gains nothing:
# norms, softmax and GELU are no products.
PRODUCTS = ("MatMul", "Gemm", "Conv")


class OnnxRuntime(Rival):
    """The graph of ``torch.onnx.export(dynamo=True)`` in an InferenceSession on the CPU."""

    name = "onnx"
    dtype = "fp32"
    runtime = "onnxruntime"
    modules: tuple[str, ...] = ("onnx", "onnxscript", "onnxruntime")
    about = "ONNX Runtime"

    def export(
        self, model: nn.Module, example: Tensor, pictures: Sequence[Tensor], folder: Path
    ) -> None:
        """As in ``Rival``."""
        with told("torch.onnx.export"), quiet(), torch.no_grad():
            plain: Any = without_kdfast(model, example)
            program = torch.onnx.export(plain, (example,), dynamo=True, verbose=False)
            if program is None:
                raise RuntimeError("torch.onnx.export made no program")
            program.save(folder / f"{OnnxRuntime.name}.onnx")

    def load(self, model: nn.Module | None, example: Tensor, folder: Path) -> Loaded:
        """As in ``Rival``."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        path = folder / f"{self.name}.onnx"
        with told("onnxruntime"):
            session = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
        entry = session.get_inputs()[0].name

        def call(pictures: Tensor) -> Tensor:
            return torch.from_numpy(session.run(None, {entry: pictures.numpy()})[0])

        return Loaded(call)

    def nbytes(self, model: nn.Module | None, folder: Path) -> int:
        """Of the graph and its weights."""
        return file_bytes(folder, self.name)

    def _whole(
        self, model: nn.Module, example: Tensor, pictures: Sequence[Tensor], folder: Path
    ) -> Path:
        """The fp32 graph, exported if it is not there yet."""
        path = folder / f"{OnnxRuntime.name}.onnx"
        if not path.exists():
            OnnxRuntime.export(self, model, example, pictures, folder)
        return path


class OnnxRuntimeInt8(OnnxRuntime):
    """Static quantisation of the products, QDQ format, weights per channel, on the pictures."""

    name = "onnx-int8"
    dtype = "int8"
    about = "ONNX Runtime, quantize_static (QDQ, products only, calibrated on the pictures)"
    quantiser = "quantize_static"

    def export(
        self, model: nn.Module, example: Tensor, pictures: Sequence[Tensor], folder: Path
    ) -> None:
        """As in ``Rival``."""
        whole = self._whole(model, example, pictures, folder)
        with told(self.quantiser), quiet():
            self._quantize(whole, folder / f"{self.name}.onnx", pictures)

    def _quantize(self, whole: Path, target: Path, pictures: Sequence[Tensor]) -> None:
        """Writes the quantised graph."""
        import onnx
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        ready = target.parent / "preprocessed.onnx"
        quant_pre_process(whole, ready, skip_symbolic_shape=True)
        entry = onnx.load(ready, load_external_data=False).graph.input[0].name
        quantize_static(
            ready,
            target,
            _reader(entry, pictures),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(PRODUCTS),
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
        )
        ready.unlink()

    def load(self, model: nn.Module | None, example: Tensor, folder: Path) -> Loaded:
        """As in ``Rival``."""
        return super().load(model, example, folder)._replace(note="int8 products, fp32 elsewhere")


class OnnxRuntimeDynamic(OnnxRuntimeInt8):
    """Dynamic quantisation: int8 weights, scales of the activations found in every call."""

    name = "onnx-int8-dynamic"
    about = "ONNX Runtime, quantize_dynamic (no calibration)"
    quantiser = "quantize_dynamic"

    def _quantize(self, whole: Path, target: Path, pictures: Sequence[Tensor]) -> None:
        """Writes the quantised graph."""
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(whole, target, weight_type=QuantType.QInt8)


def _reader(entry: str, pictures: Sequence[Tensor]) -> Any:
    """The calibration pictures as ONNX Runtime reads them."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            self._left = iter(pictures)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self._left, None)
            return None if batch is None else {entry: batch.numpy()}

    return Reader()
