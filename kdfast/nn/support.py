# SPDX-License-Identifier: Apache-2.0
"""`python -m kdfast.nn.support`: which of timm's models run fused, written as Markdown.

Every registered model is built on the meta device, so no weights are needed; this takes minutes.
"""

import argparse
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from torch import nn

from kdfast.nn.accelerate import accelerate
from kdfast.nn.table import FUSED

HEADER = """\
# Which models run fused

Written by `python -m kdfast.nn.support --out docs/support.md` with timm {version}. Do not edit.

`kdfast.accelerate` was called on every model of timm's registry that has attention. *Fused*: every
attention module was replaced. *Partly*: some were, the others are listed. *Left*: none was.

| models with | names | fused | partly | left |
| --- | --- | --- | --- | --- |
| a module with timm's `fused_attn` switch | {flagged} |
| any attention | {any} |

Heads can be removed where the class is not marked with *. Besides timm: torchvision's `vit_*`
(`torch.nn.MultiheadAttention`) and the vision towers of transformers, see
[accelerate.md](accelerate.md).

## By family

| family | names | fused | partly | left | fused classes | left, and why |
| --- | --- | --- | --- | --- | --- | --- |
"""


class Support(NamedTuple):
    """What happened to one registered model.

    Attributes:
        name: In timm's registry.
        family: File of timm that defines it.
        flagged: Whether a module has timm's ``fused_attn`` switch.
        fused: Qualified class names that were replaced.
        left: Qualified class names that were left, with the reason.
    """

    name: str
    family: str
    flagged: bool
    fused: frozenset[str]
    left: frozenset[tuple[str, str]]

    @property
    def status(self) -> str:
        """ "fused", "partly", "left", or "none" where there is no attention."""
        if self.fused:
            return "partly" if self.left else "fused"
        return "left" if self.left else "none"


def survey(names: Iterable[str]) -> Iterator[Support]:
    """Builds each model on the meta device and accelerates it."""
    for name in names:
        model = _build(name)
        flagged = any(hasattr(module, "fused_attn") for module in model.modules())
        report = accelerate(model)
        yield Support(
            name,
            timm.models.model_entrypoint(name).__module__.rpartition(".")[2],
            flagged,
            frozenset(site.source for site in report.replaced),
            frozenset((site.source, site.detail) for site in report.left),
        )


def _build(name: str) -> nn.Module:
    """The model on the meta device, with two blocks if it has such an option: all are alike."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return timm.create_model(name, depth=2)
        except (TypeError, ValueError, AssertionError):
            return timm.create_model(name)


def markdown(rows: Iterable[Support]) -> str:
    """The page: totals, a table by family, and the names that are not wholly fused."""
    rows = [row for row in rows if row.status != "none"]
    text = HEADER.format(
        version=timm.__version__,
        flagged=_counts([row for row in rows if row.flagged]),
        any=_counts(rows),
    )
    families = sorted({row.family for row in rows})
    for family in families:
        own = [row for row in rows if row.family == family]
        fused = sorted({_fused_name(source) for row in own for source in row.fused})
        left = sorted({f"`{_short(s)}`: {why}" for row in own for s, why in row.left})
        cells = [family, _counts(own), ", ".join(fused) or "-", "; ".join(left) or "-"]
        text += f"| {' | '.join(cells)} |\n"
    for status in ("partly", "left"):
        text += f"\n## Names: {status}\n\n"
        for family in families:
            names = [row.name for row in rows if (row.family, row.status) == (family, status)]
            if names:
                text += f"- {family}: {', '.join(names)}\n"
    return text


def _counts(rows: list[Support]) -> str:
    statuses = Counter(row.status for row in rows)
    return " | ".join(str(n) for n in (len(rows), *(statuses[s] for s in _STATUSES)))


_STATUSES = ("fused", "partly", "left")


def _short(source: str) -> str:
    return source.removeprefix("timm.").removeprefix("models.").removeprefix("layers.")


def _fused_name(source: str) -> str:
    return f"`{_short(source)}`" + ("" if FUSED[source].axes else "*")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m kdfast.nn.support", description=__doc__)
    parser.add_argument("--filter", default="", help="timm's pattern, such as vit_*")
    parser.add_argument("--out", type=Path, help="file to write; standard output if not given")
    args = parser.parse_args()
    page = markdown(survey(timm.list_models(args.filter)))
    if args.out:
        args.out.write_text(page)
    else:
        print(page, end="")


if __name__ == "__main__":
    main()
