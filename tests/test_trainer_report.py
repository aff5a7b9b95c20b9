# SPDX-License-Identifier: Apache-2.0
"""The picture at the end of a run, pixel by pixel."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from kdfast.recovery.report import EXPLAINED, LEGEND, LINE, MIN_TILE, draw_predictions

PALETTE = {"sky": (10, 20, 30), "road": (200, 100, 50), "car": (0, 0, 255)}


class Always(nn.Module):
    """Logits (B, 3, H, W) of one class everywhere."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, images: Tensor) -> Tensor:
        b, _, h, w = images.shape
        logits = torch.zeros(b, 3, h, w)
        logits[:, self.number] = 1
        return logits


def test_columns_and_legend(tmp_path: Path) -> None:
    labels = torch.full((2, 8, 8), 1)
    labels[1] = -100  # no label: black
    models = {"teacher": Always(2), "pruned": Always(0)}
    images = torch.zeros(2, 3, 8, 8)
    path = tmp_path / "picture.png"
    draw_predictions(path, models, nn.Identity(), images, labels, PALETTE)
    pixels = np.asarray(Image.open(path))
    assert pixels.shape == (LINE + 2 * MIN_TILE + LINE, 4 * MIN_TILE, 3)
    middle = [
        [pixels[LINE + 160 + r * 320, 160 + c * 320].tolist() for c in range(4)] for r in (0, 1)
    ]
    mean = [123, 116, 103]  # a normalised zero
    assert middle[0] == [mean, list(PALETTE["road"]), list(PALETTE["car"]), list(PALETTE["sky"])]
    assert middle[1] == [mean, [0, 0, 0], list(PALETTE["car"]), list(PALETTE["sky"])]
    for i, colour in enumerate(PALETTE.values()):
        assert pixels[LINE + 2 * MIN_TILE + 10, i * LEGEND + 9].tolist() == list(colour)


def test_a_score_in_every_tile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[tuple[float, float], str]] = []
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda self, at, text, **_: said.append((at, text))
    )
    labels = torch.full((2, 8, 8), 1)
    labels[0, :4] = 2
    labels[1] = -100  # no label, no score
    models = {"teacher": Always(2), "pruned": Always(0)}
    path = tmp_path / "picture.png"
    draw_predictions(path, models, nn.Identity(), torch.zeros(2, 3, 8, 8), labels, PALETTE)
    scores = {at: text for at, text in said if text.startswith("0.")}
    # Half of the pixels are right, and one of two classes: (0.5 + 0) / 2; then none of three.
    low = LINE + MIN_TILE - 23
    assert scores == {(2 * MIN_TILE + 8, low): "0.250", (3 * MIN_TILE + 8, low): "0.000"}
    said.clear()
    features = {"teacher": nn.Conv2d(3, 5, 4, 4), "pruned": nn.Conv2d(3, 5, 4, 4)}
    draw_predictions(path, features, None, torch.randn(2, 3, 16, 16), None, PALETTE)
    texts = [text for _, text in said]
    assert texts.count("1.000") == 2 and all(text in texts for text in EXPLAINED)


def test_without_labels_there_is_no_legend(tmp_path: Path) -> None:
    features = {"teacher": nn.Conv2d(3, 5, 4, 4)}
    images = torch.randn(2, 3, 16, 16)
    draw_predictions(tmp_path / "picture.png", features, None, images, None, PALETTE)
    assert Image.open(tmp_path / "picture.png").size == (
        2 * MIN_TILE,
        LINE + 2 * MIN_TILE + len(EXPLAINED) * LINE,
    )
