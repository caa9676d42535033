"""The README's tables of `benchmarks.fidelity`, from the kept files: our forms, and the best row of each peer.

Labels are the rows' own; the README words some of them for readers without the module at hand.

python -m benchmarks.fidelity_summary flux-digits flux-photos
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.fidelity import RESULTS

FIRST = "per_step_searched"
OURS = (FIRST, "lesa_searched", "per_step_uniform", "lesa_uniform")
PEERS = {  # of each the best row
    "L2P": r"l2p.*",
    "LinCa": r"linca.*",
    "HiCache": r"hicache.*",
    "Spectrum": r"spectrum.*",
    "TaylorSeer, searched": r"taylor[12]_searched",
    "TaylorSeer, published": r"taylor[12](_own)?",
    "cache-dit": r"cache_dit.*",
    "TeaCache": r"teacache",
    "dynamic mode decomposition": r"dmd.*",
    "UniPC": r"unipc2.*",
    "DPM-Solver++": r"dpm_solver_2m.*",
    "Adams-Bashforth": r"adams_bashforth2.*",
    "fewer steps": r"euler(_searched)?",
}


def chosen(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Our rows and each peer's best, best first."""
    found = [row for row in rows if row["method"] in OURS]
    for pattern in PEERS.values():
        matching = [row for row in rows if re.fullmatch(pattern, row["method"])]
        if matching:
            found.append(max(matching, key=lambda row: row["psnr"]["mean"]))
    return sorted(found, key=lambda row: -row["psnr"]["mean"])


def table(document: Mapping[str, Any], budget: str) -> str:
    """One number of full steps as Markdown."""
    rows = chosen([row for row in document["rows"] if row["budget"] == budget])
    first = (budget, FIRST, "psnr")
    gains = {d["against"]: d for d in document["differences"] if (d["budget"], d["method"], d["metric"]) == first}
    steps = rows[0]["num_steps"]
    lines = [
        f"| {budget} of {steps} steps ({steps / int(budget):.2f}x) | PSNR, dB | 5th pct. | the default minus this | "
        "to converged |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        psnr, name = row["psnr"], row["label"]
        gain = "" if row["method"] == FIRST else _difference(gains[row["method"]])
        if row["method"] == FIRST:
            name = f"**{name}** (the default)"
        converged = row["converged_psnr"]
        lines.append(
            f"| {name} | {psnr['mean']:.2f} [{psnr['low']:.2f}, {psnr['high']:.2f}] | {psnr['p5']:.2f} | {gain} | "
            f"{'-' if converged is None else format(converged['mean'], '.2f')} |"
        )
    return "\n".join(lines)


def _difference(gain: Mapping[str, float]) -> str:
    return f"{gain['mean']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables of some workloads; the exit status is 2 where there are none."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fidelity_summary", description=__doc__)
    parser.add_argument("workloads", nargs="+")
    options = parser.parse_args(arguments)
    for workload in options.workloads:
        files = sorted(RESULTS.glob(f"fidelity-{workload}-*.json"))
        if not files:
            print(f"{RESULTS}: no file fidelity-{workload}-*.json", file=sys.stderr)
            return 2
        documents = [json.loads(path.read_text()) for path in files]
        budgets = {row["budget"]: document for document in documents for row in document["rows"]}
        print(f"{workload}\n")
        for budget in sorted(budgets, key=int, reverse=True):
            print(table(budgets[budget], budget) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
