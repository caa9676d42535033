"""What of the closed loop's gain stays where its gradient leaves out a part of the model, for what it costs.

python -m benchmarks.studies.model_gradient            # writes benchmarks/results/model-gradient-<workload>.{json,md}

Each row trains the default predictor of one budget, the first step as it is and then the closed loop with a share of
the full steps, drawn for each optimiser step, whose calls the gradient goes through (`closed_loop.model_gradient`); at
0 no gradient goes through the transformer and none of its activations is kept. Rows with the same bill have more
optimiser steps. The bill is in forward passes of the transformer at full steps, a backward pass counted as two.
Judged on validation prompts with fresh noise, all rows on the same, PSNR to the plain run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.results_files import keep
from benchmarks.studies.choices import SEED_OFFSET, accelerated_psnr, trained
from benchmarks.studies.error_meter import RESULTS
from lesa.atomic import write_json
from lesa.evaluation.bootstrap import paired_interval
from lesa.evaluation.measure import samples
from lesa.models.bill import BACKWARD
from lesa.models.pipelines import load_pipeline, sample
from lesa.params import Workload
from lesa.params_file import load_params
from lesa.recording.dataset import recorded_splits
from lesa.recording.prompts import read_splits
from lesa.search.jobs import with_schedules

# Share of full steps with a gradient, and optimiser steps in units of the workload's.
ROWS: dict[str, tuple[float, float]] = {
    "whole": (1.0, 1.0),
    "a half": (0.5, 1.0),
    "a quarter": (0.25, 1.0),
    "none": (0.0, 1.0),
    "a half, same bill": (0.5, 1.5),
    "none, same bill": (0.0, 3.0),
    "no closed loop": (0.0, 0.0),
}


def settings_of(workload: Workload, name: str, seed: int) -> Workload:
    """The workload of one row."""
    share, length = ROWS[name]
    loop = workload.closed_loop
    loop = dataclasses.replace(loop, model_gradient=share, iterations=round(loop.iterations * length))
    return dataclasses.replace(workload, closed_loop=loop, seed=seed)


def bill(workload: Workload, num_full: int) -> float:
    """Forward passes of the transformer that the closed loop's optimiser steps cost, with the backward passes."""
    loop = workload.closed_loop
    return loop.iterations * loop.batch_size * num_full * (1 + BACKWARD * loop.model_gradient)


def table(document: Mapping[str, Any]) -> str:
    """The document as Markdown."""
    seeds = ", ".join(map(str, document["seeds"]))
    lines = [
        f"{document['workload']}, {document['full']} full steps, {document['samples']} samples of "
        f"{document['prompts']} validation prompts, training seeds {seeds}. Differences "
        "are paired over samples, resampled by prompt; the bill counts a backward pass as two forward passes.",
        "",
        "| gradient through the model | forward passes | PSNR, dB | of each seed | 5th percentile "
        "| minus whole [95%] | of the gain |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows = document["rows"]
    whole, without = (rows[name]["psnr_mean"] if name in rows else None for name in ("whole", "no closed loop"))
    for name, row in rows.items():
        d, seeds = row["minus_whole"], ", ".join(f"{value:.2f}" for value in row["by_seed"])
        part = "" if without is None else f"{(row['psnr_mean'] - without) / (whole - without):.0%}"
        lines.append(
            f"| {name} | {row['bill']:.0f} | {row['psnr_mean']:.2f} | {seeds} | {row['psnr_p5']:.2f} | "
            f"{d['mean']:+.2f} [{d['low']:+.2f}, {d['high']:+.2f}] | {part} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, measure, print and write; what is trained already is not trained again."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.model_gradient",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--workload")
    parser.add_argument("--budget", help="default: the workload's default budget")
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training")
    parser.add_argument("--prompts", type=int, default=32, help="validation prompts, from the first")
    parser.add_argument("--samples", type=int, default=4, help="of each prompt, with fresh noise")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    try:
        workload = with_schedules(load_params(workload=options.workload))
        train, validation = recorded_splits(workload.recording)
        pipe = load_pipeline(workload.model, workload.resources.device)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    budget = options.budget or workload.schedule.default_budget
    num_full = workload.budgets()[budget].num_full
    chosen = read_splits(workload.paths.prompts)["validation"][: options.prompts]
    prompts, seeds = samples(chosen, options.samples, SEED_OFFSET)
    plain = sample(pipe, prompts, seeds, workload.call)
    kept = Path("data/benchmarks") / workload.name / "model_gradient"
    kept.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ("whole", *options.only)}
    for seed in options.seeds:
        for name in found:
            place = kept / f"{budget}-{list(ROWS).index(name)}-{seed}-{len(prompts)}.json"
            if not place.exists():
                setting = settings_of(workload, name, seed)
                predictor = trained(
                    setting, budget, pipe, train, validation, closed_loop=setting.closed_loop.iterations > 0
                )
                values = accelerated_psnr(setting, budget, pipe, predictor, prompts, seeds, plain)
                write_json(place, {"psnr": values.tolist(), "bill": bill(setting, num_full)})
                print(f"{name}, seed {seed}: {values.mean():.2f} dB", file=sys.stderr, flush=True)
            found[name].append(json.loads(place.read_text()))
    document = {
        "workload": workload.name,
        "budget": budget,
        "full": num_full,
        "samples": len(prompts),
        "prompts": len(chosen),
        "seeds": options.seeds,
        "training_trajectories": len(train),
        "torch_threads": torch.get_num_threads(),
        "rows": rows_of(found, prompts),
    }
    text = table(document)
    keep(options.out or RESULTS / f"model-gradient-{workload.name}.json", document, text)
    print(text)
    return 0


def rows_of(found: Mapping[str, Sequence[Mapping[str, Any]]], prompts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Figures of each row, beside those of the whole gradient on the same samples."""
    groups = np.unique(np.array(prompts), return_inverse=True)[1]
    values = {name: np.array([record["psnr"] for record in records]) for name, records in found.items()}
    rows = {}
    for name, by_seed in values.items():
        mean, low, high = paired_interval(by_seed.mean(axis=0), values["whole"].mean(axis=0), groups)
        rows[name] = {
            "bill": found[name][0]["bill"],
            "psnr_mean": float(by_seed.mean()),
            "psnr_p5": float(np.percentile(by_seed, 5)),
            "by_seed": by_seed.mean(axis=1).tolist(),
            "minus_whole": {"mean": float(mean), "low": float(low), "high": float(high)},
        }
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
