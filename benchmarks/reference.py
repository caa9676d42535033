"""The table of a reference workload as its last `make repro` measured it, to be kept with the repository.

python -m benchmarks.reference qwen-digits hunyuan-moving-digits schnell-digits lightning-digits

Reads data/reports/<workload>/results.json, data/metrics/<workload>/base.json and decision.json, and writes
benchmarks/results/reference-<workload>.{json,md}. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lesa.atomic import write_bytes, write_json

RESULTS = Path("benchmarks/results")
KEPT = ("agreement", "computed_steps", "converged_psnr", "flops_ratio", "label", "num_steps", "psnr", "ssim")
HEADINGS = ("method", "PSNR, dB", "5th pct.", "LESA minus this", "to converged", "as prompted", "time")


def collect(workload: str, root: Path = Path(".")) -> dict[str, Any]:
    """What is kept of a workload's last run.

    Raises:
        FileNotFoundError: naming the file of a stage that has not run.
    """
    folders = {"results": root / "data/reports" / workload / "results.json"}
    folders |= {name: root / "data/metrics" / workload / f"{name}.json" for name in ("base", "decision")}
    absent = [str(path) for path in folders.values() if not path.is_file()]
    if absent:
        raise FileNotFoundError(f"{', '.join(absent)}: run make repro WORKLOAD={workload} first")
    read = {name: json.loads(path.read_text()) for name, path in folders.items()}
    results = read["results"]
    gains = {
        (found["budget"], found["against"]): {key: found[key] for key in ("mean", "low", "high")}
        for found in results["differences"]
        if found["method"] == "lesa" and found["metric"] == "psnr"
    }
    rows: dict[str, dict[str, Any]] = {}
    for row in results["rows"]:
        kept = {key: row[key] for key in KEPT} | {"time": row["wall_clock_ratio"], "full_steps": row["full_steps"]}
        kept["lesa_minus_this"] = gains.get((row["budget"], row["method"]))
        rows.setdefault(row["budget"], {})[row["method"]] = kept
    return {
        "base": read["base"],
        "budgets": rows,
        "counts": results["counts"],
        "plain": results["plain"],
        "promoted": read["decision"]["promote"],
        "workload": workload,
    }


def table(document: Mapping[str, Any]) -> str:
    """Markdown: a table a budget, best PSNR first."""
    counts, plain = document["counts"], document["plain"]
    base = ", ".join(f"{name} {value:.4g}" for name, value in document["base"].items())
    asked = f"; {plain['agreement']['mean']:.3f} of the plain run's as prompted" if plain.get("agreement") else ""
    lines = [
        f"# {document['workload']}",
        "",
        f"{counts['samples']} samples of {counts['prompts']} held-out prompts, PSNR to the plain run, 95% bootstrap "
        f"intervals over prompts; to converged: {counts['converged_samples']} samples, "
        f"{counts['converged_steps']} steps{asked}. Base stage: {base}. "
        + ("Promoted." if document["promoted"] else "Not promoted."),
    ]
    for budget, rows in document["budgets"].items():
        ours = rows["lesa"]
        lines += ["", f"## {budget}: {len(ours['full_steps'])} full of {ours['num_steps']} steps", ""]
        lines += ["| " + " | ".join(HEADINGS) + " |", "| " + " | ".join("---" for _ in HEADINGS) + " |"]
        lines += [_line(row) for row in sorted(rows.values(), key=lambda row: -row["psnr"]["mean"])]
    return "\n".join(lines) + "\n"


def _line(row: Mapping[str, Any]) -> str:
    psnr, gain = row["psnr"], row["lesa_minus_this"]
    cells = [
        row["label"],
        f"{psnr['mean']:.2f} [{psnr['low']:.2f}, {psnr['high']:.2f}]",
        f"{psnr['p5']:.2f}",
        f"{gain['mean']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}]" if gain else "",
        f"{row['converged_psnr']['mean']:.2f}" if row["converged_psnr"] else "",
        f"{row['agreement']['mean']:.3f}" if row["agreement"] else "",
        f"{row['time']:.2f}x" if row["time"] else "",
    ]
    return "| " + " | ".join(cells) + " |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reference",
        description="Keeps the tables of workloads that make repro has run.",
    )
    parser.add_argument("workloads", nargs="+", help="sections of params.yaml, run before")
    parser.add_argument("--suffix", default="", help="kept as reference-<workload><suffix>: another setting's run")
    given = parser.parse_args(arguments)
    try:
        documents = [collect(workload) for workload in given.workloads]
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for document in documents:
        name = f"reference-{document['workload']}{given.suffix}"
        write_json(RESULTS / f"{name}.json", document)
        write_bytes(RESULTS / f"{name}.md", table(document).encode())
        print(table(document))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
