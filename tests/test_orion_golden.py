# SPDX-License-Identifier: Apache-2.0
"""ORION's heads and losses against golden tensors of ORION's own code."""

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from kdfast.models.orion import (
    DetectionConfig,
    Frame,
    HeadsConfig,
    HeadsMemory,
    Lanes,
    MapConfig,
    Objects,
    OrionHeads,
)
from kdfast.models.orion.boxes import middle
from kdfast.models.orion.denoise import Noised, noised_boxes
from kdfast.models.orion.losses import detection_losses, map_losses, match_lanes, match_objects
from kdfast.models.orion.memory import Memory, SceneMemory
from kdfast.testing import relative

# Relative to the largest value of a tensor; the gradient's bounds allow for ReLUs and signs that
# lie within rounding of their kink.
OUTPUT, LOSS, GRADIENT, COSINE = 2e-4, 1e-4, 2e-2, 0.9995


class Golden:
    """Inputs, weights and results of ORION's own heads."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            self.config: dict[str, Any] = json.loads(file.metadata()["config"])
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def group(self, prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): t for k, t in self.tensors.items() if k.startswith(prefix)}

    def parameters(self) -> dict[str, Tensor]:
        return {name: tensor.float() for name, tensor in self.group("param.").items()}

    def frame(self, i: int) -> Frame:
        scenes: dict[str, int] = {}
        numbers = [
            scenes.setdefault(t, len(scenes)) for s in self.config["scene_tokens"] for t in s
        ]
        streams = len(self.config["scene_tokens"][i])
        given = self.group(f"f{i}.in.")
        names = ("lidar2img", "ego_pose", "ego_pose_inv", "timestamp", "command", "can_bus")
        scene = torch.tensor(numbers[i * streams : (i + 1) * streams])
        return Frame(scene=scene, **{name: given[name] for name in names})

    def objects(self, i: int) -> list[Objects]:
        found = []
        for b in range(len(self.config["scene_tokens"][i])):
            gt = self.group(f"f{i}.gt.{b}.")
            assert torch.equal(gt["traffic_mask"], gt["traffic_state"][:, 0] >= 0)
            moves, valid = gt["attr_labels"][:, :12], gt["attr_labels"][:, 12:18]
            lights = gt["traffic_state"]
            found.append(
                Objects(gt["boxes"], gt["labels"], lights, moves.unflatten(1, (6, 2)), valid)
            )
        return found

    def lanes(self, i: int) -> list[Lanes]:
        groups = [self.group(f"f{i}.gt.{b}.") for b in range(2)]
        return [Lanes(gt["lanes"], gt["labels"]) for gt in groups]

    def detection(self) -> DetectionConfig:
        sizes = self.config
        return DetectionConfig(
            **_common(sizes),
            results=sizes["max_num"],
            queries=sizes["num_query"],
            propagated=sizes["num_propagated"],
            scene_queries=sizes["num_memory"],
            scene_memory_len=sizes["scence_memory_len"],
            aux_ffn=sizes["aux_ffn"],
            dn_groups=sizes["dn_groups"],
        )

    def map(self) -> MapConfig:
        sizes = self.config
        return MapConfig(
            **_common(sizes),
            lanes=sizes["num_lane"],
            one2one=sizes["num_lanes_one2one"],
            repeats=sizes["k_one2many"],
            one2many_weight=sizes["lambda_one2many"],
        )


def _common(sizes: dict[str, Any]) -> dict[str, Any]:
    return {
        "in_channels": sizes["in_channels"],
        "layers": sizes["num_layers"],
        "ffn": sizes["ffn"],
        "vlm_queries": sizes["num_extra"],
        "out_dims": sizes["out_dims"],
        "memory_len": sizes["memory_len"],
        "topk": sizes["topk_proposals"],
    }


def close(got: Tensor, want: Tensor, name: str) -> None:
    assert got.shape == want.shape, name
    error = (got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-9)
    assert error <= OUTPUT, f"{name}: {error:.2e}"


def close_losses(got: dict[str, Tensor], golden: Golden, prefix: str) -> None:
    want = golden.group(f"{prefix}.loss.")
    assert got.keys() == want.keys()
    for name, loss in want.items():
        error = abs(got[name] - loss) / max(abs(loss), 1e-9)
        assert error <= LOSS, f"{prefix} {name}: {error:.2e}"
    total = torch.stack(list(got.values())).sum()
    assert abs(total - golden[f"{prefix}.loss_total"]) <= LOSS * total


def close_gradient(got: Tensor, want: Tensor) -> None:
    assert relative(got, want) <= GRADIENT
    assert F.cosine_similarity(got.flatten(), want.flatten(), 0) >= COSINE


def close_memory(memory: Memory, state: dict[str, Tensor]) -> None:
    close(memory.embedding, state["memory_embedding"], "embedding")
    close(memory.reference, state["memory_reference_point"], "reference_point")
    close(memory.age, state["memory_timestamp"], "timestamp")
    close(memory.pose, state["memory_egopose"], "egopose")


def close_scene(memory: SceneMemory, state: dict[str, Tensor]) -> None:
    close(memory.query, state["memory_scene_query"], "scene_query")
    close(memory.age, state["scene_memory_timestamp"], "scene_timestamp")
    close(memory.can_bus, state["memory_canbus"], "canbus")
    assert torch.equal(memory.frames, state["his_memory_canbus_len"].long())


class Seen:
    """Inputs and result of a decoder, recorded at each call."""

    def __init__(self, decoder: torch.nn.Module) -> None:
        decoder.register_forward_hook(self._keep)

    def _keep(self, _: torch.nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
        names = ("tgt", "query_pos", "temp_memory", "temp_pos", "memory", "pos", "attn_mask")
        self.given, self.result = dict(zip(names, given, strict=True)), result


@pytest.fixture(scope="module")
def shared_golden(request: pytest.FixtureRequest) -> Iterator[dict[str, Golden]]:
    """Files that were read, by name; reading them once is enough."""
    yield {}


@pytest.fixture
def golden(
    shared: Path, shared_golden: dict[str, Golden], request: pytest.FixtureRequest
) -> Golden:
    name = request.param
    if name not in shared_golden:
        shared_golden[name] = Golden(shared / f"orion_{name}_golden.safetensors")
    return shared_golden[name]


def detector(golden: Golden) -> OrionHeads:
    config = golden.detection()
    # No golden file holds both heads; the map head of this one stays random.
    lanes = MapConfig(in_channels=config.in_channels, layers=1, lanes=4, one2one=4, topk=1)
    heads = OrionHeads(HeadsConfig(detection=config, map=lanes)).requires_grad_(False).eval()
    found = heads.load_state_dict(golden.parameters(), strict=False)
    assert not found.unexpected_keys
    assert all(name.startswith("map_head.") for name in found.missing_keys)
    return heads


def mapper(golden: Golden) -> OrionHeads:
    config = golden.map()
    objects = DetectionConfig(in_channels=config.in_channels, layers=1)
    heads = OrionHeads(HeadsConfig(detection=objects, map=config)).requires_grad_(False).eval()
    weights = golden.parameters()
    for unused in ("map_head.code_weights", "map_head.match_costs"):
        del weights[unused]
    found = heads.load_state_dict(weights, strict=False)
    assert not found.unexpected_keys
    assert all(name.startswith("pts_bbox_head.") for name in found.missing_keys)
    return heads


def tokens_of(features: Tensor) -> Tensor:
    return features.movedim(2, -1).flatten(1, 3)


def start(heads: OrionHeads, golden: Golden) -> HeadsMemory:
    return heads.empty_memory(golden.frame(0))


@pytest.mark.parametrize("golden", ["det"], indirect=True)
def test_detection_head_equals_orions_in_every_frame(golden: Golden) -> None:
    heads = detector(golden)
    head, seen = heads.pts_bbox_head, Seen(heads.pts_bbox_head.transformer.query_decoder)
    memory, scene = start(heads, golden).detection, start(heads, golden).scene
    for i in range(4):
        frame, objects, prefix = golden.frame(i), golden.objects(i), f"f{i}"
        features = golden[f"{prefix}.in.img_feats"].requires_grad_()
        rays = heads.rays(frame.lidar2img, (6, 10))
        close(rays, golden[f"{prefix}.pos_embed"], "pos_embed")
        past = head._past(memory, frame)
        close_memory(past, golden.group(f"{prefix}.mem_in."))
        told = scene.at(frame, memory.keeps(frame), head.config.scene_memory_len)
        close_scene(told, golden.group(f"{prefix}.mem_in."))
        output, memory, scene = head(
            tokens_of(features), rays, frame, heads.encodings(), memory, scene
        )
        for name, want in golden.group(f"{prefix}.tf_in.").items():
            close(seen.given[name], want, name)
        close(seen.result, golden[f"{prefix}.decoder_out"], "decoder_out")
        close_detection(output, golden, prefix)
        close_memory(memory, golden.group(f"{prefix}.mem_out."))
        close_scene(scene, golden.group(f"{prefix}.mem_out."))
        match = match_objects(output.found, objects, head.match_costs)
        assert torch.equal(match, golden[f"{prefix}.assign"])
        losses = detection_losses(
            output, objects, None, code_weights=head.code_weights, match_costs=head.match_costs
        )
        close_losses(losses, golden, prefix)
        grad = torch.autograd.grad(torch.stack(list(losses.values())).sum(), features)[0]
        close_gradient(grad, golden[f"{prefix}.grad.img_feats"])


def close_detection(output: Any, golden: Golden, prefix: str) -> None:
    """Predictions, decoded boxes and results."""
    want = golden.group(f"{prefix}.out.")
    close(output.found.scores, want["all_cls_scores"], "scores")
    close(output.found.codes, want["all_bbox_preds"], "codes")
    close(output.found.lights, want["all_traffic_states"], "lights")
    close(output.futures, want["traj_preds"], "futures")
    close(output.future_scores, want["traj_cls_scores"], "future scores")
    close(output.tokens, want["vlm_tokens"], "tokens")
    for b, found in enumerate(output.decode()):
        decoded, result = golden.group(f"{prefix}.decode.{b}."), found.on_the_ground()
        for got, name in ((found.boxes, "bboxes"), (found.scores, "scores")):
            close(got, decoded[name], name)
        assert torch.equal(found.labels, decoded["labels"])
        close(found.futures.flatten(2), decoded["trajs"], "trajs")
        listed = golden.group(f"{prefix}.result.{b}.")
        close(result.boxes, listed["boxes_bottom"], "results")
        close(result.scores, listed["scores"], "result scores")
        assert torch.equal(result.labels, listed["labels"])


@pytest.mark.parametrize("golden", ["det"], indirect=True)
def test_denoising_equals_orions(golden: Golden) -> None:
    heads = detector(golden)
    head, seen = heads.pts_bbox_head, Seen(heads.pts_bbox_head.transformer.query_decoder)
    memory, scene = start(heads, golden).detection, start(heads, golden).scene
    for i in range(2):
        frame, objects, prefix = golden.frame(i), golden.objects(i), f"dn.f{i}"
        features = golden[f"f{i}.in.img_feats"].requires_grad_()
        noised = _noised(golden, heads, objects, prefix)
        rays = heads.rays(frame.lidar2img, (6, 10))
        output, memory, scene = head(
            tokens_of(features), rays, frame, heads.encodings(), memory, scene, noised=noised
        )
        for name, want in golden.group(f"{prefix}.tf_in.").items():
            close(seen.given[name], want, name)
        assert torch.equal(seen.given["attn_mask"], golden[f"{prefix}.tf_in.attn_mask"])
        close(seen.result, golden[f"{prefix}.decoder_out"], "decoder_out")
        close_detection(output, golden, prefix)
        want = golden.group(f"{prefix}.dn.")
        close(output.noised.scores, want["cls_scores"], "noised scores")
        close(output.noised.codes, want["bbox_preds"], "noised codes")
        close(output.noised.lights, want["traffic_states"], "noised lights")
        close_memory(memory, golden.group(f"{prefix}.mem_out."))
        close_scene(scene, golden.group(f"{prefix}.mem_out."))
        match = match_objects(output.found, objects, head.match_costs)
        assert torch.equal(match, golden[f"{prefix}.assign"])
        losses = detection_losses(
            output, objects, noised, code_weights=head.code_weights, match_costs=head.match_costs
        )
        close_losses(losses, golden, prefix)
        grad = torch.autograd.grad(torch.stack(list(losses.values())).sum(), features)[0]
        close_gradient(grad, golden[f"{prefix}.grad.img_feats"])


def _noised(golden: Golden, heads: OrionHeads, objects: list[Objects], prefix: str) -> Noised:
    """The copies that ORION's draws make, compared with its own."""
    want = golden.group(f"{prefix}.dn.")
    groups, bounds = heads.config.detection.dn_groups, heads.pts_bbox_head.pc_range
    noised = noised_boxes(objects, want["rand"], groups=groups, classes=9, bounds=bounds)
    assert noised is not None
    assert noised.centres.shape[1] == want["pad_size"]
    assert torch.equal(noised.labels, want["known_labels"])
    assert torch.equal(noised.stream, want["known_bid"])
    assert torch.equal(noised.query, want["map_known_indice"])
    close(noised.boxes, want["known_bboxes"], "known_bboxes")
    assert torch.equal(noised.boxes, torch.cat([middle(x.boxes) for x in objects]).repeat(3, 1))
    return noised


@pytest.mark.parametrize("golden", ["map"], indirect=True)
def test_map_head_equals_orions_in_every_frame(golden: Golden) -> None:
    heads = mapper(golden)
    head, seen = heads.map_head, Seen(heads.map_head.transformer.query_decoder)
    first, memory = slice(head.config.one2one), start(heads, golden).map
    for i in range(4):
        frame, lanes, prefix = golden.frame(i), golden.lanes(i), f"f{i}"
        features = golden[f"{prefix}.in.img_feats"].requires_grad_()
        rays = heads.rays(frame.lidar2img, (6, 10))
        close_memory(memory.at(frame, head.config.memory_len), golden.group(f"{prefix}.mem_in."))
        output, memory = head(tokens_of(features), rays, frame, heads.encodings(), memory)
        for name, want in golden.group(f"{prefix}.tf_in.").items():
            close(seen.given[name], want, name)
        close(seen.result, golden[f"{prefix}.decoder_out"], "decoder_out")
        close_memory(memory, golden.group(f"{prefix}.mem_out."))
        want, others = golden.group(f"{prefix}.out."), slice(head.config.one2one, None)
        points = output.points.flatten(-2)
        for part, name in ((first, "one2one"), (others, "one2many")):
            close(output.scores[:, :, part], want[f"all_lane_cls_{name}"], name)
            close(points[:, :, part], want[f"all_lane_preds_{name}"], name)
        close(output.tokens, want["vlm_tokens"], "tokens")
        match = match_lanes(output.scores[:, :, first], points[:, :, first], lanes)
        assert torch.equal(match, golden[f"{prefix}.assign_one2one"])
        close_map_results(output, golden, prefix)
        repeats = head.config.repeats
        losses = map_losses(output, lanes, repeats=repeats, one2many_weight=1.0)
        close_losses(losses, golden, prefix)
        grad = torch.autograd.grad(torch.stack(list(losses.values())).sum(), features)[0]
        close_gradient(grad, golden[f"{prefix}.grad.img_feats"])


def close_map_results(output: Any, golden: Golden, prefix: str) -> None:
    for b, found in enumerate(output.decode()):
        want, got = golden.group(f"{prefix}.result.{b}."), found.by_class()
        close(got.points, want["map_pts_3d"], "points")
        close(got.scores, want["map_scores_3d"], "scores")
        assert torch.equal(got.labels, want["map_labels_3d"])


def drawn(name: str, shape: list[int], rule: list[float]) -> Tensor:
    """The values that the full-size file gives a tensor by a formula of its name."""
    with numpy.errstate(over="ignore"):
        h = numpy.arange(int(numpy.prod(shape)), dtype=numpy.uint32) * numpy.uint32(2654435761)
        h += numpy.uint32(zlib.crc32(name.encode()))
        h ^= h >> numpy.uint32(16)
        h *= numpy.uint32(0x85EBCA6B)
        h ^= h >> numpy.uint32(13)
        h *= numpy.uint32(0xC2B2AE35)
        h ^= h >> numpy.uint32(16)
    u = (h >> numpy.uint32(8)).astype(numpy.float32) * numpy.float32(2.0**-24)
    scale, offset = map(numpy.float32, rule)
    return torch.from_numpy((2 * u - 1) * scale + offset).view(shape)


@pytest.mark.parametrize("golden", ["det_full"], indirect=True)
@pytest.mark.parametrize("graded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_detection_head_of_full_size_equals_orions(golden: Golden, graded: bool) -> None:
    """With gradients it takes a minute: without them in every run, with them in all tests."""
    config = golden.config
    lanes = MapConfig(layers=1, lanes=4, one2one=4, topk=1)
    heads = OrionHeads(HeadsConfig(detection=golden.detection(), map=lanes))
    heads.requires_grad_(False).eval()
    own = heads.state_dict()
    named = {n: drawn(n, config["param_shape"][n], r) for n, r in config["param_rule"].items()}
    weights = {**named, **golden.parameters()}
    kept = {n for n in own if n.startswith("map_head.")}
    weighted = (f"pts_bbox_head.{name}" for name in ("pc_range", "code_weights", "match_costs"))
    assert set(own) - kept - set(weights) == {"position_range", "coords_d", *weighted}
    heads.load_state_dict(weights, strict=False)
    head, seen = heads.pts_bbox_head, Seen(heads.pts_bbox_head.transformer.query_decoder)
    memory, scene = start(heads, golden).detection, start(heads, golden).scene
    for i in range(2):
        frame, objects, prefix = golden.frame(i), golden.objects(i), f"f{i}"
        features = drawn(f"{prefix}.img_feats", [1, 6, 1024, 40, 40], [2.0, 0.0])
        features.requires_grad_(graded)
        rays = heads.rays(frame.lidar2img, (40, 40))
        close(rays[:, ::37], golden[f"{prefix}.pos_embed.tokens_0_37"], "pos_embed")
        output, memory, scene = head(
            tokens_of(features), rays, frame, heads.encodings(), memory, scene
        )
        where = seen.given["temp_pos"][:, ::8]
        close(where, golden[f"{prefix}.tf_in.temp_pos.every8"], "temp_pos")
        close(seen.result[-1], golden[f"{prefix}.decoder_out.last"], "decoder_out")
        close(seen.result[0][:, ::8], golden[f"{prefix}.decoder_out.d0_every8"], "decoder_out")
        want = golden.group(f"{prefix}.out.")
        close(output.found.scores, want["all_cls_scores"], "scores")
        close(output.found.codes, want["all_bbox_preds"], "codes")
        close(output.found.lights, want["all_traffic_states"], "lights")
        close(output.futures, want["traj_preds"], "futures")
        close(output.future_scores, want["traj_cls_scores"], "future scores")
        close(output.tokens[..., ::16], want["vlm_tokens.every16"], "tokens")
        match = match_objects(output.found, objects, head.match_costs)
        assert torch.equal(match, golden[f"{prefix}.assign"])
        losses = detection_losses(
            output, objects, None, code_weights=head.code_weights, match_costs=head.match_costs
        )
        close_losses(losses, golden, prefix)
        if graded:
            grad = torch.autograd.grad(torch.stack(list(losses.values())).sum(), features)[0]
            close_full_gradient(grad, golden, prefix)
        found = output.decode()[0]
        assert abs(len(found.scores) - len(golden[f"{prefix}.decode.0.scores"])) <= 2
        memory, scene = restored(golden.group(f"{prefix}.mem_out."), memory, scene)


def close_full_gradient(grad: Tensor, golden: Golden, prefix: str) -> None:
    want = golden.group(f"{prefix}.grad.img_feats.")
    close_gradient(grad.flatten()[::1009], want["flat_0_1009"])
    close_gradient(grad.double().square().sum((0, 1, 3, 4)).sqrt(), want["channel_l2"])
    assert abs(grad.double().norm() / want["norm"] - 1) <= GRADIENT


def restored(
    state: dict[str, Tensor], memory: Memory, scene: SceneMemory
) -> tuple[Memory, SceneMemory]:
    """ORION's memory: neighbouring scores differ by less than rounding here, so the order may."""
    names = ("memory_embedding", "memory_reference_point", "memory_timestamp", "memory_egopose")
    kept = Memory(*(state[name] for name in names), memory.time, memory.scene)
    told = [state[n] for n in ("memory_scene_query", "scene_memory_timestamp", "memory_canbus")]
    close_scene(scene, state)
    return kept, SceneMemory(*told, state["his_memory_canbus_len"].long())
