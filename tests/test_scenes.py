# SPDX-License-Identifier: Apache-2.0
"""The scene renderer: geometry by analytic masks, statistics, and what colour alone can tell."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import kdfast.data as data
from kdfast.data.rng import SENSOR, WORLD, generator
from kdfast.data.scenes import Scenes, draw_world
from kdfast.data.scenes.camera import HORIZON, VIEWS, Camera, quads
from kdfast.data.scenes.ground import ground_kind
from kdfast.data.scenes.layout import (
    BUILDING,
    CLASSES,
    G_CURB,
    G_MARK,
    G_OPEN,
    G_ROAD,
    G_WALK,
    GROUND,
    MARKING,
    PALETTE,
    PEDESTRIAN,
    POLE,
    ROAD,
    SIDEWALK,
    SKY,
    VEHICLE,
    draw_layout,
    draw_light,
)
from kdfast.data.scenes.render import render
from kdfast.data.scenes.world import Builder, trapezium
from kdfast.data.views.preprocess import MEAN, STD

SIZE = (96, 128)


def level_layout(**changes):
    """A straight road of one 3.5 m lane each way; the ego vehicle is on its centre line."""
    fixed = {
        "offset": 0.0, "slope": 0.0, "curve": 0.0, "lane": 3.5, "lanes": 1, "parking": 0.0,
        "verge": (0.0, 2.0), "walk": (3.0, 1.5), "front": (1.0, 1.0), "side": (0, 0), "cross": 0.0,
        "style": 2, "edge": False, "line": 0.1, "dash": (6.0, 0.5), "wear": 0.0, "tilt": (0.0, 0.0),
    }  # fmt: skip
    return replace(draw_layout(generator(WORLD, 0)), **{**fixed, **changes})


def empty(**changes):
    rng = generator(WORLD, 1)
    build = Builder(rng, level_layout(**changes), draw_light(rng))
    # Something must exist: a box far above and behind every view.
    add_box(build, (-90.0, 0.0, 0.0, 0.1, 0.1, 300.0, 300.1), POLE)
    build.shade(np.zeros((1, 4, 2)), np.zeros(1))
    return build


def add_box(build, shape, label):
    key = np.array([-math.hypot(shape[0], shape[1])])
    build.boxes(shape, label, np.full((1, 3), 0.5), key)


def labels(build, view=0, size=SIZE):
    return render(build.world(), view, size, generator(SENSOR, 0))[1]


def hit_box(view, size, low, high):
    """Pixels whose ray meets the box between two corners, by slabs in double precision."""
    _, degrees, focal, place = VIEWS[view]
    yaw = math.radians(degrees)
    u = (np.arange(size[1]) + 0.5 - size[1] / 2) / (focal * size[1])
    v = (np.arange(size[0]) + 0.5 - HORIZON * size[0]) / (focal * size[1] * 2 * size[0] / size[1])
    u, v = np.meshgrid(u, v)
    ray = np.stack([math.cos(yaw) + u * math.sin(yaw), math.sin(yaw) - u * math.cos(yaw), -v], -1)
    with np.errstate(divide="ignore"):
        a, b = (np.array(low) - place) / ray, (np.array(high) - place) / ray
    near, far = np.minimum(a, b).max(-1), np.maximum(a, b).min(-1)
    return (near < far) & (far > 0)


def grown(mask):
    """The mask and the pixels around it."""
    padded = np.pad(mask, 1)
    rows, columns = mask.shape
    return np.any([padded[i : i + rows, j : j + columns] for i in range(3) for j in range(3)], 0)


def assert_mask(got, exact):
    """Equal except for the outermost pixels, where a filled outline may differ by one."""
    assert exact.sum() > 30
    assert not (got & ~grown(exact)).any()
    assert not (~got & ~grown(~exact)).any()


def test_fields_of_view():
    for name, _, focal, _ in VIEWS:
        degrees = 2 * math.degrees(math.atan(0.5 / focal))
        assert degrees == pytest.approx(110 if name == "back" else 70, abs=0.1)
    assert [name for name, *_ in VIEWS] == [
        "front", "front_left", "front_right", "back", "back_left", "back_right"
    ]  # fmt: skip


def test_projection_literals():
    camera = Camera.of(0, (640, 640), 0.0, 0.0)
    # ORION: f = 1142.52 * 0.4 = 457 across, twice that down; the horizon is row 2 * (180 - 40).
    assert camera.focal == pytest.approx((457, 914), rel=1e-3)
    world = np.array([[10.8, 0.0, 1.6], [10.8, -1.0, 1.6], [10.8, 0.0, 0.6]], np.float32)
    pixel = camera.pixels((world - camera.place) @ camera.rotation.T)
    np.testing.assert_allclose(pixel, [[319.5, 279.5], [365.2, 279.5], [319.5, 370.9]], atol=0.05)
    left = Camera.of(1, (640, 640), 0.0, 0.0).rotation
    np.testing.assert_allclose(left[2], [0.5736, 0.8192, 0], atol=1e-4)
    np.testing.assert_allclose(left @ left.T, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(left[1], [0, 0, -1], atol=1e-6)


def test_pitch_lowers_the_horizon():
    up = Camera.of(0, (640, 640), 0.05, 0.0)
    rays = up.rays((640, 640)).reshape(3, 640, 640)
    horizon = int((rays[2, :, 320] > 0).sum())
    assert horizon == pytest.approx(280 + 914 * math.tan(0.05), abs=1)


def test_ground_and_sky():
    label = labels(empty())
    assert (label[:41] == SKY).all() and (label[43:] != SKY).all()
    # Bottom row: 1.6 m below the camera, z = 1.6 / v ahead; across in metres from the centre.
    v = (95.5 - 42) / (0.714 * 128 * 2 * 96 / 128)
    y = -(np.arange(128) + 0.5 - 64) / (0.714 * 128) * 1.6 / v
    expected = np.select(
        [abs(y) < 0.1, abs(y) < 3.5, (y > 3.5) & (y < 6.5), (y < -5.5) & (y > -7.0)],
        [MARKING, ROAD, SIDEWALK, SIDEWALK],
        GROUND,
    )
    np.testing.assert_array_equal(label[95], expected)


def kinds(road, points):
    x, y = np.array(points, np.float32).T
    return ground_kind(road, x, y, np.zeros(len(points), np.float32)).tolist()


def test_ground_materials():
    road = level_layout()
    where = [
        (9, 0.05),
        (9, 1.0),
        (9, -3.4),
        (9, 3.6),
        (9, 5),
        (9, 6.6),
        (9, -4.5),
        (9, -6),
        (9, -8),
    ]
    assert kinds(road, where) == [
        G_MARK, G_ROAD, G_ROAD, G_CURB, G_WALK, G_OPEN, G_OPEN, G_WALK, G_OPEN
    ]  # fmt: skip
    dashed = replace(road, style=1)
    assert kinds(dashed, [(1, 0), (2.9, 0), (3.1, 0), (5.9, 0), (6.1, 0)]) == [
        G_MARK, G_MARK, G_ROAD, G_ROAD, G_MARK
    ]  # fmt: skip
    double = replace(road, style=3)
    assert kinds(double, [(9, 0), (9, 0.18), (9, -0.18)]) == [G_ROAD, G_MARK, G_MARK]
    assert kinds(replace(road, style=0), [(9, 0)]) == [G_ROAD]
    wide = replace(road, lanes=2)
    assert kinds(wide, [(1, 3.5), (4, 3.5), (1, -3.5), (1, 6.9), (1, 7.1)]) == [
        G_MARK, G_ROAD, G_MARK, G_ROAD, G_CURB
    ]  # fmt: skip
    assert kinds(wide, [(1, 6.95)]) == kinds(replace(road, style=1), [(1, 3.45)]) == [G_ROAD]
    edged = replace(road, edge=True, parking=2.0)
    assert kinds(edged, [(9, 3.55), (9, 3.3), (9, 5.4), (9, 5.6)]) == [
        G_MARK, G_ROAD, G_ROAD, G_CURB
    ]  # fmt: skip


def test_crossing():
    road = level_layout(cross=20.0, cross_half=4.0, zebra=True, style=2)
    where = [(20, 1), (20, 30), (20, 0), (24.5, 30), (13.5, 0.3), (13.5, 0.8), (11, -2), (11, 2)]
    assert kinds(road, where) == [
        G_ROAD, G_MARK, G_ROAD, G_WALK, G_MARK, G_ROAD, G_MARK, G_ROAD
    ]  # fmt: skip


def test_curved_road():
    road = level_layout(curve=0.02, slope=0.0)
    y, slope = road.centre(np.array([0.0, 40.0, 80.0, 100.0]))
    np.testing.assert_allclose(y, [0, 16, 64, 96])
    np.testing.assert_allclose(slope, [0, 0.8, 1.6, 1.6])
    x, y, angle = road.place(np.array([40.0]), np.array([5.0]))
    assert (y - 16) ** 2 + (x - 40) ** 2 == pytest.approx(25)
    assert math.tan(angle[0]) == pytest.approx(0.8) and x < 40 < 40 + y


@pytest.mark.parametrize(
    ("view", "low", "high"),
    [
        (0, (10, -2, 0), (14, 1, 3)),
        (1, (4, 6, 0), (9, 9, 4)),
        (3, (-14, -1, 0), (-9, 2, 2)),
        (5, (-6, -8, 0), (-1, -5, 3)),
        # Beside and behind the camera: cut at the near plane.
        (0, (-20, 3, 0), (30, 5, 4)),
        (4, (-9, -6, 0), (12, 3.5, 1.2)),
    ],
)
def test_box_mask(view, low, high):
    build = empty()
    (x, y, bottom), (length, width, _) = (
        (np.array(low) + high) / 2, np.array(high) - low
    )  # fmt: skip
    add_box(build, (x, y, 0.0, length, width, low[2], high[2]), VEHICLE)
    assert bottom > 0
    assert_mask(labels(build, view) == VEHICLE, hit_box(view, SIZE, low, high))


def test_turned_box_is_the_same_as_swapped_sides():
    one, two = empty(), empty()
    add_box(one, (12.0, 1.0, math.pi / 2, 4.0, 2.0, 0.0, 2.0), VEHICLE)
    add_box(two, (12.0, 1.0, 0.0, 2.0, 4.0, 0.0, 2.0), VEHICLE)
    assert (labels(one) != labels(two)).mean() < 0.002


def test_near_hides_far():
    for order in ((0, 1), (1, 0)):
        build = empty()
        boxes = [((10.0, 0.0, 0.0, 2.0, 2.0, 0.0, 2.0), VEHICLE),
                 ((20.0, 0.0, 0.0, 2.0, 9.0, 0.0, 9.0), BUILDING)]  # fmt: skip
        for index in order:
            add_box(build, *boxes[index])
        label = labels(build)
        near = hit_box(0, SIZE, (9, -1, 0), (11, 1, 2))
        far = hit_box(0, SIZE, (19, -4.5, 0), (21, 4.5, 9))
        assert_mask(label == VEHICLE, near)
        assert_mask((label == BUILDING) | (label == VEHICLE), near | far)


def test_figures_and_boxes_hide_each_other():
    for near, far in ((8.0, 16.0), (16.0, 8.0)):
        build = empty()
        add_box(build, (near, 0.0, 0.0, 1.0, 3.0, 0.0, 3.0), VEHICLE)
        zero = np.zeros(1)
        figure = trapezium(zero + 1.0, zero, zero + 5.0)[:, None]
        build.boards(zero + far, zero, figure, PEDESTRIAN, np.ones((1, 1, 3)), zero - far)
        # Row 44 is just below the horizon: 1.6 m up at any distance, less a little.
        expected = VEHICLE if near < far else PEDESTRIAN
        assert labels(build)[44, 64] == expected


def test_board_faces_every_camera():
    for view, (_, degrees, focal, place) in enumerate(VIEWS):
        build = empty()
        yaw, zero = math.radians(degrees), np.zeros(1)
        x, y = place[0] + 10 * math.cos(yaw), place[1] + 10 * math.sin(yaw)
        figure = trapezium(zero + 2.0, zero, zero + 2.5)[:, None]
        build.boards(np.array([x]), np.array([y]), figure, PEDESTRIAN, np.ones((1, 1, 3)), zero)
        rows, columns = np.nonzero(labels(build, view) == PEDESTRIAN)
        width, height = focal * 128 * 0.2, focal * 128 * 2 * 96 / 128 * 0.25
        assert np.ptp(columns) + 1 == pytest.approx(width, abs=2)
        assert np.ptp(rows) + 1 == pytest.approx(height, abs=2)
        assert (columns.min() + columns.max()) / 2 == pytest.approx(63.5, abs=1)


def test_clip_keeps_what_is_in_front():
    camera = Camera.of(0, SIZE, 0.0, 0.0)
    behind = np.array([[(-5, 1, 0), (-9, 1, 0), (-9, 2, 0), (-5, 2, 0)]], np.float32)
    outlines, rows = quads(behind, camera, SIZE)
    assert len(outlines) == len(rows) == 0
    across = np.array([[(-5, 2, 0), (30, 2, 0), (30, 4, 0), (-5, 4, 0)]], np.float32)
    outlines, rows = quads(np.concatenate([behind, across]), camera, SIZE)
    assert rows.tolist() == [1] and (outlines[..., 0] < 16 * 64).all()


def test_shadow_darkens_and_keeps_labels():
    dark, light = empty(), empty()
    square = np.array([[(8, -3), (14, -3), (14, 3), (8, 3)]], float)
    dark.patch(square)
    for build in (dark, light):
        build.light = replace(build.light, shadow=0.8, texture=0.0, noise=0.0, fog=0.0)
    (a, label_a), (b, label_b) = (
        render(build.world(), 0, SIZE, generator(SENSOR, 0)) for build in (dark, light)
    )
    np.testing.assert_array_equal(label_a, label_b)
    part = a.sum(-1) / np.maximum(b.sum(-1), 1)
    assert part.min() < 0.9
    # Half way between dark and light; the lens adds a pixel at the corners.
    shaded, exact = part < (1 + part.min()) / 2, hit_box(0, SIZE, (8, -3, -1e-3), (14, 3, 0))
    assert (shaded & ~grown(exact)).sum() <= 4
    assert not (~shaded & ~grown(~exact)).any()


@pytest.fixture(scope="module")
def sample():
    """Pictures (n, 64, 64, 3) in 0..255 and labels of 60 training and 30 validation views."""
    out = {}
    for split, count in (("train", 60), ("val", 30)):
        dataset = Scenes(split=split, size=(64, 64), seed=5, frames=20)
        items = [dataset[index] for index in range(count)]
        images = torch.stack([item["image"] for item in items])
        images = images * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
        out[split] = (
            images.permute(0, 2, 3, 1).numpy(),
            torch.stack([item["label"] for item in items]).numpy(),
        )
    return out


def test_classes(sample):
    assert len(CLASSES) == len(PALETTE) == len(set(PALETTE)) == 10
    labels = np.concatenate([sample[split][1] for split in ("train", "val")])
    share = np.bincount(labels.reshape(-1), minlength=10) / labels.size
    assert len(share) == 10
    bounds = {
        "sky": (0.08, 0.4), "road": (0.15, 0.45), "lane marking": (0.004, 0.06),
        "sidewalk": (0.03, 0.25), "building": (0.12, 0.5), "vegetation": (0.02, 0.2),
        "vehicle": (0.02, 0.25), "pedestrian": (0.003, 0.05), "pole": (0.005, 0.06),
        "ground": (0.02, 0.3),
    }  # fmt: skip
    for name, value in zip(CLASSES, share, strict=True):
        low, high = bounds[name]
        assert low < value < high, f"{name}: {value:.4f}"


def test_pictures_vary(sample):
    images = sample["train"][0]
    frames = images.reshape(10, -1).mean(1)
    assert frames.std() > 8 and 40 < frames.mean() < 200
    assert (images.std((1, 2)) > 4).all(), "a picture is flat"
    assert (images > 254).mean() < 0.1 and (images < 1).mean() < 0.05


def test_colour_alone_does_not_tell_the_class(sample):
    """The best class of each of 4096 colours, as a per-pixel classifier, stays poor."""

    def bins(images):
        r, g, b = np.moveaxis(images.astype(int).clip(0, 255) // 16, -1, 0)
        return (r * 256 + g * 16 + b).reshape(-1)

    count = np.zeros((4096, 10))
    np.add.at(count, (bins(sample["train"][0]), sample["train"][1].reshape(-1)), 1)
    guess, truth = count.argmax(1)[bins(sample["val"][0])], sample["val"][1].reshape(-1)
    overlap = np.bincount(truth[guess == truth], minlength=10)
    union = np.bincount(truth, minlength=10) + np.bincount(guess, minlength=10) - overlap
    assert (overlap / union).mean() < 0.22
    assert (guess == truth).mean() < 0.5


def test_item():
    dataset = data.build(kind="scenes", split="val", size=SIZE, seed=3, frames=4)
    assert len(dataset) == 24 and dataset.views == 6 and dataset.classes == CLASSES
    item = dataset[13]
    assert item["image"].shape == (3, *SIZE) and item["image"].dtype == torch.float32
    assert item["label"].shape == SIZE and item["label"].dtype == torch.int64
    assert item["index"] == 13 and item["path"] == "scenes/val/3/000002/front_left"
    assert 0 <= item["label"].min() and item["label"].max() < 10
    assert len(data.build(kind="scenes")) == 12_000


def test_items_do_not_depend_on_order():
    a, b = (Scenes(split="train", size=(32, 32), seed=1, frames=9) for _ in range(2))
    forward = [a[index] for index in range(20)]
    for index in reversed(range(20)):
        item = b[index]
        assert torch.equal(item["image"], forward[index]["image"])
        assert torch.equal(item["label"], forward[index]["label"])


def test_seeds_and_splits_are_disjoint():
    def first(split, seed, frame):
        return draw_world(seed, split, frame).corners.sum()

    sums = [first(s, seed, f) for s in ("train", "val") for seed in (0, 1) for f in range(5)]
    assert len(set(sums)) == 20


def test_mirroring():
    plain = Scenes(split="train", size=(32, 48), seed=2, frames=8)
    mirrored = Scenes(split="train", size=(32, 48), seed=2, frames=8, augment=True)
    seen = set()
    for epoch in range(2):
        mirrored.set_epoch(epoch)
        for frame in range(8):
            flips = set()
            for view in (0, 4):
                a, b = plain[6 * frame + view], mirrored[6 * frame + view]
                flip = not torch.equal(a["label"], b["label"])
                flips.add(flip)
                for name in ("image", "label"):
                    expected = a[name].flip(-1) if flip else a[name]
                    assert torch.equal(expected, b[name])
            assert len(flips) == 1, "views of a frame are mirrored together"
            seen.add((epoch, frame, flips.pop()))
    assert 3 <= sum(flip for *_, flip in seen) <= 13


def test_sizes_show_the_same_scene():
    small, large = (
        Scenes(split="val", size=(n, n), seed=0, frames=1)[0]["label"] for n in (64, 192)
    )
    assert (small == large[1::3, 1::3]).float().mean() > 0.93


def test_rejects():
    with pytest.raises(ValueError, match="frames: must be positive, got 0"):
        data.build(kind="scenes", frames=0)
    with pytest.raises(ValueError, match="both sides must be 16 or more"):
        data.build(kind="scenes", size=(14, 64))
