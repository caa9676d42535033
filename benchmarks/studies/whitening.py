"""In which basis of regressors do step weights learn fastest through the sampler?

python -m benchmarks.studies.whitening               # writes benchmarks/results/coordinates-<workload>.{json,md}

Step weights alone, from their closed form, on the full steps of the default budget, trained as the search trains its
finalists: on the same batches for the same number of optimiser steps, judged on the training trajectories held back.
    scaled         a parameter a regressor (the newest feature, each difference, the constant), in units of its size
    uncorrelated   a parameter a combination of regressors that goes with none of the others: what is used
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.results_files import keep
from benchmarks.studies.error_meter import RESULTS
from lesa.models.pipelines import load_pipeline
from lesa.params import Workload
from lesa.params_file import load_params
from lesa.recording.dataset import Trajectories, recorded_splits
from lesa.search.descent import DECIBELS, judged_apart
from lesa.search.finalists import error_after_training
from lesa.search.jobs import with_schedules
from lesa.training.step_weights import StepFits, StepWeights

ITERATIONS = (20, 80)
RATES = (0.01, 0.03, 0.06)
BASES = ("scaled", "uncorrelated")


def scaled(weights: StepWeights) -> StepWeights:
    """The same weights, each parameter moving one regressor by itself, as far as all of a combination's move it.

    A basis `B` is `L'^-1` in units of the target, so `(B B')^-1` is the system `L L'` in these, whose diagonal is each
    regressor's energy.
    """
    products = weights.basis.double() @ weights.basis.double().transpose(-1, -2)  # [S, C, R, R]
    energy = torch.linalg.pinv(products, hermitian=True).diagonal(dim1=-2, dim2=-1)
    units = torch.where(energy > 0, energy.clamp_min(1e-300).rsqrt(), 0.0)
    return StepWeights(weights.start.clone(), torch.diag_embed(units).float())


def table(document: Mapping[str, Any]) -> str:
    """The document as Markdown."""
    lines = [
        f"{document['workload']}, {document['full_steps']} of {document['steps']} steps full: error of the final "
        f"latents of {document['judged']} training samples that were not learned from ({document['fitted']} were). "
        f"Closed form: {document['start_db']:.2f} dB.",
        "",
        "| optimiser steps | learning rate | scaled, dB | uncorrelated, dB | difference |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in document["rows"]:
        one, other = row["scaled_db"], row["uncorrelated_db"]
        lines.append(
            f"| {row['iterations']} | {row['learning_rate']:g} | {one:.2f} | {other:.2f} | {other - one:+.2f} |"
        )
    return "\n".join(lines) + "\n"


def compared(
    workload: Workload, train: Trajectories, pipe: Any, every_iterations: Sequence[int], rates: Sequence[float]
) -> dict[str, Any]:
    """The document: a row for every number of optimiser steps and learning rate."""
    schedule = workload.budgets()[workload.schedule.default_budget]
    judged, fitted = judged_apart(train, workload.search.samples)
    fits = StepFits(train, fitted, workload.predictor.step_history, workload.predictor.ridge, pipe.device)

    train_weights = partial(
        error_after_training,
        pipe,
        workload.call,
        train,
        schedule,
        history_size=workload.predictor.step_history,
        seed=workload.seed,
        fitted=fitted,
        judged=judged,
    )

    def error_db(basis: str, iterations: int, rate: float) -> float:
        start = fits.weights(schedule)
        start = scaled(start) if basis == "scaled" else start
        settings = dataclasses.replace(workload.closed_loop, step_learning_rate=rate)
        error = DECIBELS * train_weights(start, settings=settings, iterations=iterations)
        print(f"{basis}, {iterations} at {rate:g}: {error:.2f} dB", file=sys.stderr, flush=True)
        return error

    rows = [
        {
            "iterations": iterations,
            "learning_rate": rate,
            **{f"{basis}_db": error_db(basis, iterations, rate) for basis in BASES},
        }
        for iterations in every_iterations
        for rate in rates
    ]
    return {
        "workload": workload.name,
        "full_steps": schedule.num_full,
        "steps": schedule.num_steps,
        "fitted": len(fitted),
        "judged": len(judged),
        "start_db": error_db("uncorrelated", 1, 0.0),
        "rows": rows,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, print and write; the exit status is 2 for anything the caller can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.whitening",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--workload")
    parser.add_argument("--iterations", type=int, nargs="+", default=list(ITERATIONS))
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="learning rates")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    try:
        workload = with_schedules(load_params(workload=options.workload))
        train, _ = recorded_splits(workload.recording)
        pipe = load_pipeline(workload.model, workload.resources.device)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    document = compared(workload, train, pipe, options.iterations, options.rates)
    text = table(document)
    keep(options.out or RESULTS / f"coordinates-{workload.name}.json", document, text)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
