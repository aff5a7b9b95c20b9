# SPDX-License-Identifier: Apache-2.0
"""ORION's detection head, ``pts_bbox_head``. See docs/use/orion.md.

B streams, V cameras, (h, w) grid of patches, C channels, D width, L layers, P noised copies, E
queries of the language model, Q learned queries and those propagated from the memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kdfast.models.orion.batch import CAN_BUS, STEPS, Frame
from kdfast.models.orion.boxes import Detections, find_objects
from kdfast.models.orion.config import CLASSES, PC_RANGE, DetectionConfig
from kdfast.models.orion.decoder import AuxDecoder, Transformer, normed_branch, plain_branch
from kdfast.models.orion.denoise import Noised, block_denoising
from kdfast.models.orion.encodings import (
    Encodings,
    in_metres,
    inverse_sigmoid,
    normalised,
    time_layers,
    timed,
)
from kdfast.models.orion.memory import CAN_BUS_LEN, Memory, SceneMemory

CODES, LIGHTS, MODES = 10, 4, 6
CODE_WEIGHTS = (2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Predictions:
    """What the branches say of queries.

    Attributes:
        scores: (L, B, Q, classes) logits.
        codes: (L, B, Q, 10), see ``box_codes``.
        lights: (L, B, Q, 4) logits: three states of a light, and whether it holds for this car.
    """

    scores: Tensor
    codes: Tensor
    lights: Tensor


@dataclass(frozen=True)
class DetectionOutput:
    """Results of the detection head.

    Attributes:
        found: Predictions of the learned and the propagated queries.
        noised: Predictions of the P copies, or None.
        futures: (B, Q, 6, 12): for each of six ways to go on, (dx, dy) of six steps.
        future_scores: (B, Q, 6) logits of the six.
        tokens: (B, E + scene tokens + 1, out_dims) for the language model, None if not asked for.
        results: Objects per stream that ``decode`` gives at most.
    """

    found: Predictions
    noised: Predictions | None
    futures: Tensor
    future_scores: Tensor
    tokens: Tensor | None
    results: int

    def decode(self) -> list[Detections]:
        """The objects of each stream, by the last layer."""
        found = self.found
        return find_objects(found.scores[-1], found.codes[-1], self.futures, self.results)


class DetectionHead(nn.Module):
    """Finds objects around the car in the features of its cameras, frame by frame.

    Args:
        config: Sizes.
    """

    pc_range: Tensor
    code_weights: Tensor
    match_costs: Tensor

    def __init__(self, config: DetectionConfig) -> None:
        super().__init__()
        self.config = config
        dim, heads = config.dim, config.heads
        self.input_projection = nn.Linear(config.in_channels, dim)
        self.output_projection = nn.Linear(dim, config.out_dims)
        self.reference_points = nn.Embedding(config.queries, 3)
        self.pseudo_reference_points = nn.Embedding(config.propagated, 3)
        self.query_embedding = nn.Embedding(config.vlm_queries, dim)
        self.memory_query = nn.Embedding(config.scene_queries, dim)
        self.motion_mode_query = nn.Embedding(MODES, dim)
        row, poses = CAN_BUS + 1, 16 * CAN_BUS_LEN
        self.can_bus_embed = nn.Sequential(
            nn.Linear(row * (1 + CAN_BUS_LEN) + poses, 4 * dim),
            nn.ReLU(),
            nn.Linear(4 * dim, config.out_dims),
        )
        self.transformer = Transformer(dim, heads, config.ffn, config.layers)
        self.cls_branches = nn.ModuleList([normed_branch(dim, len(CLASSES))])
        self.reg_branches = nn.ModuleList([plain_branch(dim, CODES)])
        self.tl_branches = nn.ModuleList([normed_branch(dim, LIGHTS)])
        self.traj_branches = nn.ModuleList([plain_branch(2 * dim, 2 * STEPS)])
        self.traj_cls_branches = nn.ModuleList([normed_branch(2 * dim, 1)])
        self.scene_time_embedding = time_layers(dim)
        self.motion_decoder = AuxDecoder(dim, heads, config.aux_ffn)
        self.memory_decoder_mq = AuxDecoder(dim, heads, config.aux_ffn)
        self.memory_decoder_cq = AuxDecoder(dim, heads, config.aux_ffn)
        self.register_buffer("pc_range", torch.tensor(PC_RANGE))
        self.register_buffer("code_weights", torch.tensor(CODE_WEIGHTS))
        self.register_buffer("match_costs", torch.tensor(CODE_WEIGHTS))
        for points in (self.reference_points, self.pseudo_reference_points):
            nn.init.uniform_(points.weight)
        # Where an empty memory is filled up; ORION never trains it.
        self.pseudo_reference_points.requires_grad_(False)

    def forward(
        self,
        features: Tensor,
        rays: Tensor,
        frame: Frame,
        encodings: Encodings,
        memory: Memory,
        scene: SceneMemory,
        *,
        noised: Noised | None = None,
        tokens: bool = True,
    ) -> tuple[DetectionOutput, Memory, SceneMemory]:
        """Results of a frame, and the memories for the next one.

        Args:
            features: (B, V * h * w, C) fp32, by camera, row and column.
            rays: (B, V * h * w, D) their positions.
            frame: Cameras and car.
            encodings: What both heads share.
            memory: Objects of former frames.
            scene: Tokens of former frames.
            noised: Copies of the ground truth as further queries.
            tokens: Whether to make tokens for the language model.
        """
        config = self.config
        past = self._past(memory, frame)
        told = scene.at(frame, memory.keeps(frame), config.scene_memory_len)
        states, references = self._decode(features, rays, encodings, past, noised)
        copies = 0 if noised is None else noised.centres.shape[1]
        start = copies + config.vlm_queries
        vlm = states[-1][:, copies:start]
        history = self._history(told, vlm)
        found = self._predict(states[:, :, start:], references[:, start:])
        futures, future_scores = self._futures(states[-1], copies)
        keep = found.scores[-1].max(-1).values.topk(config.topk).indices
        output = DetectionOutput(
            found,
            None if noised is None else self._predict(states[:, :, :copies], noised.centres),
            futures,
            future_scores,
            self._tokens(vlm, history, frame, past, told) if tokens else None,
            config.results,
        )
        embedding = picked(states[-1][:, start:], keep)
        # The "z" that ORION remembers of an object is its third code, log w.
        points = picked(found.codes[-1][..., :3], keep)
        return output, past.after(frame, embedding, points), told.after(frame, history)

    def _past(self, memory: Memory, frame: Frame) -> Memory:
        """The memory as the frame sees it; a stream that restarts gets learned points."""
        past = memory.at(frame, self.config.memory_len)
        keep, count = memory.keeps(frame), self.config.propagated
        points = in_metres(self.pseudo_reference_points.weight.detach(), self.pc_range)
        reference, pose = past.reference.clone(), past.pose.clone()
        here = torch.eye(4, device=pose.device)
        reference[:, :count] = points.where(~keep[:, None, None], reference[:, :count])
        pose[:, :count] = here.where(~keep[:, None, None, None], pose[:, :count])
        return replace(past, reference=reference, pose=pose)

    def _decode(
        self,
        features: Tensor,
        rays: Tensor,
        encodings: Encodings,
        past: Memory,
        noised: Noised | None,
    ) -> tuple[Tensor, Tensor]:
        """(L, B, P + E + Q, D) of all queries, and their (B, P + E + Q, 3) reference points."""
        config, batch = self.config, features.shape[0]
        propagated, vlm = config.propagated, config.vlm_queries
        shares = normalised(past.reference, self.pc_range)
        where = encodings.remembered(shares, past.age, past.pose)
        learned = self.reference_points.weight
        points = torch.cat((learned.new_zeros(vlm, 3), learned)).expand(batch, -1, -1)
        if noised is not None:
            points = torch.cat((noised.centres, points), 1)
        copies = points.shape[1] - vlm - config.queries
        pos = encodings.points(points) + encodings.now()
        x = torch.zeros_like(pos)
        tokens = slice(copies, copies + vlm)
        x[:, tokens], pos[:, tokens] = self.query_embedding.weight, 0
        x = torch.cat((x, past.embedding[:, :propagated]), 1)
        pos = torch.cat((pos, where[:, :propagated]), 1)
        states = self.transformer.query_decoder(
            x,
            pos,
            past.embedding[:, propagated:],
            where[:, propagated:],
            self.input_projection(features),
            rays,
            self._blocked(copies, 1 if noised is None else noised.groups),
        )
        return states.nan_to_num(), torch.cat((points, shares[:, :propagated]), 1)

    def _blocked(self, copies: int, groups: int) -> Tensor:
        """(queries, keys) bool: who must not see whom; objects do not see the model's queries."""
        config = self.config
        first = copies + config.vlm_queries
        queries = first + config.queries + config.propagated
        keys = queries + config.memory_len - config.propagated
        blocked = torch.zeros(queries, keys, dtype=torch.bool, device=self.pc_range.device)
        blocked[first:, copies:first] = True
        block_denoising(blocked, copies, groups)
        return blocked

    def _predict(self, states: Tensor, references: Tensor) -> Predictions:
        """Branches on states (L, B, N, D) of queries with reference points (B, N, 3)."""
        raw = self.reg_branches[0](states)
        point = (raw[..., :3] + inverse_sigmoid(references)).sigmoid()
        codes = torch.cat((in_metres(point, self.pc_range), raw[..., 3:]), -1)
        return Predictions(self.cls_branches[0](states), codes, self.tl_branches[0](states))

    def _futures(self, state: Tensor, copies: int) -> tuple[Tensor, Tensor]:
        """Ways to go on of the Q queries, from the last states (B, P + E + Q, D).

        The noised copies are among those that attend to each other, as in ORION.
        """
        first = copies + self.config.vlm_queries
        agents = torch.cat((state[:, :copies], state[:, first:]), 1)
        modes = (agents[:, :, None] + self.motion_mode_query.weight).flatten(1, 2)
        moved = self.motion_decoder(modes, modes, modes).unflatten(1, (-1, MODES))[:, copies:]
        both = torch.cat((moved, moved), -1)
        return self.traj_branches[0](both), self.traj_cls_branches[0](both)[..., 0]

    def _history(self, told: SceneMemory, vlm: Tensor) -> Tensor:
        """(B, scene tokens, D): what former frames say of the language model's queries."""
        keys = told.query + timed(self.scene_time_embedding, told.age)
        asked = self.memory_query.weight.expand(vlm.shape[0], -1, -1)
        asked = self.memory_decoder_mq(asked, keys, told.query)
        out: Tensor = self.memory_decoder_cq(asked, vlm, vlm)
        return out

    def _tokens(
        self, vlm: Tensor, history: Tensor, frame: Frame, past: Memory, told: SceneMemory
    ) -> Tensor:
        poses = past.pose.flatten(2).unflatten(1, (CAN_BUS_LEN, -1)).mean(2)
        state = (frame.can_bus_row(), told.can_bus.flatten(1), poses.flatten(1))
        can_bus = self.can_bus_embed(torch.cat(state, 1).float())
        seen = self.output_projection(torch.cat((vlm, history), 1))
        return torch.cat((seen, can_bus[:, None]), 1)


def picked(x: Tensor, index: Tensor) -> Tensor:
    """Entries ``index`` (B, m) of each stream of x (B, N, ...)."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], index]
