"""The defaults of the predictor, chosen on validation trajectories: one setting changed at a time.

python -m benchmarks.choices                     # writes benchmarks/results/choices.json and choices.md
python -m benchmarks.choices --only "loss: feature" --closed-loop

Each row trains the experts of one budget on the recorded training trajectories and runs the accelerated pipeline on
the validation ones: PSNR of the images to the unaccelerated run's, and its paired difference to the default's with a
95% bootstrap interval over prompts. Test prompts are not touched.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lesa.atomic import write_bytes, write_json
from lesa.bootstrap import paired_interval
from lesa.closed_loop import train_budget
from lesa.ends import ends_of
from lesa.hook import LesaCacheConfig, apply_lesa_cache, remove_lesa_cache
from lesa.jobs import recorded_splits
from lesa.metrics import psnr
from lesa.params import Workload, load_params
from lesa.pipelines import load_pipeline, sample
from lesa.predictor import Predictor
from lesa.training import assemble, ground_truth_jobs, new_expert, train_expert
from lesa.trajectories import Trajectories

Changes = Mapping[str, Mapping[str, Any]]
RESULTS = Path("benchmarks/results")

# Step sizes go with the form of the projection: its numbers differ by orders of magnitude in what they move.
LOW_RANK = {"projection": "low_rank"}
PER_CHANNEL = {"projection": "per_channel"}
SETTINGS: dict[str, Changes] = {
    "default": {},
    "loss: feature, L1 (paper)": {"ground_truth": {"loss": "feature"}},
    "loss: normalised feature": {"ground_truth": {"loss": "normalised_feature"}},
    "history: steps, own predictions": {"predictor": {"history": "steps"}},
    "start: random": {"predictor": {"start": "random"}},
    "projection: low rank 32": {
        "predictor": LOW_RANK,
        "ground_truth": {"learning_rate": 3e-4},
        "closed_loop": {"learning_rate": 3e-4},
    },
    "projection: per channel": {
        "predictor": PER_CHANNEL,
        "ground_truth": {"learning_rate": 3e-3},
        "closed_loop": {"learning_rate": 2e-3},
    },
    "gate: MLP": {"predictor": {"gate": "mlp"}},
    "gate: table": {"predictor": {"gate": "table"}},
    "one stage": {"predictor": {"boundaries": (), "history_sizes": (3,)}},
    "K = 2": {"predictor": {"history_sizes": (2, 2, 2)}},
    "K = 4": {"predictor": {"history_sizes": (4, 4, 4)}},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and measure every setting; print and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choices", description=__doc__)
    parser.add_argument("--params", default="params.yaml")
    parser.add_argument("--workload")
    parser.add_argument("--budget", help="default: the workload's default budget")
    parser.add_argument("--only", action="append", choices=list(SETTINGS), help="settings beside the default")
    parser.add_argument("--closed-loop", action="store_true", help="train the second step as well")
    parser.add_argument("--out", type=Path, default=RESULTS / "choices.json")
    options = parser.parse_args(arguments)
    workload = load_params(options.params, options.workload)
    budget = options.budget or workload.schedule.default_budget
    train, validation = recorded_splits(workload)
    pipe = load_pipeline(workload)
    reference = sample(pipe, validation.prompts, validation.seeds, workload.call)
    rows: dict[str, dict[str, Any]] = {}
    baseline: np.ndarray | None = None
    for name in ["default", *(options.only or [n for n in SETTINGS if n != "default"])]:
        setting = changed(workload, SETTINGS[name])
        started = time.perf_counter()
        predictor = trained(setting, budget, pipe, train, validation, closed_loop=options.closed_loop)
        seconds = time.perf_counter() - started
        values = accelerated_psnr(setting, budget, pipe, predictor, validation, reference)
        baseline = values if baseline is None else baseline
        groups = np.unique(np.array(validation.prompts), return_inverse=True)[1]
        mean, low, high = paired_interval(values, baseline, groups)
        rows[name] = {
            "psnr_mean": float(values.mean()),
            "psnr_p5": float(np.percentile(values, 5)),
            "minus_default": {"mean": float(mean), "low": float(low), "high": float(high)},
            "seconds": round(seconds, 1),
        }
        print(table_row(name, rows[name]), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "workload": workload.name,
        "budget": budget,
        "schedule": workload.budgets()[budget].to_dict(),
        "samples": len(validation),
        "split": "validation",
        "closed_loop": options.closed_loop,
        "torch_threads": torch.get_num_threads(),
    }
    write_json(options.out, {"about": about, "rows": rows}, sort_keys=False)
    write_bytes(options.out.with_suffix(".md"), table(about, rows).encode())
    return 0


def changed(workload: Workload, changes: Changes) -> Workload:
    """The workload with some settings of some sections replaced."""
    sections = {name: dataclasses.replace(getattr(workload, name), **values) for name, values in changes.items()}
    return dataclasses.replace(workload, **sections)


def trained(
    workload: Workload, budget: str, pipe: Any, train: Trajectories, validation: Trajectories, *, closed_loop: bool
) -> Predictor:
    """A predictor whose experts of `budget` are trained; the other budgets' keep their start."""
    ends = ends_of(pipe.transformer)
    experts = {}
    with tempfile.TemporaryDirectory() as folder:
        for job in ground_truth_jobs(workload, train.sigmas):
            if job.budget != budget:
                experts[job] = new_expert(workload, job, train.sigmas, train.channels).export()
                continue
            experts[job], _ = train_expert(
                workload, job, train, validation, ends, work_dir=Path(folder), report=lambda *_: None
            )
        predictor = assemble(workload, train.channels, experts)
        if closed_loop:
            tuned, _ = train_budget(
                workload, budget, predictor, pipe, train, validation, work_dir=Path(folder), report=lambda *_: None
            )
            predictor = assemble(workload, train.channels, {**experts, **tuned})
    return predictor


def accelerated_psnr(
    workload: Workload, budget: str, pipe: Any, predictor: Predictor, data: Trajectories, reference: torch.Tensor
) -> np.ndarray:
    """PSNR in dB of every sample of `data` against its unaccelerated image."""
    schedule = workload.budgets()[budget]
    rule = predictor.bind(schedule, data.sigmas, device=pipe.transformer.device, dtype=pipe.transformer.dtype)
    config = LesaCacheConfig(schedule=schedule, rule=rule, scheduler=pipe.scheduler, measure=False)
    apply_lesa_cache(pipe.transformer, config)
    try:
        images = sample(pipe, data.prompts, data.seeds, workload.call)
    finally:
        remove_lesa_cache(pipe.transformer)
    return np.asarray(psnr(images, reference), dtype=np.float64)


def table(about: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows as Markdown."""
    step = "both training steps" if about["closed_loop"] else "ground-truth step alone"
    lines = [
        f"{about['workload']}, budget {about['budget']}, {step}, {about['samples']} validation trajectories.",
        "",
        "| setting | PSNR, dB | 5th percentile | minus default [95%] | training, s |",
        "| --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*lines, *(table_row(name, row) for name, row in rows.items())]) + "\n"


def table_row(name: str, row: Mapping[str, Any]) -> str:
    """One row of the table."""
    difference = row["minus_default"]
    interval = f"{difference['mean']:+.2f} [{difference['low']:+.2f}, {difference['high']:+.2f}]"
    return f"| {name} | {row['psnr_mean']:.2f} | {row['psnr_p5']:.2f} | {interval} | {row['seconds']:.0f} |"


if __name__ == "__main__":
    raise SystemExit(main())
