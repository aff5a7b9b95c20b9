# SPDX-License-Identifier: Apache-2.0
"""What can be said of the Triton kernels without a GPU: ``make gpu-static`` after an edit of them.

Compiles every kernel that the edit reaches for every architecture, reads the binaries and checks
them. Writes bench/results/gpu_static.json, with the limits of bench/gpu_limits.py;
bench/gpu_tables.py makes tables of it.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import triton
from tqdm import tqdm

from bench.gpu_cases import Case, cases, core, describe, traced_as, violations
from bench.gpu_limits import DEVICES, goals, shares
from bench.gpu_source import ROOT, fingerprints
from bench.gpu_sweep import KERNEL, Answer, sweep
from kdfast.machine.files import replacing

RESULT = ROOT / "bench" / "results" / "gpu_static.json"
# Seconds between two writes of the file.
PAUSE = 30


def summary(done: Mapping[Case, dict[str, Any]], failed: Mapping[Case, str]) -> dict[str, Any]:
    """The result file: figures, cases, and in words what is missing and what is not as it should.

    Args:
        done: ``trace`` and ``kernels`` of each case that is compiled from the code as it is.
        failed: Why a case could not be compiled.
    """
    every = cases()
    bad = [
        f"{describe(case, row)}: {fault}"
        for case in every
        if case in done
        for row in done[case]["kernels"]
        for fault in violations(case, row)
    ]
    return {
        "triton": triton.__version__,
        "sources": fingerprints(),
        "devices": {name: asdict(device) for name, device in DEVICES.items()},
        "goals": goals(),
        "shares": shares(),
        "violations": bad + [f"{case}: {fault}" for case, fault in failed.items()],
        "columns": list(KERNEL),
        "missing": [str(case) for case in every if case not in done],
        "compiled": [
            asdict(case) | {"trace": done[case]["trace"], "kernels": packed(done[case])}
            for case in every
            if case in done
        ],
    }


def packed(answer: Mapping[str, Any]) -> list[list[Any]]:
    """The kernels of a case as rows of values."""
    return [[row[name] for name in KERNEL] for row in answer["kernels"]]


def written(facts: Mapping[str, Any]) -> str:
    """The text of the file: a line for each case, so that a change shows as one."""
    parts = [
        f" {json.dumps(key)}: " + (lines(value) if isinstance(value, list) else json.dumps(value))
        for key, value in facts.items()
    ]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def lines(values: Sequence[Any]) -> str:
    return "[\n" + ",\n".join("  " + json.dumps(x) for x in values) + "\n ]" if values else "[]"


def stored(facts: Mapping[str, Any]) -> dict[Case, dict[str, Any]]:
    """The cases of a result file."""
    found = {}
    for row in facts.get("compiled", []):
        kernels = [dict(zip(facts["columns"], values, strict=True)) for values in row["kernels"]]
        case = Case(**{field.name: row[field.name] for field in fields(Case)})
        found[case] = {"trace": row["trace"], "kernels": kernels}
    return found


def changed_ops(facts: Mapping[str, Any]) -> set[str]:
    """Ops whose code is not that of a result file, so that each of its figures is in doubt."""
    if facts.get("triton") != triton.__version__:
        return set(fingerprints())
    before = facts.get("sources", {})
    return {op for op, found in fingerprints().items() if before.get(op) != found}


def current(facts: Mapping[str, Any], jobs: int) -> dict[Case, dict[str, Any]]:
    """The cases of a result file that a compiler would find as they were when it was written."""
    before, doubtful = stored(facts), changed_ops(facts)
    if facts.get("triton") != triton.__version__:
        return {}
    known = set(cases())
    asked: dict[Case, list[Case]] = {}
    for case in before:
        if case in known and case.op in doubtful:
            asked.setdefault(traced_as(case), []).append(case)
    done = {case: row for case, row in before.items() if case in known and case.op not in doubtful}
    answers = progress(sweep(asked, jobs, binaries=False), "tracing", len(asked))
    for one, answer in answers:
        if "error" in answer:
            raise RuntimeError(f"gpu_static: {one}: {answer['error']}")
        for case in asked[one]:
            if before[case]["trace"] == answer["trace"]:
                done[case] = before[case]
    return done


def progress(answers: Iterator[Answer], what: str, count: int) -> "tqdm[Answer]":
    """The answers, with a bar; in a log a line now and then."""
    pause = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(answers, what, count, disable=count == 0, mininterval=pause)


def main() -> int:
    """Write the result file; 1 if a kernel breaks a rule of docs/internals/gpu.md."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_static", description=__doc__)
    parser.add_argument("--core", action="store_true", help="only the cases that tests insist on")
    parser.add_argument("--arch", type=int, nargs="*", help="only these")
    parser.add_argument("--op", nargs="*", help="only these")
    parser.add_argument("--dtype", nargs="*", help="only these")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile [2]")
    parser.add_argument("--minutes", type=float, help="no new case after them; 0: only figures")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    # An interrupted run goes on where it was: what the compiler would not find changed, stays.
    before = json.loads(args.out.read_text()) if args.out.exists() else {}
    done = current(before, args.jobs)
    todo = [
        case
        for case in cases()
        if case not in done
        and (not args.core or core(case))
        and (not args.arch or case.arch in args.arch)
        and (not args.op or case.op in args.op)
        and (not args.dtype or case.dtype in args.dtype)
    ]
    todo.sort(key=lambda case: not core(case))
    failed: dict[Case, str] = {}
    saved = time.monotonic()
    seconds = None if args.minutes is None else 60 * args.minutes
    answers = progress(sweep(todo, args.jobs, seconds), "compiling", len(todo))
    for case, answer in answers:
        if "error" in answer:
            failed[case] = answer["error"]
            answers.write(f"{case}: {answer['error']}")
        else:
            done[case] = answer
        if time.monotonic() > saved + PAUSE:
            write(args.out, summary(done, failed))
            saved = time.monotonic()
    facts = summary(done, failed)
    write(args.out, facts)
    print("\n".join(facts["violations"]) or "no violations")
    lacking = sum(core(case) for case in cases() if case not in done)
    print(f"{len(done)} cases, {len(facts['missing'])} missing, {lacking} of them core: {args.out}")
    return bool(facts["violations"])


def write(path: Path, facts: Mapping[str, Any]) -> None:
    """The result file, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(written(facts), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
