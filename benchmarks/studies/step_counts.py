"""A bundle at other numbers of steps than its own: trained ones and those between, beside training-free peers.

python -m benchmarks.studies.step_counts data/bundles/flux-digits --prompts 64 --seeds 2

Every method of a row makes the same number of transformer evaluations and is compared with the plain run of that number
of steps from the same noise; rules share LESA's full steps. `mixed` is what the experts for any number of steps make of
the bundle's own number, where the bundle itself has experts for each budget. Prompts are held out, noise is fresh.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lesa
from benchmarks.results_files import keep
from lesa.bundle import Bundle, load_bundle
from lesa.bundle.budgets import choose_schedule
from lesa.evaluation.bootstrap import interval, paired_interval
from lesa.evaluation.compare import refuse_trained
from lesa.evaluation.measure import samples
from lesa.metrics import psnr
from lesa.models.pipelines import load_pipeline, sample
from lesa.params_file import load_params
from lesa.peers.method import Method, lesa_method
from lesa.peers.rules import rule_method
from lesa.peers.solvers import euler_method
from lesa.predictor.predictor import Predictor
from lesa.predictor.spec import Variant
from lesa.recording.prompts import read_prompts

RESULTS = Path("benchmarks/results")
COUNTS = (20, 28, 35, 50, 60, 70, 100)
PEERS = ("reuse", "taylor1", "taylor2")
SEED_OFFSET = 60_000  # training, evaluation and the gate use lower ones


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write `benchmarks/results/step-counts-<workload>.{json,md}`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.step_counts", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS), help="sampler steps of the runs")
    parser.add_argument("--budgets", nargs="+", help="default: all of the bundle")
    parser.add_argument("--prompts", type=int, default=64, help="test prompts, from the first")
    parser.add_argument("--seeds", type=int, default=2, help="noise seeds a prompt")
    parser.add_argument("--seed", type=int, default=SEED_OFFSET, help="the first noise seed")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--resamples", type=int, default=2000, help="of the bootstrap")
    parser.add_argument("--out", type=Path, help="the JSON file; the table lies beside it")
    options = parser.parse_args(arguments)
    bundle = load_bundle(options.bundle)
    manifest = bundle.manifest
    workload = load_params(workload=manifest.workload)
    prompts = read_prompts(workload.paths.prompts, "test")[: options.prompts]
    budgets = options.budgets or list(manifest.budgets)
    check(bundle, options.counts, budgets)
    refuse_trained(prompts, manifest.data["training"])
    pipe = load_pipeline(workload.model, workload.resources.device)
    lesa.enable(pipe, bundle)  # refuses a pipeline that does not fit, before anything is computed
    lesa.disable(pipe)
    texts, seeds = samples(prompts, options.seeds, options.seed)
    rows = []
    for count in options.counts:
        rows += measure(pipe, bundle, count, budgets, texts, seeds, options.batch_size, options.resamples)
        print(table(rows[-len(budgets) :]), flush=True)
    about = {
        "workload": manifest.workload,
        "bundle": bundle.digest,
        "trained_counts": list(manifest.predictor.step_counts or (len(manifest.sigmas) - 1,)),
        "prompts": len(prompts),
        "samples": len(texts),
        "first_seed": options.seed,
        "torch_threads": torch.get_num_threads(),
    }
    out = options.out or RESULTS / f"step-counts-{manifest.workload}.json"
    head = f"{manifest.workload}: {len(texts)} samples of {len(prompts)} held-out prompts, PSNR in dB to the plain run"
    keep(out, {"about": about, "rows": rows}, f"{head}\n\n{table(rows)}\n")
    return 0


def check(bundle: Bundle, counts: Sequence[int], budgets: Sequence[str]) -> None:
    """`ValueError` naming every number of steps and budget that the bundle does not have."""
    low, high = bundle.manifest.step_range
    problems = [f"{count} steps, the bundle serves {low} to {high}" for count in counts if not low <= count <= high]
    known = bundle.manifest.budgets
    problems += [f"budget {name!r} is not one of {', '.join(known)}" for name in budgets if name not in known]
    if problems:
        raise ValueError("; ".join(problems))


def measure(
    pipe: Any,
    bundle: Bundle,
    count: int,
    budgets: Sequence[str],
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch_size: int,
    resamples: int,
) -> list[dict[str, Any]]:
    """A row for every budget at one number of steps."""
    manifest = bundle.manifest
    call = dataclasses.replace(manifest.call, num_inference_steps=count)
    groups = np.unique(np.array(prompts), return_inverse=True)[1]
    plain = sample(pipe, prompts, seeds, call, batch_size=batch_size)
    sigmas = pipe.scheduler.sigmas.detach().float().cpu().clone()
    rows = []
    for budget in budgets:
        schedule, _ = choose_schedule(manifest, budget=budget, num_steps=count)
        methods: list[Method] = [rule_method(rule, budget, schedule) for rule in PEERS]
        methods.append(euler_method(budget, schedule.num_full))
        if count == manifest.call.num_inference_steps and manifest.predictor.step_counts:
            carried = schedule.carried(count)
            methods.append(lesa_method(budget, mixed_only(bundle.predictor), carried, name="mixed", label="mixed"))
        values = {}
        with enabled(pipe, bundle, budget):
            images = sample(pipe, prompts, seeds, call, batch_size=batch_size)
            values["lesa"] = psnr(images, plain).double().numpy()
        for method in methods:
            with method.using(pipe, sigmas):
                images = sample(pipe, prompts, seeds, method.call(call), batch_size=batch_size)
            values[method.name] = psnr(images, plain).double().numpy()
        rows.append(
            {
                "num_steps": count,
                "trained": count in (manifest.predictor.step_counts or (len(manifest.sigmas) - 1,)),
                "budget": budget,
                "full_steps": list(schedule.full_steps),
                "methods": {
                    name: summarised(found, values["lesa"], groups, resamples) for name, found in values.items()
                },
            }
        )
    return rows


def summarised(
    values: np.ndarray, ours: np.ndarray, groups: np.ndarray, resamples: int
) -> dict[str, float | Mapping[str, float]]:
    """Mean with its 95% interval, 5th percentile, and what LESA has over it, in dB."""
    found, gain = interval(values, groups, resamples), paired_interval(ours, values, groups, resamples)
    return {**found._asdict(), "p5": float(np.percentile(values, 5)), "lesa_minus_this": gain._asdict()}


def mixed_only(predictor: Predictor) -> Predictor:
    """The predictor with no budget of its own to choose: experts for any number of steps serve every schedule."""
    kept = predictor.spec.variants[0]
    every = Variant(name=kept.name, full_steps=tuple(range(predictor.spec.num_steps)))  # of plain sampling alone
    dropped = tuple(f"{variant.name}/" for variant in predictor.spec.variants[1:])
    tensors = {name: tensor for name, tensor in predictor.tensors.items() if not name.startswith(dropped)}
    return Predictor(dataclasses.replace(predictor.spec, variants=(every,)), tensors)


@contextmanager
def enabled(pipe: Any, bundle: Bundle, budget: str) -> Iterator[None]:
    lesa.enable(pipe, bundle, budget=budget, measure=False)
    try:
        yield
    finally:
        lesa.disable(pipe)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown; LESA minus the best peer in the last column."""
    lines = [
        "| steps | budget | full | LESA [95%] | 5th pct. | mixed | reuse | Taylor 1 | Taylor 2 | fewer Euler steps | "
        "LESA minus the best of these [95%] |",
        "| " + " | ".join(["---"] * 11) + " |",
    ]
    for row in rows:
        methods = row["methods"]
        ours, best = methods["lesa"], max((*PEERS, "euler"), key=lambda name: methods[name]["mean"])
        gain = methods[best]["lesa_minus_this"]
        mixed = f"{methods['mixed']['mean']:.2f}" if "mixed" in methods else ""
        cells = [
            f"{row['num_steps']}{'' if row['trained'] else ' (between)'}",
            row["budget"],
            str(len(row["full_steps"])),
            f"{ours['mean']:.2f} [{ours['low']:.2f}, {ours['high']:.2f}]",
            f"{ours['p5']:.2f}",
            mixed,
            *(f"{methods[name]['mean']:.2f}" for name in (*PEERS, "euler")),
            f"{gain['mean']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}] ({best})",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
