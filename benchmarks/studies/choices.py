"""The predictor's choices, one changed at a time: each row trained with several seeds, judged on validation data.

python -m benchmarks.studies.choices    # writes benchmarks/results/choices-<workload>.{json,md}
python -m benchmarks.studies.choices --only "loss: feature" --seeds 0

Every row trains the predictor of one budget on the recorded training trajectories, both steps unless its name says
otherwise, and runs the accelerated pipeline on the validation prompts with fresh noise: PSNR of the images to the
unaccelerated run's, the mean over training seeds of each sample, and its paired difference to the first row's with a
95% bootstrap interval over prompts. Test prompts are not touched. What is finished is kept and not trained again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.results_files import Changes, changed, keep
from benchmarks.studies.learned_boundaries import learned_boundaries
from benchmarks.studies.lesa_schedules import lesa_schedules
from lesa.atomic import write_json
from lesa.evaluation.bootstrap import paired_interval
from lesa.evaluation.measure import samples
from lesa.metrics import psnr
from lesa.models.output_head import output_head_of
from lesa.models.pipelines import load_pipeline, sample
from lesa.params import BudgetParams, Workload
from lesa.params_file import load_params
from lesa.predictor.predictor import Predictor
from lesa.recording.dataset import Trajectories, recorded_splits
from lesa.recording.prompts import read_splits
from lesa.sampling.hook import LesaCacheConfig, apply_lesa_cache, remove_lesa_cache
from lesa.schedule import Schedule
from lesa.search.jobs import with_schedules
from lesa.training.closed_loop import train_budget
from lesa.training.experts import assemble, ground_truth_jobs, untrained
from lesa.training.ground_truth import train_expert
from lesa.training.jobs import expert_design

RESULTS = Path("benchmarks/results")
SEED_OFFSET = 80_000  # noise of the validation prompts here: nothing else uses it
FIRST = "LESA form"

# The LESA form, from which all other rows but the last differ in one thing.
LESA: dict[str, dict[str, Any]] = {
    "predictor": {"kind": "lesa", "projection": "low_rank", "history_sizes": (2, 2, 2)},
}
UNIFORM = "uniform schedule"
NO_LOOP = "ground-truth step alone"
LEARNED = "boundaries learned from the trajectories"
PAPER = "as the paper"
DEFAULT = "weights of each step, schedule searched for them (default)"
FASTER = "the default, step weights learn twice as fast"
SETTINGS: dict[str, Changes] = {
    FIRST: {},
    UNIFORM: {},
    "history: steps, own predictions": {"predictor": {"history": "steps"}},
    "start: random": {"predictor": {"start": "random"}},
    "first loss: feature, L1 (paper)": {"ground_truth": {"loss": "feature"}},
    "first loss: normalised feature": {"ground_truth": {"loss": "normalised_feature"}},
    "gate: MLP": {"predictor": {"gate": "mlp"}},
    "gate: table": {"predictor": {"gate": "table"}},
    "one stage": {"predictor": {"boundaries": (), "history_sizes": (2,)}},
    "two stages": {"predictor": {"boundaries": (0.6,), "history_sizes": (2, 2)}},
    "five stages": {"predictor": {"boundaries": (0.88, 0.72, 0.52, 0.27), "history_sizes": (2,) * 5}},
    LEARNED: {},
    "K = 2, 3, 3": {"predictor": {"history_sizes": (2, 3, 3)}},
    "projection: dense": {"predictor": {"projection": "dense"}},
    "projection: per channel": {"predictor": {"projection": "per_channel"}},
    NO_LOOP: {},
    "closed loop: drifted states": {"closed_loop": {"gradient": "drifted_states"}},
    "closed loop: squared error, no logarithm": {"closed_loop": {"loss": "latents"}},
    "weights of each step": {"predictor": {"kind": "per_step"}},
    "weights of each step, per channel": {"predictor": {"kind": "per_step", "projection": "per_channel"}},
    DEFAULT: {"predictor": {"kind": "per_step"}},
    FASTER: {"predictor": {"kind": "per_step"}, "closed_loop": {"step_learning_rate": 0.06}},
    PAPER: {
        "predictor": {
            "history": "steps",
            "history_sizes": (4, 8, 8),
            "start": "random",
            "projection": "dense",
        },
        "ground_truth": {"loss": "feature"},
        "closed_loop": {"gradient": "drifted_states"},
    },
}
ON_UNIFORM = (UNIFORM, PAPER)
ON_OWN = (DEFAULT, FASTER)  # on the schedule that the search stage found for the workload's kind


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and measure every setting; print and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.choices", description=__doc__)
    parser.add_argument("--params", default="params.yaml")
    parser.add_argument("--workload")
    parser.add_argument("--budget", help="default: the workload's default budget")
    parser.add_argument("--only", action="append", choices=list(SETTINGS), help="rows beside the first")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training")
    parser.add_argument("--prompts", type=int, default=32, help="validation prompts, from the first")
    parser.add_argument("--samples", type=int, default=2, help="of each prompt, with fresh noise")
    parser.add_argument("--part", default="0/1", help="train only every n-th row: part/n; the last to end writes")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    workload = with_schedules(load_params(options.params, options.workload))
    budget = options.budget or workload.schedule.default_budget
    out = options.out or RESULTS / f"choices-{workload.name}.json"
    kept = Path("data/benchmarks") / workload.name / "choices"
    kept.mkdir(parents=True, exist_ok=True)
    names = [FIRST, *(options.only or [n for n in SETTINGS if n != FIRST])]
    train, validation = recorded_splits(workload.recording)
    chosen = read_splits(workload.paths.prompts)["validation"][: options.prompts]
    prompts, seeds = samples(chosen, options.samples, SEED_OFFSET)
    pipe = load_pipeline(workload.model, workload.resources.device)
    reference = sample(pipe, prompts, seeds, workload.call)
    part, parts = map(int, options.part.split("/"))
    for seed in options.seeds:
        for name in names[part::parts]:
            place = kept / f"{budget}-{list(SETTINGS).index(name)}-{seed}.json"
            if place.exists():
                continue
            setting = row_settings(workload, budget, name, seed, train)
            started = time.perf_counter()
            predictor = trained(setting, budget, pipe, train, validation, closed_loop=name != NO_LOOP)
            seconds = time.perf_counter() - started
            values = accelerated_psnr(setting, budget, pipe, predictor, prompts, seeds, reference)
            write_json(place, {"name": name, "psnr": values.tolist(), "seconds": seconds})
            print(f"{name}, seed {seed}: {values.mean():.2f} dB, {seconds:.0f} s", file=sys.stderr, flush=True)
    rows = gathered(kept, budget, names, options.seeds, prompts)
    if rows is None:
        print("the other parts are still at work", file=sys.stderr)
        return 0
    about = {
        "workload": workload.name,
        "budget": budget,
        "schedule": row_schedule(workload, budget, FIRST).to_dict(),
        "schedule_of_the_default": workload.budgets()[budget].to_dict(),
        "boundaries": list(workload.predictor.boundaries),
        "learned_boundaries": list(row_settings(workload, budget, LEARNED, 0, train).predictor.boundaries),
        "samples": len(prompts),
        "prompts": len(chosen),
        "split": "validation",
        "training_seeds": options.seeds,
        "training_trajectories": len(train),
        "torch_threads": torch.get_num_threads(),
    }
    text = table(about, rows)
    keep(out, {"about": about, "rows": rows}, text)
    print(text)
    return 0


def row_settings(workload: Workload, budget: str, name: str, seed: int, train: Trajectories) -> Workload:
    """The workload of one row: the LESA form, the row's changes, its schedule and its training seed."""
    schedule = row_schedule(workload, budget, name)
    changes: dict[str, Mapping[str, Any]] = {
        "schedule": {"budgets": {budget: BudgetParams(full_steps=schedule.full_steps)}, "default_budget": budget}
    }
    if name == LEARNED:
        stages = len(LESA["predictor"]["history_sizes"])
        changes["predictor"] = {"boundaries": learned_boundaries(train, schedule, stages)}
    setting = changed(changed(changed(workload, LESA), SETTINGS[name]), changes)
    return dataclasses.replace(setting, seed=seed)


def row_schedule(workload: Workload, budget: str, name: str) -> Schedule:
    """The row's full steps, as many for all: searched for the LESA form where the row's name says nothing else."""
    own, steps = workload.budgets()[budget], workload.call.num_inference_steps
    if name in ON_OWN:
        return own
    if name in ON_UNIFORM:
        rules = (Schedule.uniform(steps, interval) for interval in range(1, steps))
        return next(rule for rule in rules if rule.num_full == own.num_full)
    return lesa_schedules(workload, [own.num_full])[own.num_full]


def gathered(
    kept: Path, budget: str, names: Sequence[str], seeds: Sequence[int], prompts: Sequence[str]
) -> dict[str, dict[str, Any]] | None:
    """The rows, once all are there; None before."""
    found: dict[str, list[Any]] = {name: [] for name in names}
    for name in names:
        for seed in seeds:
            place = kept / f"{budget}-{list(SETTINGS).index(name)}-{seed}.json"
            if not place.exists():
                return None
            record = json.loads(place.read_text())
            assert record["name"] == name, f"{place} is of other rows: remove {kept}"
            found[name].append(record)
    groups = np.unique(np.array(prompts), return_inverse=True)[1]
    values = {name: np.array([record["psnr"] for record in records]) for name, records in found.items()}
    rows = {}
    for name, by_seed in values.items():
        mean, low, high = paired_interval(by_seed.mean(axis=0), values[names[0]].mean(axis=0), groups)
        rows[name] = {
            "psnr_mean": float(by_seed.mean()),
            "psnr_p5": float(np.percentile(by_seed, 5)),
            "by_seed": by_seed.mean(axis=1).tolist(),
            "minus_first": {"mean": float(mean), "low": float(low), "high": float(high)},
            "seconds": round(float(np.mean([record["seconds"] for record in found[name]])), 1),
        }
    return rows


def trained(
    workload: Workload, budget: str, pipe: Any, train: Trajectories, validation: Trajectories, *, closed_loop: bool
) -> Predictor:
    """A predictor whose experts of `budget` are trained, at the call's own number of steps; others keep their start."""
    design = expert_design(changed(workload, {"record": {"step_counts": ()}}))
    head = output_head_of(pipe.transformer)
    jobs = ground_truth_jobs(design, train.sigmas)
    others = [untrained(design, job, train.sigmas, train.channels) for job in jobs if job.budget != budget]
    with tempfile.TemporaryDirectory() as folder:
        given: dict[str, Any] = {"work_dir": Path(folder), "report": lambda *_: None}
        experts = [
            train_expert(
                design, workload.ground_truth, job, train, validation, head, device=pipe.device, **given
            )
            for job in jobs
            if job.budget == budget
        ]
        predictor = assemble(design, train.channels, [*others, *experts])
        if closed_loop:
            settings, loss = workload.closed_loop, workload.ground_truth.loss
            tuned = train_budget(
                design, settings, budget, predictor, pipe, train, validation, feature_loss=loss, **given
            )
            predictor = assemble(design, train.channels, [*others, tuned])
    return predictor


def accelerated_psnr(
    workload: Workload,
    budget: str,
    pipe: Any,
    predictor: Predictor,
    prompts: Sequence[str],
    seeds: Sequence[int],
    reference: torch.Tensor,
) -> np.ndarray:
    """PSNR in dB of every sample against its unaccelerated image; the pipeline has made a plain run before."""
    schedule = workload.budgets()[budget]
    rule = predictor.bind(schedule, pipe.scheduler.sigmas, device=pipe.transformer.device, dtype=pipe.transformer.dtype)
    config = LesaCacheConfig(schedule=schedule, rule=rule, scheduler=pipe.scheduler, measure=False)
    apply_lesa_cache(pipe.transformer, config)
    try:
        images = sample(pipe, prompts, seeds, workload.call)
    finally:
        remove_lesa_cache(pipe.transformer)
    return np.asarray(psnr(images, reference), dtype=np.float64)


def table(about: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows as Markdown."""
    count = len(about["schedule"]["full_steps"])
    lines = [
        f"{about['workload']}, {count} full steps, {about['samples']} samples of {about['prompts']} validation "
        f"prompts, mean over {len(about['training_seeds'])} training seeds.",
        "",
        f"| row | PSNR, dB | of each seed | 5th percentile | minus {FIRST} [95%] | training, s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*lines, *(table_row(name, row) for name, row in rows.items())]) + "\n"


def table_row(name: str, row: Mapping[str, Any]) -> str:
    """One row of the table."""
    difference = row["minus_first"]
    interval = f"{difference['mean']:+.2f} [{difference['low']:+.2f}, {difference['high']:+.2f}]"
    seeds = ", ".join(f"{value:.2f}" for value in row["by_seed"])
    return f"| {name} | {row['psnr_mean']:.2f} | {seeds} | {row['psnr_p5']:.2f} | {interval} | {row['seconds']:.0f} |"


if __name__ == "__main__":
    raise SystemExit(main())
