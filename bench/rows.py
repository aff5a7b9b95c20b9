# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.rows RUN.json ... --out bench/results/FAMILY.json``: what is kept of a run.

RUN.json is what ``pytest bench --benchmark-json=RUN.json`` wrote. Of its entries a result file
keeps a row each, without the samples: medians, quartiles, limits, memory. Several runs are joined,
such as the parts of one that was interrupted; of an entry that is in several the last one counts.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# What a row holds, where it was measured; times in milliseconds.
FIELDS = ("op", "case", "candidate", "yardstick", "ms", "ms_all", "iqr", "samples", "fast")
FIELDS += ("gb_s", "gflop_s", "limit_ms", "limit_share", "peak_bytes", "saved_bytes")
DIGITS = 5


def joined(runs: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The content of a result file, of the contents of pytest-benchmark's files.

    Returns:
        ``machine``: the facts, as ``kdfast.machine.facts`` has them; ``rates``: FLOP per second of
        limits and libraries by dtype; ``skipped``: entries that were not timed, with the reason;
        ``rows``: a dict for every entry, with those of FIELDS that it has.

    Raises:
        ValueError: A run or an entry is not of bench/, or another machine wrote a run.
    """
    machine: dict[str, Any] = {}
    commits: dict[str, None] = {}
    rates: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    rows: dict[str, dict[str, Any]] = {}
    for run in runs:
        if "rates" not in run:
            raise ValueError("runs must be of pytest bench --benchmark-json, got another file")
        commit = run["commit_info"]
        here = {**run["machine_info"], "dirty": commit["dirty"]}
        commits[commit["id"][:12]] = None
        for fact, value in here.items() if machine else ():
            if machine[fact] != value:
                raise ValueError(
                    f"{fact} must be the same in all runs, got {machine[fact]} and {value}"
                )
        # Parts may be of several commits, as a long run is made in pieces: all of them are named.
        named = ", ".join(commits)
        machine = {**run["machine_info"], "commit": named, "dirty": commit["dirty"]}
        machine["date"] = run["datetime"][:10]
        rates |= run["rates"]
        skipped |= {row["entry"]: row["reason"] for row in run["skipped"]}
        for entry in run["benchmarks"]:
            rows[entry["fullname"]] = row_of(entry)
    return {
        "machine": machine,
        "rates": {dtype: rounded(rate) for dtype, rate in rates.items()},
        "skipped": [{"entry": k, "reason": v} for k, v in skipped.items() if k not in rows],
        "rows": list(rows.values()),
    }


def row_of(entry: dict[str, Any]) -> dict[str, Any]:
    """The row of an entry of pytest-benchmark's file."""
    info = entry["extra_info"]
    if "op" not in info:
        raise ValueError(f"entries must be of bench/, got {entry['fullname']}")
    return rounded({k: info[k] for k in FIELDS if info.get(k) is not None and info[k] is not False})


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    """The same, floats to DIGITS digits."""
    return {k: float(f"{v:.{DIGITS}g}") if isinstance(v, float) else v for k, v in values.items()}


def read(path: Path) -> dict[str, Any]:
    """A result file, or a file of pytest-benchmark as one.

    Raises:
        OSError: It cannot be read.
        ValueError: It is neither.
    """
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if "benchmarks" in found:
        return joined([found])
    if "rows" not in found:
        raise ValueError("must be of pytest bench --benchmark-json or of bench.rows")
    return found


def text(results: dict[str, Any]) -> str:
    """The result file, one line for each row, so that a changed time is a changed line."""
    parts = [f' "{key}": {json.dumps(value)}' for key, value in results.items() if key != "rows"]
    rows = ",\n".join(f"  {json.dumps(row)}" for row in results["rows"])
    return "{\n" + ",\n".join([*parts, f' "rows": [\n{rows}\n ]']) + "\n}\n"


def facts_line(machine: dict[str, Any]) -> str:
    """Machine, versions and commit, as one line."""
    changes = " with changes" if machine["dirty"] else ""
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    return (
        f"{machine['gpu'] or machine['family']}, {machine['isa']}, {threads}, "
        f"torch {machine['torch']}, commit {machine['commit']}{changes}, {machine['date']}"
    )


def skipped_lines(results: dict[str, Any]) -> str:
    """A Markdown list of the reasons, each with the entries that it kept from being timed."""
    reasons: dict[str, list[str]] = {}
    for row in results["skipped"]:
        reasons.setdefault(row["reason"], []).append(row["entry"].rpartition("::")[2])
    return "\n".join(
        f"- {reason}: {len(entries)} entries, the first is `{entries[0]}`"
        for reason, entries in reasons.items()
    )


def main(argv: Sequence[str]) -> int:
    """Writes the result file of the runs named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.rows", description=__doc__)
    parser.add_argument("run", type=Path, nargs="+", help="files of pytest bench --benchmark-json")
    parser.add_argument("--out", type=Path, required=True, help="the result file to write")
    options = parser.parse_args(argv)
    try:
        runs = [json.loads(path.read_text(encoding="utf-8")) for path in options.run]
        results = joined(runs)
    except (OSError, ValueError) as error:
        parser.error(f"{', '.join(map(str, options.run))}: {error}")
    options.out.write_text(text(results), encoding="utf-8")
    print(f"{options.out}: {len(results['rows'])} rows, {len(results['skipped'])} not timed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
