"""How far full steps given by need could lift the 5th percentile, with a fine menu and with knowledge of any quality.

python -m benchmarks.studies.budget_menu train --part 0/2     # both parts may run side by side
python -m benchmarks.studies.budget_menu measure              # writes benchmarks/results/menu-<workload>.{json,md}

`train` makes a predictor of the default kind for each number of full steps of the menu: on the searched schedule where
a budget has so many, on the cheapest path of the surrogate elsewhere. `measure` runs all of them on validation prompts
with fresh noise and asks what a rule could gain that gives each sample one of these numbers, with the mean that of the
default budget: if it knew every sample's PSNR at every number (`oracle`), and if what it believes of them correlates
with the truth by r only (`knowledge`). The error meter's r at half of a run is in `benchmarks.studies.error_meter`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results_files import changed, keep
from benchmarks.studies.choices import accelerated_psnr, trained
from benchmarks.studies.error_meter import RESULTS, SEED_OFFSET, Array, correlation, given_by_need
from lesa.evaluation.measure import samples
from lesa.models.output_head import load_output_head
from lesa.models.pipelines import load_pipeline, sample
from lesa.params import BudgetParams, Workload
from lesa.params_file import load_params
from lesa.recording.dataset import Trajectories, recorded_splits
from lesa.recording.prompts import read_splits
from lesa.schedule import Schedule
from lesa.search.jobs import with_schedules
from lesa.search.path import cheapest_schedules
from lesa.training.jobs import load_predictor, save_predictor, transformer_folder

MENU = (6, 7, 8, 9, 10, 11, 12, 13, 14, 16)  # numbers of full steps
KNOWLEDGE = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0)  # r
DRAWS = 20  # of what is believed


def schedules(workload: Workload, train: Trajectories, counts: Sequence[int]) -> dict[int, Schedule]:
    """Full steps for each number of them."""
    known = {schedule.num_full: schedule for schedule in workload.budgets().values()}
    missing = [count for count in counts if count not in known]
    head = load_output_head(transformer_folder(workload))
    found = cheapest_schedules(train, head, missing, max_gap=workload.search.max_gap) if missing else {}
    return {count: known.get(count) or found[count] for count in counts}


def setting(workload: Workload, schedule: Schedule) -> Workload:
    """The workload with that one budget, named after its number of full steps."""
    name = str(schedule.num_full)
    budgets = {name: BudgetParams(full_steps=schedule.full_steps)}
    return changed(workload, {"schedule": {"budgets": budgets, "default_budget": name}})


def believed(true: Mapping[str, Array], r: float, noise: Array) -> dict[str, Array]:
    """What someone believes whose knowledge of each sample correlates with the truth by r, at every budget.

    Without bias: the mean of what is true, given what is believed, is what is believed. The same noise [N] at every
    budget, since what one does not know of a sample one does not know of it at any.
    """
    found = {}
    for name, values in true.items():
        deviation = values.std()
        found[name] = values.mean() + r**2 * (values - values.mean()) + r * np.sqrt(1 - r**2) * deviation * noise
    return found


def analyse(true: Mapping[str, Array], default: str) -> dict[str, Any]:
    """The document's `budgets`, `oracle` and `knowledge`."""
    full = {name: int(name) for name in true}
    random = np.random.default_rng(0)
    noises = [random.normal(size=len(true[default])) for _ in range(DRAWS)]
    knowledge = []
    for r in KNOWLEDGE:
        rows = [given_by_need(believed(true, r, noise), true, full, default) for noise in noises]
        knowledge.append({"r": r, **{key: float(np.mean([row[key] for row in rows])) for key in rows[0]}})
    return {
        "default": int(default),
        "budgets": {
            name: {
                "psnr_mean": float(values.mean()),
                "psnr_std": float(values.std()),
                "psnr_p5": float(np.percentile(values, 5)),
                "r_with_default": correlation(values, true[default]),
            }
            for name, values in true.items()
        },
        "oracle": given_by_need(true, true, full, default),
        "knowledge": knowledge,
    }


def table(document: Mapping[str, Any]) -> str:
    """The document as Markdown."""
    own = document["budgets"][str(document["default"])]
    lines = [
        f"{document['workload']}: {document['samples']} samples of {document['prompts']} validation prompts.",
        "",
        "| full steps | PSNR, dB | std | 5th pct. | r with the default |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, row in document["budgets"].items():
        lines.append(
            f"| {name} | {row['psnr_mean']:.2f} | {row['psnr_std']:.2f} | {row['psnr_p5']:.2f} | "
            f"{row['r_with_default']:.2f} |"
        )
    lines += [
        "",
        "| full steps given by | mean full steps | PSNR, dB | 5th pct. | 5th pct. minus the default's |",
        "| --- | --- | --- | --- | --- |",
        f"| nobody: {document['default']} for all | {document['default']:.2f} | {own['psnr_mean']:.2f} | "
        f"{own['psnr_p5']:.2f} | |",
    ]
    rows = {f"knowledge of r = {row['r']:g}": row for row in document["knowledge"]}
    for name, row in {**rows, "every PSNR (oracle)": document["oracle"]}.items():
        lines.append(
            f"| {name} | {row['mean_full_steps']:.2f} | {row['psnr_mean']:.2f} | {row['psnr_p5']:.2f} | "
            f"{row['psnr_p5'] - own['psnr_p5']:+.2f} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Train or measure; the exit status is 2 for anything the caller can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.budget_menu",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("act", choices=("train", "measure"))
    parser.add_argument("--workload")
    parser.add_argument("--counts", type=int, nargs="+", default=list(MENU), help="numbers of full steps")
    parser.add_argument("--part", default="0/1", help="train only every n-th: part/n")
    parser.add_argument("--prompts", type=int, default=32, help="validation prompts, from the first")
    parser.add_argument("--seeds", type=int, default=10, help="of each prompt")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    try:
        workload = with_schedules(load_params(workload=options.workload))
        default = str(workload.budgets()[workload.schedule.default_budget].num_full)
        if int(default) not in options.counts:
            raise ValueError(f"--counts must contain {default}, the full steps of the default budget")
        folder = Path("data/benchmarks") / workload.name / "menu"
        train, validation = recorded_splits(workload.recording)
        found = schedules(workload, train, sorted(options.counts))
        pipe = load_pipeline(workload.model, workload.resources.device)
        part, parts = map(int, options.part.split("/"))
        if options.act == "train":
            for count in sorted(options.counts)[part::parts]:
                if (folder / str(count) / "predictor.json").exists():
                    continue
                made = setting(workload, found[count])
                predictor = trained(made, str(count), pipe, train, validation, closed_loop=True)
                save_predictor(folder / str(count), predictor, {})
                print(f"{count} full steps: {list(found[count].full_steps)}", file=sys.stderr, flush=True)
            return 0
        prompts = read_splits(workload.paths.prompts)["validation"][: options.prompts]
        texts, seeds = samples(prompts, options.seeds, SEED_OFFSET)
        plain = sample(pipe, texts, seeds, workload.call, batch_size=workload.evaluate.batch_size)
        true: dict[str, Array] = {}
        for count in sorted(options.counts):
            made, predictor = setting(workload, found[count]), load_predictor(folder / str(count))
            true[str(count)] = accelerated_psnr(made, str(count), pipe, predictor, texts, seeds, plain)
            print(f"{count} full steps: {true[str(count)].mean():.2f} dB", file=sys.stderr, flush=True)
    except (ValueError, json.JSONDecodeError) as error:
        print(error, file=sys.stderr)
        return 2
    document = {
        "workload": workload.name,
        "samples": len(texts),
        "prompts": len(prompts),
        "schedules": {count: list(schedule.full_steps) for count, schedule in found.items()},
        **analyse(true, default),
    }
    text = table(document)
    keep(options.out or RESULTS / f"menu-{workload.name}.json", document, text)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
