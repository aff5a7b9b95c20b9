# SPDX-License-Identifier: Apache-2.0
"""ORION's preprocessing against literals and independent formulas."""

import colorsys

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from kdfast.data.rng import CROP, PHOTOMETRIC, generator
from kdfast.data.views.gridmask import GridMask, grid
from kdfast.data.views.preprocess import (
    MEAN,
    STD,
    CropDraw,
    Photometric,
    crop_plan,
    distort,
    draw_crop,
    draw_photometric,
    normalise,
    preprocess,
    resize_crop,
    stretch,
    wrap_uint8,
)

ORION = (900, 1600)
INPUT = (640, 640)


def picture(height, width):
    """A smooth BGR picture with some noise, uint8."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    base = [128 + 90 * np.sin(x / 37 + c) * np.cos(y / 23 - c) for c in range(3)]
    return np.clip(np.stack(base, -1) + rng.normal(0, 8, (height, width, 3)), 0, 255).astype(
        np.uint8
    )


@pytest.mark.parametrize(
    ("source", "draw", "resized", "box"),
    [
        (ORION, None, (640, 360), (0, 40, 640, 360)),
        (ORION, CropDraw(0.37, 0.9), (592, 333), (0, 13, 640, 333)),
        (ORION, CropDraw(0.45, 0.5), (720, 405), (40, 85, 680, 405)),
        (ORION, CropDraw(0.45, 0.999), (720, 405), (79, 85, 719, 405)),
        # 640 / 400 = 1.6 decides; 224 * 1.6 = 358.4.
        ((224, 400), None, (640, 358), (0, 38, 640, 358)),
        ((224, 400), CropDraw(0.37, 0.0), (592, 331), (0, 11, 640, 331)),
        # A wide picture: 320 / 400 = 0.8 decides and the middle is kept.
        ((400, 1600), None, (1280, 320), (320, 0, 960, 320)),
        # Too flat in training: the missing rows are above the picture.
        ((400, 1600), CropDraw(0.37, 0.0), (1184, 296), (0, -24, 640, 296)),
        ((49, 49), None, (640, 640), (0, 320, 640, 640)),
    ],
)
def test_crop_plan(source, draw, resized, box):
    plan = crop_plan(source, INPUT, draw)
    assert plan.resized == resized
    assert plan.box == box


def test_crop_plan_scales_with_the_input():
    plan = crop_plan(ORION, (320, 320))
    assert (plan.ratio, plan.resized, plan.box) == (0.2, (320, 180), (0, 20, 320, 180))


def test_draw_crop_range_and_bottom():
    draws = [draw_crop(generator(CROP, 7, 0, index)) for index in range(2000)]
    ratios = np.array([draw.ratio for draw in draws])
    assert 0.37 <= ratios.min() < 0.371 and 0.449 < ratios.max() < 0.45
    assert abs(ratios.mean() - 0.41) < 0.002
    lefts = set()
    for draw in draws:
        plan = crop_plan(ORION, INPUT, draw)
        left, top, right, bottom = plan.box
        assert plan.resized == (int(1600 * draw.ratio), int(900 * draw.ratio))
        assert (right - left, bottom - top) == (640, 320)
        assert bottom == plan.resized[1]
        assert 0 <= left <= max(0, plan.resized[0] - 640)
        lefts.add(left)
    assert len(lefts) > 60


def test_fill_is_black_on_the_right():
    white = np.full((900, 1600, 3), 255, np.uint8)
    out = resize_crop(white, crop_plan(ORION, INPUT, CropDraw(0.37, 0.3)))
    assert out.shape == (320, 640, 3)
    assert (out[:, :592] == 255).all() and (out[:, 592:] == 0).all()
    tensor = preprocess(white, INPUT, crop=CropDraw(0.37, 0.3))
    black = torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)])
    torch.testing.assert_close(tensor[:, 100, 639], black)
    torch.testing.assert_close(tensor[:, 5, 5], (255 - torch.tensor(MEAN)) / torch.tensor(STD))


def test_resize_is_antialiased_bicubic():
    image = picture(900, 1600)
    ours = resize_crop(image, crop_plan(ORION, INPUT))
    planes = torch.from_numpy(image).permute(2, 0, 1)[None].double()
    other = interpolate(planes, (360, 640), mode="bicubic", antialias=True)[0, :, 40:]
    difference = ours.astype(np.float64) - other.permute(1, 2, 0).clamp(0, 255).numpy()
    assert np.abs(difference).max() <= 1.3  # PIL rounds after either direction
    assert np.abs(difference).mean() < 0.4


def test_stretch_is_half_pixel_bilinear():
    image = picture(320, 640)
    planes = torch.from_numpy(image).permute(2, 0, 1)[None].double()
    other = interpolate(planes, INPUT, mode="bilinear", align_corners=False)[0]
    ours = stretch(image, INPUT)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, other.permute(1, 2, 0).numpy(), atol=1e-3)
    column = stretch(np.array([[[0] * 3], [[100] * 3]], np.uint8), (4, 1))[:, 0, 0]
    np.testing.assert_allclose(column, [0, 25, 75, 100])


def test_normalise_literal():
    image = np.array([[[123, 116, 103], [0, 255, 128]]], np.uint8)
    out = normalise(image)
    assert out.shape == (3, 1, 2) and out.dtype == torch.float32 and out.is_contiguous()
    expected = [[-0.675 / 58.395, -123.675 / 58.395], [-0.28 / 57.12, 138.72 / 57.12],
                [-0.53 / 57.375, 24.47 / 57.375]]  # fmt: skip
    torch.testing.assert_close(out[:, 0], torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_preprocess_order_and_channels():
    # Blue in BGR at the kept bottom, red at the top 1/9 that the evaluation crop removes.
    image = np.zeros((900, 1600, 3), np.uint8)
    image[:100, :, 2], image[100:, :, 0] = 255, 255
    tensor = preprocess(image, INPUT)
    assert tensor.shape == (3, 640, 640)
    value = tensor * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    torch.testing.assert_close(
        value[:, 300, 300], torch.tensor([0.0, 0.0, 255.0]), atol=1e-3, rtol=0
    )
    assert value[0, 8:].max() < 1e-3


def test_preprocess_is_its_steps():
    image = picture(224, 400)
    crop = CropDraw(0.44, 0.7)
    photometric = Photometric(brightness=30.0, saturation=1.4, hue=-12.0, channels=(2, 0, 1))
    out = preprocess(image, INPUT, crop=crop, photometric=photometric)
    bgr = wrap_uint8(distort(image.astype(np.float32), photometric))
    cut = resize_crop(bgr, crop_plan((224, 400), INPUT, crop))
    planes = torch.from_numpy(cut[..., ::-1].copy()).permute(2, 0, 1)[None].double()
    planes = interpolate(planes, INPUT, mode="bilinear")[0]
    expected = (planes - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=0)


def test_wrap_uint8():
    values = np.array([-1.0, -0.9, 0.0, 255.9, 256.0, 282.4, -32.5, 511.0, 512.0], np.float32)
    assert wrap_uint8(values).tolist() == [255, 0, 0, 255, 0, 26, 224, 255, 0]


def test_brightness_wraps_instead_of_clipping():
    image = np.full((2, 2, 3), 250, np.uint8)
    out = distort(image.astype(np.float32), Photometric(brightness=32.0))
    np.testing.assert_allclose(out, 282, atol=1e-3)
    assert (wrap_uint8(out + 0.01) == 26).all()
    dark = distort(np.full((1, 1, 3), 10, np.float32), Photometric(brightness=-32.0))
    np.testing.assert_allclose(dark, -22, atol=1e-3)


@pytest.mark.parametrize("first", [True, False])
def test_contrast_and_brightness(first):
    draw = Photometric(brightness=-20.0, contrast=1.5, contrast_first=first)
    out = distort(np.full((1, 1, 3), 100, np.float32), draw)
    np.testing.assert_allclose(out, 120, atol=1e-3)


@pytest.mark.parametrize(
    ("saturation", "hue"), [(0.5, None), (1.5, None), (None, 18.0), (1.3, -18.0)]
)
def test_hsv_against_colorsys(saturation, hue):
    image = np.random.default_rng(0).uniform(0, 255, (6, 7, 3)).astype(np.float32)
    out = distort(image, Photometric(saturation=saturation, hue=hue))
    for row, got in zip(image.reshape(-1, 3).tolist(), out.reshape(-1, 3).tolist(), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*row[::-1])
        rgb = colorsys.hsv_to_rgb((h + (hue or 0) / 360) % 1, s * (saturation or 1), v)
        np.testing.assert_allclose(got[::-1], rgb, atol=0.05)


def test_hue_literal_and_no_change():
    red = np.array([[[0, 0, 200]]], np.float32)
    np.testing.assert_allclose(distort(red, Photometric(hue=-18.0))[0, 0], [60, 0, 200], atol=0.01)
    np.testing.assert_allclose(distort(red, Photometric(hue=18.0))[0, 0], [0, 60, 200], atol=0.01)
    np.testing.assert_allclose(distort(red, Photometric())[0, 0], [0, 0, 200], atol=0.01)


def test_channel_swap_and_input_kept():
    image = np.array([[[10, 20, 30]]], np.float32)
    out = distort(image, Photometric(channels=(2, 0, 1)))
    np.testing.assert_allclose(out[0, 0], [30, 10, 20], atol=1e-3)
    assert image.tolist() == [[[10, 20, 30]]]


def test_draw_photometric_statistics():
    draws = [draw_photometric(generator(PHOTOMETRIC, 1, 0, index)) for index in range(3000)]
    for name, low, high in (
        ("brightness", -32, 32), ("contrast", 0.5, 1.5), ("saturation", 0.5, 1.5), ("hue", -18, 18)
    ):  # fmt: skip
        values = [v for draw in draws if (v := getattr(draw, name)) is not None]
        assert abs(len(values) / 3000 - 0.5) < 0.04, name
        span = high - low
        assert low <= min(values) < low + 0.02 * span, name
        assert high - 0.02 * span < max(values) <= high, name
    assert abs(np.mean([draw.contrast_first for draw in draws]) - 0.5) < 0.04
    orders = {draw.channels for draw in draws} - {None}
    assert len(orders) == 6


def test_rejects():
    with pytest.raises(TypeError, match="image must be uint8, got float32"):
        preprocess(np.zeros((4, 4, 3), np.float32), INPUT)
    with pytest.raises(ValueError, match=r"image must be \(H, W, 3\), got \(4, 4\)"):
        preprocess(np.zeros((4, 4), np.uint8), INPUT)
    with pytest.raises(ValueError, match="input height even"):
        crop_plan(ORION, (641, 640))
    with pytest.raises(ValueError, match=r"0 <= seed < 2\*\*64"):
        generator(CROP, -1)
    with pytest.raises(ValueError, match="four numbers"):
        generator(CROP, 0, 2**32)


def test_generator_positions_are_apart():
    first = [
        generator(*words).random()
        for words in ((CROP, 1), (CROP, 1, 0), (CROP, 1, 0, 0), (CROP, 2**32), (PHOTOMETRIC, 1))
    ]
    assert len(set(first)) == 5
    assert generator(CROP, 1, 2, 3).random() == generator(CROP, 1, 2, 3).random()


def reference_grid(size, period, start, ratio):
    """Paint the stripes one by one on the larger canvas."""
    canvas = [int(1.5 * side) for side in size]
    zero = np.zeros(canvas, bool)
    width = min(max(int(period * ratio + 0.5), 1), period - 1)
    for i in range(canvas[0] // period):
        zero[period * i + start[0] : period * i + start[0] + width] = True
    for i in range(canvas[1] // period):
        zero[:, period * i + start[1] : period * i + start[1] + width] = True
    top, left = ((c - s) // 2 for c, s in zip(canvas, size, strict=True))
    return zero[top : top + size[0], left : left + size[1]]


def test_grid_literal():
    kept = grid((4, 4), 2, (0, 1))
    # Canvas of 6, rows 1..4 of it; stripes on even rows and odd columns.
    assert kept.tolist() == [[True, False, True, False], [True] * 4] * 2


@pytest.mark.parametrize("size", [(640, 640), (96, 160), (33, 20)])
def test_grid_against_painting(size):
    rng = np.random.default_rng(size[0])
    for _ in range(40):
        period = int(rng.integers(2, size[0]))
        start = tuple(rng.integers(period, size=2).tolist())
        ratio = float(rng.choice([0.3, 0.5, 0.8]))
        np.testing.assert_array_equal(
            grid(size, period, start, ratio), reference_grid(size, period, start, ratio)
        )


def test_gridmask_on_a_batch():
    mask = GridMask(seed=5)
    images = torch.randn(3, 3, 64, 48, requires_grad=True)
    step = next(s for s in range(20) if mask.mask((64, 48), 0, s) is not None)
    kept = torch.from_numpy(mask.mask((64, 48), 0, step))
    out = mask(images, epoch=0, step=step)
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(out, images.detach() * kept)
    out.sum().backward()
    torch.testing.assert_close(images.grad, kept.expand(3, 3, 64, 48).float())
    idle = next(s for s in range(20) if mask.mask((64, 48), 0, s) is None)
    assert mask(images, epoch=0, step=idle) is images
    assert mask(images.bfloat16(), epoch=0, step=step).dtype == torch.bfloat16


def test_gridmask_draws():
    mask = GridMask(seed=5)
    masks = [mask.mask((64, 64), 1, step) for step in range(1000)]
    assert abs(sum(m is not None for m in masks) / 1000 - 0.7) < 0.05
    again = GridMask(seed=5).mask((64, 64), 1, 3), GridMask(seed=5).mask((64, 64), 1, 3)
    np.testing.assert_array_equal(*again)
    other = GridMask(seed=5, rank=1)
    both = [(a, b) for s, a in enumerate(masks[:50]) if a is not None
            and (b := other.mask((64, 64), 1, s)) is not None]  # fmt: skip
    assert both and any((a != b).any() for a, b in both)
    assert GridMask(seed=0, prob=0.0).mask((64, 64), 0, 0) is None


def test_gridmask_rejects():
    with pytest.raises(ValueError, match="prob must be in"):
        GridMask(seed=0, prob=1.5)
    with pytest.raises(TypeError, match="images must be floating"):
        GridMask(seed=0)(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), epoch=0, step=0)
    with pytest.raises(ValueError, match="3 rows or more, got 2"):
        GridMask(seed=0)(torch.zeros(1, 3, 2, 8), epoch=0, step=0)
