# SPDX-License-Identifier: Apache-2.0
"""Counts parameters, heads and FLOPs of pruned models. See docs/use/pruning.md."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import nn

from kdfast.pruning.adapter import Anatomy
from kdfast.pruning.families import anatomy_of
from kdfast.pruning.select import kept_counts

Keep = int | float | Sequence[int]


@dataclass(frozen=True)
class BlockCost:
    """One block for one image; one multiply-add is 2 FLOPs, only matrix products count.

    Attributes:
        heads: Heads that the block holds.
        window: Side of its windows, in tokens; 0 for global attention.
        params: All parameters of the block.
        attention_params: Parameters of its attention.
        gemm: FLOPs of the q, k, v and output projections on the real tokens.
        attention: FLOPs of QK^T and PV between the real tokens of each window.
        gemm_padded: Like ``gemm`` with every pad computed as a token, as ORION does.
        attention_padded: Like ``attention`` with full windows, as ORION does.
        mlp: FLOPs of everything else in the block.
    """

    heads: int
    window: int
    params: int
    attention_params: int
    gemm: int
    attention: int
    gemm_padded: int
    attention_padded: int
    mlp: int

    @property
    def flops(self) -> int:
        """FLOPs without computing a pad."""
        return self.gemm + self.attention + self.mlp

    @property
    def flops_padded(self) -> int:
        """FLOPs with pads computed."""
        return self.gemm_padded + self.attention_padded + self.mlp


@dataclass(frozen=True)
class ModelCost:
    """One model for one image.

    Attributes:
        keep: The request it answers; None for the model as it was given.
        blocks: Costs of the blocks, in the order of execution.
        params: All parameters of the model.
        embed: FLOPs outside the blocks.
        mlp_keep: The request for hidden units; None if they all stay.
    """

    keep: int | float | list[int] | None
    blocks: list[BlockCost]
    params: int
    embed: int
    mlp_keep: int | float | list[int] | None = None

    @property
    def heads(self) -> int:
        """Heads of all blocks."""
        return sum(block.heads for block in self.blocks)

    @property
    def attention_params(self) -> int:
        """Parameters of all attentions."""
        return sum(block.attention_params for block in self.blocks)

    @property
    def flops(self) -> int:
        """FLOPs without computing a pad, as kdfast runs the model."""
        return self.embed + sum(block.flops for block in self.blocks)

    @property
    def flops_padded(self) -> int:
        """FLOPs with pads computed, as ORION runs the model."""
        return self.embed + sum(block.flops_padded for block in self.blocks)

    def parts(self, padded: bool = False) -> dict[str, int]:
        """FLOPs by kind: embed, window and global GEMMs and attention, mlp."""
        sums = {"embed": self.embed}
        for kind, windowed in (("window", True), ("global", False)):
            some = [block for block in self.blocks if (block.window > 0) == windowed]
            sums[f"{kind}_gemm"] = sum(b.gemm_padded if padded else b.gemm for b in some)
            sums[f"{kind}_attention"] = sum(
                b.attention_padded if padded else b.attention for b in some
            )
        sums["mlp"] = sum(block.mlp for block in self.blocks)
        return sums


@dataclass(frozen=True)
class PruningReport:
    """What pruning a model saves; ``str`` of it is a table.

    Attributes:
        family: Class of the model.
        image_size: (height, width) that the FLOPs are for.
        full: The model as it was given.
        pruned: One entry per request.
    """

    family: str
    image_size: tuple[int, int]
    full: ModelCost
    pruned: list[ModelCost]

    @property
    def flops_without_heads(self) -> int:
        """FLOPs without any head: the least that head pruning can reach."""
        return self.full.embed + sum(block.mlp for block in self.full.blocks)

    def to_json(self) -> str:
        """Everything as JSON, totals included."""
        models = [
            {
                **asdict(cost),
                "heads": cost.heads,
                "attention_params": cost.attention_params,
                "flops": cost.flops,
                "flops_padded": cost.flops_padded,
                "parts": cost.parts(),
                "parts_padded": cost.parts(padded=True),
            }
            for cost in (self.full, *self.pruned)
        ]
        content = {
            "family": self.family,
            "image_size": list(self.image_size),
            "flops_without_heads": self.flops_without_heads,
            "full": models[0],
            "pruned": models[1:],
        }
        return json.dumps(content, indent=1)

    def __str__(self) -> str:
        h, w = self.image_size
        title = (
            f"{self.family}, {len(self.full.blocks)} blocks, one {h} x {w} image; "
            "GMACs are billions of multiply-adds of matrix products"
        )
        if self._padded:
            title += "\nratios are to the full model with pads computed, as ORION runs it"
        limit = self.full.flops_padded / self.flops_without_heads
        floor = (
            f"without any head: {self.flops_without_heads / 2e9:.2f} GMACs, {limit:.3f}x: "
            "the ceiling of head pruning"
        )
        return "\n".join((title, "", *self._totals(), "", *self._blocks(), "", floor))

    @property
    def _padded(self) -> bool:
        return self.full.flops_padded != self.full.flops

    def _totals(self) -> list[str]:
        first = ("kept", "heads", "parameters", "saved", "in attention")
        pads = ("GMACs padded", "ratio", "GMACs pad-skip", "ratio")
        rows: list[tuple[str, ...]] = [first + (pads if self._padded else ("GMACs", "ratio"))]
        base = self.full
        for cost in (base, *self.pruned):
            cells: tuple[str, ...] = (
                _request(cost),
                str(cost.heads),
                f"{cost.params:,}",
                f"{1 - cost.params / base.params:.2%}",
                f"{cost.attention_params:,}",
            )
            flops = (cost.flops_padded, cost.flops) if self._padded else (cost.flops,)
            for count in flops:
                cells += (f"{count / 2e9:.3f}", f"{base.flops_padded / count:.3f}x")
            rows.append(cells)
        return _aligned(rows)

    def _blocks(self) -> list[str]:
        """One line per group of blocks that cost the same in every column."""
        costs = (self.full, *self.pruned)
        groups: dict[tuple[BlockCost, ...], list[int]] = {}
        for index in range(len(self.full.blocks)):
            groups.setdefault(tuple(cost.blocks[index] for cost in costs), []).append(index)
        labels = [_request(cost) for cost in costs]
        rows = [("attention", *(f"heads, GMACs at {label}" for label in labels), "blocks")]
        for same, indices in groups.items():
            kind = f"windows of {same[0].window}" if same[0].window else "global"
            cells = (f"{block.heads}, {block.flops / 2e9:.2f}" for block in same)
            rows.append((kind, *cells, ",".join(map(str, indices))))
        return _aligned(rows)


def pruning_report(
    model: nn.Module,
    keep: Sequence[Keep] = (0.25, 0.5, 0.75, 1.0),
    *,
    mlp_keep: Keep | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> PruningReport:
    """Counts what is left of a model for several numbers of kept heads.

    Every count is taken from the modules of the pruned architecture, built without memory on the
    meta device. FLOPs are those of matrix products; element-wise work is not counted.

    Args:
        model: Its family is one of docs/use/pruning.md; on any device, already pruned or not. It is
            not changed.
        keep: Requests as in ``select_heads`` with scope "block", relative to the heads that the
            model holds; an int or a list may be 0.
        mlp_keep: The same for the hidden units of every block's MLP, in every request; None keeps
            them all.
        image_size: Side, or (height, width), of the image; None: what the model is configured for.

    Raises:
        TypeError: The model's family is not known, or a request is of another kind.
        ValueError: A request or the image size does not fit.
    """
    whole = anatomy_of("pruning_report", model)
    adapter = whole.adapter
    size = adapter.image_size(model) if image_size is None else image_size
    size = (size, size) if isinstance(size, int) else (size[0], size[1])
    held = [site.held for site in whole.attentions]
    widths = [len(site.held) for site in whole.mlps]
    units = None
    if mlp_keep is not None:
        if not widths:
            raise ValueError("pruning_report: mlp_keep must be None, no MLP can be pruned here")
        widths = kept_counts("pruning_report", mlp_keep, widths, _least(mlp_keep))
        units = _stored(mlp_keep)
    costs = []
    for request in keep:
        sizes = [len(heads) for heads in held]
        counts = kept_counts("pruning_report", request, sizes, _least(request))
        # Which heads stay has no influence on any cost.
        heads = [heads[:count] for heads, count in zip(held, counts, strict=True)]
        pruned = Anatomy.of(adapter, adapter.empty(model, heads, widths))
        costs.append(_cost(pruned, size, _stored(request), units))
    return PruningReport(adapter.family, size, _cost(whole, size, None, None), costs)


def _least(request: Keep) -> int:
    """The smallest number that a request may give a block."""
    return 1 if isinstance(request, float) else 0


def _stored(request: Keep) -> int | float | list[int]:
    return list(request) if isinstance(request, Sequence) else request


def _cost(
    anatomy: Anatomy,
    image_size: tuple[int, int],
    keep: int | float | list[int] | None,
    mlp_keep: int | float | list[int] | None,
) -> ModelCost:
    flops, outside = anatomy.adapter.flops(anatomy.model, image_size)
    blocks = [
        BlockCost(
            heads=len(site.held),
            params=_params(block),
            attention_params=_params(site.module),
            **asdict(counts),
        )
        for block, site, counts in zip(anatomy.blocks, anatomy.attentions, flops, strict=True)
    ]
    return ModelCost(keep, blocks, _params(anatomy.model), outside, mlp_keep)


def _params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _request(cost: ModelCost) -> str:
    units = (
        "" if cost.mlp_keep is None else f" + mlp {_label(cost.mlp_keep).removesuffix(' heads')}"
    )
    return _label(cost.keep) + units


def _label(keep: int | float | list[int] | None) -> str:
    if keep is None:
        return "given"
    if isinstance(keep, float):
        return f"{keep:.0%}" if round(100 * keep, 6).is_integer() else f"{keep:.1%}"
    return "list" if isinstance(keep, list) else f"{keep} heads"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
