# SPDX-License-Identifier: Apache-2.0
"""ORION's map head, ``map_head``. See docs/use/orion.md.

B streams, V cameras, (h, w) grid of patches, C channels, D width, L layers, E queries of the
language model, Q lanes, of which the first Q1 are matched one to one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdfast.models.orion.batch import POINTS, Frame
from kdfast.models.orion.boxes import FoundLanes, find_lanes
from kdfast.models.orion.config import LANE_CLASSES, PC_RANGE, MapConfig
from kdfast.models.orion.decoder import Transformer, normed_branch, plain_branch
from kdfast.models.orion.detection import picked
from kdfast.models.orion.encodings import Encodings, in_metres, inverse_sigmoid, normalised
from kdfast.models.orion.memory import Memory


@dataclass(frozen=True)
class MapOutput:
    """Results of the map head.

    Attributes:
        scores: (L, B, Q, classes) logits.
        points: (L, B, Q, 11, 3) in metres.
        one2one: Q1; only these lanes are results.
        tokens: (B, E, out_dims) for the language model, None if not asked for.
        results: Lanes per stream that ``decode`` gives at most.
    """

    scores: Tensor
    points: Tensor
    one2one: int
    tokens: Tensor | None
    results: int

    def decode(self) -> list[FoundLanes]:
        """The lanes of each stream, by the last layer."""
        first = slice(self.one2one)
        return find_lanes(self.scores[-1][:, first], self.points[-1][:, first], self.results)


class MapHead(nn.Module):
    """Finds lane lines and what belongs to them, frame by frame.

    Args:
        config: Sizes.
    """

    pc_range: Tensor

    def __init__(self, config: MapConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.input_projection = nn.Linear(config.in_channels, dim)
        self.output_projection = nn.Linear(dim, config.out_dims)
        self.query_embedding = nn.Embedding(config.vlm_queries, dim)
        self.instance_embedding_lane = nn.Embedding(config.lanes, dim)
        self.points_embedding_lane = nn.Embedding(POINTS, dim)
        self.reference_points_lane = nn.Linear(dim, 3)
        self.transformer = Transformer(dim, config.heads, config.ffn, config.layers)
        self.cls_branches = nn.ModuleList([normed_branch(dim, len(LANE_CLASSES))])
        self.reg_branches = nn.ModuleList([plain_branch(dim, 3 * POINTS)])
        self.register_buffer("pc_range", torch.tensor(PC_RANGE))

    def forward(
        self,
        features: Tensor,
        rays: Tensor,
        frame: Frame,
        encodings: Encodings,
        memory: Memory,
        *,
        tokens: bool = True,
    ) -> tuple[MapOutput, Memory]:
        """Results of a frame, and the memory for the next one.

        Args:
            features: (B, V * h * w, C) fp32, by camera, row and column.
            rays: (B, V * h * w, D) their positions.
            frame: Cameras and car.
            encodings: What both heads share.
            memory: Lanes of former frames.
            tokens: Whether to make tokens for the language model.
        """
        config, batch = self.config, features.shape[0]
        past = memory.at(frame, config.memory_len)
        shares = normalised(past.reference, self.pc_range)
        instances = self.instance_embedding_lane.weight
        points = instances[:, None] + self.points_embedding_lane.weight
        references = self.reference_points_lane(points).sigmoid()
        pos = encodings.points(references[None])[0] + encodings.now()
        vlm = self.query_embedding.weight
        raw = self.transformer.query_decoder(
            torch.cat((vlm, instances)).expand(batch, -1, -1),
            torch.cat((torch.zeros_like(vlm), pos)).expand(batch, -1, -1),
            past.embedding,
            encodings.remembered(shares, past.age, past.pose),
            self.input_projection(features),
            rays,
            self._blocked(),
        )
        states = raw[:, :, config.vlm_queries :].nan_to_num()
        moved = self.reg_branches[0](states).unflatten(-1, (POINTS, 3))
        lines = in_metres((moved + inverse_sigmoid(references)).sigmoid(), self.pc_range)
        scores = self.cls_branches[0](states)
        first = slice(config.one2one)
        keep = scores[-1][:, first].max(-1).values.topk(config.topk).indices
        made = self.output_projection(raw[-1][:, : config.vlm_queries]) if tokens else None
        output = MapOutput(scores, lines, config.one2one, made, config.results)
        return output, past.after(frame, picked(states[-1], keep), picked(lines[-1], keep))

    def _blocked(self) -> Tensor:
        """(queries, keys) bool: who must not see whom.

        Lanes do not see the language model's queries, and the lanes that only help in training and
        all other queries do not see each other; the memory is seen by all.
        """
        config = self.config
        one2one = config.vlm_queries
        helpers, queries = one2one + config.one2one, one2one + config.lanes
        blocked = torch.zeros(
            queries, queries + config.memory_len, dtype=torch.bool, device=self.pc_range.device
        )
        blocked[one2one:, :one2one] = True
        blocked[helpers:, one2one:helpers] = True
        blocked[:helpers, helpers:queries] = True
        return blocked
