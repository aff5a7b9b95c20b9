# SPDX-License-Identifier: Apache-2.0
"""Draws attention maps: one head, a grid of heads, rollout, before and after pruning.

See docs/use/attention_pictures.md. H heads, N tokens, (h, w) grid of patches, (Y, X) pixels.

All colours of one picture share one scale, in multiples of 1/N, what attention to everything alike
gives a patch. The scale starts at 0 and ends at the 99.5th percentile of the picture, so that a few
extreme patches do not make everything else dark; an arrow on the colour bar says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kdfast.pictures.capture import Attentions
from kdfast.pictures.page import SIDE, Page
from kdfast.pictures.rollout import rollout

TOP = 99.5  # percentile
SMALL = 1.45  # inches of a panel in a grid


def head_row(
    seen: Attentions, layer: int, image: int = 0, token: int | None = None
) -> tuple[np.ndarray, list[str]]:
    """What each head of a layer looks at, in multiples of 1/N.

    Args:
        seen: From ``capture``.
        layer: Index of the layer; negative counts from the end.
        image: Index of the image.
        token: The token that looks; None: CLS, or the mean of all tokens where there is none.

    Returns:
        (H, h, w), and one line for each head: its original index and, with a prefix, how much of
        its attention goes to the prefix tokens.

    Raises:
        ValueError: An index is out of range.
    """
    if not -len(seen.layers) <= layer < len(seen.layers):
        raise ValueError(f"attention: layer must be in [0, {len(seen.layers)}), got {layer}")
    if not 0 <= image < len(seen.images):
        raise ValueError(f"attention: image must be in [0, {len(seen.images)}), got {image}")
    which = seen.layers[layer]
    token = seen.start if token is None else token
    rows = which.mean_row() if token is None else which.rows([token])[:, :, 0]
    row = rows[image].float().cpu()
    words = [f"head {head}" for head in which.heads]
    if seen.prefix:
        kept = row[:, : seen.prefix].sum(1)
        what = "CLS" if seen.cls and seen.prefix == 1 else "prefix"
        words = [f"{word} · {what} {share:.1%}" for word, share in zip(words, kept, strict=True)]
    return (seen.patches(row) * which.tokens).numpy(), words


def draw_head(
    seen: Attentions,
    path: str | Path,
    *,
    layer: int = -1,
    head: int = 0,
    image: int = 0,
    token: int | None = None,
    title: str = "",
) -> Path:
    """One head: the image, its map, and the map over the image.

    Args:
        seen: From ``capture``.
        path: PNG to write; its folder is made.
        layer: Index of the layer.
        head: Original index of the head.
        image: Index of the image.
        token: As in ``head_row``.
        title: First line of the title.

    Returns:
        ``path``.

    Raises:
        ValueError: An index is out of range, or the head was removed.
    """
    maps, words = head_row(seen, layer, image, token)
    heads = list(seen.layers[layer].heads)
    if head not in heads:
        raise ValueError(f"attention: head must be one of {heads}, got {head}")
    at = heads.index(head)
    where = f"{_place(seen, layer)}, {words[at]}, {_looker(seen, token)}"
    return _triptych(seen, image, maps[at], path, title, where, token)


def draw_rollout(
    seen: Attentions,
    path: str | Path,
    *,
    image: int = 0,
    token: int | None = None,
    fusion: str = "mean",
    discard: float = 0.0,
    title: str = "",
) -> Path:
    """Rollout through all layers: the image, the map, and the map over the image.

    Args:
        seen: From ``capture``.
        path: PNG to write; its folder is made.
        image: Index of the image.
        token: As in ``head_row``.
        fusion: As in ``rollout``.
        discard: As in ``rollout``.
        title: First line of the title.

    Returns:
        ``path``.

    Raises:
        ValueError: As in ``rollout``.
    """
    values = rollout_map(seen, token=token, fusion=fusion, discard=discard)[image]
    where = f"rollout of {len(seen.layers)} layers, heads by {fusion}, {_looker(seen, token)}"
    if discard:
        where += f", smallest {discard:.0%} discarded"
    return _triptych(seen, image, values, path, title, where, token)


def rollout_map(
    seen: Attentions, *, token: int | None = None, fusion: str = "mean", discard: float = 0.0
) -> np.ndarray:
    """Rollout of every image, (B, h, w), in multiples of 1/N."""
    start = seen.start if token is None else token
    rows = rollout(seen.layers, start, fusion=fusion, discard=discard)
    return (seen.patches(rows) * seen.layers[0].tokens).float().cpu().numpy()


def draw_heads(
    seen: Attentions,
    path: str | Path,
    *,
    layer: int = -1,
    image: int = 0,
    token: int | None = None,
    title: str = "",
) -> Path:
    """All heads of one layer in a grid, with one scale.

    Args:
        seen: From ``capture``.
        path: PNG to write; its folder is made.
        layer: Index of the layer.
        image: Index of the image.
        token: As in ``head_row``.
        title: First line of the title.

    Returns:
        ``path``.

    Raises:
        ValueError: An index is out of range.
    """
    maps, words = head_row(seen, layer, image, token)
    lines, columns = _shape(len(maps) + 1)
    page = Page(lines, columns, SMALL * 1.15, seen.grid, title)
    page.subtitle(f"{_place(seen, layer)}, {_looker(seen, token)}")
    page.image(0, seen, image, token)
    top = _top(maps)
    for at, (values, word) in enumerate(zip(maps, words, strict=True), 1):
        drawn = page.map(at, values, top, word)
    page.bar(drawn, "attention, x 1/N")
    return page.save(path)


def draw_rollout_change(
    before: Attentions,
    after: Attentions,
    path: str | Path,
    *,
    image: int = 0,
    token: int | None = None,
    names: tuple[str, str] = ("before", "after"),
    title: str = "",
) -> Path:
    """Rollout of two models on one image, with one scale, and the difference.

    Args:
        before: Attentions of the whole model, from ``capture``.
        after: Attentions of the pruned model, on the same images.
        path: PNG to write; its folder is made.
        image: Index of the image.
        token: As in ``head_row``.
        names: Names of the two models, for the titles of their panels.
        title: First line of the title.

    Returns:
        ``path``.

    Raises:
        ValueError: The two do not have the same grid of patches.
    """
    _check_pair(before, after)
    maps = [rollout_map(seen, token=token)[image] for seen in (before, after)]
    page = Page(1, 4, SIDE, before.grid, title, bars=[2])
    page.subtitle(f"rollout, {_looker(before, token)}")
    page.image(0, before, image, token)
    top = _top(np.stack(maps))
    for at, (seen, values, name) in enumerate(zip((before, after), maps, names, strict=True), 1):
        count = sum(len(layer.heads) for layer in seen.layers)
        drawn = page.map(at, values, top, f"{name}: {count} heads", overlay=(seen, image))
    change = maps[1] - maps[0]
    page.bar(drawn, "attention, x 1/N", which=0)
    drawn = page.map(3, change, _top(np.abs(change)), "change", signed=True)
    page.bar(drawn, "difference, x 1/N", ends="both")
    return page.save(path)


def draw_pruned_heads(
    before: Attentions,
    after: Attentions,
    path: str | Path,
    *,
    layer: int = -1,
    image: int = 0,
    token: int | None = None,
    title: str = "",
) -> Path:
    """Every head of one layer before pruning, and beside it after, empty where it was removed.

    Args:
        before: Attentions of the whole model, from ``capture``.
        after: Attentions of the pruned model, on the same images.
        path: PNG to write; its folder is made.
        layer: Index of the layer.
        image: Index of the image.
        token: As in ``head_row``.
        title: First line of the title.

    Returns:
        ``path``.

    Raises:
        ValueError: The two do not have the same grid and layers, or an index is out of range.
    """
    _check_pair(before, after)
    if len(before.layers) != len(after.layers):
        raise ValueError(
            f"attention: both models must have the same layers, got {len(before.layers)} and "
            f"{len(after.layers)}"
        )
    old, _ = head_row(before, layer, image, token)
    new, _ = head_row(after, layer, image, token)
    kept = dict(zip(after.layers[layer].heads, new, strict=True))
    pairs = 4 if len(old) > 6 else 3
    page = Page(-(-len(old) // pairs), 2 * pairs, SMALL, before.grid, title)
    page.subtitle(
        f"{_place(before, layer)}, {len(kept)} of {len(old)} heads kept, "
        f"{_looker(before, token)}: before | after"
    )
    top = _top(np.concatenate((old, new)))
    for at, (head, values) in enumerate(zip(before.layers[layer].heads, old, strict=True)):
        drawn = page.map(2 * at, values, top, f"head {head}")
        if head in kept:
            page.map(2 * at + 1, kept[head], top, "kept")
        else:
            page.empty(2 * at + 1, "removed")
    page.bar(drawn, "attention, x 1/N")
    return page.save(path)


def _shape(panels: int) -> tuple[int, int]:
    """Lines and columns: nearly square, a little wider where that leaves fewer panels empty."""
    least = math.ceil(math.sqrt(panels))
    columns = min(range(least, least + 3), key=lambda count: (-panels % count, count))
    return -(-panels // columns), columns


def _check_pair(before: Attentions, after: Attentions) -> None:
    if before.grid != after.grid or len(before.images) != len(after.images):
        raise ValueError(
            "attention: both models must see the same images in the same grid, got "
            f"{len(before.images)} x {before.grid} and {len(after.images)} x {after.grid}"
        )


def _place(seen: Attentions, layer: int) -> str:
    index = layer % len(seen.layers)
    return f"layer {index} ({seen.layers[index].name})"


def _looker(seen: Attentions, token: int | None) -> str:
    if token is None or token == seen.start:
        return "from CLS" if seen.cls else "mean over all tokens (the model has no CLS)"
    if token < seen.prefix:
        return f"from prefix token {token}"
    y, x = divmod(token - seen.prefix, seen.grid[1])
    return f"from patch ({y}, {x})"


def _top(maps: np.ndarray) -> float:
    return max(float(np.percentile(maps, TOP)), 1e-6) if maps.size else 1.0


def _triptych(
    seen: Attentions,
    image: int,
    values: np.ndarray,
    path: str | Path,
    title: str,
    where: str,
    token: int | None,
) -> Path:
    page = Page(1, 3, SIDE, seen.grid, title)
    page.subtitle(where)
    page.image(0, seen, image, token)
    top = _top(values)
    page.map(1, values, top, f"{seen.grid[0]} x {seen.grid[1]} patches")
    drawn = page.map(2, values, top, "overlay", overlay=(seen, image))
    page.bar(drawn, "attention, x 1/N")
    return page.save(path)


def tokens_of(seen: Attentions, patch: Sequence[int] | None) -> int | None:
    """The token of a patch (row, column), or None for the usual one.

    Raises:
        ValueError: The patch is outside the grid.
    """
    if patch is None:
        return None
    y, x = patch
    if not (0 <= y < seen.grid[0] and 0 <= x < seen.grid[1]):
        raise ValueError(f"attention: patch must be inside the grid {seen.grid}, got ({y}, {x})")
    return seen.prefix + y * seen.grid[1] + x
