"""A bundle against every peer, learned and external ones included; same table and JSON as `lesa compare`.

python -m benchmarks.compare data/bundles/flux-digits --seeds 2 --peers data/peers/flux-digits.json --json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.cache_dit import masked_methods, reported_missing
from benchmarks.peers.cache_dit_search import tuned_cache_dit
from benchmarks.peers.external import external_peers
from benchmarks.peers.learned import learned_peers
from benchmarks.peers.rule_tuning import tuned_rules
from benchmarks.results_files import keep, warned
from lesa.bundle import load_bundle
from lesa.evaluation.compare import compare, load_scorer
from lesa.evaluation.table import format_table
from lesa.models.fingerprint import fingerprint
from lesa.models.pipelines import load_pipeline
from lesa.params import Workload
from lesa.params_file import load_params
from lesa.peers.lineup import peers_from_file
from lesa.peers.method import Method, lesa_method
from lesa.peers.tuning import TUNING_SAMPLES, Bench
from lesa.recording.prompts import read_splits


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; the exit status is 2 for anything the caller can mend."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("bundle", type=Path, help="folder of the bundle")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--workload", help="section of the parameter file; default: the bundle's")
    parser.add_argument("--prompts", type=int, default=64, help="test prompts, from the first")
    parser.add_argument("--seeds", type=int, default=2, help="noise seeds a prompt")
    parser.add_argument("--seed", type=int, default=50_000, help="the first of them")
    parser.add_argument("--peers", type=Path, help="steps that benchmarks.peers.search_peers found; default: none")
    parser.add_argument("--no-tuning", action="store_true", help="leave out all that is tuned on training prompts")
    parser.add_argument("--no-learned", action="store_true", help="leave L2P, LinCa and TeaCache out")
    parser.add_argument("--no-linca", action="store_true", help="leave LinCa out, which takes longest to train")
    parser.add_argument("--no-external", action="store_true", help="leave diffusers' own TaylorSeer and cache-dit out")
    parser.add_argument("--json", action="store_true", help="print every number as JSON")
    parser.add_argument("--out", type=Path, help="also keep them: this .json file, and a .md table beside it")
    options = parser.parse_args(arguments)
    try:
        bundle = load_bundle(options.bundle)
        workload = load_params(options.params, options.workload or bundle.manifest.workload)
        splits = read_splits(workload.paths.prompts)
        test = splits["test"]
        if not 1 <= options.prompts <= len(test):
            raise ValueError(f"--prompts must be from 1 to {len(test)}, got {options.prompts}")
        judged, tuning = test[: options.prompts], splits["train"][:TUNING_SAMPLES]
        settings = dataclasses.replace(
            workload.evaluate, prompts=max(2, options.prompts), seeds_per_prompt=options.seeds
        )
        budgets = bundle.manifest.budgets
        ours = {name: lesa_method(name, bundle.predictor, budget.schedule) for name, budget in budgets.items()}
        pipe = load_pipeline(workload.model, workload.resources.device)
        results = compare(
            bundle,
            pipe,
            judged,
            options.seeds,
            options.seed,
            tuning_prompts=[] if options.no_tuning else tuning,
            further=_further(options, workload, pipe, ours, judged, tuning),
            settings=settings,
            scorer=load_scorer(workload.scorer),
            report=_report,
        )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    document = results.to_json() | {"warnings": warned(results)}
    if options.out is not None:
        keep(options.out, document, markdown(document))
    print(json.dumps(document, indent=2) if options.json else format_table(results))
    return 0


def markdown(document: Mapping[str, Any]) -> str:
    """The document as it is kept beside its JSON: one table a budget, best first."""
    counts = document["counts"]
    lines = [
        f"{counts['samples']} samples of {counts['prompts']} held-out prompts; PSNR in dB to the plain run, 95% "
        f"intervals over prompts; wall clock against plain calls of {counts['batch_size']} samples."
    ]
    for budget in dict.fromkeys(row["budget"] for row in document["rows"]):
        own = (budget, "lesa", "psnr")
        gains = {d["against"]: d for d in document["differences"] if (d["budget"], d["method"], d["metric"]) == own}
        lines += [
            "",
            f"| {budget} | computed steps | PSNR | 5th percentile | LESA minus this | wall clock |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        rows = [row for row in document["rows"] if row["budget"] == budget]
        for row in sorted(rows, key=lambda row: -row["psnr"]["mean"]):
            psnr, gain, clock = row["psnr"], gains.get(row["method"]), row["wall_clock_ratio"]
            lines.append(
                f"| {row['label']} | {row['computed_steps']:g} | {psnr['mean']:.2f} [{psnr['low']:.2f}, "
                f"{psnr['high']:.2f}] | {psnr['p5']:.2f} | "
                + ("" if gain is None else f"{gain['mean']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}]")
                + f" | {'-' if clock is None else format(clock, '.2f') + 'x'} |"
            )
    return "\n".join(lines) + "\n"


def _further(
    options: argparse.Namespace,
    workload: Workload,
    pipe: Any,
    ours: Mapping[str, Method],
    judged: Sequence[str],
    tuning: Sequence[str],
) -> list[Method]:
    """Every peer that `lesa compare` does not run, as far as the options want it."""
    methods: list[Method] = []
    budgets = {name: method.schedule for name, method in ours.items() if method.schedule}
    if options.peers is not None:
        methods += peers_from_file(options.peers, budgets, judged, fingerprint(pipe.transformer))
    cache_dit = not options.no_external and not reported_missing(pipe, workload.call)
    if not options.no_external:
        methods += [method for name, schedule in budgets.items() for method in external_peers(name, schedule)]
    if cache_dit:
        methods += [method for name, schedule in budgets.items() for method in masked_methods(name, schedule)]
    seeds = [workload.record.seed_offset + i for i in range(len(tuning))]  # training noise, on purpose
    if not options.no_tuning:
        methods += tuned_rules(
            pipe,
            budgets,
            call=workload.call,
            prompts=tuning,
            seeds=seeds,
            batch_size=workload.evaluate.batch_size,
            report=_report,
        )
    if cache_dit and not options.no_tuning:
        bench = Bench.of(pipe, tuning, seeds, workload.call, workload.evaluate.batch_size)
        repeats = workload.evaluate.wall_clock_repeats
        methods += tuned_cache_dit(bench, ours, repeats=repeats, report=_report)
    if not (options.no_learned or options.no_tuning):
        methods += learned_peers(
            workload,
            pipe,
            budgets,
            prompts=tuning,
            seeds=seeds,
            judged=judged,
            with_linca=not options.no_linca,
            report=_report,
        )
    return methods


def _report(step: int, values: Mapping[str, float]) -> None:
    print(step, dict(values), file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
