# SPDX-License-Identifier: Apache-2.0
"""How a block adds a projection's output to its stream, found by watching it.

T tokens, O channels of the stream.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kdfast.machine.ranks import Ranks
from kdfast.pruning.adapter import Anatomy

# Names of the norms that read the stream before the attention and before the MLP.
NORMS = (
    ("norm1", "layernorm_before", "layer_norm1", "ln_1"),
    ("norm2", "layernorm_after", "layer_norm2", "ln_2"),
)


def main_tensor(output: Any) -> Any:
    """The first tensor of a block's output."""
    return output[0] if isinstance(output, (tuple, list)) else output


def norm_of(block: nn.Module, part: int) -> nn.Module | None:
    """The norm before the attention (part 0) or the MLP (part 1), by its name."""
    return next((block._modules[name] for name in NORMS[part] if name in block._modules), None)


class Branch:
    """Sums over tokens that tell whether ``after = before + gain * output``, and the gain.

    ``before`` and ``after`` are the stream around the branch, ``output`` is the projection's. So a
    LayerScale is found whatever it is called, and a block that does anything else (a norm after the
    branch, windows between) is seen to do so.
    """

    def __init__(self) -> None:
        self.before: Tensor | None = None
        self.output: Tensor | None = None
        self.sums: Tensor | None = None
        self.low_precision = False

    def add(self, after: Any) -> None:
        """Adds a batch once the stream after the branch is known."""
        before, output = self.before, self.output
        self.before = self.output = None
        if before is None or output is None or not isinstance(after, Tensor):
            return
        if output.shape[-1] != after.shape[-1] or output.numel() != after.numel():
            return
        self.low_precision |= after.dtype in (torch.float16, torch.bfloat16)
        b, y, a = (z.detach().double().flatten(0, -2) for z in (before, output, after))
        change = a - b
        ones = torch.ones_like(a[:1]).expand_as(a)
        pairs = ((ones, ones), (a, ones), (a, a), (y, y), (y, change), (change, change))
        row = torch.stack([(u * v).sum(0) for u, v in pairs])
        self.sums = row if self.sums is None else self.sums + row

    def sum_over_processes(self, ranks: Ranks, device: torch.device) -> None:
        """Adds up what all processes saw, of which some may have seen nothing; all must call it.

        Args:
            ranks: This process among all.
            device: Where the tensors of this process are, or would be.
        """
        if ranks.world == 1:
            return
        shapes = [shape for shape in ranks.shared(self._shape) if shape is not None]
        self.low_precision = any(ranks.shared(lambda: self.low_precision))
        if shapes:
            if self.sums is None:
                self.sums = torch.zeros(shapes[0], dtype=torch.float64, device=device)
            dist.all_reduce(self.sums)

    def _shape(self) -> torch.Size | None:
        return None if self.sums is None else self.sums.shape

    def result(self) -> tuple[Tensor | None, float]:
        """The gain (O,) fp64, and the stream's variance after the branch, summed over channels.

        The gain is None where the block does not add its branch to the stream like that.
        """
        if self.sums is None:
            return None, 0.0
        count, a, aa, yy, yc, cc = self.sums
        variance = float((aa / count - (a / count).square()).clamp_min(0).sum())
        gain = yc / yy.clamp_min(torch.finfo(yy.dtype).tiny)
        unexplained = float((cc - gain * yc).sum().clamp_min(0) / cc.sum().clamp_min(1e-300))
        # Rounding of the stream alone, 2^-8 of it in bf16, can exceed a small branch.
        limit = 0.05 if self.low_precision else 1e-4
        return (gain if unexplained < limit else None), variance


def watch_branches(anatomy: Anatomy, branches: Sequence[Sequence[Branch]]) -> list[RemovableHandle]:
    """Hooks that feed ``branches``, (attention, MLP) of every block, or the attention alone."""
    handles = []
    mlps = anatomy.mlps
    for index, (block, parts) in enumerate(zip(anatomy.blocks, branches, strict=True)):
        norms = [norm_of(block, part) for part in range(2)]
        if None in norms:
            continue
        sites = (anatomy.attentions[index], *mlps[index : index + 1])[: len(parts)]
        for site, branch in zip(sites, parts, strict=True):
            handles.append(site.projection.register_forward_hook(_keep_output(branch)))
        for part, norm in enumerate(norms):
            if norm is not None:
                handles.append(norm.register_forward_pre_hook(_at_norm(parts, part)))
        handles.append(block.register_forward_hook(_at_end(parts)))
    return handles


def _keep_output(branch: Branch) -> Any:
    def hook(_: nn.Module, args: Any, output: Tensor) -> None:
        branch.output = output

    return hook


def _at_norm(parts: Sequence[Branch], part: int) -> Any:
    def hook(_: nn.Module, args: Any) -> None:
        if part == 1:
            parts[0].add(args[0])
        if part < len(parts):
            parts[part].before = args[0]

    return hook


def _at_end(parts: Sequence[Branch]) -> Any:
    def hook(_: nn.Module, args: Any, output: Any) -> None:
        if len(parts) > 1:
            parts[1].add(main_tensor(output))

    return hook
