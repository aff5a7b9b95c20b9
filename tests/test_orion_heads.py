# SPDX-License-Identifier: Apache-2.0
"""ORION's heads by themselves: memory, losses, gradients and checkpoints of small random heads."""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, distributed
from torch.nn import functional as F

from kdfast.models.orion import (
    Batch,
    DetectionConfig,
    Frame,
    HeadsConfig,
    HeadsMemory,
    HeadsOutput,
    Lanes,
    MapConfig,
    Objects,
    OrionHeads,
    load_orion_heads,
    rigid_inverse,
    task_loss,
)
from kdfast.models.orion.batch import CAN_BUS
from kdfast.models.orion.boxes import box_codes, codes_to_boxes, middle
from kdfast.models.orion.encodings import depth_samples, inverse_sigmoid, ray_logits
from kdfast.models.orion.matching import assigned, matching_cost
from kdfast.models.orion.split_keys import cross_attention, split
from kdfast.testing import relative
from kdfast.testing.orion import (
    CHANNELS,
    GRID,
    VIEWS,
    batch,
    features,
    frame,
    restarted,
    small_heads_config,
    small_orion_heads,
)


@pytest.fixture(scope="module")
def heads() -> OrionHeads:
    return small_orion_heads()


def results(output: HeadsOutput) -> dict[str, Tensor]:
    found, lanes = output.detection.found, output.map
    assert output.vlm_tokens is not None
    return {
        "scores": found.scores.transpose(0, 1),
        "codes": found.codes.transpose(0, 1),
        "lights": found.lights.transpose(0, 1),
        "futures": output.detection.futures,
        "lane scores": lanes.scores.transpose(0, 1),
        "lane points": lanes.points.transpose(0, 1),
        "tokens": output.vlm_tokens,
    }


def after(heads: OrionHeads, steps: int, **options: Any) -> HeadsMemory:
    """The memory after the first frames of the drive."""
    memory = None
    for step in range(steps):
        memory = heads(features(seed=step), frame(step, **options), memory)[1]
    assert memory is not None
    return memory


def test_shapes_and_tokens(heads: OrionHeads) -> None:
    output, memory = heads(features(), frame())
    assert output.detection.found.scores.shape == (2, 2, 16, 9)
    assert output.detection.found.codes.shape == (2, 2, 16, 10)
    assert output.detection.futures.shape == (2, 16, 6, 12)
    assert output.map.points.shape == (2, 2, 14, 11, 3)
    # Tokens of both heads' queries, of the scene and of the can bus.
    assert output.vlm_tokens is not None and output.vlm_tokens.shape == (2, 3 + 2 + 1 + 3, 10)
    assert heads(features(), frame(), tokens=False)[0].vlm_tokens is None
    assert memory.detection.embedding.shape == (2, 15, 16)
    assert not any(tensor.requires_grad for tensor in memory.state().values())
    found, lanes = output.detection.decode(), output.map.decode()
    assert len(found) == len(lanes) == 2
    assert found[0].boxes.shape[1:] == (9,) and found[0].futures.shape[1:] == (6, 6, 2)
    assert lanes[0].points.shape == (5, 11, 3)
    assert (found[0].scores.diff() <= 0).all() and (lanes[0].scores.diff() <= 0).all()


def test_orions_sizes() -> None:
    with torch.device("meta"):
        heads = OrionHeads()
    count = {
        name: sum(p.numel() for p in module.parameters()) for name, module in heads.named_children()
    }
    assert round(count["pts_bbox_head"] / 1e6, 2) == 18.26
    assert round(count["map_head"] / 1e6, 2) == 11.59


@pytest.mark.parametrize("gap", ["scene", "late", "back"])
def test_a_stream_that_restarts_forgets_and_the_other_does_not(heads: OrionHeads, gap: str) -> None:
    memory, now = after(heads, 2), frame(2)
    if gap == "scene":
        now = restarted(now, 1)
    else:
        shift = torch.tensor([0.0, 1.6 if gap == "late" else -3.0], dtype=torch.float64)
        now = replace(now, timestamp=now.timestamp + shift)
    broken = results(heads(features(seed=5), now, memory)[0])
    fresh = results(heads(features(seed=5), now)[0])
    going_on = results(heads(features(seed=5), frame(2), memory)[0])
    for name in broken:
        torch.testing.assert_close(broken[name][1], fresh[name][1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(broken[name][0], going_on[name][0], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(going_on[name][1], fresh[name][1], rtol=1e-4, atol=1e-4), name


def test_what_is_forgotten_may_be_nan(heads: OrionHeads) -> None:
    state = after(heads, 2).state()
    wrong = {
        n: x.fill_(torch.nan) if "embedding" in n or "query" in n else x for n, x in state.items()
    }
    now = replace(frame(2), scene=torch.tensor([7, 8]))
    output = heads(features(), now, HeadsMemory.from_state(wrong))[0]
    assert all(x.isfinite().all() for x in results(output).values())


def test_only_relative_motion_and_time_matter(heads: OrionHeads) -> None:
    """Another origin of the world, of its heading and of time changes nothing."""
    turn = torch.eye(4, dtype=torch.float64)
    turn[:2, :2] = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    turn[:3, 3] = torch.tensor([30.0, 11.0, 1.0], dtype=torch.float64)

    def moved(step: int) -> Frame:
        given = frame(step)
        pose = turn @ given.ego_pose.double()
        bus = given.can_bus.clone()
        bus[:, :3] += torch.tensor([5.0, 6, 7])
        bus[:, -1] += 90
        return replace(
            given,
            ego_pose=pose.float(),
            ego_pose_inv=rigid_inverse(pose).float(),
            timestamp=given.timestamp + 1000,
            can_bus=bus,
        )

    here = there = None
    for step in range(4):
        one, here = heads(features(seed=step), frame(step), here)
        other, there = heads(features(seed=step), moved(step), there)
        for name, want in results(one).items():
            # fp32 poses of 40 m round by 4e-6 m, which the waves of 32 turns make 1e-4.
            torch.testing.assert_close(results(other)[name], want, rtol=2e-3, atol=2e-3)


def test_streams_do_not_touch_each_other(heads: OrionHeads) -> None:
    memory = after(heads, 2)
    together = results(heads(features(seed=5), frame(2), memory)[0])
    alone_memory = HeadsMemory.from_state({n: x[1:] for n, x in memory.state().items()})
    names = Frame.__dataclass_fields__
    alone = Frame(**{name: getattr(frame(2), name)[1:] for name in names})
    single = results(heads(features(seed=5)[1:], alone, alone_memory)[0])
    for name, want in together.items():
        torch.testing.assert_close(single[name][0], want[1], rtol=1e-5, atol=1e-5)


def test_memory_is_saved_and_restored(heads: OrionHeads, tmp_path: Path) -> None:
    memory = after(heads, 3)
    torch.save(memory.state(), tmp_path / "memory.pt")
    loaded = torch.load(tmp_path / "memory.pt", weights_only=True)
    restored = HeadsMemory.from_state(loaded)
    want = results(heads(features(seed=9), frame(3), memory)[0])
    got = results(heads(features(seed=9), frame(3), restored)[0])
    assert all(torch.equal(got[name], want[name]) for name in want)
    moved = memory.to("meta")
    assert moved.map.pose.device.type == "meta" and moved.scene.frames.device.type == "meta"
    del loaded["scene.frames"]
    with pytest.raises(ValueError, match=r"missing \['scene.frames'\]"):
        HeadsMemory.from_state(loaded)


def test_gradients_reach_the_features_alone(heads: OrionHeads) -> None:
    before = {name: tensor.clone() for name, tensor in heads.state_dict().items()}
    x = features().requires_grad_()
    loss = task_loss(heads, x, batch(), denoise=torch.Generator().manual_seed(1))
    loss.total.backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.abs().sum() > 0
    assert all(p.grad is None for p in heads.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in heads.state_dict().items())
    # The next frame's graph does not reach into this one's.
    y = features(seed=1).requires_grad_()
    task_loss(heads, y, batch(1), loss.memory).total.backward()
    assert y.grad is not None


def test_every_parameter_that_a_loss_needs_can_be_trained() -> None:
    heads = small_orion_heads(frozen=False)
    memory = task_loss(heads, features(), batch()).memory
    loss = task_loss(
        heads, features(seed=1), batch(1), memory, denoise=torch.Generator().manual_seed(1)
    )
    loss.total.backward()
    # Only the tokens read these, and nothing reads the last.
    tokens = ("can_bus", "memory_", "scene_time", "output_projection", "pseudo_reference")
    for name, parameter in heads.named_parameters():
        assert (parameter.grad is None) == any(part in name for part in tokens), name


def test_total_is_the_sum_of_the_terms(heads: OrionHeads) -> None:
    x = features().requires_grad_()
    plain = task_loss(heads, x, batch())
    noisy = task_loss(heads, x, batch(), denoise=torch.Generator().manual_seed(1))
    per_layer = ("loss_cls", "loss_bbox", "loss_traffic", "loss_affect")
    lanes = ("loss_cls_lane", "loss_bbox_lane", "loss_cls_H", "loss_bbox_H")
    names = {p + n for p in ("", "d0.") for n in per_layer + lanes} | {"loss_traj", "loss_traj_cls"}
    assert set(plain.terms) == names
    assert set(noisy.terms) == names | {f"{p}dn_{n}" for p in ("", "d0.") for n in per_layer}
    for loss in (plain, noisy):
        assert not any(term.requires_grad for term in loss.terms.values())
        torch.testing.assert_close(
            loss.total.detach(), torch.stack(list(loss.terms.values())).sum()
        )
    assert plain.output.vlm_tokens is None


def test_denoising_changes_no_object_and_follows_its_seed(heads: OrionHeads) -> None:
    def run(seed: int | None) -> Any:
        made = None if seed is None else torch.Generator().manual_seed(seed)
        return task_loss(heads, features(), batch(), denoise=made, tokens=True)

    plain, one, same, other = run(None), run(1), run(1), run(2)
    assert torch.equal(one.total, same.total) and not torch.equal(one.total, other.total)
    without, among = results(plain.output), results(one.output)
    for name in ("scores", "codes", "lights", "lane points", "tokens"):
        torch.testing.assert_close(among[name], without[name], rtol=1e-5, atol=1e-5)
    # The copies attend to the objects where futures are made.
    assert not torch.allclose(among["futures"], without["futures"], rtol=1e-3)


@pytest.mark.parametrize("denoise", [False, True])
@pytest.mark.parametrize("empty", ["one", "both"])
def test_frames_without_objects_and_lanes(heads: OrionHeads, empty: str, denoise: bool) -> None:
    given = batch()
    objects = [Objects.none(), given.objects[1] if empty == "one" else Objects.none()]
    lanes = [Lanes.none(), given.lanes[1] if empty == "one" else Lanes.none()]
    x = features().requires_grad_()
    noise = torch.Generator().manual_seed(1) if denoise else None
    loss = task_loss(heads, x, Batch(given.frame, objects, lanes), denoise=noise)
    loss.total.backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.abs().sum() > 0
    assert all(term.isfinite() for term in loss.terms.values())
    if empty == "both":
        assert loss.terms["loss_bbox"] == loss.terms["loss_traj"] == loss.terms["loss_bbox_H"] == 0
        assert loss.terms["loss_cls"] > 0
        assert not any("dn_" in name for name in loss.terms)


def test_boxes_without_size_teach_no_size(heads: OrionHeads) -> None:
    """Zeros that fill a list up have codes of -inf: they cost, but reach no gradient."""
    given = batch()
    alone = Batch(given.frame, [Objects.none(), given.objects[1]], given.lanes)
    padded = replace(given.objects[0], boxes=torch.zeros_like(given.objects[0].boxes))
    x = features().requires_grad_()
    loss = task_loss(heads, x, Batch(given.frame, [padded, given.objects[1]], given.lanes))
    loss.total.backward()
    assert x.grad is not None and x.grad.isfinite().all() and loss.total.isfinite()
    # The same distances, over five matches instead of three.
    want = task_loss(heads, features(), alone).terms["loss_bbox"] * 3 / 5
    torch.testing.assert_close(loss.terms["loss_bbox"], want)


def test_the_order_of_the_ground_truth_does_not_matter(heads: OrionHeads) -> None:
    given, order = batch(), torch.tensor([2, 0, 1])
    names = Objects.__dataclass_fields__
    turned = Objects(**{name: getattr(given.objects[1], name)[order] for name in names})
    other = Batch(given.frame, [given.objects[0], turned], [given.lanes[0], given.lanes[1]])
    one, two = task_loss(heads, features(), given), task_loss(heads, features(), other)
    for name, term in one.terms.items():
        torch.testing.assert_close(two.terms[name], term)


def test_features_of_any_kind_are_computed_in_fp32(heads: OrionHeads) -> None:
    given = batch()
    want = task_loss(heads, features().bfloat16().float(), given).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = task_loss(heads, features().bfloat16(), given).total
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    flat = task_loss(heads, features().flatten(0, 1), batch()).total
    torch.testing.assert_close(flat, task_loss(heads, features(), batch()).total)


def test_rays_lead_back_to_their_pixels() -> None:
    bounds = torch.tensor([-200.0, -200, -200, 200, 200, 200])
    depths, cameras = depth_samples(64), frame().lidar2img
    assert depths[0] == 1 and depths[1] == pytest.approx(1 + 60.2 / 4160 * 2)
    logits = ray_logits(cameras, GRID, 16, depths, bounds)
    assert logits.shape == (2, VIEWS * math.prod(GRID), 192)
    shares = logits.sigmoid().view(2, VIEWS, *GRID, 64, 3)
    points = 400 * shares - 200
    whole = torch.cat((points, torch.ones_like(points[..., :1])), -1)
    seen = torch.einsum("bvij,bvhwkj->bvhwki", cameras, whole)
    pixel = seen[..., :2] / seen[..., 2:3]
    torch.testing.assert_close(seen[..., 2], depths.expand_as(seen[..., 2]), rtol=1e-3, atol=1e-3)
    want = torch.tensor([16 * 3 + 8.0, 16 * 1 + 8.0]).expand(2, VIEWS, 64, 2)
    torch.testing.assert_close(pixel[:, :, 1, 3], want, rtol=1e-3, atol=1e-2)


def test_codes_of_boxes_and_back() -> None:
    boxes = middle(batch().objects[1].boxes)
    torch.testing.assert_close(codes_to_boxes(box_codes(boxes)), boxes)
    box = torch.tensor([[1.0, 2, 3, 1, math.e, 1, 0, 5, 6]])
    assert box_codes(box).tolist()[0] == pytest.approx([1, 2, 0, 1, 3, 0, 0, 1, 5, 6])
    x = torch.tensor([-1.0, 0.25, 2.0])
    top = math.log(1e5)
    assert inverse_sigmoid(x).tolist() == pytest.approx([-top, -math.log(3), top], rel=1e-4)


def test_matching_takes_the_cheapest_and_survives_nan() -> None:
    scores = torch.full((1, 3, 2), -20.0)
    scores[0, 2, 1] = 20
    codes = torch.tensor([[[0.0], [4.0], [9.0]]])
    targets, labels = torch.tensor([[3.0], [1.0]]), torch.tensor([1, 0])
    cost = matching_cost(scores, labels, codes, targets, (0.0, 1.0))
    assert cost.tolist() == [[[3, 1], [1, 3], [6, 8]]]
    assert assigned([cost]).tolist() == [[[1, 0, -1]]]
    by_class = matching_cost(scores, labels, codes, targets, (1.0, 0.0))
    assert assigned([by_class])[0, 0, 2] == 0
    codes[0, 0] = torch.nan
    targets[1] = torch.inf
    wrong = matching_cost(scores, labels, codes, targets, (0.0, 1.0))
    assert wrong.tolist() == [[[100, 100], [1, 100], [6, 100]]]
    none = matching_cost(scores, labels[:0], codes, targets[:0], (1.0, 1.0))
    assert assigned([none, cost]).tolist() == [[[-1, -1, -1], [1, 0, -1]]]


@pytest.mark.parametrize(("queries", "keys", "parts"), [(500, 2400, 4), (1100, 2200, 2)])
def test_attention_by_parts_of_the_keys(
    compiled: None, queries: int, keys: int, parts: int
) -> None:
    assert split(queries, keys) == parts
    q = torch.randn(2, queries, 2, 8).transpose(1, 2).requires_grad_()
    k, v = (torch.randn(2, keys, 2, 8).transpose(1, 2).requires_grad_() for _ in range(2))
    weight = torch.randn(2, 2, queries, 8)
    # Weights that lie almost all in one part, and by more than fp32 can hold without their log-sum.
    with torch.no_grad():
        k[:, 0, :5] *= 200
    out = cross_attention(q, k, v)
    assert "SplitKeys" in type(out.grad_fn).__name__
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = F.scaled_dot_product_attention(*exact)
    assert relative(out.double(), want) < 1e-5
    grads = torch.autograd.grad((out * weight).sum(), (q, k, v))
    goals = torch.autograd.grad((want * weight).sum(), exact)
    for got, goal in zip(grads, goals, strict=True):
        assert relative(got.double(), goal) < 1e-4


def test_keys_are_split_only_where_it_pays() -> None:
    # ORION's heads, both with all six cameras.
    assert split(1156, 9600) == 8 and split(2056, 9600) == 4
    assert split(88, 360) == 1  # too little work
    assert split(1500, 2100) == 1  # a part would be all keys
    assert split(1000, 9601) == 1  # 9601 is a prime number
    assert split(0, 9600) == 1


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_matches_are_averaged_over_processes(
    heads: OrionHeads, one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = task_loss(heads, features(), batch()).terms
    # As if another process had found three times as many: the mean is twice this one's.
    monkeypatch.setattr(distributed, "all_reduce", lambda mean: mean.mul_(4))
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    got = task_loss(heads, features(), batch()).terms
    for name in ("loss_bbox", "loss_traj", "loss_traj_cls", "loss_bbox_lane", "d0.loss_bbox_H"):
        torch.testing.assert_close(got[name], want[name] / 2)
    for name in ("loss_cls", "loss_traffic", "loss_cls_lane"):
        assert torch.equal(got[name], want[name])


def whole_checkpoint(heads: OrionHeads) -> dict[str, Tensor]:
    """The heads' tensors under all the names that ORION saves them by, and others."""
    state = dict(heads.state_dict())
    for name, tensor in heads.state_dict().items():
        if name.startswith(("query_pos.", "time_embedding.", "ego_pose_pe.")):
            for head in ("pts_bbox_head.", "map_head."):
                state[head + name] = tensor
        if "_branches.0." in name and "traj" not in name:
            state[name.replace("_branches.0.", "_branches.1.")] = tensor
    unused = {"map_head.code_weights": torch.ones(2), "map_head.match_costs": torch.ones(2)}
    return {**state, **unused, "img_backbone.x": torch.ones(1), "lm_head.y": torch.ones(1)}


@pytest.mark.parametrize("kind", ["torch", "module", "bare", "safetensors", "half"])
def test_checkpoints(heads: OrionHeads, tmp_path: Path, kind: str) -> None:
    path, state = tmp_path / "orion.pth", whole_checkpoint(heads)
    if kind == "half":
        state = {name: tensor.half() for name, tensor in state.items()}
    if kind == "safetensors":
        save_file({name: tensor.clone() for name, tensor in state.items()}, path)
    elif kind == "bare":
        torch.save(heads.state_dict(), path)
    else:
        front = "module." if kind == "module" else ""
        named = {front + name: tensor for name, tensor in state.items()}
        torch.save({"meta": {"epoch": 6}, "state_dict": named}, path)
    loaded = load_orion_heads(path, small_heads_config())
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    for name, tensor in heads.state_dict().items():
        want = tensor.half().float() if kind == "half" else tensor
        assert torch.equal(loaded.state_dict()[name], want)
    trainable = load_orion_heads(path, small_heads_config(), frozen=False)
    frozen = {name for name, p in trainable.named_parameters() if not p.requires_grad}
    assert frozen == {"pts_bbox_head.pseudo_reference_points.weight"}


def test_every_fault_of_a_checkpoint_is_named(heads: OrionHeads, tmp_path: Path) -> None:
    path, state = tmp_path / "orion.pth", whole_checkpoint(heads)
    del state["position_encoder.0.weight"]
    state["pts_bbox_head.reference_points.weight"] = torch.zeros(5, 3)
    state["map_head.query_pos.0.bias"] = state["map_head.query_pos.0.bias"] + 1
    state["map_head.unheard_of"] = torch.zeros(1)
    torch.save({"state_dict": state}, path)
    with pytest.raises(ValueError, match="must fit the heads") as error:
        load_orion_heads(path, small_heads_config())
    assert str(error.value).splitlines()[1:] == [
        "  missing position_encoder.0.weight (64, 192)",
        "  extra map_head.unheard_of (1,)",
        "  mis-shaped pts_bbox_head.reference_points.weight: must be (12, 3), got (5, 3)",
        "  map_head.query_pos.0.bias differs from query_pos.0.bias",
    ]
    torch.save({"state_dict": {**state, "map_head.x": "text"}}, path)
    with pytest.raises(ValueError, match=r"must hold tensors, got other values for \['map_head.x'"):
        load_orion_heads(path, small_heads_config())


def test_the_documents_example_runs(heads: OrionHeads, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).resolve().parents[1] / "docs" / "use" / "orion.md"
    block = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)[0]
    student = torch.nn.Conv2d(3, CHANNELS, 16, 16)
    monkeypatch.setattr("kdfast.models.load_backbone", lambda path: student)
    monkeypatch.setattr("kdfast.models.orion.load_orion_heads", lambda path: heads)
    pictures = torch.randn(2 * VIEWS, 3, 16 * GRID[0], 16 * GRID[1])
    scope: dict[str, Any] = {"frames": [(pictures, batch(step)) for step in range(2)]}
    exec(block, scope)
    assert scope["memory"].scene.frames.tolist() == [2, 2]
    assert student.weight.grad is not None and student.weight.grad.abs().sum() > 0


def test_wrong_arguments_are_named(heads: OrionHeads) -> None:
    given = batch()
    with pytest.raises(TypeError, match="Frame: timestamp must be torch.float64"):
        replace(given.frame, timestamp=given.frame.timestamp.float())
    with pytest.raises(ValueError, match=rf"Frame: can_bus must be \(2, {CAN_BUS}\), got \(2, 3\)"):
        replace(given.frame, can_bus=given.frame.can_bus[:, :3])
    with pytest.raises(ValueError, match=r"Objects: boxes must be \(2, 9\), got \(2, 7\)"):
        replace(given.objects[0], boxes=given.objects[0].boxes[:, :7])
    with pytest.raises(ValueError, match=r"Lanes: points must be \(1, 11, 3\)"):
        replace(given.lanes[0], points=given.lanes[0].points[:, :10])
    with pytest.raises(ValueError, match="must have 2 entries.* got 1 and 2"):
        Batch(given.frame, given.objects[:1], given.lanes)
    with pytest.raises(ValueError, match=rf"features must be \(2, {VIEWS}, {CHANNELS}, h, w\)"):
        heads(features()[:, :, :5], given.frame)
    with pytest.raises(ValueError, match="must have the memory's 2 streams, got 3"):
        heads(features(3), frame(streams=3), after(heads, 1))


def test_wrong_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="multiple of heads, got 30 and 4"):
        MapConfig(dim=30, heads=4)
    with pytest.raises(ValueError, match="memory_len must be twice topk"):
        DetectionConfig(memory_len=500)
    with pytest.raises(ValueError, match=r"topk must be in \[1, 60\]"):
        DetectionConfig(queries=40, propagated=20)
    with pytest.raises(ValueError, match=r"one2one must be in \[1, lanes = 10\]"):
        MapConfig(lanes=10)
    with pytest.raises(ValueError, match=r"in_channels must be the same in both heads"):
        HeadsConfig(map=MapConfig(in_channels=7))
