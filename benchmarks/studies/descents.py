"""What several descents and a screening of their leaders bring the search, beside one descent with as many runs.

python -m benchmarks.studies.descents                  # writes benchmarks/results/descents-<workload>.{json,md}

Both ways start from the same schedules and draw the order of their moves from the same seeds:
    one        one descent with all the runs, its leaders trained for `search.finalist_iterations`, as many as finalists
    several    the workload's own settings: `search.descents` of them, `search.screened` leaders screened first
The figure is the error of the final latents of the schedule taken, after the finalists' training, on training
trajectories that were not learned from.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.results_files import keep
from benchmarks.studies.error_meter import RESULTS
from lesa.models.pipelines import load_pipeline
from lesa.params import SearchParams, Workload
from lesa.params_file import load_params
from lesa.recording.dataset import recorded_splits
from lesa.search.descent import refine
from lesa.search.jobs import cheapest_starts, search_settings


def ways(search: SearchParams) -> dict[str, SearchParams]:
    """The two settings that are compared."""
    runs = search.descents * search.evaluations
    return {"one": dataclasses.replace(search, descents=1, evaluations=runs, screened=1), "several": search}


def table(document: Mapping[str, Any]) -> str:
    """The document as Markdown."""
    search = document["search"]
    lines = [
        f"{document['workload']}, search of {search['descents']} descents of {search['evaluations']} runs, "
        f"{search['screened']} leaders screened, {search['finalists']} finalists, against one descent with as many "
        "runs and finalists: error of the final latents after the finalists' training, in dB, lower is better, on "
        f"{search['samples']} training samples that were not learned from.",
        "",
        "| budget | seed | one descent | several | difference | seconds | its steps |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for budget in dict.fromkeys(row["budget"] for row in document["rows"]):
        rows = [row for row in document["rows"] if row["budget"] == budget]
        for row in rows:
            one, several = row["one"], row["several"]
            lines.append(
                f"| {budget} | {row['seed']} | {one['error_db']:.2f} | {several['error_db']:.2f} | "
                f"{several['error_db'] - one['error_db']:+.2f} | {one['seconds']:.0f}, {several['seconds']:.0f} | "
                f"{several['full_steps']} |"
            )
        means = {way: fmean(row[way]["error_db"] for row in rows) for way in ("one", "several")}
        gain = means["several"] - means["one"]
        lines.append(f"| {budget} | mean | {means['one']:.2f} | {means['several']:.2f} | {gain:+.2f} | | |")
    return "\n".join(lines) + "\n"


def searched(workload: Workload, budgets: Sequence[str], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """A row for every budget and seed."""
    train, _ = recorded_splits(workload.recording)
    pipe = load_pipeline(workload.model, workload.resources.device)
    jobs = [job for job in cheapest_starts(workload, None, lambda *_: None) if job.budget in budgets]
    rows = []
    for job in jobs:
        for seed in seeds:
            row: dict[str, Any] = {"budget": job.budget, "seed": seed}
            for way, search in ways(workload.search).items():
                setting = dataclasses.replace(workload, search=search)
                started = time.perf_counter()
                with tempfile.TemporaryDirectory() as folder:
                    schedule, figures = refine(
                        pipe,
                        search_settings(setting),
                        train,
                        job.starts,
                        seed=1000 * seed,
                        journal=Path(folder) / "journal.json",
                        report=lambda *_: None,
                    )
                row[way] = {
                    "full_steps": list(schedule.full_steps),
                    "closed_form_db": figures["error_db"],
                    "error_db": figures["trained_error_db"],
                    "runs": int(figures["evaluations"]),
                    "seconds": time.perf_counter() - started,
                }
                print(job.budget, seed, way, row[way], file=sys.stderr, flush=True)
            rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Search, print and write; the exit status is 2 for anything the caller can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.descents", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--workload")
    parser.add_argument("--budgets", nargs="+", default=["5x", "8x"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    try:
        workload = load_params(workload=options.workload)
        if workload.search.finalists < 2:
            raise ValueError("search.finalists: at least 2 are wanted, whose training tells which schedule is better")
        rows = searched(workload, options.budgets, options.seeds)
        if not rows:
            raise ValueError(f"--budgets: none of {options.budgets} is searched by {workload.name}")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    document = {"workload": workload.name, "search": dataclasses.asdict(workload.search), "rows": rows}
    text = table(document)
    keep(options.out or RESULTS / f"descents-{workload.name}.json", document, text)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
