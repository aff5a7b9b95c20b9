# SPDX-License-Identifier: Apache-2.0
"""Result files: what is kept of pytest-benchmark's files, and the commands that read them."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench import report, rows

MACHINE = {"cpu": "C", "family": "Zen 9", "gpu": None, "isa": "avx2", "threads": 2, "torch": "9"}


def entry(candidate: str, ms: float, **more: Any) -> dict[str, Any]:
    info = {"op": "op", "case": "case", "candidate": candidate, "yardstick": False, "ms": ms}
    info |= {"ms_all": ms, "iqr": 0.0, "samples": 9, "fast": 0, "flops": 5, "isa": "avx2"}
    return {
        "fullname": f"f.py::b[{candidate}]",
        "stats": {"data": [1.0]},
        "extra_info": info | more,
    }


def run(*entries: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "machine_info": MACHINE,
        "commit_info": {"id": "0123456789abcdef", "dirty": False, "branch": "main"},
        "datetime": "2000-01-02T03:04:05+00:00",
        "rates": {"float32": {"limit": 123456789.0, "library": 1.0}},
        "skipped": [{"entry": "f.py::b[flex]", "reason": "flex: not installed"}],
        "benchmarks": list(entries),
        **more,
    }


def test_a_result_file_keeps_rows_and_no_samples() -> None:
    found = rows.joined([run(entry("kdfast", 1.23456789), entry("all", 2.0, yardstick=True))])
    machine = {**MACHINE, "commit": "0123456789ab", "dirty": False, "date": "2000-01-02"}
    assert found["machine"] == machine
    assert found["rates"] == {"float32": {"limit": 123460000.0, "library": 1.0}}
    assert found["skipped"] == [{"entry": "f.py::b[flex]", "reason": "flex: not installed"}]
    base = {"op": "op", "case": "case", "iqr": 0.0, "samples": 9, "fast": 0}
    assert found["rows"] == [
        {**base, "candidate": "kdfast", "ms": 1.2346, "ms_all": 1.2346},
        {**base, "candidate": "all", "ms": 2.0, "ms_all": 2.0, "yardstick": True},
    ]
    text = rows.text(found)
    assert json.loads(text) == found
    assert sum('"candidate"' in line for line in text.splitlines()) == 2  # a line for each
    assert "Zen 9, avx2, 2 threads, torch 9, commit 0123456789ab" in rows.facts_line(machine)
    one = {**machine, "threads": 1}
    assert "Zen 9, avx2, 1 thread, torch 9" in rows.facts_line(one)


def test_all_commits_of_joined_runs_are_named() -> None:
    later = {"id": "fedcba98765432100", "dirty": False, "branch": "main"}
    found = rows.joined([run(entry("a", 1.0)), run(entry("b", 2.0)), run(commit_info=later)])
    assert found["machine"]["commit"] == "0123456789ab, fedcba987654"


def test_runs_are_joined() -> None:
    first = run(entry("kdfast", 1.0), entry("eager", 3.0))
    second = run(entry("kdfast", 2.0), entry("flex", 4.0), skipped=[])
    found = rows.joined([first, second])
    times = [(row["candidate"], row["ms"]) for row in found["rows"]]
    assert times == [("kdfast", 2.0), ("eager", 3.0), ("flex", 4.0)]
    assert found["skipped"] == []  # timed by the second
    other = run(machine_info={**MACHINE, "threads": 4})
    with pytest.raises(ValueError, match="threads must be the same in all runs, got 2 and 4"):
        rows.joined([first, other])
    with pytest.raises(ValueError, match="entries must be of bench/, got f.py::b"):
        rows.joined([run({**entry("x", 1.0), "extra_info": {}})])


def test_rows_and_report_are_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, kept = tmp_path / "run.json", tmp_path / "zen9.json"
    raw.write_text(json.dumps(run(entry("kdfast", 2.0), entry("flex", 3.0))))
    assert rows.main([str(raw), "--out", str(kept)]) == 0
    assert f"{kept}: 2 rows, 0 not timed" in capsys.readouterr().out
    assert rows.read(kept) == rows.read(raw)
    for file in (raw, kept):
        assert report.main([str(file)]) == 0
        line = "| op | case | 2.00 (2.00) | flex | 3.00 (3.00) | 1.50 (1.50) |  | "
        assert line + "0/9 and 0/9, too few |" in capsys.readouterr().out
    for name, content in (("none.json", None), ("text.json", "no JSON"), ("other.json", "{}")):
        if content:
            (tmp_path / name).write_text(content)
        with pytest.raises(SystemExit, match="2"):
            report.main([str(tmp_path / name)])
        assert f"{name}: must be a result file" in capsys.readouterr().err
        with pytest.raises(SystemExit, match="2"):
            rows.main([str(tmp_path / name), "--out", str(kept)])
        assert name in capsys.readouterr().err


def test_the_best_other_is_the_fastest_rival_and_no_yardstick() -> None:
    times = {"kdfast": 1.0, "kdfast, weight": 0.5, "half": 0.7, "openvino": 3.0, "eager": 2.0}
    every = [{"candidate": name, "ms": ms} for name, ms in times.items()]
    every[2]["yardstick"] = True
    assert report.best_other(every) == {"candidate": "eager", "ms": 2.0}
    assert report.best_other(every[:3]) is None


def test_plots_is_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    from bench import plots

    entries = []
    for name in plots.COLOURS:
        for tokens in (64, 128):
            case = f"fwd+bwd 1x8x{tokens} bfloat16"
            new = entry(name, 1.0, op="lengths", case=case, peak_bytes=1 << 20)
            entries.append({**new, "fullname": f"{name} {tokens}"})
    file, picture = tmp_path / "rows.json", tmp_path / "lengths.png"
    file.write_text(json.dumps(run(*entries)))
    assert plots.main([str(file), str(picture)]) == 0
    assert picture.read_bytes()[1:4] == b"PNG"
    file.write_text(json.dumps(run()))
    with pytest.raises(SystemExit, match="2"):
        plots.main([str(file), str(picture)])
    assert "must have rows of bench_lengths.py, got none" in capsys.readouterr().err
