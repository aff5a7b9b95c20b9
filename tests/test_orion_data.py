# SPDX-License-Identifier: Apache-2.0
"""Bench2Drive's formats: annotations, infos, maps, conversations, frames and their order."""

from __future__ import annotations

import gzip
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from kdfast.data.__main__ import main
from kdfast.data.files import CorruptDataError
from kdfast.data.orion import annotation, chat, names, prepare
from kdfast.data.orion.check import check_root
from kdfast.data.orion.frames import OrionFrames, collate_frames
from kdfast.data.orion.geometry import box_corners, invert, move, project
from kdfast.data.orion.infos import InfosBuilder, open_infos
from kdfast.data.orion.maps import open_maps, read_pickled_maps, resample
from kdfast.data.orion.sample import SampleOptions, write_sample
from kdfast.data.orion.sequences import SequenceSampler
from kdfast.data.orion.targets import command
from kdfast.data.views.preprocess import MEAN, STD
from kdfast.models.orion.config import CLASSES

SHARED = Path(__file__).parents[2] / "shared" / "data"
FRAMES = 16


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("b2d") / "data"
    write_sample(out, SampleOptions(clips=3, val_clips=1, frames=FRAMES, size=(180, 320)))
    assert main(["infos", "--root", str(out), "--workers", "1"]) == 0
    return out


@pytest.fixture()
def copied(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(root, tmp_path / "copy"))


def test_real_annotation_agrees_with_its_own_matrices() -> None:
    path = SHARED / "b2d_anno_sample.json.gz"
    if not path.is_file():
        pytest.skip("needs shared/data/b2d_anno_sample.json.gz, a real annotation of Bench2Drive")
    info, centres = annotation.frame_info(
        annotation.read_annotation(path), "v1/Accident_Town03_Route24816_Weather25", 93
    )
    assert info["town_name"] == "Town03"
    assert [names.detection_class(name) for name in info["gt_names"]] == [0, 4, 5]
    for camera in names.CAMERAS:
        sensor = info["sensors"][camera]
        agreed = sensor["cam2ego"] @ sensor["world2cam"]
        np.testing.assert_allclose(agreed, info["world2ego"], atol=2e-4)
    lidar = info["sensors"]["LIDAR_TOP"]
    np.testing.assert_allclose(
        lidar["lidar2ego"] @ lidar["world2lidar"], info["world2ego"], atol=1e-5
    )
    # x right, y ahead: the car that comes towards the ego is ahead and to the left.
    x, y = info["gt_boxes"][0, :2]
    assert x == pytest.approx(-9.568, abs=1e-3) and y == pytest.approx(18.230, abs=1e-3)
    assert np.hypot(*info["gt_boxes"][0, 7:]) == pytest.approx(8.15659, abs=1e-4)
    assert info["gt_boxes"][0, 3:6] == pytest.approx([1.9941, 4.1812, 1.3853], abs=1e-3)
    # The corners that CARLA annotates are those of the box.
    thing = annotation.read_annotation(path)["bounding_boxes"][1]
    world = np.array(thing["world_cord"]) * (1, -1, 1)
    corners = move(lidar["world2lidar"], world)
    ours = box_corners(info["gt_boxes"][:1])[0]
    apart = np.linalg.norm(corners[:, None] - ours[None], axis=-1).min(1)
    assert apart.max() < 0.1


def test_boxes_project_onto_the_pixels_that_were_drawn(root: Path) -> None:
    data = OrionFrames(root, size=(320, 320))
    hits = seen = 0
    for index in range(0, len(data), 5):
        sample = data[index]
        boxes = sample.objects.boxes.double().numpy().copy()
        boxes[:, 2] += boxes[:, 5] / 2
        for view in range(6):
            pixels, depth = project(sample.rig.lidar2img[view].double().numpy(), boxes[:, :3])
            for (x, y), z, label in zip(pixels, depth, sample.objects.labels, strict=True):
                # Cars and larger ones, near enough to fill a few pixels, not at the border.
                if label > 2 or not 2 < z < 25 or not (8 < x < 312 and 8 < y < 312):
                    continue
                pixel = sample.images[view, :, int(y), int(x)].numpy() * STD + MEAN
                seen += 1
                # Sky is bluish, road and meadow are dull; bodies of cars are neither.
                hits += bool(np.ptp(pixel) > 35 or pixel.mean() > 110)
    assert seen > 5 and hits / seen > 0.7


def test_frame_has_the_true_geometry(root: Path) -> None:
    data = OrionFrames(root, size=(64, 64))
    first, later = data[0], data[10]
    np.testing.assert_allclose(
        (first.rig.ego_pose @ first.rig.ego_pose_inv).numpy(), np.eye(4), atol=1e-4
    )
    # Standing things keep their place in the world.
    infos = data.infos
    for one in infos.columns["gt_ids"][infos.boxes(0)]:
        rows = infos.columns["gt_ids"][infos.boxes(10)]
        if one not in rows:
            continue
        a = infos.columns["gt_boxes"][infos.boxes(0)][
            list(infos.columns["gt_ids"][infos.boxes(0)]).index(one)
        ]
        b = infos.columns["gt_boxes"][infos.boxes(10)][list(rows).index(one)]
        if np.hypot(*a[7:]) == 0 and np.hypot(*b[7:]) == 0:
            there = move(invert(infos.pose(0)), a[None, :3])
            np.testing.assert_allclose(there, move(invert(infos.pose(10)), b[None, :3]), atol=1e-6)
    speed = first.rig.can_bus[7].item()
    moved = np.linalg.norm((later.rig.ego_pose - first.rig.ego_pose)[:3, 3].numpy())
    assert moved == pytest.approx(speed * (later.rig.timestamp - first.rig.timestamp), rel=0.02)
    # A car that drives on: its future is its velocity.
    moving = (first.objects.boxes[:, 7:].norm(dim=1) > 1) & (first.objects.labels < 3)
    steps = first.objects.future_valid[moving].bool()
    velocity = first.objects.boxes[moving, 7:][:, None].expand(-1, 6, -1)
    torch.testing.assert_close(
        first.objects.future[moving][steps], velocity[steps] * 0.5, atol=1e-3, rtol=1e-3
    )
    assert steps[:, 0].all() and steps.any()
    # Seven known places need 30 frames; the clip ends before.
    assert not first.objects.future_valid[:, 3:].any()


def test_lanes_around_the_car(root: Path) -> None:
    data = OrionFrames(root, size=(64, 64))
    lanes = data[0].lanes
    assert lanes.points.shape[1:] == (11, 3) and not lanes.points[..., 2].any()
    assert {int(label) for label in lanes.labels} >= {1, 3}
    # Outlines have corners, where the way is longer than the distance.
    steps = lanes.points[lanes.labels < 4].diff(dim=1).norm(dim=-1)
    even = steps.mean(1, keepdim=True).expand_as(steps)
    torch.testing.assert_close(steps, even, rtol=0.02, atol=0)
    # The ego drives in the middle of a lane.
    middle = lanes.points[lanes.labels == 3][..., :2].norm(dim=-1).min()
    assert middle < 4


def test_resample_is_of_equal_distance() -> None:
    line = np.array([[0.0, 0], [1, 0], [1, 3]])
    np.testing.assert_allclose(resample(line, 5), [[0, 0], [1, 0], [1, 1], [1, 2], [1, 3]])


def test_pickled_infos_give_the_same_frames(copied: Path) -> None:
    before = OrionFrames(copied, size=(64, 64))[3]
    infos = open_infos(copied / "kdfast_infos_train")
    held = [{k: v for k, v in info.items() if k != "light"} for info in prepare.infos_of(infos)]
    (copied / "train.pkl").write_bytes(pickle.dumps(held[::-1], protocol=4))
    (copied / "val.pkl").write_bytes(pickle.dumps(held[:1], protocol=2))
    pickles = ["--train", str(copied / "train.pkl"), "--val", str(copied / "val.pkl")]
    assert main(["infos", "--root", str(copied), *pickles]) == 0
    data = OrionFrames(copied, size=(64, 64))
    assert data.infos.has_lights
    number = int(infos.columns["frame_idx"][3])
    after = data[data.infos.frame_of(infos.clip(3), number)]  # type: ignore[index]
    assert torch.equal(before.objects.boxes, after.objects.boxes)
    assert torch.equal(before.objects.lights, after.objects.lights)
    assert torch.equal(before.rig.lidar2img, after.rig.lidar2img)


def test_pickled_infos_without_annotations_know_no_lights(copied: Path) -> None:
    infos = open_infos(copied / "kdfast_infos_train")
    held = [{k: v for k, v in i.items() if k != "light"} for i in prepare.infos_of(infos)]
    (copied / "infos.pkl").write_bytes(pickle.dumps(held))
    for folder in copied.glob("v1/*/anno"):
        shutil.rmtree(folder)
    prepare.infos_from_pickle(copied / "infos.pkl", copied, "train")
    data = OrionFrames(copied, size=(64, 64))
    assert not data.infos.has_lights
    assert (data[0].objects.lights == -1).all()


def test_maps_from_pickle_and_from_npz_agree(copied: Path) -> None:
    from kdfast.data.orion.maps import read_hd_maps, write_maps

    towns = read_hd_maps(copied / "maps")
    (copied / "maps.pkl").write_bytes(pickle.dumps(towns))
    write_maps(copied / "again", read_pickled_maps(copied / "maps.pkl"))
    one, other = open_maps(copied / "kdfast_maps"), open_maps(copied / "again")
    pose = np.eye(4)
    for town in one:
        for a, b in zip(one[town].around(pose), other[town].around(pose), strict=True):
            assert np.array_equal(a, b)


def test_maps_leave_out_what_has_no_class_and_what_is_far() -> None:
    from kdfast.data.orion.maps import Town, _town_arrays

    far = np.array([[500.0, 0, 0], [501, 0, 0]])
    near = np.array([[-80.0, 1, 0], [0, 1, 0], [40, 1, 0]])
    square = np.array([[0.0, 0, 0], [2, 0, 0], [2, 2, 0], [0, 2, 0]])
    town = Town(
        **_town_arrays(
            {
                "lane_points": [far, near, near],
                "lane_sample_points": [far, near, near],
                "lane_types": ["Solid", "Broken", "NONE"],
                "trigger_volumes_points": [square, square + (50, 0, 0)],
                "trigger_volumes_types": ["StopSign", "TrafficLight"],
            },
            "here",
        )
    )
    points, labels = town.around(np.eye(4))
    # The second volume reaches out of the range; of the near lane two points are inside.
    assert labels.tolist() == [0, 5]
    np.testing.assert_allclose(points[0, [0, -1], 0], [0, 40])
    np.testing.assert_allclose(points[1, [0, -1], :2], [[0, 0], [0, 0]])


@pytest.mark.parametrize("name", ["frame_idx", "gt_boxes", "box_start"])
def test_damaged_tables_are_seen(copied: Path, name: str) -> None:
    file = copied / "kdfast_infos_train" / f"{name}.npy"
    file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(ValueError, match="kdfast.data infos"):
        open_infos(copied / "kdfast_infos_train")


@pytest.mark.parametrize(
    "change",
    [
        {"gt_boxes": np.zeros((1, 7))},
        {"ego_vel": np.array([np.nan, 0, 0])},
        {"sensors": {}},
        {"gt_names": []},
        {"command_near": "left"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_infos_of_another_form_are_named(root: Path, change: dict[str, object]) -> None:
    info = next(iter(prepare.infos_of(open_infos(root / "kdfast_infos_train"))))
    with pytest.raises(CorruptDataError, match=r"frame 0: .*"):
        InfosBuilder().add({**info, **change})


def test_an_interrupted_run_goes_on(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    real = prepare._make_part

    def stop_at_second(root: Path, parts: Path, use_depth: bool, clip: str) -> None:
        if made and len(made) == 1:
            made.append("stopped")
            raise KeyboardInterrupt
        made.append(clip)
        real(root, parts, use_depth, clip)

    shutil.rmtree(copied / "kdfast_infos_train")
    monkeypatch.setattr(prepare, "_make_part", stop_at_second)
    arguments = ["infos", "--root", str(copied), "--workers", "1"]
    assert main(arguments) == 130
    first = made[0]
    assert not (copied / "kdfast_infos_train").exists()
    assert main(arguments) == 0
    assert made.count(first) == 1
    assert len(open_infos(copied / "kdfast_infos_train")) == 2 * FRAMES
    assert not (copied / prepare.PARTS).exists()


def test_depth_pictures_leave_out_what_is_hidden(root: Path) -> None:
    clip = sorted((root / "v1").iterdir())[0]
    anno = annotation.read_annotation(clip / "anno" / "00000.json.gz")
    everything, _ = annotation.frame_info(anno, f"v1/{clip.name}", 0)
    wall = {camera: np.zeros((180, 320), np.uint8) for camera in names.CAMERAS}
    nothing, _ = annotation.frame_info(anno, f"v1/{clip.name}", 0, depth=wall)
    far = {camera: np.full((180, 320), 255, np.uint8) for camera in names.CAMERAS}
    again, _ = annotation.frame_info(anno, f"v1/{clip.name}", 0, depth=far)
    assert len(everything["gt_ids"]) and not len(nothing["gt_ids"])
    assert np.array_equal(everything["gt_ids"], again["gt_ids"])


def test_walkers_get_the_speed_of_their_steps(root: Path) -> None:
    clip = sorted((root / "v1").iterdir())[0]
    anno = annotation.read_annotation(clip / "anno" / "00000.json.gz")
    walker = {**anno["bounding_boxes"][1], "class": "walker", "id": "7", "speed": 0.0}
    anno["bounding_boxes"][1:] = [walker]
    _, centres = annotation.frame_info(anno, f"v1/{clip.name}", 0)
    before = {"7": centres["7"] - (0.1, 0.05, 0)}
    info, _ = annotation.frame_info(anno, f"v1/{clip.name}", 1, before)
    assert np.hypot(*info["gt_boxes"][0, 7:]) == pytest.approx(np.hypot(1, 0.5))
    unknown, _ = annotation.frame_info(anno, f"v1/{clip.name}", 1, {"8": centres["7"]})
    assert not unknown["gt_boxes"][0, 7:].any()


def test_commands() -> None:
    assert command(-1) == 3 and command(1) == 0
    with pytest.raises(ValueError, match="1 to 6"):
        command(7)


def test_pictures_that_cannot_be_read_teach_nothing(copied: Path) -> None:
    data = OrionFrames(copied, size=(64, 64))
    path = copied / data.infos.pictures(2)[4]
    path.write_bytes(b"\xff\xd8 broken")
    sample = data[2]
    assert [item.path for item in sample.corrupt] == [str(path)]
    assert not len(sample.objects.labels) and not len(sample.lanes.labels)
    assert not sample.images[4].any() and sample.images[3].any()
    batch = collate_frames([data[1], sample])
    assert batch.images.shape == (2, 6, 3, 64, 64) and len(batch.corrupt) == 1
    assert torch.isfinite(batch.batch.frame.lidar2img).all()


def test_augmentation_moves_calibration_with_the_picture(root: Path) -> None:
    data = OrionFrames(root, size=(320, 320), augment=True, photometric=True, seed=3)
    plain = OrionFrames(root, size=(320, 320))
    one, other = data[0], plain[0]
    assert not torch.equal(one.rig.lidar2img, other.rig.lidar2img)
    # The point that both calibrations see at different pixels shows the same thing: undo one, do
    # the other, and the pixels of the lane markings agree.
    transform = one.rig.lidar2img[0].double() @ other.rig.lidar2img[0].double().inverse()
    scale = transform[:2, :2] / transform[0, 0]
    torch.testing.assert_close(scale, torch.eye(2, dtype=torch.double), atol=1e-3, rtol=0)
    data.set_epoch(1)
    assert not torch.equal(data[0].images, one.images)
    data.set_epoch(0)
    assert torch.equal(data[0].images, one.images)


def batches(sampler: SequenceSampler) -> list[list[int]]:
    indices = list(sampler)
    return [indices[at : at + sampler.batch] for at in range(0, len(indices), sampler.batch)]


def test_sequences_walk_in_order_and_share_among_ranks(root: Path) -> None:
    infos = open_infos(root / "kdfast_infos_train")
    sampler = SequenceSampler(infos, 4, length=5, seed=1)
    whole = batches(sampler)
    halves = [batches(SequenceSampler(infos, 2, length=5, seed=1, rank=r, world=2)) for r in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole
    assert len(whole) == len(infos) // 4
    assert len({frame for batch in whole for frame in batch}) > 0.9 * len(infos) - 4
    for slot in range(4):
        walk = [batch[slot] for batch in whole]
        breaks = sum(b != a + 1 for a, b in zip(walk, walk[1:], strict=False))
        assert breaks <= len(walk) // 4 + 1
    sampler.set_epoch(0, 3 * 4)
    assert batches(sampler) == whole[3:] and len(sampler) == 4 * (len(whole) - 3)
    sampler.set_epoch(1)
    assert batches(sampler) != whole and len(batches(sampler)) == len(whole)
    in_order = SequenceSampler(infos, 1, length=0, shuffle=False)
    assert list(in_order) == list(range(len(infos)))
    strided = batches(SequenceSampler(infos, 1, length=0, stride=5, shuffle=False))
    assert [batch[0] for batch in strided[:4]] == [0, 5, 10, 15]
    with pytest.raises(ValueError, match="sequences"):
        SequenceSampler(infos, 100)
    with pytest.raises(ValueError, match="positive"):
        SequenceSampler(infos, 1, stride=0)


def test_conversations_and_their_tokens(root: Path, tmp_path: Path) -> None:
    data = OrionFrames(root, size=(64, 64), chat=root / "chat-B2D")
    rounds = data[0].rounds
    assert len(rounds) == 2 and "metres" in rounds[1].answer
    assert chat.encode(rounds, None) is None

    class Tokenizer:
        bos_token_id, eos_token_id = 1, 2

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) for letter in text]}

    encoded = chat.encode(rounds, Tokenizer(), system="Be brief.")
    assert encoded is not None and encoded.ids.shape == encoded.labels.shape
    assert (encoded.ids == chat.IMAGE_INDEX).sum() == 1
    learned = encoded.labels[encoded.labels != chat.IGNORE]
    text = "".join(chr(token) for token in learned.tolist() if token != 2)
    assert text == f" {rounds[0].answer} {rounds[1].answer}"
    assert (learned == 2).sum() == 2
    assert chat.conversation(tmp_path / "absent.json") == ()
    broken = tmp_path / "broken.json"
    for content in ("{", "[[1, 2]]", '[[{"from": "gpt", "value": "a"}]]', "7"):
        broken.write_text(content)
        with pytest.raises(CorruptDataError, match=r"broken\.json"):
            chat.conversation(broken)


def test_check_says_what_is_missing(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--root", str(copied)]) == 0
    shown = capsys.readouterr().out
    assert "3 of the synthetic sample" in shown and "download" not in shown
    (copied / "sample.json").unlink()
    assert main(["check", "--root", str(copied)]) == 0, "other clips may be few"
    assert "download Bench2Drive base" in capsys.readouterr().out
    shutil.rmtree(copied / "kdfast_maps")
    picture = next((copied / "v1").glob("*/camera/rgb_back/*.jpg"))
    picture.unlink()
    states = {one.what: one.state for one in check_root(copied)}
    assert states["maps"] == "missing" and states["pictures"] == "partial"
    capsys.readouterr()
    assert main(["check", "--root", str(copied)]) == 1
    said = capsys.readouterr().out
    assert "Bench2Drive-Map" in said and "needs pictures" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["check", "--root", "absent"], "must be a folder"),
        (["infos", "--root", "absent"], "must be a folder"),
        (["sample", "--out", "x", "--clips", "0"], "1 to 99"),
        (["sample", "--out", "x", "--clips", "2", "--val-clips", "2"], "fewer"),
        (["sample", "--out", "x", "--size", "2", "2"], "16 pixels"),
    ],
)
def test_requests_that_cannot_be_met(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_sample_does_not_overwrite(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "--out", str(root)]) == 2
    assert "must be free" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"{}", b'{"bounding_boxes": []}', b"[1]", b"\xff"])
def test_damaged_annotations_are_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "00003.json.gz"
    for data in (content, gzip.compress(content)):
        path.write_bytes(data)
        with pytest.raises(CorruptDataError, match=r"00003\.json\.gz"):
            annotation.read_annotation(path)


def test_an_annotation_with_a_wrong_value_is_named(root: Path) -> None:
    clip = sorted((root / "v1").iterdir())[0]
    anno = annotation.read_annotation(clip / "anno" / "00000.json.gz")
    for key, value in (("theta", "x"), ("sensors", {}), ("acceleration", None)):
        with pytest.raises(CorruptDataError, match="annotation 00000"):
            annotation.frame_info({**anno, key: value}, f"v1/{clip.name}", 0)
    broken = json.loads(json.dumps(anno))
    broken["bounding_boxes"][-1]["extent"] = [1.0]
    with pytest.raises(CorruptDataError, match="annotation 00000"):
        annotation.frame_info(broken, f"v1/{clip.name}", 0)


@pytest.mark.parametrize(
    ("state", "index"),
    [(0, 0), ("Red", 0), ("Green", 2), (4, 3), ("TrafficLightState.Yellow", 1), ("Unknown", 3)],
)
def test_states_of_traffic_lights(state: object, index: int) -> None:
    assert names.light_state(state) == index


@pytest.mark.parametrize("state", [None, True, "blue", -1])
def test_states_that_there_are_not(state: object) -> None:
    with pytest.raises(ValueError, match="traffic light"):
        names.light_state(state)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("vehicle.audi.tt", "car"),
        ("walker.pedestrian.0047", "pedestrian"),
        ("traffic.speed_limit.60", "traffic_sign"),
        ("static.prop.constructioncone", "traffic_cone"),
        (
            "/Game/Carla/Static/Car/4Wheeled/ParkedVehicles/VolkswagenT2/SM_VolkswagenT2.SM",
            "van",
        ),
        ("/Game/Carla/Static/Car/4Wheeled/ParkedVehicles/TeslaM3/SM_TeslaM3.SM", "car"),
        ("van", "van"),
    ],
)
def test_classes_of_blueprints(name: str, label: str) -> None:
    assert CLASSES[names.detection_class(name)] == label
    assert names.detection_class("vehicle.unknown.thing") == -1
