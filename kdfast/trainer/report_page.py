# SPDX-License-Identifier: Apache-2.0
"""One HTML page about a run: tables, pictures and how it was made, in a single file.

The page needs no network and no other file: pictures are inside of it, there are no scripts.
"""

from __future__ import annotations

import base64
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from kdfast.machine.facts import machine_facts
from kdfast.machine.files import write_text

PAGE = "report.html"
# Libraries whose versions decide what a run computes, besides torch.
LIBRARIES = ("torchvision", "timm", "transformers", "accelerate", "numpy")


@dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
        head: Names of the columns; the first column names the rows.
        rows: Cells as they are shown, as many as columns.
        note: Below the table.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.head):
                raise ValueError(
                    f"Grid: a row must have {len(self.head)} cells, got {len(row)}: {list(row)}"
                )


@dataclass(frozen=True)
class Picture:
    """A PNG file and what it shows; a file that is gone is named as missing."""

    path: Path
    caption: str

    @property
    def source(self) -> str | None:
        """The file as a data URL; None: it is gone."""
        if not self.path.is_file():
            return None
        return "data:image/png;base64," + base64.b64encode(self.path.read_bytes()).decode("ascii")


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: Its heading.
        text: Sentences below the heading.
        grids: Tables.
        pictures: Below the tables.
        folded: Closed until the reader opens it.
    """

    title: str
    text: str = ""
    grids: Sequence[Grid] = ()
    pictures: Sequence[Picture] = ()
    folded: bool = False


def write_page(
    path: Path,
    *,
    title: str,
    lead: str,
    sections: Sequence[Section],
    config: Mapping[str, Any],
    note: str = "",
) -> Path:
    """Write the page about a run.

    Args:
        path: HTML file, such as ``report.html`` in the folder of the run.
        title: Heading of the page.
        lead: What came out, in a sentence or two.
        sections: Parts of the page, in their order.
        config: Plain values of the whole config, as ``kdfast.configs.plain`` makes them.
        note: What a reader must know first, such as that made-up data were used; may be empty.

    Returns:
        ``path``.

    Raises:
        DiskFull: There is no room for it.
    """
    settings = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    text = _template().render(
        title=title,
        lead=lead,
        note=note,
        sections=sections,
        command=command_line(),
        config=settings,
        facts=_facts(),
    )
    write_text(path, text)
    return path


def command_line() -> str:
    """The command of this process, ready for a shell."""
    python, *words = sys.orig_argv
    if words[:1] == ["-m"]:
        return shlex.join([Path(python).name, *words])
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _facts() -> dict[str, str]:
    """Machine and versions, those that are known."""
    facts = machine_facts()
    if facts.pop("dirty") and facts["commit"]:
        facts["commit"] += " with changes"
    for name in LIBRARIES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            continue
    return {name: str(value) for name, value in facts.items() if value is not None}


def _template() -> Any:
    made = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return made.from_string(TEMPLATE)


STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --line: #d1d9e0;
  --paper: #ffffff; --card: #f6f8fa; --accent: #0b57a4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d;
  --paper: #0d1117; --card: #161b22; --accent: #79b8ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; overflow-wrap: anywhere; }
h2, summary { font-size: 1.2rem; font-weight: 600; margin: 2rem 0 .5rem; }
summary { cursor: pointer; color: var(--accent); }
.note { border-left: .3rem solid #bf8700; background: var(--card); padding: .5rem .8rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.facts th { text-align: left; font-weight: 400; color: var(--soft); }
figure { margin: 1rem 0; }
img { display: block; max-width: 100%; height: auto; background: #ffffff; border-radius: .3rem;
  border: 1px solid var(--line); }
figcaption, .under { color: var(--soft); font-size: .9rem; margin-top: .3rem; }
pre { background: var(--card); padding: .8rem; overflow-x: auto; font-size: .85rem;
  border-radius: .3rem; }
@media print {
  :root { color-scheme: light; --ink: #000000; --soft: #444444; --line: #bbbbbb;
    --paper: #ffffff; --card: #ffffff; --accent: #000000; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  figure, tr { break-inside: avoid; }
  h2, summary { break-after: avoid; }
  pre { white-space: pre-wrap; border: 1px solid var(--line); }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""

TEMPLATE = (
    """{% macro body(section) %}
{% if section.text %}
<p>{{ section.text }}</p>
{% endif %}
{% for grid in section.grids %}
<div class="wide"><table>
<thead><tr>{% for name in grid.head %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in grid.rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% if grid.note %}
<p class="under">{{ grid.note }}</p>
{% endif %}
{% endfor %}
{% for picture in section.pictures %}
<figure>
{% set source = picture.source %}
{% if source %}
<img src="{{ source }}" alt="{{ picture.caption }}">
{% endif %}
<figcaption>{{ picture.caption }}{% if not source %}: {{ picture.path.name }} is gone{% endif %}
</figcaption>
</figure>
{% endfor %}
{% endmacro %}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>"""
    + STYLE
    + """</style>
</head>
<body>
<h1>{{ title }}</h1>
{% if note %}
<p class="note">{{ note }}</p>
{% endif %}
<p>{{ lead }}</p>
{% for section in sections %}
{% if section.folded %}
<details><summary>{{ section.title }}</summary>
{{ body(section) }}
</details>
{% else %}
<section><h2>{{ section.title }}</h2>
{{ body(section) }}
</section>
{% endif %}
{% endfor %}
<section><h2>How it was run</h2>
<pre>{{ command }}</pre>
<table class="facts"><tbody>
{% for name, value in facts.items() %}
<tr><th scope="row">{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}
</tbody></table>
</section>
<details><summary>Config</summary>
<pre>{{ config }}</pre>
</details>
</body>
</html>
"""
)
