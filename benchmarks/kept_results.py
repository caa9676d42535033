"""Tables of kept results: what `python -m benchmarks.tables` puts into its pages, computed from benchmarks/results.

In every comparison the peer that comes nearest to ours is printed first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path("benchmarks/results")

FIRST = "per_step_searched"  # the default
OURS = (FIRST, "lesa_searched", "per_step_uniform", "lesa_uniform")
PEERS = {  # a peer -> its rows; the best of them counts
    "L2P": r"l2p.*",
    "LinCa": r"linca.*",
    "TeaCache": r"teacache",
    "HiCache": r"hicache.*",
    "Spectrum": r"spectrum.*",
    "TaylorSeer, searched": r"taylor[12]_(searched|ours)",
    "TaylorSeer, published": r"taylor[12](_own)?",
    "cache-dit": r"cache_dit.*",
    "dynamic mode decomposition": r"dmd.*",
    "UniPC": r"unipc2.*",
    "DPM-Solver++": r"dpm_solver_2m.*",
    "Adams-Bashforth": r"adams_bashforth2.*",
    "Heun": r"heun.*",
    "fewer steps": r"euler(_searched)?",
    "reuse": r"reuse",
}
LINES_OF_README = {  # a row of the README's table -> the peers of which the best counts
    "trained here: L2P, LinCa, TeaCache": ("L2P", "LinCa", "TeaCache"),
    "forecasts: HiCache, Spectrum, DMD": ("HiCache", "Spectrum", "dynamic mode decomposition"),
    "solvers: UniPC, DPM-Solver++, Adams-Bashforth, Heun": ("UniPC", "DPM-Solver++", "Adams-Bashforth", "Heun"),
    "TaylorSeer on searched full steps": ("TaylorSeer, searched",),
    "TaylorSeer as published": ("TaylorSeer, published",),
}
Document = Mapping[str, Any]


def load(name: str, root: Path = ROOT) -> Document:
    """A kept file by its name without `.json`."""
    document: Document = json.loads((root / RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return document


def mean_interval(value: Mapping[str, float], sign: str = "") -> str:
    """`mean [low, high]` in dB; `sign` is "+" for differences."""
    return f"{value['mean']:{sign}.2f} [{value['low']:{sign}.2f}, {value['high']:{sign}.2f}]"


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def best(rows: Sequence[Mapping[str, Any]], peers: Sequence[str]) -> Mapping[str, Any]:
    """The row of the highest PSNR among those of some peers."""
    pattern = "|".join(PEERS[name] for name in peers)
    return max((r for r in rows if re.fullmatch(pattern, r["method"])), key=lambda r: r["psnr"]["mean"])


def chosen(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The default, then of each peer the best row, the strongest first, then our other forms."""
    ours = {row["method"]: row for row in rows if row["method"] in OURS}
    present = [name for name, pattern in PEERS.items() if any(re.fullmatch(pattern, r["method"]) for r in rows)]
    peers = sorted((best(rows, [name]) for name in present), key=lambda row: -row["psnr"]["mean"])
    others = sorted((row for name, row in ours.items() if name != FIRST), key=lambda row: -row["psnr"]["mean"])
    return [ours[FIRST], *peers, *others]


def comparison(document: Document, count: str) -> str:
    """One number of full steps of `benchmarks.fidelity`, as Markdown."""
    rows = chosen([row for row in document["rows"] if row["budget"] == count])
    gains = _gains(document, count)
    steps = rows[0]["num_steps"]
    ratio = f"{count} of {steps} steps ({steps / int(count):.2f}x)"
    lines = []
    for row in rows:
        name = f"**{row['label']}** (the default)" if row["method"] == FIRST else row["label"]
        name = f"*ours:* {name}" if row["method"] in OURS and row["method"] != FIRST else name
        gain = "" if row["method"] == FIRST else mean_interval(gains[row["method"]], "+")
        converged = row["converged_psnr"]
        far = "-" if converged is None else f"{converged['mean']:.2f}"
        lines.append([name, mean_interval(row["psnr"]), f"{row['psnr']['p5']:.2f}", gain, far])
    return markdown([ratio, "PSNR, dB", "5th pct.", "the default minus this", "to converged"], lines)


def _gains(document: Document, count: str) -> dict[str, Mapping[str, float]]:
    first = (count, FIRST, "psnr")
    return {d["against"]: d for d in document["differences"] if (d["budget"], d["method"], d["metric"]) == first}


def kept_files(workload: str, root: Path = ROOT) -> dict[str, str]:
    """Number of full steps -> the name of the file of `benchmarks.fidelity` that holds it, the most steps first."""
    names = [path.stem for path in sorted((root / RESULTS).glob(f"fidelity-{workload}-*.json"))]
    counts = {row["budget"]: name for name in names for row in load(name, root)["rows"]}
    return {count: counts[count] for count in sorted(counts, key=int, reverse=True)}


def by_count(workload: str, root: Path = ROOT) -> dict[str, Document]:
    """The kept files of `benchmarks.fidelity` by number of full steps, the most first."""
    return {count: load(name, root) for count, name in kept_files(workload, root).items()}


def readme_table(root: Path = ROOT) -> str:
    """Six rows: the default, and the best of each kind of peer, at 10, 8 and 6 of 50 full steps."""
    documents = by_count("flux-digits", root)
    rows = {n: [row for row in d["rows"] if row["budget"] == n] for n, d in documents.items()}
    num_steps = rows["10"][0]["num_steps"]
    first = {n: chosen(rows[n])[0] for n in rows}
    lines = [["**lesa**, the default", *(f"**{first[n]['psnr']['mean']:.1f}**" for n in rows), ""]]
    ranked = sorted(LINES_OF_README.items(), key=lambda line: -best(rows["10"], line[1])["psnr"]["mean"])
    for name, peers in ranked:
        strongest = {n: best(rows[n], peers) for n in rows}
        lead = _gains(documents["10"], "10")[strongest["10"]["method"]]
        figures = [f"{strongest[n]['psnr']['mean']:.1f}" for n in rows]
        lines.append([name, *figures, f"{lead['mean']:.1f} [{lead['low']:.1f}, {lead['high']:.1f}]"])
    steps = [f"{n} of {num_steps} ({num_steps / int(n):.2f}x)" for n in rows]
    table = markdown(["mean PSNR in dB, full steps:", *steps, f"lead at {next(iter(rows))} of {num_steps}"], lines)
    counts = documents["10"]["counts"]
    samples = f"{counts['samples']} samples of {counts['prompts']} held-out prompts"
    note = (
        f"{samples} of `flux-digits`; PSNR to the image of all {num_steps} steps, leads with 95% intervals.\n"
        "Of each kind of peer the best row counts, at equal numbers of transformer evaluations (TeaCache: no fewer).\n"
        "Settings and searched steps were chosen on training prompts; trained peers have our full steps where better."
    )
    return f"{table}\n\n{note}"


def reference_table(names: Sequence[str], root: Path = ROOT) -> str:
    """A line a budget: LESA, the strongest of all peers, then TaylorSeer's best row and reuse."""
    headings = ["workload", "full steps", "LESA, dB", "5th pct.", "minus the strongest peer"]
    headings += ["minus TaylorSeer's best row", "minus reuse", "as prompted: plain, LESA, TaylorSeer"]
    lines = []
    for name in names:
        document = load(f"reference-{name}", root)
        plain = document["plain"].get("agreement")
        for budget, rows in document["budgets"].items():
            ours = rows["lesa"]
            peers = {method: row for method, row in rows.items() if not method.startswith("lesa")}
            taylor = _strongest([row for method, row in peers.items() if method.startswith("taylor")])
            strongest = _strongest(list(peers.values()))
            prompted = [row["agreement"]["mean"] for row in (ours, taylor) if row["agreement"]]
            steps = f"{len(ours['full_steps'])} of {ours['num_steps']}"
            kept = f"[{document['workload']}](../{RESULTS}/reference-{name}.md)"
            lines.append([
                kept, f"{steps}, even" if budget.endswith("even") else f"{steps}, searched",
                mean_interval(ours["psnr"]), f"{ours['psnr']['p5']:.2f}",
                f"{mean_interval(strongest['lesa_minus_this'], '+')} ({strongest['label']})",
                mean_interval(taylor["lesa_minus_this"], "+"), mean_interval(rows["reuse"]["lesa_minus_this"], "+"),
                ", ".join(f"{x:.3f}" for x in [plain["mean"], *prompted]) if plain else "",
            ])  # fmt: skip
    return markdown(headings, lines)


def _strongest(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return max(rows, key=lambda row: row["psnr"]["mean"])
