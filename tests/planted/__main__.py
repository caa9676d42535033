"""Plants every fault of the list in a copy of the working tree, one by one, and runs the tests that ought to notice.

    python -m tests.planted [--only NAME]... [--json FILE]

The exit status is 0 where at least 95% of the faults that count were caught.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.planted.fault import Fault
from tests.planted.faults import FAULTS
from tests.planted.trial import ROOT, Outcome, copied_tree, load_libraries, run_tests, try_fault

WANTED = 0.95  # share of the faults that are caught
Rows = dict[str, dict[str, Any]]  # by the fault's name


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.planted", description=__doc__.split("\n")[0])
    parser.add_argument("--only", action="append", metavar="NAME", help="this fault; may be given again")
    parser.add_argument("--json", type=Path, metavar="FILE", help="results; with --only, other faults' are kept")
    given = parser.parse_args(arguments)
    chosen = [fault for fault in FAULTS if not given.only or fault.name in given.only]
    if unknown := {*(given.only or ())} - {fault.name for fault in chosen}:
        parser.error(f"no fault is named {', '.join(sorted(unknown))}")
    rows: Rows = {}
    if given.json and given.only and given.json.exists():
        rows = {row["name"]: row for row in json.loads(given.json.read_text())["faults"]}
    load_libraries()
    with copied_tree(ROOT) as tree:
        for fault in chosen:
            rows[fault.name] = row = row_of(fault, None if fault.equivalent else try_fault(fault, tree))
            print(f"{row['result']:<11} {row['seconds']:>6} s  {fault.name}  {row['by']}{row['log']}", flush=True)
            write(given.json, rows)
        not_their_doing(rows, [fault.name for fault in chosen], tree)
    write(given.json, rows)
    asked = [fault for fault in FAULTS if not given.only or fault.name in rows]
    caught, counted = figures(rows, asked)
    print(f"{caught} of {counted} faults were caught")
    return 0 if caught >= WANTED * counted else 1


def row_of(fault: Fault, outcome: Outcome | None) -> dict[str, Any]:
    """A line of the results; without an outcome, of a fault that changes nothing."""
    return {
        "name": fault.name,
        "file": fault.file,
        "result": "equivalent" if outcome is None else outcome.result,
        "by": fault.equivalent if outcome is None else outcome.by,
        "seconds": 0.0 if outcome is None else outcome.seconds,
        "log": "" if outcome is None else outcome.log,
    }


def not_their_doing(rows: Rows, names: Sequence[str], tree: Path) -> None:
    """Marks what was caught by tests that fail without any fault too."""
    caught = {name: rows[name]["by"].split() for name in names if rows[name]["result"] == "caught"}
    tests = sorted({test for by in caught.values() for test in by})
    outcome = run_tests(tests, tree, first_failure=False) if tests else None
    failing = {*(outcome.by.split() if outcome else ())}
    if outcome is not None and outcome.result == "broken":
        failing = {*tests}
    for name, by in caught.items():
        if failing & {*by}:
            rows[name] |= {"result": "broken", "log": "the test fails without the fault too"}
            print(f"broken: {name}: {rows[name]['by']} fails without the fault too")


def figures(rows: Mapping[str, Mapping[str, Any]], faults: Iterable[Fault]) -> tuple[int, int]:
    """How many were caught, of how many that count: all but the equivalent ones, run or not."""
    counted = [fault.name for fault in faults if not fault.equivalent]
    return sum(name in rows and rows[name]["result"] == "caught" for name in counted), len(counted)


def write(path: Path | None, rows: Rows) -> None:
    """The results as JSON and as a table beside it, in the order of the list."""
    if path is None:
        return
    listed = [rows[fault.name] for fault in FAULTS if fault.name in rows]
    caught, counted = figures(rows, FAULTS)
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"caught": caught, "counted": counted, "run": len(listed), "faults": listed}
    path.write_text(json.dumps(document, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(listed, caught, counted))


def table(rows: Sequence[Mapping[str, Any]], caught: int, counted: int) -> str:
    """The results as Markdown."""
    done = sum(row["result"] != "equivalent" for row in rows)
    lines = [
        "# Planted faults",
        "",
        f"`python -m tests.planted`: {caught} of {counted} faults were caught; {counted - done} were not run.",
        "",
        "| fault | file | result | caught by | seconds |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        by = " ".join(f"`{test}`" for test in row["by"].split()) if row["result"] == "caught" else row["by"]
        lines.append(f"| {row['name']} | `{row['file']}` | {row['result']} | {by} | {row['seconds']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
