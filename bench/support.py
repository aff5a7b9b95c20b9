# SPDX-License-Identifier: Apache-2.0
"""`python -m bench.support`: which of timm's models run fused, written as Markdown.

Every registered model is built on the meta device, so no weights are needed; this takes minutes.
With ``--rows`` a run that was stopped goes on where it was.
"""

import argparse
import json
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from torch import nn
from tqdm import tqdm

from kdfast.nn.accelerate import accelerate
from kdfast.nn.attention import FusedAttention
from kdfast.nn.table import FUSED
from kdfast.pruning.vit_adapter import stand_ins

HEADER = """\
# Which models run fused

Written by `python -m bench.support --out docs/use/support.md` with timm {version}. Do not edit.

`kdfast.accelerate` was called on every model of timm's registry that has attention. *Fused*: every
attention module was replaced. *Partly*: some were, the others are listed. *Left*: none was.

| models with | names | fused | partly | left |
| --- | --- | --- | --- | --- |
| a module with timm's `fused_attn` switch | {flagged} |
| any attention | {any} |

`kdfast.prune_heads` removes heads of {pruned} names, of {whole} of them in every attention; column
*pruned*. Fused classes marked with * keep their heads, [see below](#fused-not-pruned). Besides
timm: torchvision's `vit_*` (`torch.nn.MultiheadAttention`) and `swin_*`, and the vision towers of
transformers, see [accelerate.md](accelerate.md) and [pruning.md](pruning.md).

## By family

| family | names | fused | partly | left | pruned | fused classes | left, and why |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""


class Support(NamedTuple):
    """What happened to one registered model.

    Attributes:
        name: Its name in timm's registry.
        family: The file of timm that defines it.
        flagged: Whether a module has timm's ``fused_attn`` switch.
        fused: Qualified class names that were replaced.
        left: Qualified class names that were left, with the reason.
        pruned: Qualified class names whose heads can be removed.
    """

    name: str
    family: str
    flagged: bool
    fused: frozenset[str]
    left: frozenset[tuple[str, str]]
    pruned: frozenset[str]

    @property
    def status(self) -> str:
        """ "fused", "partly", "left", or "none" where there is no attention."""
        if self.fused:
            return "partly" if self.left else "fused"
        return "left" if self.left else "none"


def survey(names: Iterable[str], known: Mapping[str, Support] | None = None) -> Iterator[Support]:
    """Builds each model on the meta device, unless its row is known, and accelerates it."""
    for name in names:
        if known and name in known:
            yield known[name]
            continue
        model = _build(name)
        flagged = any(hasattr(module, "fused_attn") for module in model.modules())
        report = accelerate(model)
        yield Support(
            name,
            timm.models.model_entrypoint(name).__module__.rpartition(".")[2],
            flagged,
            frozenset(row.source for row in report.replaced),
            frozenset((row.source, row.detail) for row in report.left),
            frozenset(s.source for _, s in stand_ins(model) if isinstance(s, FusedAttention)),
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
        pruned=sum(bool(row.pruned) for row in rows),
        whole=sum(row.status == "fused" and row.pruned == row.fused for row in rows),
    )
    families = sorted({row.family for row in rows})
    for family in families:
        own = [row for row in rows if row.family == family]
        fused = sorted({_fused_name(source) for row in own for source in row.fused})
        left = sorted({f"`{_short(s)}`: {why}" for row in own for s, why in row.left})
        pruned = str(sum(bool(row.pruned) for row in own))
        cells = [family, _counts(own), pruned, ", ".join(fused) or "-", "; ".join(left) or "-"]
        text += f"| {' | '.join(cells)} |\n"
    text += "\n## Fused, not pruned\n\n"
    for source, kind in sorted(FUSED.items()):
        if kind.unprunable:
            text += f"- `{_short(source)}`: {kind.unprunable}\n"
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
    return f"`{_short(source)}`" + ("*" if FUSED[source].unprunable else "")


def read_rows(path: Path) -> dict[str, Support]:
    """The rows that ``write_row`` wrote, by name; none if there is no such file."""
    rows = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        name, family, flagged, fused, left, pruned = json.loads(line)
        reasons = frozenset((source, why) for source, why in left)
        rows[name] = Support(name, family, flagged, frozenset(fused), reasons, frozenset(pruned))
    return rows


def write_row(path: Path, row: Support) -> None:
    """Appends one row as a line of JSON."""
    with path.open("a") as file:
        file.write(json.dumps([sorted(x) if isinstance(x, frozenset) else x for x in row]) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.support", description=__doc__)
    parser.add_argument("--filter", default="", help="timm's pattern, such as vit_*")
    parser.add_argument("--out", type=Path, help="file to write; standard output if not given")
    parser.add_argument("--rows", type=Path, help="file to keep rows in, to go on after a stop")
    args = parser.parse_args()
    names = timm.list_models(args.filter)
    known = read_rows(args.rows) if args.rows else {}
    rows = []
    for row in tqdm(survey(names, known), total=len(names), unit="model", disable=None):
        rows.append(row)
        if args.rows and row.name not in known:
            write_row(args.rows, row)
    page = markdown(rows)
    if args.out:
        args.out.write_text(page)
    else:
        print(page, end="")


if __name__ == "__main__":
    main()
