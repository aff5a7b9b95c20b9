# SPDX-License-Identifier: Apache-2.0
"""Queries, keys and features of a timm model's forward, read by hooks while it runs as it is.

B batch, H heads, N tokens, D head dim, C channels.
"""

from __future__ import annotations

import math
from types import TracebackType
from typing import Any

from torch import Tensor, nn

QK = tuple[Tensor, Tensor]


def attention_layers(net: nn.Module, name: str) -> list[str]:
    """Names of the attention modules whose queries and keys can be read.

    Raises:
        ValueError: There is none.
    """
    found = [
        path
        for path, module in net.named_modules()
        if isinstance(getattr(module, "qkv", None), nn.Linear) and hasattr(module, "num_heads")
    ]
    if not found:
        raise ValueError(f"distill.attention: {name} must have attention with packed qkv, has none")
    return found


def timm_features(net: nn.Module, name: str) -> tuple[list[str], list[int]]:
    """Names and widths of the layers that timm lists as features.

    Raises:
        ValueError: timm lists none.
    """
    info = getattr(net, "feature_info", None)
    rows = info if isinstance(info, list) else getattr(info, "info", [])
    modules = dict(net.named_modules())
    rows = [row for row in rows if row.get("module") in modules]
    # The stem of a convolutional network has no counterpart worth imitating.
    rows = [row for row in rows if row["module"] not in ("act1", "relu", "bn1")]
    if not rows:
        raise ValueError(f"distill.feature: timm must list features of {name}, lists none")
    return [row["module"] for row in rows], [row["num_chs"] for row in rows]


def paired_layers(students: int, teachers: int, layers: str) -> list[tuple[int, int]]:
    """Which layer of the student is compared with which one of the teacher.

    Args:
        students: Layers of the student, Ls.
        teachers: Layers of the teacher, Lt.
        layers: "all", or "last".

    Returns:
        Pairs (i, ceil((i + 1) Lt / Ls) - 1): the last layers always meet.
    """
    pairs = [(i, math.ceil((i + 1) * teachers / students) - 1) for i in range(students)]
    return pairs if layers == "all" else pairs[-1:]


def head_groups(students: int, teachers: int) -> list[int]:
    """The teacher head that each student head imitates: the first one of its group."""
    return [i * teachers // students for i in range(students)]


def relation_heads(x: Tensor, count: int, what: str) -> Tensor:
    """(B, H, N, D) as ``count`` heads (B, R, N, H D / R) over the concatenation of all heads.

    Raises:
        ValueError: R does not divide H D.
    """
    b, h, n, d = x.shape
    if h * d % count:
        raise ValueError(
            f"distill.relation_heads: must divide the {what}'s width {h * d}, got {count}"
        )
    return x.transpose(1, 2).reshape(b, n, count, h * d // count).transpose(1, 2)


class Capture:
    """Context in which a forward of ``net`` leaves what the named modules saw.

    Attributes:
        qk: Queries and keys (B, H, N, D) by name, after the norms of the module if it has any.
        features: Outputs by name, as (B, N, C).
    """

    def __init__(self, net: nn.Module, attention: list[str], features: list[str]) -> None:
        self.net, self.attention, self.names = net, attention, features
        self.qk: dict[str, QK] = {}
        self.features: dict[str, Tensor] = {}

    def __enter__(self) -> Capture:
        modules = dict(self.net.named_modules())
        self._handles = []
        for name in self.attention:
            hook = self._qk_hook(name, modules[name])
            self._handles.append(modules[name].qkv.register_forward_hook(hook))
        for name in self.names:
            self._handles.append(modules[name].register_forward_hook(self._feature_hook(name)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        seen = len(self.qk) + len(self.features)
        if kind is None and seen != len(self.attention) + len(self.names):
            raise RuntimeError(
                f"distill: a forward must pass {[*self.attention, *self.names]}, "
                f"got {[*self.qk, *self.features]}"
            )

    def _qk_hook(self, name: str, module: Any) -> Any:
        q_norm = getattr(module, "q_norm", None) or nn.Identity()
        k_norm = getattr(module, "k_norm", None) or nn.Identity()

        def hook(linear: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            b, n, width = out.shape
            heads = module.num_heads
            q, k, _ = out.view(b, n, 3, heads, width // 3 // heads).permute(2, 0, 3, 1, 4)
            self.qk[name] = (q_norm(q), k_norm(k))

        return hook

    def _feature_hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            self.features[name] = out.flatten(2).transpose(1, 2) if out.dim() == 4 else out

        return hook
