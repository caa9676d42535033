"""Runs the tests of every fault, the long ones longer, and writes what came out as a page.

python -m tests.faults [--rounds 200] [--kills 20] [--write]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from lesa.atomic import write_bytes, write_json
from tests.faults.cases import GROUPS

ROOT = Path(__file__).resolve().parents[2]
LONGER = {  # than in CI
    "LESA_FUZZ_SECONDS": "60",
    "LESA_SAMPLING_RUNS": "1000",
    "LESA_STATEFUL_EXAMPLES": "60",
}
RESULT, PAGE = ROOT / "benchmarks/results/faults.json", ROOT / "docs/faults.md"


def all_tests() -> list[str]:
    """Every test of every case, once, in order."""
    return list(dict.fromkeys(test for group in GROUPS for case in group.cases for test in case.tests))


def run(rounds: int, kills: int, report: Path) -> dict[str, dict[str, Any]]:
    """By test: how many cases of it ran and failed, the seconds, and the kills where it counts them."""
    environment = LONGER | os.environ | {"LESA_FAULT_ROUNDS": str(rounds), "LESA_FAULT_KILLS": str(kills)}
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *all_tests()], cwd=ROOT, env=environment
    )
    results: dict[str, dict[Any, Any]] = {}
    for found in ElementTree.parse(report).iter("testcase"):
        name = f"{found.get('classname', '').replace('.', '/')}.py::{found.get('name', '').split('[')[0]}"
        result = results.setdefault(name, {"ran": 0, "failed": 0, "seconds": 0.0})
        result["ran"] += 1
        result["failed"] += any(child.tag in ("failure", "error", "skipped") for child in found)
        result["seconds"] = round(result["seconds"] + float(found.get("time", "0")), 1)
        for noted in found.iter("property"):
            result[noted.get("name")] = result.get(noted.get("name"), 0) + int(noted.get("value", "0"))
    return results


def page(document: dict[str, Any]) -> str:
    """The table for people."""
    results = document["tests"]
    ran = sum(result["ran"] for result in results.values())
    failed = sum(result["failed"] for result in results.values())
    kills = sum(result.get("kills", 0) for result in results.values())
    lines = [
        "# Faults",
        "",
        f"{sum(len(group.cases) for group in GROUPS)} faults, {len(results)} tests with {ran} cases, {failed} failed; "
        f"{document['rounds']} rounds of racing publishers, {kills} kills in sweeps. Last run {document['date']} by "
        "`python -m tests.faults --write`, which writes this page.",
    ]
    for group in GROUPS:
        lines += ["", f"## {group.name}", ""]
        lines += ["| fault | caused by | what happens | tests |", "| --- | --- | --- | --- |"]
        for case in group.cases:
            tests = "<br>".join(f"`{test.split('/')[-1]}`{_mark(results.get(test))}" for test in case.tests)
            lines.append(f"| {case.fault} | {case.caused} | {case.happens} | {tests} |")
    return "\n".join(lines) + "\n"


def _mark(result: dict[str, Any] | None) -> str:
    if result is None:
        return " not run"
    return f" {result['failed']} of {result['ran']} FAILED" if result["failed"] else ""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="of racing publishers (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=20, help="of a sweep (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help=f"keep the result in {RESULT.name} and {PAGE.name}")
    arguments = parser.parse_args(argv)
    (ROOT / "build").mkdir(exist_ok=True)
    tests = run(arguments.rounds, arguments.kills, ROOT / "build/faults.xml")
    document = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": "python -m tests.faults --write",
        "rounds": arguments.rounds,
        "tests": dict(sorted(tests.items())),
    }
    if arguments.write:
        write_json(RESULT, document)
        write_bytes(PAGE, page(document).encode())
    bad = {name: result for name, result in tests.items() if result["failed"]}
    missing = [test for test in all_tests() if test not in tests]
    print(json.dumps({"tests": len(tests), "failed": bad, "missing": missing}, indent=1))
    return 1 if bad or missing else 0


if __name__ == "__main__":
    raise SystemExit(main())
