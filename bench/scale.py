# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.scale``: writes the tables and the picture of docs/scale.md.

Counted and measured inputs are in bench/results/scale_inputs.json, which
--measure writes again in some minutes. Everything else is an assumption, and
each of them is an option: to compute with others, name another page and
picture.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.documents import filled
from bench.gpu_tables import ROOT
from bench.scale_settings import add_assumptions, assumptions_of
from bench.scale_tables import blocks

INPUTS = ROOT / "bench" / "results" / "scale_inputs.json"
PAGE = ROOT / "docs" / "scale.md"
PICTURE = ROOT / "docs" / "images" / "scale.png"


def main(argv: Sequence[str]) -> int:
    """Measures if asked to, and writes the page."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.scale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--measure", action="store_true", help="count and measure again first")
    parser.add_argument("--inputs", type=Path, default=INPUTS, help="the result file")
    parser.add_argument(
        "--page",
        type=Path,
        default=PAGE,
        help="the page to write; a new one gets the text of docs/scale.md",
    )
    parser.add_argument("--picture", type=Path, default=PICTURE, help="the PNG to draw")
    add_assumptions(parser)
    options = parser.parse_args(argv)
    try:
        chosen = assumptions_of(options)
    except ValueError as error:
        parser.error(str(error))
    if options.measure:
        from bench.scale_measure import measure

        found = measure("python -m bench.scale --measure")
        options.inputs.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    inputs = json.loads(options.inputs.read_text(encoding="utf-8"))
    new = not options.page.exists()
    before = (PAGE if new else options.page).read_text(encoding="utf-8")
    after = filled(before, blocks(inputs, chosen))
    options.page.write_text(after, encoding="utf-8")
    print(f"{options.page}: {'as it was' if after == before and not new else 'written'}")
    from bench.scale_plot import draw

    draw(inputs, chosen, options.picture)
    print(options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
