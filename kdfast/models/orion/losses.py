# SPDX-License-Identifier: Apache-2.0
"""The losses of ORION's heads, term by term. See docs/use/orion.md.

B streams, L layers, Q queries, m matched queries of one layer, n objects or lanes of one stream, C
classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, distributed
from torchvision.ops import sigmoid_focal_loss

from kdfast.models.orion.batch import STEPS, Lanes, Objects
from kdfast.models.orion.boxes import box_codes, middle
from kdfast.models.orion.denoise import SPLIT, Noised
from kdfast.models.orion.detection import DetectionOutput, Predictions
from kdfast.models.orion.lanes import MapOutput
from kdfast.models.orion.matching import assigned, matching_cost

SCORE, BOX, LIGHT, FUTURE, WAY = 2.0, 0.25, 2.0, 0.25, 0.8
LANE_SCORE, LANE_POINTS = 1.5, 0.02
MATCHED_CODES = 8  # velocities do not count in the matching
STATES = 3  # of a traffic light


def detection_losses(
    output: DetectionOutput,
    objects: Sequence[Objects],
    noised: Noised | None,
    *,
    code_weights: Tensor,
    match_costs: Tensor,
) -> dict[str, Tensor]:
    """The terms of the detection head; their plain sum is its loss.

    Args:
        output: What the head gave.
        objects: Ground truth, B entries.
        noised: The copies that were among its queries. Without a box in the batch there are none
            although denoising is on; the terms are then left out.
        code_weights: (10,) weights in the loss.
        match_costs: (10,) weights in the matching.

    Returns:
        Scalars with gradients: "loss_cls", "loss_bbox", "loss_traffic", "loss_affect" of the last
        layer, the same with "d0." to "d<L-2>." in front of the earlier ones, "loss_traj" and
        "loss_traj_cls"; with ``noised`` also the four with "dn_loss_" for every layer.
    """
    match = match_objects(output.found, objects, match_costs)
    losses: dict[str, Tensor] = {}
    truth = _all_objects(objects)
    for layer, rows in enumerate(_rows(match, [len(one.labels) for one in objects])):
        prefix = _prefix(layer, match.shape[0])
        terms = _layer_losses(output.found, layer, rows, truth, code_weights)
        losses |= {prefix + name: loss for name, loss in terms.items()}
        if noised is not None and output.noised is not None:
            terms = _denoising_losses(output.noised, layer, noised, code_weights)
            losses |= {f"{prefix}dn_{name}": loss for name, loss in terms.items()}
        if not prefix:
            losses |= _future_losses(output, rows, truth)
    return losses


def match_objects(found: Predictions, objects: Sequence[Objects], weights: Tensor) -> Tensor:
    """(L, B, Q) int64: the object of its stream that a query is matched with, else -1."""
    weights, costs = weights[:MATCHED_CODES], []
    with torch.no_grad():
        for stream, one in enumerate(objects):
            codes = found.codes[:, stream, :, :MATCHED_CODES] * weights
            targets = box_codes(middle(one.boxes))[:, :MATCHED_CODES] * weights
            scores = found.scores[:, stream]
            costs.append(matching_cost(scores, one.labels, codes, targets, (SCORE, BOX)))
        return assigned(costs)


def map_losses(
    output: MapOutput, lanes: Sequence[Lanes], *, repeats: int, one2many_weight: float
) -> dict[str, Tensor]:
    """The terms of the map head; their plain sum is its loss.

    Args:
        output: What the head gave.
        lanes: Ground truth, B entries.
        repeats: How often each lane is matched among the queries that only help in training.
        one2many_weight: Weight of those queries' terms.

    Returns:
        Scalars with gradients: "loss_cls_lane", "loss_bbox_lane", "loss_cls_H" and "loss_bbox_H" of
        the last layer, the same with "d0." to "d<L-2>." in front of the earlier ones.
    """
    losses: dict[str, Tensor] = {}
    many = [Lanes(x.points.repeat(repeats, 1, 1), x.labels.repeat(repeats)) for x in lanes]
    first, others = slice(output.one2one), slice(output.one2one, None)
    groups = [(first, lanes, "lane", 1.0), (others, many, "H", one2many_weight)]
    for part, truth, name, weight in groups:
        scores, points = output.scores[:, :, part], output.points[:, :, part].flatten(-2)
        if scores.shape[2] == 0:
            continue
        match = match_lanes(scores, points, truth)
        labels = torch.cat([one.labels for one in truth])
        targets = torch.cat([one.points.flatten(1) for one in truth])
        for layer, rows in enumerate(_rows(match, [len(one.labels) for one in truth])):
            query, target = rows
            prefix = _prefix(layer, match.shape[0])
            count = len(query)
            cls = _focal(scores[layer].flatten(0, 1), query, labels[target]) / max(count, 1)
            far = (points[layer].flatten(0, 1)[query] - targets[target]).abs().sum()
            far = far / _mean_over_ranks(count, far)
            losses[f"{prefix}loss_cls_{name}"] = weight * LANE_SCORE * cls
            losses[f"{prefix}loss_bbox_{name}"] = weight * LANE_POINTS * far
    return losses


def match_lanes(scores: Tensor, points: Tensor, lanes: Sequence[Lanes]) -> Tensor:
    """(L, B, Q) int64: the lane of its stream that a query is matched with, else -1.

    Args:
        scores: (L, B, Q, C) logits.
        points: (L, B, Q, 33) in metres.
        lanes: B entries.
    """
    weights, costs = (LANE_SCORE, LANE_POINTS), []
    with torch.no_grad():
        for stream, one in enumerate(lanes):
            lines = points[:, stream], one.points.flatten(1)
            costs.append(matching_cost(scores[:, stream], one.labels, *lines, weights))
        return assigned(costs)


def _prefix(layer: int, layers: int) -> str:
    return "" if layer == layers - 1 else f"d{layer}."


def _rows(match: Tensor, counts: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """For each layer the matched queries and their targets, (m,), among those of all streams."""
    starts = torch.tensor([0, *counts[:-1]], device=match.device).cumsum(0)
    whole = (match + starts[:, None]).flatten(1)
    hits = [row.nonzero()[:, 0] for row in (match >= 0).flatten(1)]
    return [(hit, row[hit]) for hit, row in zip(hits, whole, strict=True)]


def _all_objects(objects: Sequence[Objects]) -> Objects:
    names = ("boxes", "labels", "lights", "future", "future_valid")
    return Objects(*(torch.cat([getattr(one, name) for one in objects]) for name in names))


def _layer_losses(
    found: Predictions,
    layer: int,
    rows: tuple[Tensor, Tensor],
    truth: Objects,
    code_weights: Tensor,
) -> dict[str, Tensor]:
    """Terms of one layer of the learned and propagated queries."""
    query, target = rows
    count = len(query)
    scores = found.scores[layer].flatten(0, 1)
    cls = _focal(scores, query, truth.labels[target]) / max(count, 1)
    codes = found.codes[layer].flatten(0, 1)[query]
    box = _box_distance(codes, middle(truth.boxes)[target], code_weights)
    lights = _light_losses(found.lights[layer].flatten(0, 1)[query], truth.lights[target])
    box = box / _mean_over_ranks(count, box)
    return {"loss_cls": SCORE * cls, "loss_bbox": BOX * box, **lights}


def _denoising_losses(
    found: Predictions, layer: int, noised: Noised, code_weights: Tensor
) -> dict[str, Tensor]:
    """Terms of one layer of the noised copies; background must still find its box."""
    place, count = (noised.stream, noised.query), len(noised.labels)
    scores = found.scores[layer][place]
    # As many copies as a ball of radius SPLIT takes of the cube of moves.
    expected = max(count * math.pi / 6 * SPLIT**3, 1.0)
    hit = (noised.labels < scores.shape[1]).nonzero()[:, 0]
    cls = _focal(scores, hit, noised.labels[hit]) / expected
    box = _box_distance(found.codes[layer][place], noised.boxes, code_weights) / count
    lights = _light_losses(found.lights[layer][place], noised.lights)
    return {"loss_cls": SCORE * cls, "loss_bbox": BOX * box, **lights}


def _box_distance(codes: Tensor, boxes: Tensor, weights: Tensor) -> Tensor:
    """Weighted L1 distance of codes (m, 10) to boxes (m, 9), without those that have no size."""
    targets = box_codes(boxes)
    whole = targets.isfinite().all(1)
    return ((codes[whole] - targets[whole]).abs() * weights).sum()


def _light_losses(logits: Tensor, lights: Tensor) -> dict[str, Tensor]:
    """Terms of the state of traffic lights, logits (m, 4); other objects do not count."""
    known = (lights[:, 0] >= 0).nonzero()[:, 0]
    logits, (state, affects) = logits[known], lights[known].unbind(1)
    count = max(len(known), 1)
    shown = (state < STATES).nonzero()[:, 0]
    traffic = _focal(logits[:, :STATES], shown, state[shown]) / count
    goal = affects.to(logits.dtype)[:, None]
    affect = sigmoid_focal_loss(logits[:, STATES:], goal, reduction="sum") / count
    return {"loss_traffic": LIGHT * traffic, "loss_affect": LIGHT * affect}


def _future_losses(
    output: DetectionOutput, rows: tuple[Tensor, Tensor], truth: Objects
) -> dict[str, Tensor]:
    """Terms of the ways to go on: the one that ends nearest must fit, and be the likely one."""
    query, target = rows
    moves = output.futures.flatten(0, 1)[query].unflatten(-1, (STEPS, 2))
    goal, valid = truth.future[target][:, None], truth.future_valid[target]
    with torch.no_grad():
        end = (moves.sum(-2) - goal.sum(-2)).norm(dim=-1)
        # Without a known end every way is as good, and the first is taken.
        best = (end * valid[:, -1:]).argmin(-1)
    chosen = moves[torch.arange(len(best), device=best.device), best]
    far = ((chosen - goal[:, 0]).abs() * valid[..., None]).sum()
    ways = _focal(output.future_scores.flatten(0, 1), query, best)
    count = _mean_over_ranks(len(query), far)
    return {"loss_traj": FUTURE * far / count, "loss_traj_cls": WAY * ways / count}


def _focal(logits: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
    """Summed focal loss of logits (N, C); the rows that are not named have no class.

    Args:
        logits: (N, C).
        rows: (m,) distinct rows that have a class.
        labels: (m,) theirs.
    """
    goal = torch.zeros_like(logits)
    goal[rows, labels] = 1
    return sigmoid_focal_loss(logits, goal, alpha=0.25, gamma=2.0, reduction="sum")


def _mean_over_ranks(count: int, like: Tensor) -> Tensor:
    """The number of matches of a process, averaged over all of them; at least 1."""
    mean = like.new_tensor(float(count))
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(mean)
        mean = mean / distributed.get_world_size()
    return mean.clamp(min=1)
