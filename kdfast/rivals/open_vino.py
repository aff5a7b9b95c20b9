# SPDX-License-Identifier: Apache-2.0
"""OpenVINO: fp32, bf16, and int8 by NNCF, its own quantiser."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.rivals.plain import without_kdfast
from kdfast.rivals.rival import Loaded, Rival, Unavailable, file_bytes, quiet, told

PRECISION = "INFERENCE_PRECISION_HINT"


class OpenVino(Rival):
    """The graph of ``torch.export``, converted by ``openvino.convert_model`` for one shape."""

    runtime = "openvino"
    modules: tuple[str, ...] = ("openvino",)
    file = "openvino"

    def __init__(self, name: str, dtype: str, precision: str, about: str) -> None:
        self.name, self.dtype, self.about = name, dtype, about
        self.precision = precision

    def export(
        self, model: nn.Module, example: Tensor, pictures: Sequence[Tensor], folder: Path
    ) -> None:
        """As in ``Rival``."""
        path = folder / f"{self.file}.xml"
        if path.exists():
            return
        with told("openvino.convert_model"), quiet(), torch.no_grad():
            openvino: Any = importlib.import_module("openvino")
            graph: Any = without_kdfast(model, example)
            program = torch.export.export(graph, (example,))
            converted = openvino.convert_model(program)
            converted.reshape(list(example.shape))
            openvino.save_model(converted, path, compress_to_fp16=False)

    def load(self, model: nn.Module | None, example: Tensor, folder: Path) -> Loaded:
        """As in ``Rival``; Unavailable too where OpenVINO would run another precision."""
        openvino: Any = importlib.import_module("openvino")
        config = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            **self.config(),
        }
        with told("openvino"):
            compiled = openvino.Core().compile_model(folder / f"{self.file}.xml", "CPU", config)
        runs = compiled.get_property(PRECISION).get_type_name()
        request = compiled.create_infer_request()

        def call(pictures: Tensor) -> Tensor:
            found = request.infer([pictures.numpy()], share_inputs=True)
            return torch.from_numpy(found[0])

        return Loaded(call, self.note(runs))

    def config(self) -> dict[str, str]:
        """Properties of the compiled model beyond threads and hint."""
        return {PRECISION: self.precision}

    def note(self, runs: str) -> str:
        """What is worth knowing of the precision that OpenVINO says it runs."""
        if runs != self.precision:
            raise Unavailable(f"asked for {self.precision}, but OpenVINO runs {runs} here")
        return ""

    def nbytes(self, model: nn.Module | None, folder: Path) -> int:
        """Of the graph and its weights."""
        return file_bytes(folder, self.file)


class OpenVinoInt8(OpenVino):
    """``nncf.quantize`` for transformers, calibrated on the pictures."""

    modules = ("openvino", "nncf")
    file = "openvino-int8"

    def export(
        self, model: nn.Module, example: Tensor, pictures: Sequence[Tensor], folder: Path
    ) -> None:
        """As in ``Rival``."""
        whole = folder / f"{OpenVino.file}.xml"
        if not whole.exists():
            OPENVINO.export(model, example, pictures, folder)
        with told("nncf.quantize"), quiet():
            nncf: Any = importlib.import_module("nncf")
            openvino: Any = importlib.import_module("openvino")
            quantized = nncf.quantize(
                openvino.Core().read_model(whole),
                nncf.Dataset([batch.numpy() for batch in pictures]),
                subset_size=len(pictures),
                model_type=nncf.ModelType.TRANSFORMER,
            )
            openvino.save_model(quantized, folder / f"{self.file}.xml", compress_to_fp16=False)

    def config(self) -> dict[str, str]:
        """Nothing: what is not quantized runs in the precision that OpenVINO takes by itself."""
        return {}

    def note(self, runs: str) -> str:
        """Says what the layers that are not quantized run in."""
        return f"int8 products, {runs} elsewhere"


OPENVINO = OpenVino("openvino", "fp32", "f32", "OpenVINO with INFERENCE_PRECISION_HINT=f32")
