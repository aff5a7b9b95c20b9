# SPDX-License-Identifier: Apache-2.0
"""Queries and keys of the attentions of Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from kdfast.nn.attention import qualified_name
from kdfast.nn.heads import AttentionCall
from kdfast.pruning.adapter import Site
from kdfast.pruning.hf_adapter import ATTENTIONS, HfAdapter, NoHeads


class HfReader:
    """Tells queries and keys of an attention's calls; the attention itself runs.

    Attributes:
        heads: Original index of each head.
    """

    def __init__(self, site: Site) -> None:
        self.site, self.heads = site, list(site.held)

    @property
    def forward(self) -> Callable[..., Any]:
        """The attention's own, for the names of its arguments."""
        forward: Callable[..., Any] = self.site.module.forward
        return forward

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> AttentionCall:
        """Queries, keys and rotation of a call with these arguments."""
        return HfAdapter().call(self.site, args, kwargs, None)


def hf_reader(module: nn.Module) -> HfReader | str | None:
    """The reader of an attention of transformers, or why there is none; None for all else."""
    if isinstance(module, NoHeads):
        return "it has lost all its heads"
    if qualified_name(module) not in ATTENTIONS:
        return None
    return HfReader(HfAdapter().attentions(module)[0])
